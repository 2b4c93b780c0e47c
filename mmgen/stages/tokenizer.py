"""Stage `tokenizer`: pixels <-> codes. Learns an autoencoder around a quantizer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from mmgen.data.loader import Images
from mmgen.data.sources import documents_of, open_source
from mmgen.models import contrastive
from mmgen.models.autoencoders import Autoencoder, Tokenizer, to_float
from mmgen.models.contrastive import load_towers
from mmgen.runtime.config import ConfigError
from mmgen.stages.loop import Stage


def setup(config, workdir):
    """See `loop.Stage`. Learns from `config.data`, is measured on `config.held_out`."""
    data = Images(
        open_source(**config.data.source),
        config.data.batch_size,
        config.seed,
        augment=config.data.augment,
        max_bad=config.data.max_bad,
        recolored=config.loss.recolor > 0,
        threads=config.data.threads,
        workers=config.data.workers,
    )
    held_out = open_source(**config.held_out)
    terms = dict(config.loss)
    towers, tower = terms.pop("towers"), None
    if config.loss.perceptual:
        if not towers:
            raise ConfigError(
                "config.loss.perceptual needs a network: name a contrastive run in config.loss.towers"
            )
        found = load_towers(towers)
        towers, tower = found.name, found.model.image

    def evaluate(graphdef, params, step):
        model = Tokenizer(nnx.merge(graphdef, params))
        documents = [document.images() for _, document in documents_of(held_out)]
        images = np.stack([found[0].pixels for found in documents if found])
        codes = model.encode(images)
        back = model.decode(codes)
        _preview(workdir / "previews" / f"{step:07d}.png", images[:32], back[:32])
        return {**reconstruction(images, back), **usage(codes, model.codes)}

    return Stage(
        make=lambda rngs: Autoencoder(config.model, rngs),
        loss=functools.partial(loss, tower=tower, **terms),
        data=data,
        shape=(config.data.batch_size,),
        axes=("batch",),
        unit="images",
        units_a_step=config.data.batch_size,
        evaluate=evaluate,
        identity={"towers": towers} if tower else {},
    )


def loss(model, batch, key, *, floor, noise, rate, recolor, color_digits, perceptual=0.0, tower=None):
    """{name: (sum over images, images)} of log(mean squared error + floor), of pixels in [-1, 1], and the codes' rate.

    The first is PSNR itself up to a factor: a faint shape on gray counts as much as a bright one on black.
    `floor` keeps an image that is already right from outweighing the others. `rate` weighs the nats that a
    code has for those who know its neighbours (see `Prior`). Up to a share `noise` of an image's codes is
    replaced before decoding, so that the decoder bears the errors of a sampler, and codes back each other.

    A share `recolor` of the images (the first of the batch) is decoded from its own codes but for the first
    `color_digits` digits: these are of batch["recolored"], the same picture in other colours, and it is this
    one that has to come out. So those digits learn to carry colours, and the others what is there in any
    colours: a transformer then needs to learn an outline once, not for each pair of colours.

    `perceptual` weighs how unlike the images look to the image `tower` of a contrastive run. It is a constant of
    the program, held whole by every device.
    """
    images = to_float(batch["images"])
    features = model.features(images)
    given = values = model.quantizer.quantize(features)
    if recolor:
        other = to_float(batch["recolored"])
        painted = model.encode(other)
        repainted = jnp.concatenate([painted[..., :color_digits], values[..., color_digits:]], -1)
        chosen = (jnp.arange(len(images)) < recolor * len(images))[:, None, None, None]
        given, images = jnp.where(chosen, repainted, values), jnp.where(chosen, other, images)
    back = model.decode(_disturbed(given, key, noise) if noise else given)
    error = back - images
    mse = jnp.mean(jnp.square(error), axis=(1, 2, 3))
    total = 0.1 * jnp.mean(jnp.log(mse + floor))
    measured = {"batch_psnr": 10 * jnp.mean(jnp.log10(4.0 / (mse + 1e-6)))}
    if perceptual:
        measured["perceptual"] = contrastive.distance(tower, back, images).mean()
        total += perceptual * measured["perceptual"]
    if rate:
        measured["code_nats"] = model.prior(values, model.quantizer.bound(features)).mean()
        total += rate * measured["code_nats"]
    n = jnp.float32(len(images))
    return {name: (value * n, n) for name, value in {"loss": total, **measured}.items()}


def _disturbed(values, key, noise):
    """Quantized values [B, h, w, C] where each image has lost a share of up to `noise` to values from
    anywhere in the batch."""
    share, which, whose = jax.random.split(key, 3)
    lost = jax.random.uniform(share, (len(values), 1, 1, 1), maxval=noise)
    others = jax.random.permutation(whose, jax.lax.stop_gradient(values).reshape(-1, values.shape[-1]))
    lost = jax.random.uniform(which, (*values.shape[:3], 1)) < lost
    return jnp.where(lost, others.reshape(values.shape), values)


# ---- how good it is -------------------------------------------------------------------------


def reconstruction(images, back):
    """PSNR in dB (mean over images) and SSIM of uint8 [B, H, W, 3] against their reconstructions."""
    a, b = images.astype(np.float64), back.astype(np.float64)
    mse = np.maximum(np.mean((a - b) ** 2, axis=(1, 2, 3)), 1e-3)
    return {"psnr": float(np.mean(10 * np.log10(255**2 / mse))), "ssim": ssim(a, b)}


def ssim(a, b, window=7):
    """Mean structural similarity (Wang et al. 2004) of [B, H, W, C] in [0, 255], uniform window."""

    def mean(x):  # box filter over H and W by cumulative sums, valid positions only
        for axis in (1, 2):
            total = np.cumsum(np.insert(x, 0, 0.0, axis=axis), axis=axis)
            n = x.shape[axis]
            x = (
                np.take(total, range(window, n + 1), axis) - np.take(total, range(n + 1 - window), axis)
            ) / window
        return x

    ma, mb = mean(a), mean(b)
    va, vb, cov = mean(a * a) - ma**2, mean(b * b) - mb**2, mean(a * b) - ma * mb
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    score = (2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))
    return float(score.mean())


def usage(codes, size):
    """Share of codes seen at least once, and perplexity exp(entropy), of an int array of codes."""
    counts = np.bincount(codes.ravel(), minlength=size)
    p = counts[counts > 0] / counts.sum()
    return {
        "code_usage": float(np.mean(counts > 0)),
        "code_perplexity": float(np.exp(-np.sum(p * np.log(p)))),
    }


def _preview(path, images, back):
    """Originals above their reconstructions, eight a row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(0, len(images), 8):
        rows += [np.concatenate(list(images[i : i + 8]), 1), np.concatenate(list(back[i : i + 8]), 1)]
    Image.fromarray(np.concatenate(rows, 0)).save(path)
