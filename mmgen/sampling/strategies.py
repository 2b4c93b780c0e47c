"""How the next token is chosen from logits.

Shapes: B rows, V vocabulary. Every setting is an array over rows, so that one compiled program
serves unlike requests.
"""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Strategy:
    """How one modality of a request is drawn. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 keep all.

    keep_mode: where the likeliest token is likelier than all others together, or is the one just written,
    it keeps its probability, and temperature shapes the others alone. Something rare at each place, such as
    the first code of an object on a background, then begins as often as was learned: a temperature below 1
    else sharpens it away, most of all where an object must begin and its probability is shared by many codes.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    keep_mode: bool = False

    def __post_init__(self):
        # Written so that what is no number fails.
        right = 0 <= self.temperature <= 1e6 and 0 <= self.top_k < 2**31
        if not (right and 0 < self.top_p <= 1 and 0 <= self.min_p <= 1):
            raise ValueError(
                "expected temperature from 0 to 1e6, top_k >= 0, 0 < top_p <= 1 and 0 <= min_p <= 1, "
                f"found {self}"
            )


def choose(logits, legal, uniform, previous, temperature, top_k, top_p, min_p, keep_mode):
    """Draws one legal token a row -> int32 [B].

    logits float32 [B, V]; legal bool [B, V], at least one a row; uniform float32 [B] in [0, 1) is
    the row's only randomness; previous int32 [B] is the token before, -1 for none; temperature,
    top_p, min_p float32 [B], top_k int32 [B], keep_mode bool [B].
    """
    logits = jnp.where(legal, logits, -jnp.inf)
    # The largest first becomes 0, so that no temperature, however small, makes an infinite one of it.
    scaled = (logits - logits.max(-1, keepdims=True)) / jnp.where(temperature > 0, temperature, 1.0)[:, None]
    p = jax.nn.softmax(scaled, axis=-1)
    p = jax.lax.cond(jnp.any(keep_mode), _keep_mode, lambda p, *_: p, p, logits, previous, keep_mode)
    cut = jnp.any((top_k > 0) | (top_p < 1) | (min_p > 0))
    p = jax.lax.cond(cut, _keep_top, lambda p, *_: p, p, top_k, top_p, min_p)
    # Inverse of the cumulative distribution: the first token whose cumulated weight exceeds u. A parallel
    # cumulative sum is not quite monotone, so that tokens of weight 0 are left out by name; the total is
    # the largest of the others, and u < 1 keeps the threshold below it.
    cumulated = jnp.where(p > 0, jnp.cumsum(p, axis=-1), 0.0)
    total = cumulated.max(axis=-1)
    threshold = jnp.minimum(uniform * total, jnp.nextafter(total, 0.0))
    drawn = jnp.argmax(cumulated > threshold[:, None], axis=-1)
    return jnp.where(temperature > 0, drawn, jnp.argmax(logits, axis=-1)).astype(jnp.int32)


def _keep_mode(p, logits, previous, keep_mode):
    """Gives the likeliest token its probability in `logits` back, where asked for and where that is above
    1/2 or the token repeats the one before."""
    at = jnp.argmax(logits, axis=-1, keepdims=True)
    before = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), at, -1)
    rest = jnp.where(jnp.arange(p.shape[-1]) == at, 0.0, p)
    others = rest.sum(axis=-1, keepdims=True)
    kept = jnp.where(rest > 0, rest * (1 - before) / jnp.where(others > 0, others, 1.0), 0.0)
    kept = jnp.where(jnp.arange(p.shape[-1]) == at, before, kept)
    keeps = keep_mode[:, None] & ((before > 0.5) | (at == previous[:, None]))
    return jnp.where(keeps, kept, p)


def _keep_top(p, top_k, top_p, min_p):
    """Zeroes all but the top_k most likely tokens, all beyond the first top_p of weight (nucleus sampling,
    arXiv:1904.09751), and those less likely than min_p times the likeliest (arXiv:2407.01082). Ties at the border
    are kept.

    Nothing is sorted. What is kept has a least probability, and of numbers that are not negative the order is that
    of their bits: thirty halvings find it exactly.
    """
    bits = jax.lax.bitcast_convert_type(p, jnp.int32)
    # top_p 1 keeps all whatever the weights are rounded to: a row is the same beside any others.
    k, weight = jnp.where(top_k > 0, top_k, p.shape[-1] + 1), jnp.where(top_p < 1, top_p, jnp.inf)

    def halve(_, least):
        low, high = least  # with `low` enough is kept, with `high` too little
        middle = (low + high) // 2
        kept = bits >= middle[:, None]
        enough = (kept.sum(-1) >= k) | (jnp.where(kept, p, 0.0).sum(-1) >= weight)
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    most = bits.max(-1)
    least, _ = jax.lax.fori_loop(0, 30, halve, (jnp.zeros_like(most), most + 1))
    return jnp.where((bits >= least[:, None]) & (p >= min_p[:, None] * p.max(-1, keepdims=True)), p, 0.0)
