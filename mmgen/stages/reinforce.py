"""Stage `reinforce`: a trained transformer learns from rewards of the pictures that it draws, or of its words about some.

Group-relative policy optimisation (GRPO, arXiv:2402.03300). A step draws a group of answers for each of some prompts
of the world, with the weights that it begins with; what is better than the mean of its group becomes likelier, what
is worse less likely, and a penalty keeps the model near the one it began as. See docs/posttraining.md.

Shapes: B answers a step, G of them a group, T tokens of a row, n codes of a picture, or tokens of words at most.
"""

import functools
import importlib
import itertools
import json
import pickle
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmgen import world
from mmgen.document import Document
from mmgen.grammar import Grammar
from mmgen.models import transformer
from mmgen.models.autoencoders import load_tokenizer
from mmgen.runtime import checkpoint
from mmgen.runtime import mesh as meshes
from mmgen.runtime.config import ConfigError, nearest
from mmgen.runtime.workers import Workers
from mmgen.sampling import cache as caches
from mmgen.sampling.sampler import Request, Sampler, draw_seed
from mmgen.sampling.slots import Slots
from mmgen.sampling.strategies import Strategy
from mmgen.stages import policy
from mmgen.stages.loop import Stage
from mmgen.stages.transformer import adopt
from mmgen.text import Text
from mmgen.world import rewards as world_rewards
from mmgen.world import tasks, wishes

REFERENCE = "reference"  # in the workdir: the weights that the run began with


