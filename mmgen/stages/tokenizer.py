"""Stage `tokenizer`: pixels <-> codes. Learns an autoencoder around a quantizer."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from mmgen.data import images as pictures
from mmgen.data.images import ALPHA, BadImage
from mmgen.data.loader import Images
from mmgen.data.sources import Bad, Several, open_source
from mmgen.models import contrastive, image_losses
from mmgen.models.autoencoders import Autoencoder, Tokenizer, to_float
from mmgen.models.contrastive import load_towers
from mmgen.models.discriminators import PatchGAN, adversarial
from mmgen.models.quantizers import FSQ
from mmgen.runtime import checkpoint
from mmgen.runtime.config import ConfigError
from mmgen.stages.loop import Stage


def setup(config, workdir):
    """See `loop.Stage`. Learns from `config.data`, is measured on `config.held_out`."""
    seen = background(config)
    source, larger = open_source(**{**config.data.source, **seen}), None
    if config.data.get("larger"):
        larger = open_source(name="larger", **{**config.data.larger, **seen})
        small, large = source.size, larger.size
        if config.data.augment or any(a > b for a, b in zip(small, large)):
            raise ConfigError(
                f"config.data.larger has pictures to cut {small} out of, without config.data.augment; found size {large} and "
                f"augment={config.data.augment}"
            )
    data = Images(
        Several([source, larger], alike=False) if larger else source,
        config.data.batch_size,
        config.seed,
        augment=config.data.augment,
        max_bad=config.data.max_bad,
        recolored=config.loss.recolor > 0,
        crop=source.size if larger else None,
        threads=config.data.threads,
        workers=config.data.workers,
    )
    held_out = open_source(**{**config.held_out, **seen})
    if config.model.alpha and any("world" == each.spec.partition(":")[0] for each in (data.source, held_out)):
        raise ConfigError(
            "config.model.alpha is for pictures that may be transparent, and the world has none: name another source in "
            "config.data.source and config.held_out, or set it to False"
        )
    q = config.model.quantizer
    if q.kind == "vq" and q.decay and q.restart and config.accumulate > 1:
        raise ConfigError(
            f"config.accumulate={config.accumulate}: each part of a batch would restart the same dead codes, at other "
            "features, of which they would become the mean; set accumulate to 1 or model.quantizer.restart to 0"
        )
    weights, more = dict(config.loss.weights), dict(config.loss)
    del more["weights"]
    towers, tower = more.pop("towers"), None
    if (q.kind != "fsq" or q.depth > 1) and (weights["rate"] or more["recolor"]):
        raise ConfigError(
            "config.loss.weights.rate and config.loss.recolor are about the digits of plain FSQ; set both to 0 for the "
            f"quantizer {q.kind!r} of depth {q.depth}"
        )
    if weights["perceptual"]:
        if not towers:
            raise ConfigError(
                "config.loss.weights.perceptual needs a network: name a contrastive run in config.loss.towers"
            )
        found = load_towers(towers)
        towers, tower = found.name, found.model.image

    frozen = config.model.get("frozen", False)
    if frozen and not config.init:
        raise ConfigError("config.model.frozen=True, but there is no encoder to keep: name a tokenizer run in config.init")

    def make(rngs):
        model = Autoencoder(config.model, rngs)
        if frozen:
            for part in (model.encoder, model.to_features, model.quantizer):
                for _, variable in nnx.to_flat_state(nnx.state(part)):
                    variable.set_metadata(frozen=True)
        if weights["adversarial"]:
            m = config.model
            model.discriminator = PatchGAN(m.discriminator, rngs, dtype=jnp.dtype(m.dtype), alpha=m.alpha)
        return model

    def evaluate(graphdef, params, step):
        model = nnx.merge(graphdef, params)
        model.discriminator = None  # no part of a tokenizer, nor of its hash
        model = Tokenizer(model)
        images, codes, back = reconstructed(model, held_out, config.data.max_bad)
        preview(workdir / "previews" / f"{step:07d}.png", images[:32, ..., :3], back[:32, ..., :3])
        return {**reconstruction(images, back), **usage(codes, model.levels)}

    return Stage(
        make=make,
        loss=functools.partial(loss, weights=weights, tower=tower, **more),
        data=data,
        shape=(config.data.batch_size,),
        axes=("batch",),
        unit="images",
        units_a_step=config.data.batch_size,
        evaluate=evaluate,
        identity={"towers": towers} if tower else {},
        warnings=warnings,
        only=lambda run: f"^({CODES})/" if frozen and not _same_decoder(config, run) else None,
        complete=f"^({CODES})/" if frozen else "",
    )


CODES = "encoder|to_features|quantizer"  # what decides which code an image has


def _same_decoder(config, run):
    """Whether the decoder of the run that this one begins with is of this config's shape."""
    ours, theirs = config.model, checkpoint.read_config(run, "tokenizer")["model"]
    return all(ours[name] == theirs[name] for name in ("decoder", "layers", "cell_layers", "cell_width"))


