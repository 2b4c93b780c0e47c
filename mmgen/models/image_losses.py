"""How unlike two sets of images are: each function takes float images [B, H, W, C] in [-1, 1] twice.

All return float32 [B], a number for each image, so that whoever calls can weigh them. They compute in float32
whatever comes in, are the same with their arguments swapped, and have a finite slope everywhere.
"""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np

from mmgen.runtime import mesh as meshes

WINDOW = 11  # pixels along each side of what SSIM compares, a Gaussian of standard deviation 1.5
_GAUSSIAN = np.exp(-0.5 * ((np.arange(WINDOW) - WINDOW // 2) / 1.5) ** 2)
_GAUSSIAN /= _GAUSSIAN.sum()
_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # of the scales, finest first, as people saw them
_RANGE = 2.0  # from black to white
_LEAST = 1e-4  # what a scale counts at least: a power of 0 would have no slope, and of less no value


def l1(a, b):
    """Mean absolute error."""
    a, b = _floats(a, b)
    return jnp.mean(jnp.abs(a - b), (1, 2, 3))


def l2(a, b):
    """Mean squared error."""
    a, b = _floats(a, b)
    return jnp.mean(jnp.square(a - b), (1, 2, 3))


def ms_ssim(a, b, *, levels=5):
    """Structural similarity over several scales (Wang et al. 2003), 1 for equal images; a loss is 1 minus it.

    Of each channel alone, then the mean of them. Of the `levels` scales as many count as hold the window,
    with weights that sum to 1, so that images of different sizes don't compare with one another. Each halves
    the image, whose last row or column is left out where the side is odd. A single scale is SSIM (Wang et al.
    2004), from -1; of several, each counts `_LEAST` at least. Raises ValueError where no window fits.
    """
    a, b = _floats(a, b)
    if not 1 <= levels <= len(_WEIGHTS):
        raise ValueError(f"MS-SSIM has from 1 to {len(_WEIGHTS)} levels, found {levels}")
    height, width = a.shape[1:3]
    scales = sum(min(height, width) >> level >= WINDOW for level in range(levels))
    if not scales:
        raise ValueError(
            f"SSIM compares windows of {WINDOW}x{WINDOW} pixels, found images of {width}x{height}"
        )

    scores = []
    for level in range(scales):
        if level:
            a, b = _halved(a), _halved(b)
        luminance, contrast = _similarity(a, b)
        # How light a place is counts at the coarsest scale alone.
        score = luminance * contrast if level == scales - 1 else contrast
        scores.append(score.mean((1, 2)))
    if scales > 1:
        total = sum(_WEIGHTS[:scales])
        scores = [jnp.maximum(x, _LEAST) ** (w / total) for x, w in zip(scores, _WEIGHTS)]
    return functools.reduce(operator.mul, scores).mean(-1)


def focal_frequency(a, b, alpha=1.0):
    """Focal frequency loss (arXiv:2012.12821): the mean over frequencies of their weight times squared error.

    The weight is the error ** `alpha`, of which the largest in an image, over all its channels, counts 1; it
    has no gradient. With `alpha` 0 this is `l2`.
    """
    a, b = _floats(a, b)
    spectrum = _fourier(a - b)
    power = jnp.square(spectrum.real) + jnp.square(spectrum.imag)
    weight = jax.lax.stop_gradient(power) ** (alpha / 2)
    weight /= jnp.maximum(weight.max((1, 2, 3), keepdims=True), jnp.finfo(weight.dtype).tiny)
    return jnp.mean(weight * power, (1, 2, 3))


def gradient(a, b, scales=3):
    """Mean absolute error of the steps from a pixel to the next, along rows plus along columns.

    The mean over `scales`, the first of them the image itself, each next one of half the size. What both
    images are lighter or darker by as a whole counts nothing. Raises ValueError where the last has no step.
    """
    a, b = _floats(a, b)
    height, width = a.shape[1:3]
    if scales < 1 or min(height, width) < 2**scales:
        raise ValueError(f"{scales} scales need images of {2**scales}x{2**scales}, found {width}x{height}")
    error, total = a - b, 0.0
    for scale in range(scales):
        error = _halved(error) if scale else error
        total += sum(jnp.mean(jnp.abs(jnp.diff(error, axis=axis)), (1, 2, 3)) for axis in (1, 2))
    return total / scales


def _floats(a, b):
    """Both in float32. Shapes that differ would be broadcast, and give the loss of something else."""
    if a.ndim != 4 or a.shape != b.shape:
        raise ValueError(f"two batches of images [B, H, W, C] of one shape, found {a.shape} and {b.shape}")
    return a.astype(jnp.float32), b.astype(jnp.float32)


def _halved(x):
    """[B, H, W, C] -> [B, H // 2, W // 2, C], the mean of 2x2 pixels each."""
    B, H, W, C = x.shape
    h, w = H // 2, W // 2
    return x[:, : 2 * h, : 2 * w].reshape(B, h, 2, w, 2, C).mean((2, 4))


def _blurred(x):
    """The mean of each window that fits. Sums of shifted images, since a convolution would be rounded to less
    than float32 on an accelerator, and variances are small differences of its results."""
    for axis in (1, 2):
        n = x.shape[axis] - WINDOW + 1
        shifted = [jax.lax.slice_in_dim(x, i, i + n, axis=axis) for i in range(WINDOW)]
        x = sum(float(weight) * y for weight, y in zip(_GAUSSIAN, shifted))
    return x


def _similarity(a, b):
    """The two factors of SSIM at each place: of luminance, and of contrast with structure."""
    blurred = _blurred(jnp.concatenate([a, b, a * a + b * b, a * b], -1))
    mean_a, mean_b, squares, product = jnp.split(blurred, 4, -1)
    c1, c2 = (0.01 * _RANGE) ** 2, (0.03 * _RANGE) ** 2
    contrast = (2 * (product - mean_a * mean_b) + c2) / (squares - mean_a**2 - mean_b**2 + c2)
    # Luminance is relative to black: relative to a middle gray of 0, two grays beside it would be opposites.
    mean_a, mean_b = mean_a + _RANGE / 2, mean_b + _RANGE / 2
    return (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1), contrast


def _fourier(x):
    """The orthonormal Fourier transform of images over their height and width."""
    transform = lambda x: jnp.fft.fft2(x, axes=(1, 2), norm="ortho")
    if meshes.current() is None:
        return transform(x)
    # Left to itself, the partitioner gives every device all images to transform.
    mesh, rules = meshes.current()
    rows = meshes.spec(("batch",), rules)
    return jax.shard_map(transform, mesh=mesh, in_specs=rows, out_specs=rows)(x)
