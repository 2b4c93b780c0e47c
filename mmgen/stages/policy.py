"""What stage `reinforce` learns from answers that were drawn: rows of them, their log-probabilities under the policy, and GRPO's loss.

Shapes: B answers a step, G of them a group, T tokens of a row, n codes of a picture, or tokens of words at most.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from mmgen.models import layers
from mmgen.runtime import mesh as meshes
from mmgen.stages import program as programs


def advantages(rewards, normalise=False):
    """How much better each of a group is than the group: float [groups, G] -> float32 [groups * G].

    GRPO also divides by the group's standard deviation (`normalise`). That weighs a prompt the more the nearer it is
    to always right or always wrong, and is left out unless it is asked for, after Dr. GRPO (arXiv:2503.20783).
    """
    rewards = np.asarray(rewards, np.float64)
    gains = rewards - rewards.mean(1, keepdims=True)
    gains[np.ptp(rewards, 1) == 0] = 0  # what rounding leaves of equal ones is no difference
    if normalise:
        gains /= rewards.std(1, keepdims=True) + 1e-4
    return gains.astype(np.float32).ravel()


def first_parts(idle, updates, parts):
    """The order of rows in which those that teach, not `idle` [B], fill the first parts of each update: see `loss`."""
    place = np.arange(len(idle)) // updates % parts  # the part of each row: program.parts
    order = np.empty(len(idle), int)
    order[np.argsort(place, kind="stable")] = np.argsort(idle, kind="stable")
    return order


# ---- rows -------------------------------------------------------------------------------------------


def _empty(B, T):
    ints = lambda *shape: np.zeros((B, T, *shape), np.int32)
    return {
        "tokens": ints(), "segments": ints(), "positions": ints(3), "weights": np.zeros((B, T), np.float32)
    }  # fmt: skip


def trees(drawn, gains, group, grammar, n, T, before, every):
    """Prompts, each with all that a group answered with words, as the rows of a batch; what is left of as many rows as answers is empty.

    A row is the prompt and the group's different answers, each of a branch of its own, with the prompt's last `before` tokens in front of
    it, which the model's input of its first tokens has, but which no token sees ("branches", as `Transformer` has them; -1 of these).
    "sources" are where the hidden state is that a token was drawn by. "weights" are how often an answer was drawn; an <end> that the
    number of words (`n`) forced has none. "advantage" is each token's. Answers without one teach nothing, and are left out unless
    there is a penalty (`every`)."""
    batch = _empty(len(drawn), T) | {"advantage": np.zeros((len(drawn), T), np.float32)}
    batch["branches"] = np.zeros((len(drawn), T), np.int32)
    batch["sources"] = np.tile(np.arange(T, dtype=np.int32), (len(drawn), 1))
    row, at, branch = -1, T, 0

    def put(tokens, positions, **more):
        values = {"tokens": tokens, "positions": positions, "segments": 1} | more
        for name, value in values.items():
            batch[name][row, at : at + len(tokens)] = value
        return at + len(tokens)

    for start in range(0, len(drawn), group):
        prompt, times = drawn[start][0], {}
        for i in range(start, start + group):
            if gains[i] or every:
                times.setdefault(drawn[i][1].tobytes(), []).append(i)
        begun = False
        for same in times.values():
            answer = drawn[same[0]][1]
            positions = grammar.positions(np.concatenate([prompt, answer]))
            if not begun or at + before + len(answer) > T:
                row, at, branch, begun = row + 1, 0, 0, True
                at = put(prompt, positions[: len(prompt)])
            last = slice(len(prompt) - before, len(prompt))
            at, branch = put(prompt[last], positions[last], branches=-1), branch + 1
            sources = np.arange(at - 1, at - 1 + len(answer))
            sources[0] = len(prompt) - 1
            counts = len(same) * (np.arange(len(answer)) < n - 1)
            at = put(
                answer, positions[len(prompt) :], branches=branch, sources=sources, weights=counts, advantage=gains[same].mean()
            )  # fmt: skip
    return batch


def rows(drawn, grammar, codes, T):
    """Prompts with their answers, up to the last code, as a batch of rows; where each row's codes are, int [B, n]."""
    batch = _empty(len(drawn), T)
    at = np.array([len(prompt) + 3 for prompt, _ in drawn])[:, None] + np.arange(codes)  # after <boi> <h> <w>
    for row, (prompt, answer) in enumerate(drawn):
        tokens = np.concatenate([prompt, answer[: 3 + codes]])
        batch["tokens"][row, : len(tokens)] = tokens
        batch["segments"][row, : len(tokens)] = 1
        batch["positions"][row, : len(tokens)] = grammar.positions(tokens)
    np.put_along_axis(batch["weights"], at, 1.0, 1)
    return batch, at


