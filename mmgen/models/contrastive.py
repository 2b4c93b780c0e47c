"""Two towers that put images and texts that belong together into one direction: CLIP, SigLIP.

Shapes: B pairs, images [B, H, W, 3] in [-1, 1], tokens [B, T], D tower width, E joint width, h = H / patch.
"""

import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx

from mmgen.data import images as pictures
from mmgen.models import layers
from mmgen.models.attention import LOW, attention, bias_of
from mmgen.models.autoencoders import patchify, to_float
from mmgen.models.lookup import lookup
from mmgen.runtime import checkpoint
from mmgen.runtime import mesh as meshes
from mmgen.runtime.mesh import constrain
from mmgen.text import Text

LOSSES = ("softmax", "sigmoid")


class Pool(nnx.Module):
    """Attention of one learned query over all tokens, then an MLP: the head of SigLIP (arXiv:2303.15343), from
    set transformers (arXiv:1810.00825)."""

    def __init__(self, config, rngs, *, dtype):
        D, N, C = config.width, config.heads, config.head_dim
        self.dtype = dtype
        self.query = nnx.Param(layers.normal(rngs, (N, C), 1.0), axes=("query", "head_dim"))
        self.k = layers.Linear((D, N, C), ("embed", "heads", "head_dim"), rngs, dtype=dtype)
        self.v = layers.Linear((D, N, C), ("embed", "heads", "head_dim"), rngs, dtype=dtype)
        self.out = layers.Linear((N * C, D), ("heads", "embed"), rngs, dtype=dtype)
        self.mlp = layers.MLP(D, config.mlp, rngs, dtype=dtype)

    def __call__(self, x, bias=None):
        """[B, T, D], and what `attention` takes as a bias [B, 1, T] -> [B, D]."""
        B = len(x)
        query = jnp.broadcast_to(self.query[...].astype(self.dtype), (B, 1, *self.query.shape))
        y = attention(layers.rms_norm(query), layers.rms_norm(self.k(x)), self.v(x), bias)
        y = self.out(y.reshape(B, -1))
        return y + self.mlp(layers.rms_norm(y))


class Encoder(nnx.Module):
    """Bidirectional blocks, and a pool."""

    def __init__(self, config, rngs, *, dtype):
        self.config, self.dtype = ml_collections.FrozenConfigDict(config), dtype
        self.blocks = layers.stack(lambda r: layers.Block(config, r, dtype=dtype), config.layers, rngs)
        self.pool = Pool(config, rngs, dtype=dtype)

    def __call__(self, x, positions, bias=None):
        """[B, T, D], positions int [1, T, A] -> normed tokens [B, T, D]."""
        c = self.config
        cos_sin = layers.rope(positions, c.head_dim, c.rope_base)
        x = constrain(x, ("batch", "length", None))
        x = layers.scan(self.blocks, x, cos_sin, bias, remat=c.remat, unroll=c.unroll)
        return layers.rms_norm(x)


class ImageTower(nnx.Module):
    """A ViT (arXiv:2010.11929) with two-axis rotary positions; any image size that the patch divides."""

    def __init__(self, config, rngs, *, dtype):
        self.patch = config.patch
        pixels = config.patch**2 * 3
        self.stem = layers.Linear((pixels, config.width), ("pixels", "embed"), rngs, bias=True, dtype=dtype)
        self.encoder = Encoder(config, rngs, dtype=dtype)

    def _patches(self, images):
        """-> [B, h * w, D], positions int [1, h * w, 2], (h, w)."""
        x = self.stem(patchify(images, self.patch))
        B, h, w, D = x.shape
        grid = jnp.stack(jnp.meshgrid(jnp.arange(h), jnp.arange(w), indexing="ij"), -1)
        return x.reshape(B, h * w, D), grid.reshape(1, h * w, 2), (h, w)

    def grid(self, images):
        """Images -> normed features [B, h, w, D]."""
        x, positions, sides = self._patches(images)
        return self.encoder(x, positions).reshape(len(x), *sides, -1)

    def depths(self, images):
        """Images -> features [B, h, w, D] after the stem and after each layer, normed."""
        x, positions, sides = self._patches(images)
        c = self.encoder.config
        cos_sin, found = layers.rope(positions, c.head_dim, c.rope_base), [x]
        for block in layers.unstack(self.encoder.blocks, c.layers):
            found.append(block(found[-1], cos_sin))
        return [layers.rms_norm(y).reshape(len(y), *sides, -1) for y in found]

    def __call__(self, images):
        """Images -> pooled features [B, D]."""
        x, positions, _ = self._patches(images)
        return self.encoder.pool(self.encoder(x, positions))