def setup(config, workdir):
    """See `loop.Stage`. Begins with the transformer run in `config.init`, and copies all that its samples need."""
    data = config.data
    own = (workdir / "vocabulary.json").exists()
    if not own and not config.init:
        raise ConfigError("name the workdir of the transformer run to begin with: --config.init=DIR")
    run = workdir if own else Path(config.init)
    checkpoint.read_config(run, "transformer", "reinforce")
    vocabulary = json.loads((run / "vocabulary.json").read_text())
    grammar, text = Grammar.from_dict(vocabulary["grammar"]), Text(run / "text.model")
    tokenizer = load_tokenizer(run / "tokenizer")
    for name, found in (("text", text.hash), ("tokenizer", tokenizer.hash)):
        if found != vocabulary[f"{name}_hash"]:
            raise checkpoint.CheckpointError(
                f"{run}: the {name} in it is not the one that this transformer was trained with (expected hash "
                f"{vocabulary[f'{name}_hash']}, found {found})"
            )
    grid, told = _check(config, grammar, tokenizer)
    picture = grid[0] * grid[1] * grammar.depth
    n = data.words if told else picture  # tokens of an answer that are drawn, at most
    before = config.model.before
    functions = [(name, reward(name), float(weight)) for name, weight in _pairs(config.rewards)]
    for name, function, _ in functions if data.workers else ():
        try:
            pickle.dumps(function)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ConfigError(
                f"config.rewards: {name} cannot be sent to other processes ({error}): make it a plain function of its "
                "module, or leave config.data.workers at 0"
            ) from error
    workers = Workers(data.workers) if data.workers else None
    room = (
        data.longest - n - (max(before, 1) if told else 3)
    )  # of a row, for a prompt; the sampler needs one for <eos>
    prompts = Prompts(data, config.seed, "train", text, room, picture, data.group)
    held_out = Prompts(data, config.seed, "valid", text, room, picture, 1)
    painter = _painter(config, grammar, text, tokenizer)
    how = dict(grammar=grammar, temperature=data.temperature, keep_mode=data.keep_mode)
    if told:
        measure = functools.partial(policy.text_log_probs, **how)
    else:
        measure = functools.partial(policy.log_probs, codes=n, **how)
    scorer = functools.cache(lambda graphdef: policy.scorer(graphdef, measure, config.accumulate))
    reference = []  # its parameters, once they are read

    def draw(graphdef, params, items, seeds):
        sampler = painter(graphdef, params)
        # Which share the pictures out to decode them.
        with meshes.use(meshes.of_rows(jax.local_devices()), config.sharding):
            return _draw(sampler, items, seeds, None if told else grid, data)

    def rewarded(answers, items):
        """{name: float32 [B]}, and their weighted sum as "reward"."""
        mapped = workers.map if workers else map
        found = {
            f"reward_{name}": np.array(list(mapped(one, answers, items)), np.float32)
            for name, one, _ in functions
        }
        total = sum(weight * each for (*_, weight), each in zip(functions, found.values()))
        return {"reward": total} | (found if len(functions) > 1 else {})

    def rollout(program, params, step, drawn, share):
        rows, items = drawn["rows"], drawn["items"]
        seeds = [draw_seed(config.seed, step * data.batch_size + int(row)) for row in rows]
        tokens, answers = draw(program.graphdef, params, items, seeds)
        found = rewarded(answers, items)
        for name, value in found.items():
            if not np.isfinite(value).all():
                raise ValueError(
                    f"{name} of step {step}: expected finite rewards, found {value[~np.isfinite(value)][0]}"
                )
        gains = policy.advantages(found["reward"].reshape(-1, data.group), config.loss.normalise)
        # Whole rows, as all of a batch is: the mesh may split them.
        whole = lambda x: np.repeat(np.float32(x)[:, None], data.longest, 1)
        flat = np.repeat((gains == 0).reshape(-1, data.group).all(1), data.group)
        if told:
            batch = policy.trees(
                tokens, gains, data.group, grammar, n, data.longest, before, bool(config.loss.kl)
            )
            at = np.broadcast_to(np.arange(data.longest), batch["tokens"].shape)
        else:
            batch, at = policy.rows(tokens, grammar, n, data.longest)
            batch["advantage"] = whole(gains)
        batch |= {name: whole(x) for name, x in found.items()} | {"flat": whole(flat)}
        order = policy.first_parts((batch["advantage"] == 0).all(1), config.updates, config.accumulate)
        batch, at = {name: x[order] for name, x in batch.items()}, at[order]
        if config.loss.kl and not reference:
            reference.append(checkpoint.load_weights(workdir / REFERENCE, program.shapes["params"])[0])
        models = {"reference": each for each in reference}
        models |= {"old": params} if config.updates > 1 else {}
        read = ("tokens", "segments", "positions", "weights", "branches", "sources")
        shared = share({name: batch[name] for name in read if name in batch}) if models else None
        for name, weights in models.items():
            values = np.zeros(batch["weights"].shape, np.float32)
            np.put_along_axis(values, at, policy.here(scorer(program.graphdef)(weights, shared)), 1)
            batch[name] = values
        return batch

    def evaluate(graphdef, params, step):
        count = config.held_out.prompts
        if not count:
            return {}
        drawn, _ = held_out.rows_of(0, np.arange(count))
        seeds = [draw_seed(config.seed, i) for i in range(count)]
        _, answers = draw(graphdef, params, drawn["items"], seeds)
        return {f"held_out_{name}": float(x.mean()) for name, x in rewarded(answers, drawn["items"]).items()}

    def bring():
        """What samples of the run need, and what its penalty is measured from."""
        if not own:
            if config.loss.kl:
                checkpoint.export(config.init, workdir / REFERENCE)
            adopt(run, vocabulary, workdir)

    return Stage(
        make=lambda rngs: transformer.of_codes(config.model, vocabulary, grammar.vocab_size, rngs),
        loss=functools.partial(
            policy.loss, measure=measure, clip=config.loss.clip, kl=config.loss.kl, n=n, whole=told
        ),
        data=prompts,
        shape=(data.batch_size, data.longest),
        axes=("batch", "length"),
        unit="answers" if told else "codes",
        units_a_step=data.batch_size * (1 if told else n),
        evaluate=evaluate,
        adopt=bring,
        identity=vocabulary,
        complete=".",
        rollout=rollout,
        close=workers.close if workers else lambda: None,
    )


