"""Image autoencoders: pixels -> features -> codes -> features -> pixels.

Shapes: images [B, H, W, 3] in [-1, 1], codes [B, h, w], h = H / patch.
"""

import functools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from mmgen.models import layers
from mmgen.models.quantizers import FSQ
from mmgen.runtime import checkpoint
from mmgen.runtime import mesh as meshes


def to_float(images):
    """uint8 [0, 255] -> float32 [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(images):
    """float [-1, 1] -> uint8 [0, 255], rounded and clipped."""
    return jnp.clip(jnp.round((images + 1.0) * 127.5), 0, 255).astype(jnp.uint8)


def patchify(images, patch):
    """[B, H, W, C] -> [B, h, w, patch * patch * C]."""
    B, H, W, C = images.shape
    if H % patch or W % patch:
        raise ValueError(f"the patch ({patch}) must divide the image, found {W}x{H} (width x height)")
    x = images.reshape(B, H // patch, patch, W // patch, patch, C)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(B, H // patch, W // patch, -1)


def unpatchify(x, patch):
    """[B, h, w, patch * patch * C] -> [B, H, W, C]."""
    B, h, w, D = x.shape
    x = x.reshape(B, h, w, patch, patch, -1).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(B, h * patch, w * patch, -1)


class AttentionTower(nnx.Module):
    """Bidirectional transformer over a grid with two-axis rotary positions (ViT-VQGAN, arXiv:2110.04627)."""

    def __init__(self, config, depth, rngs, *, dtype):
        self.head_dim, self.base, self.unroll = config.head_dim, config.rope_base, config.unroll
        self.blocks = layers.stack(lambda r: layers.Block(config, r, dtype=dtype), depth, rngs)

    def __call__(self, x):
        B, h, w, D = x.shape
        grid = jnp.stack(jnp.meshgrid(jnp.arange(h), jnp.arange(w), indexing="ij"), -1)
        cos_sin = layers.rope(grid.reshape(1, h * w, 2), self.head_dim, self.base)
        x = layers.scan(self.blocks, x.reshape(B, h * w, D), cos_sin, unroll=self.unroll)
        return layers.rms_norm(x).reshape(B, h, w, D)


class ConvBlock(nnx.Module):
    """x + 1x1(silu(3x3(norm(x)))), normed for each place alone, so that tiles agree with the whole.

    On CPU `lax.conv` is slow in a scanned layer: `unroll` the tower there.
    """

    def __init__(self, config, rngs, *, dtype):
        D = config.width
        self.dtype = dtype
        # A matrix over the window, so that Muon sees one matrix and not nine.
        self.wide = nnx.Param(layers.normal(rngs, (9 * D, D), (9 * D) ** -0.5), axes=("window", "mlp"))
        self.out = layers.Linear(
            (D, D), ("mlp", "embed"), rngs, scale=(2 * config.layers * D) ** -0.5, dtype=dtype
        )

    def __call__(self, x):
        D = x.shape[-1]
        kernel = self.wide[...].astype(self.dtype).reshape(3, 3, D, D)
        y = jax.lax.conv_general_dilated(
            layers.rms_norm(x).astype(self.dtype), kernel, (1, 1), "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip
        return x + self.out(jax.nn.silu(y))


class PatchBlock(nnx.Module):
    """x + MLP(norm(x)), each patch alone."""

    def __init__(self, config, rngs, *, dtype):
        scale = (2 * config.layers * config.mlp) ** -0.5
        self.mlp = layers.MLP(config.width, config.mlp, rngs, dtype=dtype, out_scale=scale)

    def __call__(self, x):
        return x + self.mlp(layers.rms_norm(x))


class Tower(nnx.Module):
    """A stack of residual blocks over a grid. Of `PatchBlock`s it gives equal patches equal codes anywhere."""

    def __init__(self, block, config, depth, rngs, *, dtype):
        self.unroll = config.unroll
        self.blocks = layers.stack(lambda r: block(config, r, dtype=dtype), depth, rngs)

    def __call__(self, x):
        return layers.rms_norm(layers.scan(self.blocks, x, unroll=self.unroll))


TOWERS = {
    "conv": functools.partial(Tower, ConvBlock),
    "attention": AttentionTower,
    "patch": functools.partial(Tower, PatchBlock),
}


CELLS = 2  # along each side of a patch


class Cells(nnx.Module):
    """Convolutions on a grid finer than the patches, where an edge looks alike at more places."""

    def __init__(self, config, rngs, *, dtype):
        if config.patch % CELLS:
            raise ValueError(f"model.cell_layers need a patch that {CELLS} divides, found {config.patch}")
        D, F = config.width, config.cell_width
        self.up = layers.Linear((D, CELLS**2 * F), ("embed", "window"), rngs, dtype=dtype)
        fine = ml_collections.ConfigDict({**config, "width": F, "layers": config.cell_layers})
        self.tower = Tower(ConvBlock, fine, config.cell_layers, rngs, dtype=dtype)

    def __call__(self, x):
        """[B, h, w, D] -> [B, h * CELLS, w * CELLS, F]."""
        return self.tower(unpatchify(self.up(x), CELLS))


class Prior(nnx.Module):
    """How well codes can be foreseen: a small network that reads a code's four nearest predecessors.

    As a part of the loss (the rate of learned compression, arXiv:1809.02736), it makes the encoder write
    what those before it say already, so that a transformer has less to learn. Nothing else uses it.
    """

    def __init__(self, channels, hidden, rngs):
        self.read = layers.Linear((4 * (channels + 1), hidden), ("code", "mlp"), rngs, bias=True)
        self.mix = layers.Linear((hidden, hidden), ("embed", "mlp"), rngs)
        self.write = layers.Linear((hidden, 2 * channels), ("mlp", "code"), rngs, bias=True)

    def __call__(self, values, digits):
        """Quantized values and the digits they were rounded from [B, h, w, C] -> nats of each code [B, h, w].

        The digits are not rounded and a digit's probability is a logistic distribution's on the interval of
        length 1 around it, so that there is a slope to follow.
        """
        h, w = values.shape[1:3]
        x = jnp.pad(values, ((0, 0), (0, 0), (0, 0), (0, 1)), constant_values=1.0)  # 0 outside the image
        x = jnp.pad(x, ((0, 0), (1, 0), (1, 1), (0, 0)))
        before = jnp.concatenate([x[:, 1:, :w], x[:, :h, :w], x[:, :h, 1:-1], x[:, :h, 2:]], -1)
        y = jax.nn.silu(self.read(before))
        y = layers.rms_norm(y + jax.nn.silu(self.mix(layers.rms_norm(y))))
        mean, sharpness = jnp.split(self.write(y), 2, -1)
        sharpness, distance = jnp.exp(jnp.clip(sharpness, -2, 4)), digits - 4 * mean
        sides = [jax.nn.sigmoid((distance + side) * sharpness) for side in (0.5, -0.5)]
        return -jnp.log(jnp.maximum(sides[0] - sides[1], 1e-6)).sum(-1)


class Autoencoder(nnx.Module):
    """Patches -> tower -> FSQ -> tower -> patches; any image size that the patch divides."""

    def __init__(self, config, rngs):
        for name in (config.encoder, config.decoder):
            if name not in TOWERS:
                raise ValueError(f"unknown tower {name!r}; known: {', '.join(TOWERS)}")
        dtype = jnp.dtype(config.dtype)
        self.patch, self.quantizer = config.patch, FSQ(config.levels)
        pixels, D, C = config.patch**2 * 3, config.width, self.quantizer.channels
        self.stem = layers.Linear((pixels, D), ("pixels", "embed"), rngs, bias=True, dtype=dtype)
        self.encoder = TOWERS[config.encoder](config, config.encoder_layers, rngs, dtype=dtype)
        self.to_features = layers.Linear((D, C), ("embed", "code"), rngs, bias=True)
        self.from_features = layers.Linear((C, D), ("code", "embed"), rngs, bias=True, dtype=dtype)
        self.decoder = TOWERS[config.decoder](config, config.layers, rngs, dtype=dtype)
        self.cells = Cells(config, rngs, dtype=dtype) if config.cell_layers else None
        if config.cell_layers:
            D, pixels = config.cell_width, pixels // CELLS**2
        self.head = layers.Linear((D, pixels), ("embed", "pixels"), rngs, bias=True, dtype=dtype)
        self.prior = Prior(C, D, rngs)

    def features(self, images):
        """Images [B, H, W, 3] in [-1, 1] -> what is to be quantized [B, h, w, C]."""
        return self.to_features(self.encoder(self.stem(patchify(images, self.patch))))

    def encode(self, images):
        """Images [B, H, W, 3] in [-1, 1] -> quantized values [B, h, w, C]."""
        return self.quantizer.quantize(self.features(images))

    def decode(self, values):
        """Quantized values [B, h, w, C] -> images [B, H, W, 3], not clipped."""
        x, side = self.decoder(self.from_features(values)), self.patch
        if self.cells is not None:
            x, side = self.cells(x), self.patch // CELLS
        return unpatchify(self.head(x).astype(jnp.float32), side)

    def encode_codes(self, images):
        """Images [B, H, W, 3] in [-1, 1] -> codes int32 [B, h, w]."""
        return self.quantizer.pack(self.encode(images))

    def decode_codes(self, codes):
        """Codes int32 [B, h, w] -> images [B, H, W, 3], not clipped."""
        return self.decode(self.quantizer.unpack(codes))


class Tokenizer:
    """A trained autoencoder: images uint8 [B, H, W, 3] <-> codes int32 [B, h, w].

    With `devices` each batch is shared out among these (all that this process has, as a rule).
    """

    def __init__(self, model, color_digits=0, devices=()):
        self.color_digits = color_digits  # the first of a code's digits, where these carry its colours alone
        self.patch, self.codes = model.patch, model.quantizer.codes
        self.levels = tuple(int(level) for level in model.quantizer.levels)
        graphdef, self._params = nnx.split(model)
        self._rows = None
        if len(devices) > 1:
            mesh = jax.sharding.Mesh(np.array(devices), ("data",))
            self._rows = NamedSharding(mesh, PartitionSpec("data"))
            self._params = jax.device_put(self._params, NamedSharding(mesh, PartitionSpec()))
        run = functools.partial(jax.jit, out_shardings=meshes.whole())
        self._encode = run(lambda p, x: nnx.merge(graphdef, p).encode_codes(to_float(x)))
        self._decode = run(lambda p, c: to_uint8(nnx.merge(graphdef, p).decode_codes(c)))

    def encode(self, images, batch=64):
        return self._in_batches(self._encode, images, batch)

    def decode(self, codes, batch=64):
        return self._in_batches(self._decode, codes, batch)

    def _in_batches(self, function, x, batch):
        """Applies a jitted function in equal, padded batches, so that it compiles once."""
        if self._rows is not None:
            batch = -(-batch // self._rows.num_devices) * self._rows.num_devices
        out = []
        for start in range(0, len(x), batch):
            part = x[start : start + batch]
            part = np.concatenate([part, np.repeat(part[-1:], batch - len(part), axis=0)])
            out.append(
                function(self._params, part if self._rows is None else jax.device_put(part, self._rows))
            )
        return np.concatenate([np.asarray(each) for each in out])[: len(x)]

    @functools.cached_property
    def hash(self):
        """Identity of the trained weights: codes of one tokenizer mean nothing to another."""
        return checkpoint.weights_hash(nnx.to_pure_dict(self._params))


def load_tokenizer(workdir):
    """Restores the `Tokenizer` of a tokenizer run (or of an exported copy)."""
    config = ml_collections.ConfigDict(checkpoint.read_config(workdir, "tokenizer"))
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: Autoencoder(config.model, nnx.Rngs(0))))
    params, _ = checkpoint.load_weights(workdir, nnx.to_pure_dict(abstract))
    color_digits = config.loss.color_digits if config.loss.recolor else 0
    return Tokenizer(nnx.merge(graphdef, params), color_digits, jax.local_devices())
