"""Stage `transformer`: next token over text and image codes, from tokenised shards."""

import functools
import itertools
import json
import logging
import math
import os
import re
import shutil

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from mmgen.data.loader import Rows
from mmgen.data.shards import Shards
from mmgen.grammar import Grammar
from mmgen.models import transformer
from mmgen.runtime import checkpoint, hardware
from mmgen.runtime import mesh as meshes
from mmgen.runtime.config import ConfigError
from mmgen.stages.loop import Stage


def setup(config, workdir):
    """See `loop.Stage`. Copies what its samples need (tokenizer, text model, grammar) to the workdir, and measures the
    loss on config.held_out, where that names shards."""
    data = config.data
    shards = Shards(*data.shards.split(","))
    grammar = shards.grammar
    keep = ("grammar", "grammar_hash", "text_hash", "tokenizer_hash", "patch", "levels", "color_digits")
    missing = [name for name in keep if name not in shards.manifest]
    if missing:
        raise ValueError(
            f"{shards}: the manifest says no {', '.join(missing)}; make shards with `mmgen tokenize`"
        )
    vocabulary = {name: shards.manifest[name] for name in keep} | {"shards": shards.identity}
    # Whether there are refusals among its documents, which those who sample have to know.
    sources = [word for manifest in shards.manifests for word in re.split(r"\W+", manifest["source"])]
    vocabulary["refusals"] = "refusal" in sources
    _check(shards, vocabulary, workdir)
    loss = dict(
        text=data.text_weight, image=data.image_weight, user=data.user_weight, user_images=data.user_images
    )
    how = dict(
        batch_size=data.batch_size,
        row_length=data.row_length,
        loss=loss,
        mixture=_mixture(data.mixture),
        overlong=data.overlong,
        max_bad=data.max_bad,
    )
    rows = Rows(
        shards,
        grammar,
        seed=config.seed,
        text_drop=data.text_drop,
        image_drop=data.image_drop,
        plans=workdir / "plans",
        threads=data.threads,
        workers=data.workers,
        **how,
    )
    measured = functools.partial(transformer.loss, code_start=grammar.code_start, **config.loss)

    return Stage(
        make=lambda rngs: transformer.of_codes(config.model, vocabulary, grammar.vocab_size, rngs),
        loss=lambda model, batch, key: measured(model, batch),
        data=rows,
        shape=(data.batch_size, data.row_length),
        axes=("batch", "length"),
        unit="tokens",
        units_a_step=data.batch_size * data.row_length,
        evaluate=_held_out(config, vocabulary, grammar, measured, how),
        adopt=functools.partial(adopt, shards.folders[0], vocabulary, workdir),
        identity=vocabulary,
        flops=functools.partial(_flops, config),
        grow=functools.partial(_grow, vocabulary, config.model),
    )


def _held_out(config, vocabulary, grammar, measured, how):
    """The `Stage.evaluate` of config.held_out: the same first batches each time, and for every seed, of a mixture as the
    training's, with all of each document."""
    held_out = config.held_out
    if not held_out.shards:
        return lambda graphdef, params, step: {}
    if held_out.batches < 1:
        raise ConfigError(f"config.held_out.batches is at least 1, not {held_out.batches}")
    shards = Shards(*held_out.shards.split(","))
    for name in ("tokenizer_hash", "text_hash"):
        if shards.manifest.get(name) != vocabulary[name]:
            raise ConfigError(
                f"config.held_out.shards={held_out.shards}: their {name} is not that of config.data.shards, so that "
                "their tokens mean other things; make both with the same tokenizer and text model"
            )
    rows = Rows(shards, grammar, text_drop=0.0, **how)

    @functools.partial(jax.jit, static_argnums=0)
    def sums(graphdef, params, batch):
        return measured(nnx.merge(graphdef, params), batch)

    def evaluate(graphdef, params, step):
        mesh = jax.tree.leaves(params)[0].sharding.mesh
        layout = NamedSharding(mesh, meshes.spec(("batch", "length"), config.sharding))
        lines = NamedSharding(mesh, meshes.spec(("batch",), config.sharding))
        mine, total = meshes.local_rows(lines, rows.batch_size), {}
        for number in range(held_out.batches):
            batch = meshes.global_batch(rows.rows_of(number, mine)[0], mine, rows.batch_size, layout)
            for name, part in sums(graphdef, params, batch).items():
                total[name] = total.get(name, 0.0) + np.array([float(x) for x in part])
        return {f"held_out_{name}": total[name][0] / max(total[name][1], 1e-9) for name in _MEASURED}

    return evaluate


