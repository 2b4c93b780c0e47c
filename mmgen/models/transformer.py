"""The sharded transformer that reads and writes text and images.

Pre-norm RMSNorm, QK-norm, SwiGLU, grouped-query attention, (t, y, x) rotary embedding, scanned
layers. Shapes: B batch, T tokens, D model, V vocabulary, K kv-heads, C channels a head.
"""

import functools
import math

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx

from mmgen.grammar import Grammar
from mmgen.models import layers
from mmgen.models.attention import bias_of
from mmgen.models.cross_entropy import cross_entropy
from mmgen.models.lookup import lookup, rows_of, rows_of_each
from mmgen.runtime.mesh import constrain

_OCTAVES = 6  # of the place features: periods of 4, 8, ... 128 patches
AROUND = 5  # codes around the next one
BENEATH = 5  # codes of an earlier image: at the next place, and left, right, above and below
CONTEXTS = ("codes", "cross", "both")  # by what later tokens know of an image: see `Transformer`


def crossings(config):
    """How many layers of a model's config attend to image features. Without a `context`, as runs from before there
    was one, it is "codes". ValueError for another, and for layers that do not divide."""
    context = config.get("context", "codes")
    if context not in CONTEXTS:
        raise ValueError(f"config.model.context: expected one of {', '.join(CONTEXTS)}; found {context!r}")
    if context == "codes":
        return 0
    if config.cross_every < 1 or config.layers % config.cross_every:
        raise ValueError(
            f"config.model.cross_every={config.cross_every} does not divide config.model.layers={config.layers}"
        )
    return config.layers // config.cross_every


class ImageEncoder(nnx.Module):
    """A ViT (arXiv:2010.11929) over the codes of images, in place among the tokens of packed rows.

    Its patches are what the transformer itself reads of each code, whatever the tokenizer. In the causal rows a code
    knows those before it; here it sees all of its image, and nothing else.
    """

    def __init__(self, config, source, rngs, *, dtype):
        self.config = config
        self.join = layers.Linear((source, config.width), ("embed", "joint"), rngs, dtype=dtype)
        self.blocks = layers.stack(lambda r: layers.Block(config, r, dtype=dtype), config.layers, rngs)

    def __call__(self, x, images, cos_sin, **how):
        """x [B, T, D], images int32 [B, T] as `images_of` says -> features [B, T, E], which mean something where there
        are images."""
        see = bias_of(images[:, :, None] == images[:, None])
        return layers.rms_norm(layers.scan(self.blocks, self.join(x), cos_sin, see, **how))


