"""The refiner: codes -> better, and larger, pixels, by a rectified flow in pixel space.

What is sought is the detail that the tokenizer's own decoder leaves out: the image minus the `base`, which is what the
decoder makes of the codes, enlarged. It is written in coordinates in which its parts are about independent: the cosine
transform of each square of `patch` pixels, of brightness and two opponent colours instead of red, green and blue, each
coefficient in units of its deviation in the data (`spread`, measured once before the training). Detail is smooth and mostly
gray, and noise in these coordinates is so from the start.

Between detail y and noise e lies the straight path (1 - t) y + t e, along which a point moves with the velocity e - y
(rectified flow, arXiv:2209.03003; flow matching, arXiv:2210.02747); a network that tells the mean velocity of what passes a
point turns noise into detail, in a few steps from t = 1 to 0. With a length of 1 restored at each t the path is an arc,

    z = cos(a) y + sin(a) e,    tan(a) = t / (1 - t),    dz / da = cos(a) e - sin(a) y,

from the angle a = 0 of the image to pi / 2 of noise (arXiv:2410.11081). Points and velocities have a deviation of 1 at every
angle.

The network tells the mean velocity from one angle to any smaller one (flow maps, arXiv:2406.07507; shortcut models,
arXiv:2410.12557; MeanFlow, arXiv:2505.13447): where they are equal, the velocity of the flow; where they are not, what
one step between them takes, so that few steps suffice. It does so by a mean m and a deviation s of each coefficient,
of which `mean_velocity` is exact, for steps of any length, as long as detail is normal: a plain surface, where the base lacks
nothing, is s = 0, and no noise is left there even by one step. All else is in how m and s depend on z, from one step to the
next. A network that tells nothing has m = 0 and s = 1: the base and noise of the deviation `spread`.

The coarsest cosines of each square are not drawn but told (`certain`): what is larger than a few pixels is what codes are about,
and a sample of it, by a network that is not perfect, is further from the image than the base is.

Shapes: images [B, H, W, c] in [-1, 1] of the refined size; detail, noise and what is between, [B, H / patch, W / patch, K]
with K = patch * patch * c; values [B, h, w, C] of the quantizer; angles [B].
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx

from mmgen.data import images as pictures
from mmgen.models import layers
from mmgen.models.autoencoders import (
    Conv,
    load_tokenizer,
    patchify,
    to_float,
    to_uint8,
    unpatchify,
    windows,
)
from mmgen.runtime import checkpoint
from mmgen.runtime import mesh as meshes

_WAVES = (
    5  # of each of the two numbers that tell the angles: periods of 4, 2, 1, 1/2 and 1/4 of the quarter turn
)


_MOST = 3.0  # logarithm of the greatest deviation, and of one over the least: a twentieth of the detail's is not seen


class ModulatedBlock(nnx.Module):
    """shortcut(x) + 3x3(silu(norm(3x3(silu(norm(x)))))), the second norm scaled and shifted by what the angles say
    (adaptive norm, arXiv:2105.05233). Norms are of each place alone, as in autoencoders.ResidualBlock: tiles agree
    with the whole."""

    def __init__(self, inputs, outputs, angles, rngs, *, shrink, dtype):
        self.conv = Conv(inputs, outputs, ("embed", "mlp"), rngs, dtype=dtype)
        self.out = Conv(
            outputs, outputs, ("mlp", "embed"), rngs, scale=shrink * (9 * outputs) ** -0.5, dtype=dtype
        )
        self.modulate = layers.Linear((angles, 2 * outputs), ("embed", "mlp"), rngs, scale=0.0, dtype=dtype)
        same = inputs == outputs
        self.shortcut = (
            None if same else layers.Linear((inputs, outputs), ("mlp", "embed"), rngs, dtype=dtype)
        )

    def __call__(self, x, angles):
        scale, shift = jnp.split(self.modulate(angles)[:, None, None], 2, -1)
        y = self.conv(jax.nn.silu(layers.rms_norm(x)))
        y = self.out(jax.nn.silu(layers.rms_norm(y) * (1 + scale) + shift))
        return (x if self.shortcut is None else self.shortcut(x)) + y


class RefinerNet(nnx.Module):
    """A U-Net over squares of pixels, of convolutions alone, so that it takes any size and tiles are exact.

    config: `scale` (refined pixels for one of the tokenizer, along each side: 1, 2 or 4), `patch` (refined pixels a
    side of what a place of the finest grid stands for), `channels` (widths of the grids, each next of half the size),
    `blocks` (of a grid, on the way down and again up), `angles` (width of what the angles say), `certain` (so many
    cosines along each side of a square are told, the others drawn), `flow` (False: the deterministic up-sampler, which sees
    no noise and tells the detail), `dtype`.

    channels and code_channels: of images and of quantized values; code_patch: pixels a side of the tokenizer's patch.
    The codes come in at the coarsest grid, of whose squares a whole number must make up a code's. spread: float [K]; left out
    where a checkpoint has it.
    """

    def __init__(self, config, channels, code_channels, code_patch, rngs, spread=None):
        if config.scale not in (1, 2, 4):
            raise ValueError(f"model.scale is 1, 2 or 4, found {config.scale}")
        if min(config.patch, config.blocks, len(config.channels)) < 1:
            raise ValueError(
                "model.patch and model.blocks are at least 1, model.channels has one number at least"
            )
        if not 0 <= config.certain < config.patch:
            raise ValueError(
                f"model.certain is from 0 to below model.patch={config.patch}, found {config.certain}"
            )
        self.scale, self.patch, self.flow, self.channels = config.scale, config.patch, config.flow, channels
        self.coarsest = config.certain
        widths, dtype = tuple(config.channels), jnp.dtype(config.dtype)
        self.blocks, self.grids = config.blocks, len(widths)
        coarsest, stride = config.patch * 2 ** (self.grids - 1), config.scale * code_patch
        self.finer, rest = divmod(stride, coarsest)
        if rest or not self.finer:
            raise ValueError(
                f"a code stands for {stride}x{stride} refined pixels, and the {self.grids} grids of model.channels with "
                f"model.patch={config.patch} end with squares of {coarsest}, which must divide that: make model.patch "
                "smaller, or leave grids out"
            )
        shrink = (4 * config.blocks * self.grids) ** -0.5
        block = functools.partial(ModulatedBlock, angles=config.angles, rngs=rngs, shrink=shrink, dtype=dtype)
        linear = functools.partial(layers.Linear, rngs=rngs, dtype=dtype)
        pixels = config.patch**2 * channels
        self.spread = nnx.Param(
            jnp.ones(pixels) if spread is None else jnp.asarray(spread), axes=("pixels",), frozen=True
        )
        # Matrices over windows and squares lie along a mesh by their rows, whatever place these stand for.
        self.stem = linear((pixels * (2 if config.flow else 1), widths[0]), ("pixels", "embed"), bias=True)
        self.codes = Conv(code_channels + 1, widths[-1], ("window", "embed"), rngs, bias=True, dtype=dtype)
        self.finer_codes = linear((widths[-1], self.finer**2 * widths[-1]), ("embed", "mlp"))
        self.angles_in = linear((4 * _WAVES + 1, config.angles), ("place", "embed"), bias=True)
        self.angles_out = linear((config.angles, config.angles), ("mlp", "embed"))
        # By texts, which all keys are in checkpoints.
        self.down, self.up, self.before, self.after = (nnx.Dict() for _ in range(4))
        for k, width in enumerate(widths):
            if k:
                self.down[str(k)] = linear((4 * widths[k - 1], width), ("mlp", "embed"))
                self.up[str(k)] = linear((width, 4 * widths[k - 1]), ("embed", "mlp"))
            for i in range(config.blocks):
                self.before[f"{k}.{i}"] = block(width, width)
                self.after[f"{k}.{i}"] = block(width if i else 2 * width, width)
        # It begins by telling nothing.
        told = pixels * (2 if config.flow else 1)
        self.head = linear((widths[0], told), ("embed", "pixels"), scale=0.0, bias=True)

    @property
    def reach(self):
        """How many refined pixels beyond a code's square, along each axis, what is in it still changes what is told."""
        down, squares = 0, [self.patch * 2**k for k in range(self.grids)]
        for square in squares:  # a place that is touched at all is touched whole
            down = -(-down // square) * square + 2 * self.blocks * square
        return max(down, self.finer * squares[-1] + 2 * self.blocks * squares[-1]) + 2 * self.blocks * sum(
            squares
        )

    def __call__(self, z, base, values, at, to, given):
        """-> the mean velocity dz / da from the angle `at` to `to`, of z's shape; of what is `certain` the detail
        itself, and its z is not looked at, as with all of the deterministic up-sampler. given bool [B]: whether it sees the
        condition, base and values; without, it knows what detail is like, and nothing of this image."""
        there = given[:, None, None, None].astype(values.dtype)
        base, values = base * there, values * there
        angles = jax.nn.silu(self.angles_out(jax.nn.silu(self.angles_in(_waves(at, to, given)))))
        seen = patchify(base, self.patch)
        x = self.stem(jnp.concatenate([jnp.where(self.certain, 0.0, z), seen], -1) if self.flow else seen)
        inside = jnp.broadcast_to(
            there, (*values.shape[:-1], 1)
        )  # tells zeros from what is outside the image
        codes = jax.nn.silu(self.codes(jnp.concatenate([values, inside], -1)))
        codes = unpatchify(self.finer_codes(codes), self.finer)
        kept = []
        for k in range(self.grids):
            if k:
                x = self.down[str(k)](patchify(x, 2))
            if k == self.grids - 1:
                x = x + codes
            for i in range(self.blocks):
                x = self.before[f"{k}.{i}"](x, angles)
            kept.append(x)
        for k in reversed(range(self.grids)):
            x = jnp.concatenate([x, kept[k]], -1)
            for i in range(self.blocks):
                x = self.after[f"{k}.{i}"](x, angles)
            if k:
                x = unpatchify(self.up[str(k)](x), 2)
        told = layers.high(self.head(layers.rms_norm(x)))
        if not self.flow:
            return told
        mean, deviation = jnp.split(told, 2, -1)
        velocity = mean_velocity(z, mean, jnp.exp(_MOST * jnp.tanh(deviation / _MOST)), at, to)
        return jnp.where(self.certain, mean, velocity)

    @property
    def certain(self):
        """bool [K]: which coefficients are told and not drawn."""
        coarse = np.arange(self.patch) < self.coarsest
        return np.repeat(np.outer(coarse, coarse), self.channels)

    def step(self, z, told, at, to):
        """Where z at the angle `at` comes at `to`, by what the network told."""
        return jnp.where(self.certain, told, z - (at - to)[:, None, None, None] * told)

    def upsampled(self, base, values):
        """The detail that the deterministic up-sampler tells."""
        zeros = jnp.zeros(len(base))
        return self(None, base, values, zeros, zeros, jnp.ones(len(base), bool))

    def detail(self, difference):
        """Of images minus their bases, [B, H, W, c], the coordinates in which they are refined."""
        basis = _basis(self.patch, self.channels)
        return patchify(difference, self.patch) @ basis.T / self.spread[...]

    def pixels(self, detail):
        """The other way round: what is to be added to the base."""
        return unpatchify((detail * self.spread[...]) @ _basis(self.patch, self.channels), self.patch)


def _basis(patch, channels):
    """Orthonormal float32 [K, K]: of pixels as `patchify` lines them up, their cosine transform (DCT-II) of brightness, blue
    against red, and green against both; a fourth channel stays what it is."""
    k = np.arange(patch)
    waves = np.cos(np.pi * k[:, None] * (k + 0.5) / patch)
    colors = np.eye(channels)
    colors[:3, :3] = [[1, 1, 1], [1, 0, -1], [1, -2, 1]]
    waves, colors = (m / np.linalg.norm(m, axis=1, keepdims=True) for m in (waves, colors))
    return np.kron(np.kron(waves, waves), colors).astype(np.float32)


def measured_spread(images, bases, patch):
    """The deviation of each coefficient of the detail float [N, H, W, c] lacking in the bases: float32 [K]. At least half a
    gray level's of one pixel, which is not seen."""
    detail = patchify(images - bases, patch) @ _basis(patch, images.shape[-1]).T
    return np.maximum(np.sqrt(np.mean(np.square(detail), (0, 1, 2))), 1 / 255).astype(np.float32)


def mean_velocity(z, mean, deviation, at, to):
    """The mean velocity from the angle `at` to `to`, [B] each, of a point z where detail is normal, [B, h, w, K] each.

    There z goes from cos(at) mean + r(at) u to cos(to) mean + r(to) u, with r(a)**2 = (cos(a) deviation)**2 + sin(a)**2 and
    the same u. Written so that nothing is divided by a step that may be 0."""
    at, to = (a[:, None, None, None] for a in (at, to))
    sinc = lambda x: jnp.sinc(x / np.pi)  # sin(x) / x
    r, later = (jnp.sqrt(jnp.square(jnp.cos(a) * deviation) + jnp.square(jnp.sin(a))) for a in (at, to))
    shrinks = (1 - jnp.square(deviation)) * jnp.sin(at + to) * sinc(at - to) / (r * (r + later))
    return shrinks * (z - jnp.cos(at) * mean) - jnp.sin((at + to) / 2) * sinc((at - to) / 2) * mean


def _waves(at, to, given):
    """[B, N]: features of the angle and of the step, as shares of a quarter turn, and whether there is a condition."""
    shares = jnp.stack([at, at - to], -1) * (2 / np.pi)
    turns = shares[..., None] * (np.pi / 2 * 2.0 ** np.arange(_WAVES))
    waves = jnp.concatenate([jnp.sin(turns), jnp.cos(turns) - 1], -1)
    return jnp.concatenate([waves.reshape(len(at), -1), given[:, None]], -1)


def base_of(autoencoder, values, scale):
    """The decoder's image of quantized values, enlarged: float32 [B, H, W, c] in [-1, 1]."""
    return enlarged(jnp.clip(autoencoder.decode(values), -1, 1), scale)


def added(model, base, detail):
    """The base with the detail that a model told of it, clipped to [-1, 1]."""
    return jnp.clip(base + model.pixels(detail), -1, 1)


def enlarged(images, scale):
    """Images [B, H, W, c] in [-1, 1], `scale` times as large by bicubic interpolation, clipped."""
    if scale == 1:
        return images
    B, H, W, c = images.shape
    return jnp.clip(jax.image.resize(images, (B, scale * H, scale * W, c), "cubic"), -1, 1)


def reduced(images, scale):
    """Images [B, H, W, c] -> [B, H / scale, W / scale, c], the mean of each square."""
    B, H, W, c = images.shape
    return images.reshape(B, H // scale, scale, W // scale, scale, c).mean((2, 4))


def noise(seeds, shape):
    """What the refinement of each seed begins with: float32 [B, *shape]. Each is a function of its own seed alone."""
    draw = lambda seed: jax.random.normal(jax.random.key(seed, impl="threefry2x32"), shape)
    return jax.vmap(draw)(np.asarray([seed & 0xFFFFFFFF for seed in seeds], np.uint32))


class Refiner:
    """A trained refiner with the tokenizer whose codes it reads: codes int32 [B, h, w] -> images uint8.

    `scale` is how many times as large as the tokenizer's own these are, along each side. most_steps: the most for which
    one step was learned (see stages/refiner.py). upsampler: the `Refiner` of a deterministic up-sampler, whose image is then the base.
    """

    def __init__(self, model, tokenizer, most_steps, upsampler=None):
        self.upsampler = upsampler
        self.tokenizer, self.scale, self.patch, self.flow = tokenizer, model.scale, model.patch, model.flow
        self.most_steps, self.stride = most_steps, model.scale * tokenizer.patch
        self.halo = -(-model.reach // self.stride)  # codes around a tile
        graphdef, self._params = nnx.split(model)
        run = functools.partial(jax.jit, out_shardings=meshes.whole())
        self._reduce = run(lambda images: to_uint8(reduced(to_float(images), self.scale)))
        self._enlarge = run(lambda images: enlarged(to_float(images), self.scale))
        self._lookup = run(tokenizer.model.quantizer.lookup)

        def step(params, z, base, values, at, to, told, guidance):
            model = nnx.merge(graphdef, params)
            full = lambda value: jnp.full(len(z), value)
            tell = lambda given: model(z, base, values, full(at), full(told), full(given))
            v = tell(True)
            if guidance is not None:
                v = (free := tell(False)) + guidance * (v - free)
            return model.step(z, v, full(at), full(to))

        self.net = model
        self._step = run(step)
        self._tell = run(lambda params, base, values: nnx.merge(graphdef, params).upsampled(base, values))
        self._better = run(lambda params, base, z: added(nnx.merge(graphdef, params), base, z))
        self._added = run(lambda params, base, z: to_uint8(base + nnx.merge(graphdef, params).pixels(z)))

    @functools.cached_property
    def hash(self):
        """Identity of the trained weights."""
        own = nnx.to_pure_dict(self._params)
        return checkpoint.weights_hash(
            {"own": own, "base": nnx.to_pure_dict(self.upsampler._params)} if self.upsampler else own
        )

    def codes(self, images, batch=64):
        """The codes int32 [B, h, w] of images uint8 of the refined size."""
        if self.tokenizer.alpha and images.shape[-1] == 3:
            images = pictures.opaque(images)
        parts = (images[i : i + batch] for i in range(0, len(images), batch))
        return self.tokenizer.encode(
            np.concatenate([np.asarray(self._reduce(part)) for part in parts]), batch
        )

    def bicubic(self, codes, batch=64):
        """What the tokenizer's own decoder makes of codes, enlarged: uint8."""
        parts = (codes[i : i + batch] for i in range(0, len(codes), batch))
        enlarge = lambda part: np.asarray(to_uint8(self._enlarge(self.tokenizer.decode(part, batch))))
        return np.concatenate([enlarge(part) for part in parts])

    def refine(self, codes, seeds, steps=4, guidance=1.0, tile=None, batch=16, temperature=1.0):
        """Codes int32 [B, h, w] -> images uint8 [B, scale * patch * h, ...], by `steps` calls of the network.

        1, 2, 4 ... `most_steps` steps are those that were learned; for other numbers each follows the flow's own
        velocity. guidance: above 1 it goes further than that from the detail that any image might have to that of this
        image; each step is then two calls. seeds: one int an image, from which its noise comes. What comes out depends
        on its codes and its seed alone. temperature: what the noise is multiplied by; below 1 there is less detail, and less of it is
        wrong, down to the mean of what may be there (0). The deterministic up-sampler has no use for seeds, steps, guidance and temperature.

        With `tile`, grids longer than tile + 2 * halo codes along an axis go through the network in windows of so many
        codes, `batch` windows at a time. That gives the image it gives without (but for a gray level where another
        program rounds otherwise): at each step windows overlap by all that the network sees. For the base, see
        `Tokenizer.decode`.

        ValueError where seeds are not as many as images, steps are below 1, the guidance is not finite, or the temperature
        not from 0 to 1.
        """
        codes = np.asarray(codes)
        if len(codes) != len(seeds) or not len(codes):
            raise ValueError(f"expected images with a seed for each, found {len(codes)} and {len(seeds)}")
        if steps < 1 or not np.isfinite(guidance):
            raise ValueError(f"expected at least 1 step and a finite guidance, found {steps} and {guidance}")
        if not 0 <= temperature <= 1:
            raise ValueError(f"expected a temperature from 0 to 1, found {temperature}")
        out = []
        for start in range(0, len(codes), batch):
            rows = min(batch, len(codes) - start)
            fill = [
                *range(start, start + rows),
                *[start] * (batch - rows if tile is None else 0),
            ]  # one program
            images = self._refined(
                codes[fill], [seeds[i] for i in fill], steps, guidance, tile, batch, temperature
            )
            out.append(np.asarray(images)[:rows])
        return np.concatenate(out)

    def _refined(self, codes, seeds, steps, guidance, tile, batch, temperature):
        values = self._lookup(codes)
        base = self._enlarge(self.tokenizer.decode(codes, batch=batch, tile=tile))
        if self.upsampler:
            above = self.upsampler
            z = above._tiled(above._tell, (base, values), tile, batch)
            base = above._better(above._params, base, z)
        if self.flow:
            learned = steps <= self.most_steps and steps & (steps - 1) == 0
            B, H, W, c = base.shape
            z = temperature * noise(seeds, (H // self.patch, W // self.patch, self.patch**2 * c))
            angles = np.linspace(np.pi / 2, 0, steps + 1, dtype=np.float32)
            for at, to in zip(angles[:-1], angles[1:]):
                how = dict(at=at, to=to, told=to if learned else at)
                how["guidance"] = None if guidance == 1 else np.float32(guidance)
                z = self._tiled(functools.partial(self._step, **how), (z, base, values), tile, batch)
        else:
            z = self._tiled(self._tell, (base, values), tile, batch)
        return self._added(self._params, base, z)

    def _tiled(self, function, arrays, tile, batch):
        """function(params, *arrays) -> [B, H / patch, W / patch, K]; arrays are [B, n * h, n * w, ...] with the last of them,
        values [B, h, w, C]."""
        if tile is None:
            return function(self._params, *arrays)
        arrays = [np.asarray(a) for a in arrays]
        B, *grid = arrays[-1].shape[:3]
        n = self.stride // self.patch
        (ys, h, tall), (xs, w, wide) = (windows(codes, tile, self.halo, n) for codes in grid)
        corners = [(i, j) for i in range(len(ys)) for j in range(len(xs))]

        def cut(a):
            n = a.shape[1] // grid[0]
            at = lambda i, j: a[:, n * ys[i] : n * (ys[i] + h), n * xs[j] : n * (xs[j] + w)]
            return np.concatenate([at(i, j) for i, j in corners])

        parts, out = [cut(a) for a in arrays], []
        for start in range(0, len(parts[0]), batch):
            part = [a[start : start + batch] for a in parts]
            rows = len(part[0])
            part = [np.concatenate([a, np.repeat(a[-1:], batch - rows, 0)]) for a in part]
            out.append(np.asarray(function(self._params, *part))[:rows])
        found = np.concatenate(out)
        found = found.reshape(len(corners), B, n * h, n * w, -1)
        whole = np.zeros((B, n * grid[0], n * grid[1], found.shape[-1]), np.float32)
        for (i, j), each in zip(corners, found):
            rows, columns = slice(n * ys[i], n * (ys[i] + h)), slice(n * xs[j], n * (xs[j] + w))
            whole[:, rows, columns] += tall[i, rows, None, None] * wide[j, columns, None] * each
        return whole


def make(config, autoencoder, rngs, spread=None):
    """The `RefinerNet` of a config's model for the codes of an autoencoder."""
    channels, digits = autoencoder.channels, autoencoder.quantizer.channels
    return RefinerNet(config, channels, digits, autoencoder.patch, rngs, spread)


def load_refiner(workdir, tokenizer=None):
    """The `Refiner` of a refiner run, whose workdir holds the tokenizer, if it is not given, and the up-sampler if there is one."""
    config = ml_collections.ConfigDict(checkpoint.read_config(workdir, "refiner"))
    tokenizer = tokenizer or load_tokenizer(Path(workdir) / "tokenizer")
    beside = Path(workdir) / "upsampler"
    upsampler = load_refiner(beside, tokenizer) if beside.exists() else None
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: make(config.model, tokenizer.model, None)))
    params, _ = checkpoint.load_weights(workdir, nnx.to_pure_dict(abstract), beside=("discriminator",))
    return Refiner(nnx.merge(graphdef, params), tokenizer, config.loss.most_steps, upsampler)