def background(config):
    """What a tokenizer of this config sees behind transparent parts, as a setting of `open_source`: with
    `model.alpha` these themselves, else what its training source says, if anything."""
    if config["model"]["alpha"]:
        return {"background": ALPHA}
    source = config["data"]["source"]
    return {"background": source["background"]} if "background" in source else {}


def warnings(measured):
    """What is wrong with a run, by the metrics of a step: texts for its log line."""
    checks = (
        (
            "digit_entropy",
            lambda x: x < 0.5,
            "codes collapse: digits have {:.0%} of the entropy they could have",
        ),
        (
            "digit_entropy_least",
            lambda x: x < 0.1,
            "a digit is all but constant: it has {:.0%} of the entropy it could have",
        ),
        (
            "dead",
            lambda x: x > 0.5,
            "{:.0%} of the codebook is dead: fewer codes, fewer channels, or restart",
        ),
        (
            "grad_norm",
            lambda x: x < 1e-6,
            "the gradient is all but gone ({:.1e}): nothing is learned any more",
        ),
        (
            "discriminator_right",
            lambda x: x > 0.95,
            "the discriminator wins ({:.0%} right): a lower learning rate for it, or more r1",
        ),
    )
    return [
        words.format(measured[name])
        for name, bad, words in checks
        if name in measured and bad(measured[name])
    ]


def reconstructed(model, source, max_bad=0.1, tile=None):
    """-> images uint8 [N, H, W, C], codes int32 [N, h, w] and images again, of a source's good documents: the first
    image of each."""
    images = real_images(model, source, max_bad)
    codes = model.encode(images)
    return images, codes, model.decode(codes, tile=tile)


def real_images(model, source, max_bad=0.1, most=None):
    """Images uint8 [N, H, W, C] of a source's good documents (of the first `most`), as the tokenizer `model` takes them."""
    images, bad = [], Bad(source, max_bad)
    for i in range(min(len(source), most or len(source))):
        try:
            images.append(pictures.fit(source.pixels(i), *source.size))
            bad.saw()
        except BadImage as error:
            bad.saw(error)
    if not images:
        raise ValueError(f"{source.spec} has no image: {dict(source.skipped)}")
    images = np.stack(images)
    if model.alpha and images.shape[-1] == 3:
        images = pictures.opaque(images)
    return images


def loss(model, batch, key, *, weights, noise, recolor, color_digits, floor, gan, tower=None):
    """{name: (sum over images, images)}: "loss", the sum of the terms that have a weight, each term, and what is
    watched.

    weights: {term: weight}, 0 leaves a term out.
      log_mse: log(mean squared error + floor) of pixels in [-1, 1], which is PSNR itself up to a factor: a faint shape
        on gray counts as much as a bright one on black. `floor` keeps an image that is already right from outweighing
        the others.
      l1, l2, gradient, focal_frequency, ms_ssim: see models/image_losses.py; of the last, 1 minus it.
      perceptual: how unlike the images look to the image `tower` of a contrastive run. It is a constant of the program,
        held whole by every device.
      adversarial: what the discriminator says (models/discriminators.py), with the settings `gan`. It learns at its
        own rate in the same step.
      rate: the nats that a code has for those who know its neighbours (see `Prior`).
    What the quantizer itself asks for is always in, as its config weighs it.

    Up to a share `noise` of an image's codes is replaced before decoding, so that the decoder bears the errors of a
    sampler, and codes back each other.

    A share `recolor` of the images (the first of the batch) is decoded from its own codes but for the first
    `color_digits` digits: these are of batch["recolored"], the same picture in other colours, and it is this
    one that has to come out. So those digits learn to carry colours, and the others what is there in any
    colours: a transformer then needs to learn an outline once, not for each pair of colours.
    """
    images = to_float(batch["images"])
    features = model.features(images)
    values, own, watched = model.quantizer(features)
    given = values
    if recolor:
        other = to_float(batch["recolored"])
        painted = model.encode(other)
        repainted = jnp.concatenate([painted[..., :color_digits], values[..., color_digits:]], -1)
        chosen = (jnp.arange(len(images)) < recolor * len(images))[:, None, None, None]
        given, images = jnp.where(chosen, repainted, values), jnp.where(chosen, other, images)
    back = model.decode(disturbed(given, key, noise) if noise else given)
    mse = image_losses.l2(back, images)
    measured = {"batch_psnr": 10 * jnp.log10(4.0 / (mse + 1e-6)), **watched}
    if type(model.quantizer) is FSQ:  # codes that any other arithmetic may give otherwise
        bounded = model.quantizer.bound(features)
        measured["near_border"] = ((0.5 - jnp.abs(bounded - jnp.round(bounded))).min(-1) < 0.01).mean()
    terms = {  # of those that have a weight: [B] or []
        "log_mse": lambda: jnp.log(mse + floor),
        "l1": lambda: image_losses.l1(back, images),
        "l2": lambda: mse,
        "gradient": lambda: image_losses.gradient(back, images),
        "focal_frequency": lambda: image_losses.focal_frequency(back, images),
        "ms_ssim": lambda: 1 - image_losses.ms_ssim(back, images),
        "perceptual": lambda: contrastive.distance(tower, back[..., :3], images[..., :3]),
        "rate": lambda: model.prior(values, model.quantizer.bound(features)),
    }
    total = own
    for name, term in terms.items():
        if weights[name]:
            measured[name] = term().mean()
            total += weights[name] * measured[name]
    if weights["adversarial"]:
        theirs, its, seen = adversarial(model.discriminator, images, back, batch["step"], **gan)
        total += weights["adversarial"] * theirs.mean() + its.mean()
        measured |= {"adversarial": theirs, "discriminator": its, **seen}
    n = jnp.float32(len(images))
    return {name: (jnp.mean(value) * n, n) for name, value in {"loss": total, **measured}.items()}