# ---- the policy -------------------------------------------------------------------------------------


def log_probs(model, batch, *, grammar, codes, temperature, keep_mode=False):
    """Of a batch's codes, in their order: log-probability and entropy in nats, float32 [B, n] each.

    They are those of the distribution that the sampler draws from: at a code the grammar allows the codes of its
    depth alone, and the softmax is over these, of logits / temperature, with `keep_mode` as strategies have it (of
    colours and then of outlines, where codes are told in two steps). What the grammar forces or the request
    decides (<boi>, the size, <eoi>, <end>) has probability 1 there, and no part in the loss.
    """
    x = model(*(batch[name] for name in ("tokens", "segments", "positions")))
    at = _places(batch, codes)
    x = layers.rms_norm(jnp.take_along_axis(x, at[..., None] - 1, 1))
    token = (jnp.take_along_axis(batch["tokens"], at, 1) - grammar.code_start) % grammar.codes
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    table = lambda rows: rows.astype(model.dtype)
    chosen = functools.partial(_chosen, temperature=temperature, keep_mode=keep_mode)
    if model.colors:
        # As they are drawn, colour by colour and outline by outline. The entropy of outlines is that with the colour
        # which was drawn: the mean over draws is that of codes.
        outline, color = jnp.divmod(token, model.colors)
        colors = product("bnd,vd->bnv", x, table(model.head_table()[grammar.code_start : model.first]))
        same = jnp.where(color == _one_before(color), _one_before(outline), -1)
        first = chosen(colors, color, _one_before(color))
        return jax.tree.map(jnp.add, first, chosen(model.outline.given(x, color), outline, same))
    rows = table(model.head_table()[grammar.code_start : grammar.vocab_size])
    rows = rows.reshape(grammar.depth, grammar.codes, -1)
    x = x.reshape(len(x), -1, grammar.depth, x.shape[-1])
    logits = product("bpkd,kvd->bpkv", x, rows)
    # A code's earlier parts are of other depths, so that it repeats none.
    same = _one_before(token) if grammar.depth == 1 else jnp.full_like(token, -1)
    return chosen(logits.reshape(*token.shape, -1), token, same)


def text_log_probs(model, batch, *, grammar, temperature, keep_mode=False):
    """As `log_probs`, of the words of `trees`: float32 [B, T] each, of which those count that have a weight. At each place the grammar
    allows a piece of text or the <end>."""
    x = model(*(batch[name] for name in ("tokens", "segments", "positions", "branches")))
    x = layers.rms_norm(jnp.take_along_axis(x, batch["sources"][..., None], 1))
    legal = jnp.arange(grammar.pieces + 1).at[-1].set(grammar.end)
    rows = model.head_table()[legal].astype(model.dtype)
    logits = jnp.einsum("bnd,vd->bnv", x, rows, preferred_element_type=jnp.float32)
    chosen = jnp.minimum(batch["tokens"], grammar.pieces)  # the <end>; what else is no piece has no weight
    first = batch["branches"] != _one_before(batch["branches"])
    return _chosen(logits, chosen, jnp.where(first, -1, _one_before(chosen)), temperature, keep_mode)


def _one_before(x):
    """[B, n] one place later, -1 at first."""
    return jnp.pad(x[:, :-1], ((0, 0), (1, 0)), constant_values=-1)


def _chosen(logits, chosen, previous, temperature, keep_mode):
    """Log-probabilities of the chosen int32 [B, n] by logits [B, n, V], and the entropies, float32 [B, n] each. `previous`
    int32 [B, n] are the tokens before, -1 for none."""
    logs = jax.nn.log_softmax(logits / temperature)
    if keep_mode:  # strategies.choose, as a function with a gradient
        plain, at = jax.nn.log_softmax(logits), jnp.argmax(logits, -1, keepdims=True)
        likeliest = jnp.arange(logits.shape[-1]) == at
        others = lambda x: jnp.where(likeliest, -1e30, x)
        rest = jax.nn.logsumexp(others(plain), -1, keepdims=True)
        kept = jnp.where(likeliest, plain, jax.nn.log_softmax(others(logits / temperature)) + rest)
        keeps = (plain.max(-1, keepdims=True) > jnp.log(0.5)) | (at == previous[..., None])
        logs = jnp.where(keeps, kept, logs)
    return jnp.take_along_axis(logs, chosen[..., None], 2)[..., 0], -(jnp.exp(logs) * logs).sum(-1)