class TextTower(nnx.Module):
    """A bidirectional transformer over the pieces of a text; `vocab` is how many pieces there are."""

    def __init__(self, config, vocab, rngs, *, dtype):
        self.dtype = dtype
        rows = -(-vocab // config.vocab_multiple) * config.vocab_multiple
        self.embedding = nnx.Param(layers.normal(rngs, (rows, config.width), 1.0), axes=("vocab", "embed"))
        self.encoder = Encoder(config, rngs, dtype=dtype)

    def __call__(self, tokens, lengths):
        """tokens int32 [B, T], of which the first lengths int32 [B] count -> pooled features [B, D]."""
        T = tokens.shape[1]
        bias = bias_of(jnp.arange(T) < lengths[:, None])[:, None]
        x = lookup(self.embedding[...].astype(self.dtype), tokens)
        x = self.encoder(x, jnp.arange(T)[None, :, None], bias)
        return self.encoder.pool(x, bias)


class Contrastive(nnx.Module):
    """An image tower and a text tower with a joint space of unit vectors, and the temperature of their loss.

    The temperature is learned as its logarithm and kept within [1, `max_scale`] after every step, as in CLIP
    (arXiv:2103.00020): the optimizer projects what says its `bounds`.
    """

    def __init__(self, config, vocab, rngs):
        if config.loss not in LOSSES:
            raise ValueError(f"unknown contrastive loss {config.loss!r}; known: {', '.join(LOSSES)}")
        self.kind = config.loss
        dtype = jnp.dtype(config.dtype)
        self.image = ImageTower(config.image, rngs, dtype=dtype)
        self.text = TextTower(config.text, vocab, rngs, dtype=dtype)
        join = lambda width: layers.Linear((width, config.joint), ("embed", "joint"), rngs)
        self.image_out, self.text_out = join(config.image.width), join(config.text.width)
        sigmoid = config.loss == "sigmoid"
        scale = math.log(10.0 if sigmoid else 1 / 0.07)
        self.scale = nnx.Param(jnp.float32(scale), axes=(), bounds=(0.0, math.log(config.max_scale)))
        # So many more pairs are wrong than right: the loss begins with saying so.
        self.bias = nnx.Param(jnp.float32(-10.0), axes=()) if sigmoid else None

    def embed_images(self, images):
        """-> unit vectors float32 [B, E]."""
        return unit(self.image_out(layers.rms_norm(self.image(images))))

    def embed_texts(self, tokens, lengths):
        """-> unit vectors float32 [B, E]."""
        return unit(self.text_out(layers.rms_norm(self.text(tokens, lengths))))


def unit(x):
    """Vectors of length 1, in float32."""
    x = layers.high(x)
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), -1, keepdims=True) + 1e-12)


def pair_loss(images, texts, scale, bias, same, altered=None):
    """The loss of each pair of unit vectors [B, E], [B, E] in a batch, and whether each image finds its text.

    Softmax over the batch both ways, the mean of the two (arXiv:2103.00020), or with a `bias` that is not None the
    sum of the sigmoid losses of an image with all texts (arXiv:2303.15343). An image and a text of different pairs
    are wrong for one another unless same[i] and same[j], int [B, k], agree in one of the k numbers, where they are
    left out. `altered` [B, n, E] are more texts that are wrong for their own image (arXiv:2210.01936); the texts
    know nothing of them.

    Returns float32 [B], bool [B]. The sums are exact over all of the batch on a mesh: each device holds the
    logits of its own images with all texts, [B / devices, B].
    """
    logits = scale * jnp.einsum("ie,je->ij", images, texts, precision="highest")
    logits = constrain(logits, ("batch", None))
    right = scale * jnp.sum(images * texts, -1)
    # Known from data alone: a mask that is the same for every batch, as of the diagonal, would be folded into the
    # program as a constant of B x B.
    wrong = (same[:, None] != same).all(-1)
    others = jnp.where(wrong, logits, LOW)
    found = right > others.max(1)
    more = None if altered is None else scale * jnp.einsum("ie,ine->in", images, altered, precision="highest")
    if bias is not None:
        each = jnp.where(wrong, jax.nn.softplus(logits + bias), 0.0).sum(1)
        each += 0.0 if more is None else jax.nn.softplus(more + bias).sum(1)
        return each + jax.nn.softplus(-right - bias), found
    row, column = (jnp.logaddexp(right, jax.nn.logsumexp(others, axis=axis)) for axis in (1, 0))
    row = row if more is None else jnp.logaddexp(row, jax.nn.logsumexp(more, axis=1))
    return (row + column) / 2 - right, found