def disturbed(values, key, noise):
    """Quantized values [B, h, w, C] where each image has lost a share of up to `noise` to values from
    anywhere in the batch."""
    share, which, whose = jax.random.split(key, 3)
    lost = jax.random.uniform(share, (len(values), 1, 1, 1), maxval=noise)
    others = jax.random.permutation(whose, jax.lax.stop_gradient(values).reshape(-1, values.shape[-1]))
    lost = jax.random.uniform(which, (*values.shape[:3], 1)) < lost
    return jnp.where(lost, others.reshape(values.shape), values)


# ---- how good it is -------------------------------------------------------------------------


def reconstruction(images, back, mean=True):
    """Of uint8 [N, H, W, C] against their reconstructions: PSNR in dB, SSIM and MS-SSIM, means over images or, without
    `mean`, float32 [N]. Of images with alpha it is that of all four channels."""
    parts = [_compared(images[i : i + 64], back[i : i + 64]) for i in range(0, len(images), 64)]
    found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return {name: float(values.mean()) for name, values in found.items()} if mean else found


@jax.jit
def _compared(images, back):
    a, b = to_float(images), to_float(back)
    mse = jnp.maximum(image_losses.l2(a, b), 1e-3 / 127.5**2)
    ssim = {"ssim": 1, "ms_ssim": 5} if min(images.shape[1:3]) >= image_losses.WINDOW else {}
    return {
        "psnr": 10 * jnp.log10(4 / mse),
        **{name: image_losses.ms_ssim(a, b, levels=levels) for name, levels in ssim.items()},
    }


def usage(codes, levels):
    """Of an int array of codes whose digits have so many `levels`: the share of codes seen at least once, their
    perplexity exp(entropy), and each digit's entropy over that of a uniform one: the least and the mean."""
    size = math.prod(int(level) for level in levels)
    seen, counts = np.unique(codes, return_counts=True)
    entropies = digit_entropies(codes, levels)
    return {
        "code_usage": len(seen) / size,
        "code_perplexity": math.exp(_entropy(counts)),
        "digit_entropy_least": min(entropies),
        "digit_entropy_mean": float(np.mean(entropies)),
    }


def digit_entropies(codes, levels):
    """Each digit's entropy over that of a uniform one."""
    digits = np.unravel_index(codes.ravel(), tuple(levels), order="F")
    return [_entropy(np.bincount(digit)) / math.log(level) for digit, level in zip(digits, levels)]


def _entropy(counts):
    p = counts[counts > 0] / counts.sum()
    return float(-np.sum(p * np.log(p)))


def preview(path, *rows):
    """Originals above what became of them, eight a row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [np.concatenate(list(row[i : i + 8]), 1) for i in range(0, len(rows[0]), 8) for row in rows]
    Image.fromarray(np.concatenate(lines, 0)).save(path)