_MEASURED = ("loss", "image_loss", "text_loss")  # of `transformer.loss`


def _flops(config, params):
    """FLOPs of a step, see `hardware.flops_a_token`."""
    m, (rows, tokens) = config.model, (config.data.batch_size, config.data.row_length)
    _, multiplied = hardware.parameters(params, m.tied)
    layers = m.layers + transformer.crossings(m)
    return rows * tokens * hardware.flops_a_token(multiplied, layers, tokens, m.heads * m.head_dim)


def _grow(vocabulary, model, workdir):
    """Which rows of the tables of the run in `workdir` mean what in ours: {pattern: [(theirs, ours, how many)]}.

    A vocabulary is pieces, control tokens, heights, widths and codes: where one part has grown, the next begin later.
    """
    theirs = json.loads((workdir / "vocabulary.json").read_text())
    if theirs["levels"] != vocabulary["levels"]:
        raise ConfigError(
            f"the codes of {workdir} have levels {theirs['levels']}, ours {vocabulary['levels']}: they mean other pictures"
        )
    for name in ("tokenizer_hash", "text_hash"):
        if theirs[name] != vocabulary[name]:
            logging.warning(
                "init: %s differs from that of %s: codes or pieces may mean other things", name, workdir
            )
    old, new = (Grammar.from_dict(each["grammar"]) for each in (theirs, vocabulary))
    spans, parts = [], lambda g: (0, g.pieces, g.h(1), g.w(1), g.code_start, g.vocab_size)
    for (a, a_end), (b, b_end) in zip(*(itertools.pairwise(parts(g)) for g in (old, new))):
        spans.append((a, b, min(a_end - a, b_end - b)))
    was = checkpoint.read_config(workdir)["model"]
    # Of each place the tokens before it come first, then the images beneath: of each more may be read than were.
    before, beneath = (was.get("before", 0), model.before), (was.get("beneath", 0), model.beneath)
    tokens, codes = min(before), min(beneath) * transformer.BENEATH
    places = [(0, 0, tokens), (*before, codes)]
    found = {"^before/w$": [tuple(model.width * n for n in span) for span in places]}
    if not model.outline:
        return found | {"^(embedding|head)$": spans}
    # The head's rows for codes are those of their colours.
    heads = spans[:-1]
    if was.get("outline", 0) and theirs["color_digits"] == vocabulary["color_digits"]:
        heads.append((*spans[-1][:2], math.prod(vocabulary["levels"][: vocabulary["color_digits"]])))
    return found | {"^embedding$": spans[:-1], "^head$": heads}


def _mixture(pairs):
    """config.data.mixture as a dict."""
    try:
        return {str(name): float(weight) for name, weight in pairs}
    except (TypeError, ValueError):
        raise ConfigError(
            f"config.data.mixture is written (('NAME', WEIGHT), ...), as in (('world', 0.7), ('photos', 0.3)); "
            f"found {pairs!r}"
        ) from None


def _check(shards, vocabulary, workdir):
    """Raises where the workdir's run learns from other shards: they may lie elsewhere, but not be others."""
    path = workdir / "vocabulary.json"
    if path.exists():
        ours = json.loads(path.read_text())
        changed = [
            name
            for name in vocabulary
            if ours.get(name, False if name == "refusals" else None) != vocabulary[name]
        ]
        if changed:
            raise ValueError(
                f"{workdir} was trained on other shards than {shards} ({', '.join(changed)} differ); "
                "use another --workdir"
            )


def adopt(folder, vocabulary, workdir):
    """Copies the tokenizer and the text model of a folder beside the checkpoints, and writes the vocabulary."""
    path = workdir / "vocabulary.json"
    if path.exists():
        return
    shutil.copytree(folder / "tokenizer", workdir / "tokenizer", dirs_exist_ok=True)
    shutil.copy2(folder / "text.model", workdir / "text.model")
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(vocabulary, indent=2))
    os.replace(temporary, path)