def _places(batch, codes):
    """Where the codes of each row are: int32 [B, n]."""
    return jnp.argmax(batch["weights"] > 0, 1)[:, None] + jnp.arange(codes)


def scorer(graphdef, measure, parts):
    """The jitted (params, batch) -> log-probabilities of its codes [B, n], each device those of its rows."""

    def score(params, batch):
        measured = lambda part: measure(nnx.merge(graphdef, params), part)[0]

        def one(part):  # rows of words may be empty
            nothing = lambda part: jnp.zeros(jax.eval_shape(measured, part).shape)
            return jax.lax.cond(jnp.any(part["weights"] != 0), measured, nothing, part)

        if parts == 1:
            return one(batch)
        found = jax.lax.map(one, programs.parts(batch, parts))
        return jnp.swapaxes(found, 0, 1).reshape(-1, found.shape[-1])

    if meshes.current() is None:
        return jax.jit(score)
    mesh, rules = meshes.current()
    return jax.jit(score, out_shardings=NamedSharding(mesh, meshes.spec(("batch", None), rules)))


def here(x):
    """The rows of a global array [B, n] that this process's devices hold, in order."""
    parts = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
    return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])


def loss(model, batch, key, *, measure, clip, kl, n, whole=False):
    """GRPO's clipped surrogate and `kl` times the penalty, over what was drawn, codes or words; and what is watched: {name: (sum, weight)}.

    batch: as of `rows` or (`whole`) `trees`; and in float32 [B, T] "advantage"; "flat" (1 where the whole group has one
    reward) and rewards, one of each answer, which are constant along a row; and log-probabilities at each place: "old", those of
    the model that drew it, and "reference". Without "old" the model that draws is the one that learns: the ratio of
    the two is 1, with a gradient. `clip` is how far the ratio may fall below 1 and rise above it before it earns
    nothing more; unequal ones are DAPO's (arXiv:2503.14476). The penalty is the k3 estimator of the KL divergence
    from the model to the reference, exp(d) - d - 1 with d = log(reference / model) (Schulman, "Approximating KL
    Divergence"). Without a penalty flat groups have no gradient: a part of the batch (`config.accumulate`) with these
    alone is not computed, and "entropy" and "clipped" are of the others.

    GRPO's mean over the tokens of each answer is biased where answers differ in length (arXiv:2503.20783): the sum over
    all is divided by B * n, whatever the words' number. What is watched are means over what was drawn.
    """

    of = lambda name: batch[name] if whole else jnp.take_along_axis(batch[name], _places(batch, n), 1)

    def learned():
        drawn = of("weights")
        chosen = lambda x: jnp.where(drawn > 0, x, 0)
        logs, entropy = map(chosen, measure(model, batch))
        old = chosen(of("old")) if "old" in batch else jax.lax.stop_gradient(logs)
        ratio, gain = jnp.exp(logs - old), of("advantage")
        plain = ratio * gain
        surrogate = jnp.minimum(plain, jnp.clip(ratio, 1 - clip[0], 1 + clip[1]) * gain)
        terms = {"loss": -surrogate, "entropy": entropy}
        if "old" in batch:
            terms["clipped"] = surrogate < plain
        if "reference" in batch:
            d = chosen(of("reference")) - logs
            terms["kl"] = jnp.exp(d) - d - 1
            terms["loss"] += kl * terms["kl"]
        return {name: ((drawn * value).sum(), drawn.sum()) for name, value in terms.items()}

    nothing = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(learned))
    # Of a part of the batch with flat groups alone there is nothing to learn, unless to stay near the reference.
    found = jax.lax.cond(jnp.any(batch["weights" if kl else "advantage"] != 0), learned, nothing)
    places = jnp.float32(len(batch["weights"]) * n)  # the loss is a mean over all of them
    found |= {"loss": (found["loss"][0], places)}
    rows = [name for name in batch if name.startswith("reward") or name == "flat"]
    return found | {name: (batch[name][:, 0].sum(), jnp.float32(len(batch[name]))) for name in rows}