def _check(config, grammar, tokenizer):
    """(height, width) of the pictures in patches, and whether words are drawn; raises ConfigError for settings that make no sense."""
    data, patch = config.data, tokenizer.patch
    if data.group < 2 or data.batch_size % data.group:
        raise ConfigError(
            "config.data.group is at least 2 and divides config.data.batch_size; found "
            f"{data.group} and {data.batch_size}"
        )
    if config.updates < 1 or data.batch_size % (config.updates * config.accumulate):
        raise ConfigError(
            f"config.updates={config.updates} times config.accumulate={config.accumulate} must divide "
            f"config.data.batch_size={data.batch_size}"
        )
    if any(side % patch or not 0 < side <= patch * grammar.max_side for side in data.size):
        raise ConfigError(
            f"config.data.size={tuple(data.size)} must be multiples of {patch}, up to {patch * grammar.max_side}"
        )
    bounds = {
        "data.temperature": 1e-3,
        "data.slots": 1,
        "data.words": 2,
        "data.workers": 0,
        "held_out.prompts": 0,
        "loss.kl": 0,
    }
    for name, value in bounds.items():
        found = functools.reduce(lambda node, key: node[key], name.split("."), config)
        if not found >= value:
            raise ConfigError(f"config.{name} is at least {value}, not {found}")
    if (
        data.keep_mode and data.temperature < 0.1
    ):  # below it the sampler's rounding draws by other probabilities
        raise ConfigError(f"config.data.temperature is at least 0.1 with keep_mode, not {data.temperature}")
    if len(config.loss.clip) != 2 or not (0 < config.loss.clip[0] < 1 and config.loss.clip[1] > 0):
        raise ConfigError(
            "config.loss.clip is how far the ratio may go, (below 1, above 1), as in (0.2, 0.2); found "
            f"{config.loss.clip}"
        )
    for category in data.categories:
        if category not in wishes.KINDS:
            raise ConfigError(f"no category {category!r}; {nearest(category, wishes.KINDS)}")
        least = tasks.LEAST.get(category, 0)
        if min(data.size) < least:
            raise ConfigError(
                f"config.data.size={tuple(data.size)}: {category} needs a short side of {least} pixels at least"
            )
    for language in data.languages:
        if language not in world.language.LANGUAGES:
            raise ConfigError(f"no language {language!r}; {nearest(language, world.language.LANGUAGES)}")
    if not data.categories or not data.languages:
        raise ConfigError("config.data.categories and config.data.languages name one at least")
    told = [category for category in data.categories if category in wishes.TOLD]
    if told and len(told) < len(data.categories):
        drawn = [category for category in data.categories if category not in wishes.TOLD]
        raise ConfigError(
            f"config.data.categories: pictures answer {', '.join(drawn)} and words {', '.join(told)}; a run learns from one of both"
        )
    grid = data.size[1] // patch, data.size[0] // patch
    least = grid[0] * grid[1] * grammar.depth + 8
    if told:
        least += data.words + max(config.model.before, 1)
    if not least <= data.longest <= data.row_length:
        raise ConfigError(
            f"config.data.longest={data.longest} must hold a prompt and a picture of {grid[0]} x {grid[1]} patches"
            + (f", with config.data.words={data.words} about it: {least} at least" if told else "")
            + f", and be at most config.data.row_length={data.row_length}"
        )
    if told and "legible" in dict(_pairs(config.rewards)):
        raise ConfigError("config.rewards: legible is of pictures, and words answer config.data.categories")
    return grid, bool(told)


# ---- rewards ----------------------------------------------------------------------------------------


def reward(name):
    """The function of a reward's name: of mmgen/world/rewards.py, or "package.module:function".

    It is called with a picture, uint8 [H, W, C], or words, and the `world.Item` that asked for it (a `Wish` of world/wishes.py,
    where that was an edit or another task), and returns a finite number, the more the better.
    """
    place, colon, function = name.rpartition(":")
    try:
        module = importlib.import_module(place) if colon else world_rewards
    except ImportError as error:
        raise ConfigError(f"config.rewards: {place!r} of {name!r} cannot be imported: {error}") from error
    found = getattr(module, function, None)
    if not callable(found):
        known = [
            name for name, each in vars(module).items() if getattr(each, "__module__", "") == module.__name__
        ]
        raise ConfigError(
            f"config.rewards: no function {function!r} in {module.__name__}; {nearest(function, known)}"
        )
    return found


def _pairs(rewards):
    """config.rewards as a list of (name, weight)."""
    try:
        pairs = [(str(name), float(weight)) for name, weight in rewards]
    except (TypeError, ValueError):
        pairs = []
    if not pairs or len(dict(pairs)) < len(pairs):
        raise ConfigError(
            "config.rewards is written ((NAME, WEIGHT), ...), as in (('judge', 1.0),), each name once; found "
            f"{rewards!r}"
        )
    return pairs


# ---- what is drawn ----------------------------------------------------------------------------------