def loss(model, batch, key=None):
    """{name: (sum over pairs, pairs)}: "loss" as `pair_loss`, and what is watched.

    batch: images uint8 [B, H, W, 3], tokens int32 [B, T], lengths int32 [B], same int32 [B, 2] (of the text and of
    the document), and perhaps altered_tokens [B, n, T] and altered_lengths [B, n] of texts that are wrong for their
    image.
    """
    images = model.embed_images(to_float(batch["images"]))
    texts = model.embed_texts(batch["tokens"], batch["lengths"])
    scale = jnp.exp(model.scale[...])
    bias = None if model.bias is None else model.bias[...]
    altered = None
    if "altered_tokens" in batch:
        B, k, T = batch["altered_tokens"].shape
        altered = model.embed_texts(
            batch["altered_tokens"].reshape(-1, T), batch["altered_lengths"].reshape(-1)
        )
        altered = altered.reshape(B, k, -1)
    each, found = pair_loss(images, texts, scale, bias, batch["same"], altered)
    n = jnp.float32(len(each))
    return {
        "loss": (each.sum(), n),
        "batch_recall": (found.sum().astype(jnp.float32), n),
        "scale": (scale * n, n),
    }


def distance(tower, a, b):
    """How unlike two images [B, H, W, 3] look to an `ImageTower`: float32 [B].

    The squared distance of features of unit length at each place, the mean over places and the sum over depths:
    LPIPS (arXiv:1801.03924) without learned weights, which pixels that move a little change little.
    """
    pairs = zip(tower.depths(a), tower.depths(b))
    return sum(jnp.mean(jnp.sum(jnp.square(unit(x) - unit(y)), -1), (1, 2)) for x, y in pairs)


def tokens_of(texts, text, length):
    """Strings -> tokens int32 [B, length], cut and padded, and lengths int32 [B], at least 1."""
    tokens, lengths = np.zeros((len(texts), length), np.int32), np.ones(len(texts), np.int32)
    for row, each in enumerate(texts):
        ids = text.encode(each)[:length]
        tokens[row, : len(ids)], lengths[row] = ids, max(len(ids), 1)
    return tokens, lengths


class Towers:
    """Trained towers for use: pictures and strings -> vectors, scores and features.

    Within a mesh every process gets all vectors.
    """

    def __init__(self, model, text, length, size, run):
        self.text, self.length, self.size, self._run = text, length, tuple(size), run
        self.model = model
        graphdef, self._params = nnx.split(model)
        run = lambda method: jax.jit(
            lambda p, *x: method(nnx.merge(graphdef, p), *x), out_shardings=meshes.whole()
        )
        self._images = run(lambda model, x: model.embed_images(to_float(x)))
        self._texts = run(lambda model, *x: model.embed_texts(*x))
        self._features = run(lambda model, x: layers.high(model.image(to_float(x))))

    @functools.cached_property
    def name(self):
        """What measures made with them are called after, "RUN@" and the first digits of the weights' hash: a
        CLIPScore or a Fréchet distance means nothing without its network."""
        return f"{self._run}@{checkpoint.weights_hash(nnx.to_pure_dict(self._params))[:6]}"

    def embed_images(self, images):
        """Images, uint8 [H, W, 3] each of any size -> unit vectors float32 [B, E]. Of a fourth channel nothing is seen.

        They are fitted into the size of the training, their middle where the aspect ratio is another.
        """
        return in_batches(self._images, self._params, (self._fitted(images),))

    def features(self, images):
        """-> the image tower's pooled features, float32 [B, D]: for distances between sets of pictures."""
        return in_batches(self._features, self._params, (self._fitted(images),))

    def embed_texts(self, texts):
        """Strings -> unit vectors float32 [B, E]."""
        return in_batches(self._texts, self._params, tokens_of(texts, self.text, self.length))

    def score(self, images, texts):
        """Cosines float32 [B] of images and texts, pair by pair."""
        return np.sum(self.embed_images(images) * self.embed_texts(texts), -1)

    def _fitted(self, images):
        return np.stack([pictures.fit(image[..., :3], *self.size) for image in images])


def in_batches(function, params, arrays, batch=256):
    """function(params, *arrays) in batches of a power of two, so that it compiles few times -> numpy."""
    n, out = len(arrays[0]), []
    for start in range(0, n, batch):
        part = [x[start : start + batch] for x in arrays]
        rows = len(part[0])
        fill = min(batch, 1 << (rows - 1).bit_length()) - rows
        part = [np.concatenate([x, np.repeat(x[-1:], fill, axis=0)]) for x in part]
        out.append(np.asarray(function(params, *part))[:rows])
    return np.concatenate(out)


def load_towers(workdir):
    """The `Towers` of a contrastive run."""
    workdir = Path(workdir)
    config = ml_collections.ConfigDict(checkpoint.read_config(workdir, "contrastive"))
    text = Text(workdir / "text.model")
    make = functools.partial(Contrastive, config.model, text.size)
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: make(None)))
    params, _ = checkpoint.load_weights(workdir, nnx.to_pure_dict(abstract))
    return Towers(nnx.merge(graphdef, params), text, config.data.length, config.data.source.size, config.name)
