"""A network that tells images from reconstructions, and what it and the reconstructing model learn from it.

Shapes: images [B, H, W, 3] (or 4, with alpha) in [-1, 1], logits float32 [B, h, w], positive where a patch looks real. Losses
are float32 [B], a number for each image: the mean over its places.
"""

import itertools

import jax
import jax.numpy as jnp
from flax import nnx

from mmgen.models import layers

GROUP = "discriminator"  # of every parameter here, for an optimizer that treats them apart
LOSSES = ("hinge", "non_saturating")
# Of the norms, which so magnify nothing more than three times. Where all channels are near 0, the slope of a
# norm without a bound, and with it R1, would be millions of times as large as anywhere else.
_EPSILON = 0.1


class Conv(nnx.Module):
    """A 4x4 convolution with a bias, one pixel of zeros around the image."""

    def __init__(self, inputs, outputs, axes, rngs, *, stride, dtype):
        self.stride, self.dtype = stride, dtype
        # A matrix over the window, so that Muon sees one matrix and not sixteen.
        rows = 16 * inputs
        self.w = nnx.Param(layers.normal(rngs, (rows, outputs), rows**-0.5), axes=axes, group=GROUP)
        # Not 0, so that no image, not even an even middle gray, is 0 in all channels (see _EPSILON).
        self.b = nnx.Param(layers.normal(rngs, (outputs,), rows**-0.5), axes=axes[1:], group=GROUP)

    def __call__(self, x):
        kernel = self.w[...].astype(self.dtype).reshape(4, 4, x.shape[-1], -1)
        y = jax.lax.conv_general_dilated(
            x.astype(self.dtype), kernel, (self.stride, self.stride), ((1, 1), (1, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip
        return y + self.b[...].astype(self.dtype)


class PatchGAN(nnx.Module):
    """Judges each patch of an image alone (arXiv:1611.07004): `config.layers` convolutions that halve the
    image, one that keeps its size but for a pixel, and one that writes the logits. Of 3 layers each sees
    70x70 pixels.

    Channels double from `config.width` to 8 times as many. Norms are over the channels of a place and not
    over the batch, as in the paper: an image is then judged the same in any company, on any mesh and, away
    from the borders, as a part of another image. A batch norm would also let the discriminator tell real
    batches by their statistics, and R1 would have no slope of one image alone.
    """

    def __init__(self, config, rngs, *, dtype, alpha=False):
        if config.layers < 1:
            raise ValueError(f"a PatchGAN has at least 1 layer, found {config.layers}")
        self.layers, self.smallest = config.layers, 3 * 2**config.layers
        widths = [4 if alpha else 3] + [config.width * min(2**i, 8) for i in range(config.layers + 1)]
        self.convs = nnx.Dict()
        for i, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
            # "embed" though the rows are a window's: wide ones must not lie whole on a mesh.
            axes = ("embed" if i else "pixels", "mlp")
            stride = 2 if i < config.layers else 1
            self.convs[str(i)] = Conv(inputs, outputs, axes, rngs, stride=stride, dtype=dtype)
        self.head = Conv(widths[-1], 1, ("embed", "label"), rngs, stride=1, dtype=jnp.float32)

    def __call__(self, images):
        """-> logits, h = H // 2**layers - 2. Raises ValueError for sides under `smallest`, 3 * 2**layers."""
        height, width = images.shape[1:3]
        if min(height, width) < self.smallest:
            raise ValueError(
                f"a PatchGAN of {self.layers} layers judges images of at least "
                f"{self.smallest}x{self.smallest}, found {width}x{height}"
            )
        x = images
        for i in range(self.layers + 1):
            x = self.convs[str(i)](x)
            x = jax.nn.leaky_relu(layers.rms_norm(x, _EPSILON) if i else x, 0.2)
        return self.head(x)[..., 0]


def discriminator_loss(real_logits, fake_logits, kind):
    """What the discriminator minimizes: logits of images go up, those of as many reconstructions down.

    "hinge" (arXiv:1705.02894) asks for 1 and -1 and no more, "non_saturating" (arXiv:1406.2661) is the cross
    entropy. Sums of both halves, as in the papers; some codebases take their mean.
    """
    _check(kind)
    if kind == "hinge":
        return _mean(jax.nn.relu(1.0 - real_logits)) + _mean(jax.nn.relu(1.0 + fake_logits))
    return _mean(jax.nn.softplus(-real_logits)) + _mean(jax.nn.softplus(fake_logits))


def generator_loss(fake_logits, kind):
    """What the reconstructing model minimizes: fake up. With "hinge" it has no bound."""
    _check(kind)
    return -_mean(fake_logits) if kind == "hinge" else _mean(jax.nn.softplus(-fake_logits))


def r1(logits_of, images):
    """Half the squared slope of an image's summed logits by its pixels (arXiv:1801.04406): float32 [B].

    `logits_of` is a function of images that judges each alone. The sum over places makes this grow with the
    number of pixels, so that its weight belongs to a size. It can be differentiated once more.
    """
    slope = jax.grad(lambda x: logits_of(x).astype(jnp.float32).sum())(images.astype(jnp.float32))
    return 0.5 * jnp.sum(jnp.square(slope), range(1, slope.ndim))


def lazily(step, every, function, *args):
    """`every` * function(*args) at each step that `every` divides, elsewhere zeros that cost nothing.

    So a regularizer counts as much over time as if it were always there (StyleGAN2, arXiv:1912.04958). `step`
    may be traced.
    """
    if every < 1:
        raise ValueError(f"a lazy term is computed every so many steps, at least 1, found {every}")
    shapes = jax.eval_shape(function, *args)
    return jax.lax.cond(
        step % every == 0,
        lambda *args: jax.tree.map(lambda x: every * x, function(*args)),
        lambda *args: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes),
        *args,
    )


def adversarial(discriminator, real, fake, step, *, kind, start, r1_weight, r1_every):
    """Both sides' terms for one step of both, float32 [B] each, and what is to be watched {name: scalar}.

    The generator's term has a gradient by `fake` alone, the discriminator's, with `r1_weight` times R1 of the
    real images in every `r1_every`-th step, by the discriminator's parameters alone. So their sum is a loss
    that both sides may learn from at once, each with its own optimizer, and each as if the other stood still.

    `step` counts steps of the training from 0, and not how often an optimizer was called. Before step `start`
    the generator's term is exactly 0, but the discriminator learns from the first step on: an untrained one
    has nothing but noise to tell, and reconstructions are known to break where they begin to listen to it.
    """
    real, still = jax.lax.stop_gradient((real, fake))
    graphdef, params = nnx.split(discriminator)
    judge = nnx.merge(graphdef, jax.lax.stop_gradient(params))
    generator_term = jnp.where(step >= start, generator_loss(judge(fake), kind), 0.0)

    # The same numbers as the judge's, which the compiler computes once.
    real_logits, fake_logits = discriminator(real), discriminator(still)
    discriminator_term = discriminator_loss(real_logits, fake_logits, kind)
    if r1_weight:
        discriminator_term += r1_weight * lazily(step, r1_every, lambda x: r1(discriminator, x), real)

    watched = {
        "real_logit": real_logits.mean(),
        "fake_logit": fake_logits.mean(),
        "discriminator_right": (jnp.mean(real_logits > 0) + jnp.mean(fake_logits < 0)) / 2,
    }
    return generator_term, discriminator_term, jax.lax.stop_gradient(watched)


def _check(kind):
    if kind not in LOSSES:
        raise ValueError(f"unknown adversarial loss {kind!r}; known: {', '.join(LOSSES)}")


def _mean(x):
    """The mean over all axes but the first, in float32."""
    return jnp.mean(layers.high(x), range(1, x.ndim))
