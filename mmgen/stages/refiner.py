"""Stage `refiner`: codes -> better, and larger, pixels. Learns a rectified flow, or the deterministic up-sampler."""

import functools
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmgen.data.images import ALPHA
from mmgen.data.loader import Images
from mmgen.data.sources import open_source
from mmgen.models import image_losses, refiner
from mmgen.models.autoencoders import load_tokenizer, to_float, to_uint8
from mmgen.models.discriminators import PatchGAN, adversarial
from mmgen.models.quantizers import FSQ
from mmgen.models.refiner import Refiner, added, base_of, enlarged, load_refiner, reduced
from mmgen.runtime import checkpoint
from mmgen.runtime import mesh as meshes
from mmgen.runtime.config import ConfigError
from mmgen.stages.loop import Stage
from mmgen.stages.tokenizer import background, disturbed, preview, real_images, reconstruction, warnings

_MEASURED = 128  # images by which the deviations of the detail are known


def setup(config, workdir):
    """See `loop.Stage`. Learns from `config.data`, of whose images the tokenizer of the run config.data.tokenizer makes
    codes, is measured on `config.held_out`, and copies the tokenizer to the workdir."""
    data, folder = config.data, workdir / "tokenizer"
    if not folder.exists() and not data.tokenizer:
        raise ConfigError(
            "config.data.tokenizer is the workdir of the tokenizer whose codes are refined; found none"
        )
    tokenizer = load_tokenizer(folder if folder.exists() else data.tokenizer)
    if folder.exists() and data.tokenizer and os.path.exists(data.tokenizer):
        if load_tokenizer(data.tokenizer).hash != tokenizer.hash:
            raise checkpoint.CheckpointError(
                f"{folder} is another tokenizer than {data.tokenizer}: use another --workdir, or remove it"
            )
    seen = background(checkpoint.read_config(folder if folder.exists() else data.tokenizer, "tokenizer"))
    _check(config, tokenizer, seen)
    upsampler = _upsampler(config, workdir / "upsampler", tokenizer)
    images = Images(
        open_source(**{**data.source, **seen}),
        data.batch_size,
        config.seed,
        augment=data.augment,
        max_bad=data.max_bad,
        threads=data.threads,
        workers=data.workers,
    )
    spread = _spread(
        tokenizer, config.model, upsampler, real_images(tokenizer, images.source, 1.0, _MEASURED)
    )
    held_out = open_source(**{**config.held_out, **seen})
    held_out_images = functools.cache(lambda: real_images(tokenizer, held_out, data.max_bad))

    def make(rngs):
        model = refiner.make(config.model, tokenizer.model, rngs, spread)
        if config.loss.gan.weight:
            m = config.model
            model.discriminator = PatchGAN(
                m.discriminator, rngs, dtype=jnp.dtype(m.dtype), alpha=tokenizer.alpha
            )
        return model

    def evaluate(graphdef, params, step):
        # Each process for itself, as its tokenizer is: on the mesh of all, what it computes would be laid out there.
        params = jax.tree.map(np.asarray, meshes.fetched(params))
        with meshes.use(meshes.of_rows(jax.local_devices()), config.sharding):
            net = nnx.merge(graphdef, params)
            net.discriminator = None  # no part of a refiner, nor of its hash
            return measured(net, step)

    def measured(net, step):
        model = Refiner(net, tokenizer, config.loss.most_steps, upsampler)
        real = held_out_images()
        codes = model.codes(real)
        made = {
            "base_": model.bicubic(codes),
            "": model.refine(codes, range(len(codes)), config.refine_steps),
        }
        preview(workdir / "previews" / f"{step:07d}.png", *(x[:32, ..., :3] for x in (real, *made.values())))
        each = {name: reconstruction(real, back) | spectrum(real, back) for name, back in made.items()}
        return {name + key: value for name, found in each.items() for key, value in found.items()}

    return Stage(
        make=make,
        loss=functools.partial(
            loss, autoencoder=tokenizer.model, upsampler=upsampler and upsampler.net, **config.loss
        ),
        data=images,
        shape=(data.batch_size,),
        axes=("batch",),
        unit="images",
        units_a_step=data.batch_size,
        evaluate=evaluate,
        adopt=functools.partial(_adopt, {data.tokenizer: folder, data.upsampler: workdir / "upsampler"}),
        identity={"tokenizer_hash": tokenizer.hash}
        | ({"upsampler_hash": upsampler.hash} if upsampler else {}),
        warnings=warnings,
    )


