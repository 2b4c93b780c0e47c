"""Image autoencoders: pixels -> features -> codes -> features -> pixels.

Shapes: images [B, H, W, c] in [-1, 1], c = 3 (RGB) or 4 (RGB and alpha, -1 transparent and 1 opaque), codes
[B, h, w], h = H / patch.
"""

import functools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from mmgen.data import images as pictures
from mmgen.models import layers
from mmgen.models.attention import bias_of
from mmgen.models.quantizers import FSQ, make_quantizer
from mmgen.runtime import checkpoint
from mmgen.runtime import mesh as meshes


def to_float(images):
    """uint8 [0, 255] -> float32 [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(images):
    """float [-1, 1] -> uint8 [0, 255], rounded and clipped."""
    return jnp.clip(jnp.round((images + 1.0) * 127.5), 0, 255).astype(jnp.uint8)


def _indivisible(patch, H, W):
    return f"the patch ({patch}) must divide the image, found {W}x{H} (width x height)"


def patchify(images, patch):
    """[B, H, W, C] -> [B, h, w, patch * patch * C]."""
    B, H, W, C = images.shape
    if H % patch or W % patch:
        raise ValueError(_indivisible(patch, H, W))
    x = images.reshape(B, H // patch, patch, W // patch, patch, C)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(B, H // patch, W // patch, -1)


def unpatchify(x, patch):
    """[B, h, w, patch * patch * C] -> [B, H, W, C]."""
    B, h, w, D = x.shape
    x = x.reshape(B, h, w, patch, patch, -1).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(B, h * patch, w * patch, -1)


class AttentionTower(nnx.Module):
    """Bidirectional transformer over a grid with two-axis rotary positions (ViT-VQGAN, arXiv:2110.04627).

    With `config.window` a place sees those at most so many away along each axis, else all.
    """

    def __init__(self, config, depth, rngs, *, dtype):
        if config.window < 0:
            raise ValueError(
                f"model.window is at least 0, which stands for all places, found {config.window}"
            )
        self.head_dim, self.base, self.unroll = config.head_dim, config.rope_base, config.unroll
        self.window = config.window
        self.blocks = layers.stack(lambda r: layers.Block(config, r, dtype=dtype), depth, rngs)

    def __call__(self, x):
        B, h, w, D = x.shape
        places = np.stack(np.mgrid[:h, :w], -1).reshape(1, h * w, 2)
        cos_sin = layers.rope(jnp.asarray(places), self.head_dim, self.base)
        see = None
        if self.window:
            near = np.abs(places[0, :, None] - places[0]).max(-1) <= self.window
            see = bias_of(near)[None]
        x = layers.scan(self.blocks, x.reshape(B, h * w, D), cos_sin, see, unroll=self.unroll)
        return layers.rms_norm(x).reshape(B, h, w, D)


def convolve(x, matrix):
    """3x3 convolution of x [B, H, W, C] with a matrix [9 * C, D], zeros around the image -> [B, H, W, D]."""
    return jax.lax.conv_general_dilated(
        x, matrix.reshape(3, 3, x.shape[-1], -1), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


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
        y = convolve(layers.rms_norm(x).astype(self.dtype), self.wide[...].astype(self.dtype))
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


class PatchEncoder(nnx.Module):
    """Images -> patches -> tower -> [B, h, w, D], normed."""

    def __init__(self, config, rngs, *, inputs, dtype):
        self.patch = config.patch
        pixels = config.patch**2 * inputs
        self.stem = layers.Linear((pixels, config.width), ("pixels", "embed"), rngs, bias=True, dtype=dtype)
        self.tower = TOWERS[config.encoder](config, config.encoder_layers, rngs, dtype=dtype)

    def __call__(self, images):
        return self.tower(self.stem(patchify(images, self.patch)))


class PatchDecoder(nnx.Module):
    """[B, h, w, D] -> tower -> cells, if any -> patches -> images float32."""

    def __init__(self, config, rngs, *, outputs, dtype):
        self.tower = TOWERS[config.decoder](config, config.layers, rngs, dtype=dtype)
        self.cells = Cells(config, rngs, dtype=dtype) if config.cell_layers else None
        width, self.side = config.width, config.patch
        if config.cell_layers:
            width, self.side = config.cell_width, config.patch // CELLS
        pixels = self.side**2 * outputs
        self.head = layers.Linear((width, pixels), ("embed", "pixels"), rngs, bias=True, dtype=dtype)

    def __call__(self, x):
        x = self.tower(x)
        if self.cells is not None:
            x = self.cells(x)
        return unpatchify(self.head(x).astype(jnp.float32), self.side)


class Conv(nnx.Module):
    """3x3 convolution, zeros around the image; its kernel is a matrix over the window, as in `ConvBlock`."""

    def __init__(self, inputs, outputs, axes, rngs, *, bias=False, scale=None, dtype):
        self.dtype, rows = dtype, 9 * inputs
        self.w = nnx.Param(
            layers.normal(rngs, (rows, outputs), rows**-0.5 if scale is None else scale), axes=axes
        )
        self.b = nnx.Param(jnp.zeros(outputs), axes=axes[1:]) if bias else None

    def __call__(self, x):
        y = convolve(x.astype(self.dtype), self.w[...].astype(self.dtype))
        return y if self.b is None else y + self.b[...].astype(self.dtype)


class ResidualBlock(nnx.Module):
    """shortcut(x) + 3x3(silu(norm(3x3(silu(norm(x)))))); the shortcut is 1x1 where widths differ, else x.

    The norm is of each place alone, not over groups of channels and all places as in the paper
    (arXiv:2012.09841): what comes out then depends on what is near alone, and tiles agree with the whole.
    """

    def __init__(self, inputs, outputs, rngs, *, shrink, dtype):
        self.conv = Conv(inputs, outputs, ("window", "mlp"), rngs, dtype=dtype)
        self.out = Conv(
            outputs, outputs, ("window", "embed"), rngs, scale=shrink * (9 * outputs) ** -0.5, dtype=dtype
        )
        same = inputs == outputs
        self.shortcut = (
            None if same else layers.Linear((inputs, outputs), ("mlp", "embed"), rngs, dtype=dtype)
        )

    def __call__(self, x):
        y = self.conv(jax.nn.silu(layers.rms_norm(x)))
        y = self.out(jax.nn.silu(layers.rms_norm(y)))
        return (x if self.shortcut is None else self.shortcut(x)) + y


class Scale(nnx.Module):
    """`config.blocks` residual blocks on one grid; the first changes the width."""

    def __init__(self, config, inputs, outputs, rngs, *, dtype):
        # Residual outputs start small so that depth does not grow the stream, as in layers.Block.
        shrink = (2 * config.blocks * (len(config.channels) + 1)) ** -0.5
        self.blocks = nnx.Dict()  # by texts, which all keys are in checkpoints
        for i in range(config.blocks):
            width = outputs if i else inputs
            self.blocks[str(i)] = ResidualBlock(width, outputs, rngs, shrink=shrink, dtype=dtype)

    def __call__(self, x):
        for i in range(len(self.blocks)):
            x = self.blocks[str(i)](x)
        return x


def _check_pyramid(config):
    scales = len(config.channels)
    if scales < 1 or config.patch != 2 ** (scales - 1):
        raise ValueError(
            f"a 'cnn' halves the image between scales: the {scales} of model.channels need a patch of "
            f"2**({scales} - 1), found {config.patch}"
        )
    if config.blocks < 1:
        raise ValueError(f"a 'cnn' needs at least 1 block a scale, found model.blocks {config.blocks}")


class PyramidEncoder(nnx.Module):
    """Images -> residual blocks of `config.channels[k]` channels on grids of 1 / 2**k -> [B, h, w, D], normed
    (as VQGAN's, arXiv:2012.09841, without its attention).

    From scale to scale it goes by a linear map of 2x2 squares. A strided 3x3 convolution would cost twice as
    much, and pad but one side of an even image.
    """

    def __init__(self, config, rngs, *, inputs, dtype):
        _check_pyramid(config)
        widths = config.channels
        self.stem = Conv(inputs, widths[0], ("pixels", "embed"), rngs, bias=True, dtype=dtype)
        self.scales, self.down = nnx.Dict(), nnx.Dict()
        for k, width in enumerate(widths):
            if k:
                before = widths[k - 1]
                self.down[str(k)] = layers.Linear(
                    (4 * before, before), ("window", "embed"), rngs, dtype=dtype
                )
            self.scales[str(k)] = Scale(config, widths[max(k - 1, 0)], width, rngs, dtype=dtype)
        self.middle = Scale(config, widths[-1], widths[-1], rngs, dtype=dtype)
        self.out = layers.Linear((widths[-1], config.width), ("mlp", "embed"), rngs, dtype=dtype)

    def __call__(self, images):
        x = self.stem(images)
        for k in range(len(self.scales)):
            if k:
                x = self.down[str(k)](patchify(x, 2))
            x = self.scales[str(k)](x)
        x = jax.nn.silu(layers.rms_norm(self.middle(x)))
        return layers.rms_norm(self.out(x))


class PyramidDecoder(nnx.Module):
    """[B, h, w, D] -> the scales of `PyramidEncoder` from the last to the first -> images float32.

    A linear map makes each place 2x2 of the next finer grid, with a ninth of the work of a 3x3 convolution
    there; the residual blocks that follow smooth the squares' edges.
    """

    def __init__(self, config, rngs, *, outputs, dtype):
        _check_pyramid(config)
        if config.cell_layers:
            raise ValueError(
                "model.cell_layers are a part of decoders of patches: a 'cnn' has 0, found "
                f"{config.cell_layers}"
            )
        widths = config.channels
        self.stem = Conv(config.width, widths[-1], ("window", "embed"), rngs, dtype=dtype)
        self.middle = Scale(config, widths[-1], widths[-1], rngs, dtype=dtype)
        self.scales, self.up = nnx.Dict(), nnx.Dict()
        before = widths[-1]
        for k in reversed(range(len(widths))):
            self.scales[str(k)] = Scale(config, before, widths[k], rngs, dtype=dtype)
            before = widths[k]
            if k:
                self.up[str(k)] = layers.Linear((before, 4 * before), ("embed", "window"), rngs, dtype=dtype)
        self.head = Conv(before, outputs, ("window", "pixels"), rngs, bias=True, dtype=dtype)

    def __call__(self, x):
        x = self.middle(self.stem(x))
        for k in reversed(range(len(self.scales))):
            x = self.scales[str(k)](x)
            if k:
                x = unpatchify(self.up[str(k)](x), 2)
        return self.head(jax.nn.silu(layers.rms_norm(x))).astype(jnp.float32)


# All meet at [B, h, w, config.width], so that each encoder goes with each decoder.
ENCODERS = {**dict.fromkeys(TOWERS, PatchEncoder), "cnn": PyramidEncoder}
DECODERS = {**dict.fromkeys(TOWERS, PatchDecoder), "cnn": PyramidDecoder}


def decoder_reach(config):
    """How many codes away, along each axis, a code still changes pixels: the radius of what a decoder sees.

    Exactly so for decoders of convolutions. None for attention that sees everything; of a window it is the farthest
    that can be, though little of a code gets there.

    It counts, on each layer's grid, the places by which a change has spread beyond the code's own: a 3x3
    convolution adds one, and on a grid twice as fine they are twice as many. A code of which only some pixels
    change counts whole.
    """
    if config.decoder == "attention" and not config.window:
        return None
    if config.decoder == "cnn":
        scale = 2 * config.blocks  # convolutions on one grid
        reach = 1 + scale  # the stem's and the middle's
        for k in reversed(range(len(config.channels))):
            reach = (reach + scale) * (2 if k else 1)
        return -(-(reach + 1) // config.patch)  # in pixels, with the head's
    reach = config.layers * {"patch": 0, "conv": 1, "attention": config.window}[config.decoder]
    return reach + -(-config.cell_layers // CELLS)


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
    """Encoder -> quantizer -> decoder; any image size that the patch divides.

    config: `encoder` and `decoder` (names of `ENCODERS` and `DECODERS`), `patch`, `width`, `alpha` (images
    have one), `quantizer` (see `make_quantizer`), `dtype`, and what the encoder and the decoder take of it.
    """

    def __init__(self, config, rngs):
        for what, name, known in (
            ("encoder", config.encoder, ENCODERS),
            ("decoder", config.decoder, DECODERS),
        ):
            if name not in known:
                raise ValueError(f"unknown {what} {name!r}; known: {', '.join(known)}")
        dtype = jnp.dtype(config.dtype)
        self.patch, self.channels = config.patch, 4 if config.alpha else 3
        self.quantizer = make_quantizer(config.quantizer, rngs)
        self.reach = decoder_reach(config)
        D, C = config.width, self.quantizer.channels
        self.encoder = ENCODERS[config.encoder](config, rngs, inputs=self.channels, dtype=dtype)
        self.to_features = layers.Linear((D, C), ("embed", "code"), rngs, bias=True)
        self.from_features = layers.Linear((C, D), ("code", "embed"), rngs, bias=True, dtype=dtype)
        self.decoder = DECODERS[config.decoder](config, rngs, outputs=self.channels, dtype=dtype)
        # It foresees digits, and of these only FSQ's are rounded from something that it could be told.
        self.prior = Prior(C, D, rngs) if isinstance(self.quantizer, FSQ) else None

    def features(self, images):
        """Images [B, H, W, c] in [-1, 1] -> what is to be quantized [B, h, w, C].

        Raises ValueError where the patch does not divide the size or c is not the model's.
        """
        H, W, channels = images.shape[1:]
        if channels != self.channels:
            advice = (
                "add an alpha of 1"
                if self.channels == 4
                else "lay them over a background, or train a tokenizer with model.alpha"
            )
            raise ValueError(
                f"this tokenizer expects images of {self.channels} channels, found {channels}: {advice}"
            )
        if H % self.patch or W % self.patch:
            raise ValueError(_indivisible(self.patch, H, W))
        return self.to_features(self.encoder(images))

    def encode(self, images):
        """Images [B, H, W, c] in [-1, 1] -> quantized values [B, h, w, C]."""
        return self.quantizer(self.features(images))[0]

    def decode(self, values):
        """Quantized values [B, h, w, C] -> images float32 [B, H, W, c], not clipped."""
        return self.decoder(self.from_features(values))

    def encode_codes(self, images):
        """Images [B, H, W, c] in [-1, 1] -> codes int32 [B, h, w]."""
        return self.quantizer.index(self.features(images))

    def decode_codes(self, codes):
        """Codes int32 [B, h, w] -> images float32 [B, H, W, c], not clipped."""
        return self.decode(self.quantizer.lookup(codes))


PROGRAMS = 64  # compiled ones that a tokenizer keeps, of its encoder and of its decoder
HALO = 4  # codes around a tile of decoders with attention


class Tokenizer:
    """A trained autoencoder: images uint8 [B, H, W, c] <-> codes int32 [B, h, w].

    With `devices` each batch is shared out among these (all that this process has, as a rule).

    `halo` is how many codes around a tile are decoded with it (see `decode`).
    """

    def __init__(self, model, color_digits=0, devices=()):
        self.color_digits = color_digits  # the first of a code's digits, where these carry its colours alone
        self.patch, self.codes = model.patch, model.quantizer.codes
        self.alpha = model.channels == 4
        self.levels = tuple(int(level) for level in model.quantizer.levels)
        self.exact = model.reach is not None  # tiles decode as the whole does
        self.halo = model.reach if self.exact else HALO
        self.model = model
        graphdef, self._params = nnx.split(model)
        self._rows = None
        if len(devices) > 1:
            mesh = jax.sharding.Mesh(np.array(devices), ("data",))
            self._rows = NamedSharding(mesh, PartitionSpec("data"))
            self._params = jax.device_put(self._params, NamedSharding(mesh, PartitionSpec()))
        self._shapes = {}  # that each of these has a program for
        run = functools.partial(jax.jit, out_shardings=meshes.whole())
        self._encode = run(lambda p, x: _exactly(nnx.merge(graphdef, p).encode_codes, to_float(x)))
        self._decode = run(lambda p, c: to_uint8(nnx.merge(graphdef, p).decode_codes(c)))

    def encode(self, images, batch=64):
        """Images uint8 [B, H, W, c] -> codes int32 [B, h, w], `batch` images at a time.

        A tokenizer with alpha takes RGB as opaque. ValueError for RGBA where it has none.
        """
        if self.alpha and images.shape[-1] == 3:
            images = pictures.opaque(images)
        return self._in_batches(self._encode, images, batch)

    def decode(self, codes, batch=64, tile=None):
        """Codes int32 [B, h, w] -> images uint8 [B, H, W, c], `batch` grids at a time.

        With `tile`, grids longer than tile + 2 * halo codes along an axis are decoded in windows of that many
        codes, `batch` windows at a time: the device's memory no longer grows with the image, and all large
        images share one program. Windows are shifted inwards where they would leave the grid, so that they
        end where the image does and see what it sees there.

        A decoder of convolutions, or of attention within a `window`, gives the image it gives without tiles (but for
        a gray level where another program rounds otherwise): what is kept of a tile is `halo` codes from its cut sides.

        Of attention that sees everything no halo is wide enough. There, neighbouring windows overlap by 2 * `halo` codes and are
        blended linearly, into another image than the whole and one as good: a small model that had learned
        from 8x8 codes for 400 steps decoded 32x48 codes in tiles of 8 with 29 dB from the whole (in tiles of
        16: 32 dB; with twice the halo 33 and 37), but 18.9 dB from the original, the whole being 18.5. Best
        are windows as large as the grids it learned from.

        ValueError for codes that this tokenizer has not.
        """
        codes = np.asarray(codes)
        if codes.size and not 0 <= codes.min() <= codes.max() < self.codes:
            raise ValueError(f"codes must be in [0, {self.codes}), found {codes.min()} to {codes.max()}")
        if tile is None:
            return self._in_batches(self._decode, codes, batch)
        if tile < 1:
            raise ValueError(f"a tile has at least 1 code along each side, found {tile}")
        cuts = (windows(n, tile, self.halo, self.patch, self.exact) for n in codes.shape[1:])
        (ys, h, tall), (xs, w, wide) = cuts
        cut = [codes[:, y : y + h, x : x + w] for y in ys for x in xs]
        pixels = self._in_batches(self._decode, np.concatenate(cut), batch)
        pixels = pixels.reshape(len(ys), len(xs), len(codes), *pixels.shape[1:])
        p = self.patch
        whole = np.zeros((len(codes), *(p * n for n in codes.shape[1:]), pixels.shape[-1]), np.float32)
        for i, y in enumerate(p * ys):
            for j, x in enumerate(p * xs):
                rows, columns = slice(y, y + p * h), slice(x, x + p * w)
                weight = tall[i, rows, None, None] * wide[j, columns, None]
                whole[:, rows, columns] += weight * pixels[i, j]
        return np.round(whole).astype(np.uint8)

    def _in_batches(self, function, x, batch):
        """Applies a jitted function in equal, padded batches, so that it compiles once a shape; of many shapes all programs are let go, as
        each holds megabytes and whoever serves gets every size that there is."""
        if not len(x):
            raise ValueError("there is nothing to encode or decode: expected at least one image")
        if self._rows is not None:
            batch = -(-batch // self._rows.num_devices) * self._rows.num_devices
        shapes = self._shapes.setdefault(function, set())
        if len(shapes) >= PROGRAMS and (batch, x.shape[1:]) not in shapes:
            function.clear_cache()
            shapes.clear()
        shapes.add((batch, x.shape[1:]))
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


def _exactly(function, x):
    """function(x) with products in float32, whatever the chip would rather do: what is rounded to codes lies, for the commonest
    patches, so near to a border that rounded products give other codes than those that a transformer was trained on."""
    with jax.default_matmul_precision("highest"):
        return function(x)


def windows(n, tile, halo, patch, exact=True):
    """How an axis of n codes is cut: where windows start, their size in codes, and what each counts for the axis'
    pixels, `patch` a code: float32 [windows, n * patch] with columns that sum to 1. Windows overlap by 2 * `halo` codes,
    where one ends and the next begins or, unless `exact`, fades into it."""
    size = min(tile + 2 * halo, n)
    starts = np.minimum(np.arange(0, n - size + tile, tile), n - size)
    pixels = np.arange(n * patch) + 0.5
    from_seam = pixels - patch * (halo + tile * np.arange(1, len(starts)))[:, None]
    later = from_seam > 0 if exact else np.clip(0.5 + from_seam / (2 * halo * patch), 0, 1)
    later = np.concatenate([np.ones((1, len(pixels))), later, np.zeros((1, len(pixels)))])
    return starts, size, (later[:-1] - later[1:]).astype(np.float32)


def load_tokenizer(workdir):
    """Restores the `Tokenizer` of a tokenizer run (or of an exported copy)."""
    config = ml_collections.ConfigDict(checkpoint.read_config(workdir, "tokenizer"))
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: Autoencoder(config.model, None)))
    params, _ = checkpoint.load_weights(workdir, nnx.to_pure_dict(abstract), beside=("discriminator",))
    color_digits = config.loss.color_digits if config.loss.recolor else 0
    return Tokenizer(nnx.merge(graphdef, params), color_digits, jax.local_devices())