class Prompts:
    """The prompts of each step, a function of the step: row r of step s asks for number s * (B // G) + r // G.

    Categories and languages take turns. A prompt of more tokens than there is room for is replaced by another and
    counted; what no picture answers is passed over.
    """

    def __init__(self, data, seed, split, text, room, picture, group):
        self.data, self.seed, self.split, self.text = data, seed, split, text
        self.room, self.picture, self.group = room, picture, group  # picture: its codes

    def rows_of(self, step, rows):
        """({"rows", "items": a world.Item for each}, how many prompts were replaced)."""
        items, bad = {}, 0
        for each in sorted({int(row) // self.group for row in rows}):
            items[each], replaced = self._item(step * (self.data.batch_size // self.group) + each)
            bad += replaced
        return {"rows": rows, "items": [items[int(row) // self.group] for row in rows]}, bad

    def prefetch(self, start, rows):
        groups, counts = np.unique(np.asarray(rows) // self.group, return_counts=True)
        if (counts != self.group).any():
            raise ConfigError(
                f"a group of {self.group} pictures is drawn by one process, but this one has {len(rows)} rows, with "
                "parts of groups: make config.data.batch_size / config.data.group a multiple of the processes"
            )
        for step in itertools.count(start):
            yield step, *self.rows_of(step, rows)

    def _item(self, number):
        kinds, languages = self.data.categories, self.data.languages
        kind, language = kinds[number % len(kinds)], languages[number // len(kinds) % len(languages)]
        long = False
        for tried in range(1000):
            at = self.seed, self.split, number + (tried << 40), kind, language, tuple(self.data.size)
            item = wishes.wish(*at)
            if item is None:  # a question, say
                continue
            if self._length(item) <= self.room:
                return item, long
            long = True
        raise ConfigError(
            f"none of 1000 prompts of {kind!r} in {language!r} has at most {self.room - 4} tokens: "
            "raise config.data.longest, or lower config.data.words where words answer"
        )

    def _length(self, item):
        """Tokens of <bos> <user> ... <end> <assistant>, of which an image has its codes and <boi> <h> <w> <eoi>."""
        size = lambda part: len(self.text.encode(part)) if isinstance(part, str) else self.picture + 4
        return 4 + sum(map(size, wishes.asks(item)))


def _painter(config, grammar, text, tokenizer):
    """-> (graphdef, params) -> a `Sampler` of these weights: the same one each time, so that nothing compiles anew.

    Each process draws its rows on its first device, which therefore holds the weights whole.
    """
    made, here = [], meshes.of_rows(jax.local_devices()[:1])

    @functools.partial(jax.jit, static_argnums=0)
    def lay_out(graphdef, params):
        return caches.prepare(nnx.merge(graphdef, params), jnp.dtype(config.model.dtype))

    def of(graphdef, params):
        params = meshes.fetched(params)
        if not made:
            made.append(Sampler(graphdef, params, config, grammar, text, tokenizer, mesh=here))
        sampler = made[0]
        with sampler.on_mesh():
            sampler.weights = lay_out(graphdef, params)
        sampler.params = {name: params[name] for name in sampler.params}
        return sampler

    return of


def _draw(sampler, items, seeds, grid, data):
    """An answer to each item, a picture of grid (height, width) in patches, or words where that is None -> [(tokens of the
    prompt, of the answer)], pixels or texts.

    Slots of its own: what others have read was read with other weights. No guidance, and nothing is cut off: the
    policy that is improved must be the one that is drawn from (see `policy.log_probs`).
    """
    asked = {id(item): item for item in items}  # a group has one
    documents = (wishes.document(item, data.size) for item in asked.values())
    documents = dict(zip(asked, sampler.encode(documents)))
    strategy = Strategy(data.temperature, keep_mode=data.keep_mode)
    how = (
        dict(size=grid, image=strategy) if grid else dict(output="text", text=strategy, max_tokens=data.words)
    )
    requests = [Request(documents[id(item)], seed=seed, **how) for item, seed in zip(items, seeds)]
    tokens, answers = [None] * len(requests), [None] * len(requests)
    slots = Slots(sampler, min(data.slots, data.batch_size), 1, data.longest + 3)  # <eoi> <end> <eos>
    for i, turn, _, answer in sampler.answers(slots, requests, range(len(requests))):
        tokens[i] = sampler.prompts(requests[i])[0], answer
        answers[i] = turn.parts[0].pixels if grid else Document((turn,)).text().strip()
    return tokens, answers