def _check(config, tokenizer, seen):
    """Raises ConfigError for settings that do not go together, before anything is claimed."""
    square = config.model.scale * tokenizer.patch
    for name, source in (("data.source", config.data.source), ("held_out", config.held_out)):
        if any(side % square for side in source.size):
            raise ConfigError(
                f"config.{name}.size={tuple(source.size)} is that of refined images: expected multiples of "
                f"model.scale * the tokenizer's patch = {square}"
            )
        if seen.get("background") == ALPHA and source.spec.startswith("world:"):
            raise ConfigError(
                f"config.{name}.spec={source.spec!r} has no transparent pictures, which this tokenizer is for"
            )
    l = config.loss
    for name in ("drop", "noise", "near", "uniform"):
        if not 0 <= l[name] <= 1:
            raise ConfigError(f"config.loss.{name} is a share from 0 to 1, not {l[name]}")
    if l.near and type(tokenizer.model.quantizer) is not FSQ:
        raise ConfigError(
            "config.loss.near is about the digits of plain FSQ, which this tokenizer has not; set it to 0"
        )
    if l.most_steps < 1 or l.most_steps & (l.most_steps - 1):
        raise ConfigError(f"config.loss.most_steps is a power of two, not {l.most_steps}")
    if l.few_every < 0 or (l.few_every and config.data.batch_size // config.accumulate % l.few_every):
        raise ConfigError(
            f"config.loss.few_every={l.few_every} must divide the {config.data.batch_size // config.accumulate} images of "
            "data.batch_size / accumulate, or be 0"
        )
    if l.gan.weight and not config.model.flow:
        raise ConfigError(
            "config.loss.gan.weight is for the flow: of the deterministic up-sampler, the baseline, it must be 0"
        )
    if l.gan.weight < 0:
        raise ConfigError(f"config.loss.gan.weight is at least 0, not {l.gan.weight}")
    if config.refine_steps < 1:
        raise ConfigError(f"config.refine_steps is at least 1, not {config.refine_steps}")


def _adopt(runs):
    """Copies runs to folders, {run: folder}, each whole or not at all, where there is none yet; a run that is not named is none."""
    for source, folder in runs.items():
        if not source or folder.exists():
            continue
        temporary = folder.with_suffix(".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        checkpoint.export(source, temporary)
        os.replace(temporary, folder)


def _upsampler(config, folder, tokenizer):
    """The up-sampler whose images are the base, or None."""
    source = folder if folder.exists() else config.data.upsampler
    if not source:
        return None
    found = load_refiner(source, tokenizer)
    same = folder.exists() or load_tokenizer(Path(source) / "tokenizer").hash == tokenizer.hash
    if found.flow or not same or found.scale != config.model.scale:
        raise ConfigError(
            f"config.data.upsampler={str(source)!r}: expected a refiner run of model.flow=False and model.scale={config.model.scale} that reads "
            f"the codes of tokenizer {tokenizer.hash}"
        )
    return found


def _spread(tokenizer, model, upsampler, images):
    """What `refiner.measured_spread` says of the tokenizer's codes of uint8 [N, H, W, c]."""
    small = np.asarray(to_uint8(reduced(to_float(images), model.scale)))
    codes = tokenizer.encode(small)
    if upsampler:
        base = to_float(upsampler.refine(codes, range(len(codes))))
    else:
        base = enlarged(to_float(tokenizer.decode(codes)), model.scale)
    return refiner.measured_spread(*map(np.asarray, (to_float(images), base)), model.patch)


def loss(
    model,
    batch,
    key,
    *,
    autoencoder,
    upsampler=None,
    drop,
    noise,
    near,
    uniform,
    mean,
    width,
    few_every,
    most_steps,
    gan,
):
    """{name: (sum over images, images)}: "loss", its parts "flow" and "few", and what is watched.

    upsampler: the `RefinerNet` of a deterministic one, whose image is the base. The autoencoder makes codes of the images in its own size. Up to a share `noise` of an image's codes is wrong, so
    that the refiner mends what a transformer gets wrong: of these a share `near` has one digit a level off, the others
    are from anywhere in the batch. A share `drop` of the images is refined without seeing the condition, for guidance.

    flow: the squared error of the velocity at the angle of a time t, a logistic of a normal number of `mean` and deviation
    `width`; or, with a chance of `uniform`, any angle as likely as any other (arXiv:2403.03206; the ends would else be all
    but unknown). Coefficients count as much as their deviation is: between alike, and by what is seen of them.
    told: the squared error of the coefficients that are not drawn (`model.certain`), at any angle.

    few: one image in `few_every` instead learns that one step of 1, 2, 4 ... `most_steps` equal ones comes out where two
    of half the length do; of the smallest, where two steps of the flow's own velocity do (self-consistency,
    arXiv:2410.12557).

    adversarial, where gan["weight"] is above 0: what a discriminator says of the image that a single step makes of noise
    (models/discriminators.py, with the rest of `gan`; adversarial distillation, arXiv:2311.17042). Of all that is told
    this alone asks that the image as a whole be like one: squares are else drawn each for itself, given the others' noise.

    The deterministic up-sampler learns the mean absolute error of the detail, and has none of this but the wrong codes.
    """
    images = to_float(batch["images"])
    n, B = jnp.float32(len(images)), len(images)
    keys = dict(
        zip(("noise", "nudge", "where", "eps", "t", "any", "which", "drop", "few"), jax.random.split(key, 9))
    )
    values = autoencoder.encode(reduced(images, model.scale))
    if noise:
        values = _mistaken(autoencoder.quantizer, values, keys, noise, near)
    base = base_of(autoencoder, values, model.scale)
    if upsampler:
        base = jax.lax.stop_gradient(added(upsampler, base, upsampler.upsampled(base, values)))
    if not model.flow:
        made = base + model.pixels(model.upsampled(base, values))
        return {"loss": (image_losses.l1(made, images).sum(), n)}

    column = lambda a: a.reshape(-1, 1, 1, 1)
    y = model.detail(images - base)
    e = jax.random.normal(keys["eps"], y.shape)
    times = mean + width * jax.random.normal(keys["t"], (B,))
    anywhere = jax.random.uniform(keys["any"], (B,), maxval=np.pi / 2)
    at = jnp.where(
        jax.random.uniform(keys["which"], (B,)) < uniform,
        anywhere,
        jnp.arctan(jnp.exp(times)),
    )
    to, given = at, jax.random.uniform(keys["drop"], (B,)) >= drop
    if few_every:
        # One row in so many, so that devices of a mesh have their share of them where they have as many rows.
        one_in = lambda a: a.reshape(-1, few_every, *a.shape[1:])[:, 0]
        put = lambda a, new: a.reshape(-1, few_every, *a.shape[1:]).at[:, 0].set(new).reshape(a.shape)
        level, place = jax.random.uniform(keys["few"], (2, B // few_every))
        steps = 2.0 ** jnp.floor(level * (int(np.log2(most_steps)) + 1))
        end = jnp.floor(place * steps) / steps * (np.pi / 2)
        start, middle = end + np.pi / 2 / steps, end + np.pi / 4 / steps
        at, to = put(at, start), put(to, end)
    z = column(jnp.cos(at)) * y + column(jnp.sin(at)) * e
    target = column(jnp.cos(at)) * e - column(jnp.sin(at)) * y
    few = jnp.zeros(B, bool)
    if few_every:
        few = put(few, True)
        condition = [one_in(a) for a in (base, values)], one_in(given)
        finest = steps == most_steps

        def go(z, at, to):
            told = model(z, *condition[0], at, jnp.where(finest, at, to), condition[1])
            return model.step(z, told, at, to)

        arrived = jax.lax.stop_gradient(go(go(one_in(z), start, middle), middle, end))
        target = put(target, (one_in(z) - arrived) / column(start - end))
    target = jnp.where(model.certain, y, target)
    counts = model.spread[...] / model.spread[...].mean()
    if gan["weight"]:
        begin, end = jnp.full(B, np.pi / 2), jnp.zeros(B)
        made = model.step(e, model(e, base, values, begin, end, jnp.ones(B, bool)), begin, end)
        settings = {name: value for name, value in gan.items() if name != "weight"}
        theirs, its, seen = adversarial(
            model.discriminator, images, base + model.pixels(made), batch["step"], **settings
        )
    error = counts * jnp.square(model(z, base, values, at, to, given) - target)
    told, drawn = (
        jnp.mean(jnp.where(which, error, 0.0), (1, 2, 3)) for which in (model.certain, ~model.certain)
    )
    found = {"loss": ((told + drawn).sum(), n), "told": (told.sum(), n)}
    for name, chosen in (("flow", ~few), ("few", few)):
        found[name] = (jnp.where(chosen, drawn, 0.0).sum(), chosen.sum().astype(jnp.float32))
    if gan["weight"]:
        found["loss"] = (found["loss"][0] + (gan["weight"] * theirs + its).sum(), n)
        found |= {"adversarial": (theirs.sum(), n), "discriminator": (its.sum(), n)}
        found |= {name: (value * n, n) for name, value in seen.items()}
    return found


def _mistaken(quantizer, values, keys, noise, near):
    """Quantized values [B, h, w, C] where each image has lost a share of up to `noise`: a share `near` of these to the
    code whose digits are the same but for one, a level higher or lower, the others to codes of anywhere in the batch."""
    wrong = disturbed(values, keys["noise"], noise)
    if not near:
        return wrong
    which, up = jax.random.split(keys["nudge"])
    half = quantizer.levels // 2
    digit = jax.nn.one_hot(jax.random.randint(which, values.shape[:3], 0, values.shape[-1]), values.shape[-1])
    step = jnp.where(jax.random.bernoulli(up, 0.5, values.shape[:3]), 1.0, -1.0)[..., None] * digit
    nudged = jnp.clip(jnp.round(values * half) + step, -half, quantizer.levels - 1 - half) / half
    lost = (wrong != values).any(-1, keepdims=True)
    chosen = lost & (jax.random.uniform(keys["where"], lost.shape) < near)
    return jnp.where(chosen, nudged, wrong)


# ---- how good it is -------------------------------------------------------------------------


def spectrum(images, back, batch=64):
    """How detail compares, octave by octave of spatial frequency, of uint8 [N, H, W, C] and what is made of them.

    "power_K": the power of `back` over that of `images`, in dB; below 0 it is blurred. "error_K": the power of their
    difference over that of `images`, in dB. K is the shortest wavelength of the octave in pixels; that of 2 has all that
    is finer, along diagonals, too.
    """
    H, W = images.shape[1:3]
    radius = np.hypot(np.fft.fftfreq(H)[:, None], np.fft.fftfreq(W)[None])
    octaves = 2 ** np.arange(1, int(np.log2(min(H, W))))
    bands = [(radius > 1 / (2 * k)) & (radius <= (1 / k if k > 2 else 1)) for k in octaves]
    sums = np.zeros((3, len(octaves)))
    for start in range(0, len(images), batch):
        a, b = (np.fft.fft2(x[start : start + batch].astype(np.float32), axes=(1, 2)) for x in (images, back))
        for row, each in enumerate((a, b, a - b)):
            power = np.square(np.abs(each)).sum((0, 3))
            sums[row] += [power[band].sum() for band in bands]
    sums = np.maximum(sums, 1e-9)
    decibel = 10 * np.log10(sums[1:] / sums[0])
    return {
        f"{name}_{k}": float(x)
        for name, row in zip(("power", "error"), decibel)
        for k, x in zip(octaves, row)
    }