class Transformer(nnx.Module):
    """Causal transformer over packed rows; `vocab` is the grammar's joint vocabulary size.

    `levels` are those of an FSQ tokenizer, whose codes are the last of the vocabulary: a code is then
    read and written as its digits together, plus a part of its own that starts at zero. Codes that
    are alike share what is learned of them, so that rare ones need not be learned alone. Where the first
    `color_digits` of them carry colours (see stages/tokenizer.py), these together are also read and written
    as one, and so are the rest: an outline is the same in any colour. `max_side` and `depth` are the grammar's;
    `code_start` is needed where there are no levels to tell it.

    `config.context` says how an image's codes reach the tokens after it. With "codes" by attention to them. With
    "both" also by gated cross-attention to the features that an `ImageEncoder` makes of every image that was
    finished before, before every `config.cross_every` layers. With "cross" by that alone: codes are then seen
    within their own image only.
    """

    def __init__(
        self, config, vocab, rngs, levels=(), color_digits=0, max_side=0, depth=1, code_start=None
    ):  # fmt: skip
        # Frozen, so that the graph definition can be hashed (it is a static argument of jit).
        self.config, self.dtype = ml_collections.FrozenConfigDict(config), jnp.dtype(config.dtype)
        D = config.width
        codes = math.prod(levels) if levels else 0
        parts = [range(i, i + 1) for i in range(len(levels))]
        if color_digits:
            parts += [range(color_digits), range(color_digits, len(levels))]
        self.levels, self.parts = tuple(levels), tuple(parts)
        # Tables may have more rows than tokens, so that a tensor axis can share them evenly.
        self.vocab, self.code_start = vocab, vocab - codes if code_start is None else code_start
        padded = lambda n: -(-n // config.vocab_multiple) * config.vocab_multiple
        self.rows = padded(vocab)
        outline = config.get("outline", 0)
        # Where colours and outlines are told apart they are all that a code is: it has no row of its own.
        own = (jnp.arange(padded(vocab - codes) if outline else self.rows) < vocab - codes)[:, None]
        self.embedding = nnx.Param(own * layers.normal(rngs, (len(own), D), 1.0), axes=("vocab", "embed"))
        self.blocks = layers.stack(lambda r: layers.Block(config, r, dtype=self.dtype), config.layers, rngs)
        # Where codes are told in two steps, first the colour and then the outline, the head has a row for each colour.
        self.colors = math.prod(levels[:color_digits]) if outline else 0
        if outline and (self.colors < 2 or config.tied or depth > 1):
            raise ValueError(
                "model.outline needs an FSQ tokenizer with color digits, one code a patch, model.factored=True and "
                "model.tied=False; set it to 0"
            )
        self.first = self.code_start + self.colors if self.colors else vocab
        own_head = jnp.ones((padded(self.first), 1)) if self.colors else own
        self.head = (
            None
            if config.tied
            else nnx.Param(
                own_head * layers.normal(rngs, (padded(self.first), D), D**-0.5), axes=("vocab", "embed")
            )
        )
        outlines = codes // max(self.colors, 1)
        self.outline = (
            OutlineHead(D, outline, self.colors, outlines, padded(outlines), rngs, self.dtype)
            if self.colors
            else None
        )
        scale = max(len(parts), 1) ** -0.5
        rows = sum(math.prod(levels[i] for i in part) for part in parts)
        digits = lambda scale: nnx.Param(layers.normal(rngs, (rows, D), scale), axes=("code", "embed"))
        self.digit_embedding = digits(scale) if levels else None
        self.digit_head = digits(scale * D**-0.5) if levels and not config.tied and not self.colors else None

        # Rotary embedding tells how far apart two tokens are; where in its image a code stands would have
        # to be inferred. These features of (y - t, x - t) say it outright, for any size; 0 for text.
        self.place = layers.Linear((4 * _OCTAVES, D), ("place", "embed"), rngs, dtype=self.dtype)

        # What is drawn already around the next code decides most of it: given at once, no head has to find it.
        self.max_side, self.most_codes = max_side, max_side**2 * depth
        self.around = (
            layers.Linear((AROUND * rows, D), ("place", "embed"), rngs, scale=D**-0.5, dtype=self.dtype)
            if config.around and levels
            else None
        )

        # Whose colour "red" is, the next word says: words that stand together are bound before any head looks for them.
        # And what an edit leaves alone is what the image before has at the same place.
        self.beneath = config.get("beneath", 0)
        near = config.before + BENEATH * self.beneath
        self.before = layers.Linear((near * D, D), ("mlp", "embed"), rngs, dtype=self.dtype) if near else None

        # Last of all, so that the rest begins as it does without.
        count, self.hidden_codes = crossings(config), config.get("context") == "cross"
        if self.hidden_codes and self.beneath:
            raise ValueError(
                'model.beneath shows codes of other images, which model.context="cross" hides: set it to 0'
            )
        self.encoder = ImageEncoder(self.config.encoder, D, rngs, dtype=self.dtype) if count else None
        crossing = lambda r: layers.CrossBlock(config, config.encoder.width, r, dtype=self.dtype)
        self.cross = layers.stack(crossing, count, rngs) if count else None

    def _digits(self, codes):
        """[..., rows]: ones at the rows of the digits' tables that make up each code; zeros where it is negative."""
        digit = lambda i: codes // math.prod(self.levels[:i]) % self.levels[i]
        found = []
        for part in self.parts:
            row = functools.reduce(lambda row, i: row * self.levels[i] + digit(i), part, 0)
            size = math.prod(self.levels[i] for i in part)
            found.append(jax.nn.one_hot(jnp.where(codes < 0, -1, row), size, dtype=self.dtype))
        return jnp.concatenate(found, -1)

    def _split(self, codes):
        """Where in `_halves` the two halves of each code are; -1 twice where it is negative."""
        outlines, colors = jnp.divmod(codes, self.colors)
        return jnp.where(codes < 0, -1, colors), jnp.where(codes < 0, -1, self.colors + outlines)

    def _halves(self, rows):
        """Rows [..., R, D] of the digits' tables -> [..., colors + outlines, D]: a code's is the sum of that of its colour
        and that of its outline, each the sum of the rows of its own digits."""
        starts = np.cumsum([0, *(math.prod(self.levels[i] for i in part) for part in self.parts)])
        found = []
        for half in self.parts[-2:]:
            number = np.arange(math.prod(self.levels[i] for i in half))
            digit = lambda i: number // math.prod(self.levels[half.start : i]) % self.levels[i]
            for start, part in zip(starts, self.parts):
                if half.start <= part.start and part.stop <= half.stop:
                    row = functools.reduce(lambda row, i: row * self.levels[i] + digit(i), part, 0)
                    found.append((half, rows[..., start + row, :]))
        sums = [sum(each for of, each in found if of is half) for half in self.parts[-2:]]
        return jnp.concatenate(sums, -2)

    def _lookup_halves(self, ids, codes_from=None):
        """What `lookup` in the `embedding_table` gives, without making it: large codebooks have few halves. Of the last
        axis, what stands from `codes_from` on are codes or nothing, and have no rows of their own to be looked up."""
        halves = constrain(self._halves(self.digit_embedding[...]), (None, None)).astype(self.dtype)
        codes = ids - self.code_start
        first, second = self._split(jnp.where(codes < 0, -1, codes))
        found = rows_of(halves, first) + rows_of(halves, second)
        if codes_from == 0:
            return found
        ids = jnp.where(codes < 0, ids, -1)[..., :codes_from]
        own = lookup(self.embedding[...].astype(self.dtype), ids)
        if codes_from is not None:
            own = jnp.pad(own, ((0, 0),) * (own.ndim - 2) + ((0, codes.shape[-1] - codes_from), (0, 0)))
        return own + found

    def _table(self, own, digits):
        """[rows, D]: each token's own row, and for a code those of its digits added."""
        own = own[...]
        if digits is None:
            return own
        # A sum over a grid with an axis for each digit, of parts that vary along some: codes may be many.
        table, at, grid = 0.0, 0, self.levels[::-1]  # the first digit is the fastest
        for part in self.parts:
            sizes = [self.levels[i] for i in part]
            rows = digits[...][at : at + math.prod(sizes)].reshape(*sizes, -1)
            rows = jnp.moveaxis(rows, -1, 0).T  # from the part's last digit to its first
            shape = [n if len(grid) - 1 - i in part else 1 for i, n in enumerate(grid)]
            table, at = table + rows.reshape(*shape, -1), at + math.prod(sizes)
        table = table.reshape(-1, own.shape[1])
        # Padded and added rather than written into a slice: a table that is split over its rows stays so.
        table = jnp.pad(table, ((self.code_start, self.rows - self.vocab), (0, 0)))
        return jnp.pad(own, ((0, self.rows - len(own)), (0, 0))) + table

    def embedding_table(self):
        """[rows, D]: what a token becomes at the input, before its place and its neighbours are added."""
        return self._table(self.embedding, self.digit_embedding)

    def embed(self, tokens, positions, around, before, table=None):
        """tokens int32 [B, T], positions int32 [B, T, 3], around int32 [B, T, AROUND], before int32 [B, T, N] -> [B, T, D].

        `around` is as `around_next` says, `before` as `tokens_before` does and then `beneath_next`. `table` is the
        `embedding_table` where it is at hand already.
        """
        offset = (positions[..., 1:] - positions[..., :1]).astype(jnp.float32)
        angles = offset[..., None] * (np.pi / 2 ** np.arange(1, _OCTAVES + 1, dtype=np.float32))
        waves = jnp.concatenate([jnp.sin(angles), jnp.cos(angles) - 1], -1)
        if table is None and not self.colors:
            table = self.embedding_table()
        look = self._lookup_halves if table is None else lambda ids: lookup(table.astype(self.dtype), ids)
        x = look(tokens) + self.place(waves.reshape(waves.shape[:-2] + (-1,)))
        if self.before is not None:
            earlier = look(before, self.config.before) if table is None else look(before)
            x = x + self.before(earlier.reshape(earlier.shape[:-2] + (-1,)))
        if self.around is None:
            return x
        if self.colors:  # the same as below without a row of ones and zeros for each code
            rows = self._halves(self.around.w[...].astype(self.dtype).reshape(AROUND, -1, self.config.width))
            first, second = self._split(around)
            return x + (rows_of_each(rows, first) + rows_of_each(rows, second)).sum(-2)
        digits = self._digits(around)
        return x + self.around(digits.reshape(digits.shape[:-2] + (-1,)))

    def head_table(self):
        """[rows, D]: what a normed hidden state is multiplied with to give logits."""
        if self.head is None:
            # Tied embeddings start at unit scale for the input; the output side is scaled to match.
            return self.embedding_table() * self.config.width**-0.5
        return self._table(self.head, self.digit_head)

    def logits(self, x):
        """x [..., D] -> float32 logits [..., V]."""
        x = layers.rms_norm(x)
        y = jnp.einsum("nd,vd->nv", x.reshape(-1, x.shape[-1]), self.head_table().astype(self.dtype))
        y = layers.high(y).reshape(x.shape[:-1] + (-1,))[..., : self.first]
        if not self.colors:
            return y
        y, colors = y[..., : self.code_start], y[..., self.code_start :]
        # The colours' digits are the fastest in a code.
        codes = jnp.swapaxes(colors[..., None] + self.outline(x), -1, -2)
        return jnp.concatenate([y, codes.reshape(*y.shape[:-1], -1)], -1)

    def near(self, tokens, segments):
        """What `embed` needs of the tokens near each one: int32 [B, T, AROUND] and [B, T, N]."""
        before = tokens_before(tokens, segments, self.config.before)
        if self.hidden_codes:
            images, _ = images_of(tokens, segments, self.code_start)
            theirs = tokens_before(images, segments, self.config.before)
            before = jnp.where(of_other_images(images, theirs), -1, before)
        begin, width = began(tokens, self.code_start, self.max_side)
        around = around_next(tokens, segments, begin, width, self.code_start)
        beneath = beneath_next(tokens, segments, begin, width, self.code_start, self.beneath)
        return around, jnp.concatenate([before, beneath], -1)

    def near_at(self, tokens, places):
        """As `near`, of one document a row, for the tokens at `places` int32 [B, T] of tokens [B, S] alone."""
        at = jnp.arange(tokens.shape[1])
        stated = stated_width(tokens, self.code_start, self.max_side)
        seen = jnp.where((stated > 0)[:, None] & (at <= places[..., None]), at, -1).max(-1)
        width = jnp.take_along_axis(stated, jnp.maximum(seen, 0), 1)
        around = around_places(places, width)
        of = lambda y, x=tokens: jnp.take_along_axis(x[:, None], jnp.clip(y, 0, x.shape[1] - 1), 2)
        at_places = lambda x: jnp.take_along_axis(x, jnp.minimum(places, x.shape[1] - 1), 1)
        now = at_places(tokens)
        inside = ((now >= self.code_start) & (seen >= 0))[..., None]
        inside &= (seen[..., None] < around) & (around <= places[..., None])
        before = places[..., None] - np.arange(1, self.config.before + 1)
        seen = before >= 0
        if self.hidden_codes:
            images, _ = images_of(tokens, jnp.zeros_like(tokens), self.code_start)
            seen &= ~of_other_images(at_places(images), of(before, images))
        before = jnp.where(seen, of(before), -1)
        if self.beneath:
            sizes = (stated > 0)[:, None]
            last = lambda y: jnp.where(sizes & (at < y[..., None]), at, -1).max(-1)
            pick = lambda x, y: of(y[..., None], x)[..., 0]
            begins, widths = [last(places + 1)], [width]
            for _ in range(self.beneath):
                begins.append(last(begins[-1]))
                widths.append(pick(stated, begins[-1]))
            drawn = (now >= self.code_start) | (pick(stated, places) > 0)
            before = jnp.concatenate(
                [before, _beneath(pick, tokens, places, drawn, begins, widths, self.code_start)], -1
            )
        return jnp.where(inside, of(around) - self.code_start, -1), before

    def rope(self, positions):
        return layers.rope(positions, self.config.head_dim, self.config.rope_base)

    def cross_rope(self, positions):
        """As `rope`, for cross-attention: y and x are counted from the image's corner, so that the same place of
        another image is at a distance of (t, 0, 0), whatever is said between."""
        t = positions[..., :1]
        return self.rope(jnp.concatenate([t, positions[..., 1:] - t], -1))

    def features(self, x, images, positions, **how):
        """The `ImageEncoder`'s of inputs x [B, T, D] (see `embed`)."""
        e = self.config.encoder
        return self.encoder(x, images, layers.rope(positions, e.head_dim, self.config.rope_base), **how)

    def __call__(self, tokens, segments, positions, branches=None):
        """Tokens, segments int32 [B, T], positions int32 [B, T, 3] -> hidden [B, T, D] (see `logits`).

        A token sees itself and the earlier tokens of its own segment; by cross-attention, the features of its images
        that are finished. With `branches` int32 [B, T] it sees of these the tokens of its own branch and of branch 0 alone: several
        answers in one row, to one prompt, which has all images.
        """
        x = self.embed(tokens, positions, *self.near(tokens, segments))
        x = constrain(x, ("batch", "stream", None))
        c = self.config
        how = dict(remat=c.remat, unroll=c.unroll)
        same = segments[:, :, None] == segments[:, None]
        causal, codes = jnp.tril(jnp.ones(same.shape[1:], bool)), (segments, c.attention)
        if branches is not None:  # which no fused kernel can do, nor what hides codes
            same &= (branches == 0)[:, None] | (branches[:, :, None] == branches[:, None])
            codes = bias_of(causal & same), "xla"
        if self.cross is None:
            return layers.scan(self.blocks, x, self.rope(positions), *codes, **how)
        images, finished = images_of(tokens, segments, self.code_start)
        sight = (
            self.cross_rope(positions),
            self.features(x, images, positions, **how),
            same & sees_features(finished, images),
        )
        if self.hidden_codes:
            codes = bias_of(causal & same & sees_codes(images, images)), "xla"
        return layers.scan_crossed(self.cross, sight, self.blocks, x, self.rope(positions), *codes, **how)


class OutlineHead(nnx.Module):
    """The second of the two steps in which a code is told: what is drawn, where its colour is known.

    A code's logit is its colour's plus the log-probability that this gives. So the loss of a code is a softmax over the
    colours and one over the outlines, instead of one over all pairs, and yet any two may depend on each other.
    """

    def __init__(self, width, hidden, colors, outlines, rows, rngs, dtype):
        self.outlines, self.dtype = outlines, dtype
        self.wi = layers.Linear((width, hidden), ("embed", "joint"), rngs, dtype=dtype)
        self.color_embedding = nnx.Param(layers.normal(rngs, (colors, hidden), 1.0), axes=("code", "joint"))
        self.table = nnx.Param(layers.normal(rngs, (rows, hidden), hidden**-0.5), axes=("vocab", "joint"))

    def hidden(self, x, color):
        """Of normed hidden states [..., D] and colours' rows that broadcast against them, [..., hidden]."""
        return nnx.silu(self.wi(x) + color.astype(self.dtype))

    def given(self, x, color):
        """Logits of the outlines, float32 [..., outlines], of normed hidden states [..., D] and colours int32 [...]."""
        return self._logits(self.hidden(x, jnp.take(self.color_embedding[...], color, 0)))

    def __call__(self, x):
        """x [..., D] -> log-probabilities of the outlines with each colour, float32 [..., colors, outlines]."""
        return jax.nn.log_softmax(self._logits(self.hidden(x[..., None, :], self.color_embedding[...])))

    def _logits(self, h):
        table = self.table[...].astype(self.dtype)
        y = jnp.einsum("...h,oh->...o", h, table, preferred_element_type=jnp.float32)
        return y[..., : self.outlines]


def images_of(tokens, segments, code_start):
    """tokens, segments int32 [B, T] -> which image of its row each code belongs to, from 1 on, and 0 beside codes; how many
    images of the row are finished at each token. int32 [B, T] each.

    An image is a run of codes; the grammar has marks between any two.
    """
    code = tokens >= code_start
    goes_on = code[:, :-1] & (segments[:, :-1] == segments[:, 1:])
    begun = jnp.cumsum(code & ~jnp.pad(goes_on, ((0, 0), (1, 0))), 1, dtype=jnp.int32)
    return jnp.where(code, begun, 0), begun - code


def sees_features(finished, images):
    """Of `images_of`, [B, T] of queries and [B, S] of keys -> bool [B, T, S], of one document a row."""
    return (images > 0)[:, None] & (images[:, None] <= finished[..., None])


def sees_codes(images, theirs):
    """`images_of` queries [B, T] and of keys [B, S] -> bool [B, T, S]: all but the codes of other images."""
    return (theirs == 0)[:, None] | (theirs[:, None] == images[..., None])


def of_other_images(images, theirs):
    """`images_of` tokens [B, T] and of some beside each [B, T, N] -> bool [B, T, N]: codes of another image."""
    return (theirs > 0) & (theirs != images[..., None])


def stated_width(tokens, code_start, max_side):
    """The width that each token states, 0 where it states none: <w:1..max_side> precede the codes in the vocabulary."""
    width = tokens - code_start + max_side + 1
    return jnp.where((width > 0) & (width <= max_side), width, 0)


def around_places(at, width):
    """Where the codes around the place after `at` stand, in an image of this width: int32 [..., AROUND]."""
    above = at - width + 1
    return jnp.stack([above - 1, above, above + 1, above - width, jnp.broadcast_to(at - 1, above.shape)], -1)


def began(tokens, code_start, max_side):
    """Where the image that a token is in, or the last one before it, states its width, and that width: int32 [B, T]
    each; 0 and 0 before the first."""
    at = jnp.arange(tokens.shape[1])
    stated = stated_width(tokens, code_start, max_side)
    latest = jax.lax.cummax(jnp.where(stated > 0, at * (max_side + 1) + stated, 0), axis=1)
    return jnp.divmod(latest, max_side + 1)


def beneath_next(tokens, segments, begin, width, code_start, images):
    """The codes that each of the last `images` images before has at the place that comes next, and left and right of it,
    above and below: int32 [B, T] and `began` -> int32 [B, T, BENEATH * images].

    -1 where there is no such code, the image before is of another size or another document's, and beside images.
    """
    at = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    pick = lambda x, y: jnp.take_along_axis(x, jnp.clip(y, 0, x.shape[1] - 1), 1)
    mine = lambda y: (y > 0) & (pick(segments, y) == segments)
    begins, widths = [jnp.where(mine(begin), begin, -1)], [width]
    for _ in range(images):
        earlier = pick(begin, begins[-1] - 1)
        begins.append(jnp.where(mine(earlier) & (earlier < begins[-1]), earlier, -1))
        widths.append(pick(width, begins[-1]))
    drawn = (tokens >= code_start) | (at == begin)
    return _beneath(pick, tokens, at, drawn, begins, widths, code_start)


def _beneath(pick, tokens, at, drawn, begins, widths, code_start):
    """Of tokens at places `at`: `begins` and `widths` are those of their own image and of those before, the latest
    first, -1 where there is none; pick(x, y) takes from x [B, S] at y [B, T]."""
    begin, width, found = begins[0], widths[0], []
    height = pick(tokens, begin - 1)
    for earlier, their_width in zip(begins[1:], widths[1:], strict=True):
        alike = drawn & (earlier > 0) & (their_width == width) & (pick(tokens, earlier - 1) == height)
        place = earlier + 1 + at - begin
        for y in (place, place - 1, place + 1, place - width, place + width):
            code = pick(tokens, y)
            found.append(jnp.where(alike & (earlier < y) & (y < begin) & (code >= code_start), code, -1))
    return jnp.stack(found, -1) if found else jnp.zeros((*at.shape, 0), jnp.int32)


def around_next(tokens, segments, begin, width, code_start):
    """The codes above left, above, above right, two above and two left of the place that comes after each code.

    tokens, segments and `began` int32 [B, T] -> int32 [B, T, AROUND]; -1 where the image has no such code, or not yet, and
    beside text. The width of an image is said by the token before its first code; <w:1..max_side> precede the
    codes in the vocabulary. At an image's sides "left" and "right" are the ends of the rows beside.
    """
    at = jnp.arange(tokens.shape[1])
    places = around_places(at, width)
    of = lambda x: jnp.take_along_axis(x[..., None], jnp.clip(places, 0, x.shape[1] - 1), 1)
    inside = ((tokens >= code_start) & (width > 0))[..., None] & (begin[..., None] < places)
    inside &= places <= at[:, None]
    inside &= of(segments) == segments[..., None]
    inside &= (jnp.take_along_axis(segments, begin, 1) == segments)[
        ..., None
    ]  # the width is of this document
    return jnp.where(inside, of(tokens) - code_start, -1)


def tokens_before(tokens, segments, n):
    """The n tokens before each one, the nearest first: int32 [B, T] twice -> [B, T, n]; -1 beyond the segment's start."""
    places = np.arange(tokens.shape[1])[:, None] - np.arange(1, n + 1)
    of = lambda x: x[:, np.maximum(places, 0)]
    return jnp.where((places >= 0) & (of(segments) == segments[..., None]), of(tokens), -1)


def of_codes(config, vocabulary, vocab, rngs):
    """The Transformer for the codes and the grammar that a dict (such as a shard's manifest) describes."""
    levels, colors = (vocabulary["levels"], vocabulary["color_digits"]) if config.factored else ((), 0)
    grammar = Grammar.from_dict(vocabulary["grammar"])
    return Transformer(
        config, vocab, rngs, levels, colors, grammar.max_side, grammar.depth, grammar.code_start
    )  # fmt: skip


def loss(model, batch, *, code_start, z, chunk):
    """Weighted next-token cross-entropy of a packed batch, and what is watched: {name: (sum, weight)}.

    batch: tokens, segments int32 [B, T], positions int32 [B, T, 3], weights float32 [B, T] (of each token as a
    target). Tokens from `code_start` on are image codes. `z` times log Z squared keeps the logits from drifting (arXiv:2204.02311). Beside "loss", the
    cross-entropy of image codes and of text apart, the mean log Z and the root mean square of the last hidden
    states, whose growth announces trouble long before the loss does.
    """
    x = model(batch["tokens"], batch["segments"], batch["positions"])
    # The row is not cut by one for the shift: kernels and meshes want its full, even length. The last place has
    # no target and no weight.
    after = lambda y: jnp.pad(y[:, 1:], ((0, 0), (0, 1)))
    targets, weights = after(batch["tokens"]), after(batch["weights"])
    normed = constrain(layers.rms_norm(x), ("batch", "length", None))
    images, first = targets >= code_start, targets
    if model.colors:
        outlines, colors = jnp.divmod(jnp.where(images, targets - code_start, 0), model.colors)
        first = jnp.where(images, code_start + colors, targets)
    how = z, chunk, model.dtype
    total, entropy, log_z = cross_entropy(normed, model.head_table(), first, weights, model.first, *how)
    if model.colors:
        head = model.outline
        hidden = head.hidden(normed, lookup(head.color_embedding[...], colors, "code"))
        hidden = constrain(hidden, ("batch", "length", None))
        more, theirs, _ = cross_entropy(
            hidden, head.table[...], outlines, weights * images, head.outlines, *how
        )
        total, entropy = total + more, entropy + images * theirs
    of = lambda value, weight: ((value * weight).sum(), weight.sum())
    square = jnp.mean(jnp.square(jax.lax.stop_gradient(layers.high(x))), -1)
    return {
        "loss": (total, weights.sum()),
        "image_loss": of(entropy, weights * images),
        "text_loss": of(entropy, weights * ~images),
        "log_z": of(log_z, weights),
        "output_norm": of(jnp.sqrt(square), batch["segments"] > 0),
    }
