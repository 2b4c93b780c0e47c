"""Stage `transformer`: next token over text and image codes, from tokenised shards."""

import functools
import json
import shutil

from mmgen.data.loader import Rows
from mmgen.data.shards import Shards
from mmgen.grammar import Grammar
from mmgen.models import transformer
from mmgen.stages.loop import Stage


def setup(config, workdir):
    """See `loop.Stage`. Copies what its samples need (tokenizer, text model, grammar) to the workdir."""
    data = config.data
    shards = Shards(data.shards)
    grammar = Grammar.from_dict(shards.manifest["grammar"])
    keep = ("grammar", "grammar_hash", "text_hash", "tokenizer_hash", "patch", "levels", "color_digits")
    vocabulary = {name: shards.manifest[name] for name in keep}
    _adopt(shards, vocabulary, workdir)
    loss = dict(text=data.text_weight, image=data.image_weight, user=data.user_weight)
    rows = functools.partial(
        Rows,
        grammar=grammar,
        batch_size=data.batch_size,
        row_length=data.row_length,
        seed=config.seed,
        loss=loss,
        overlong=data.overlong,
    )

    return Stage(
        make=lambda rngs: transformer.of_codes(config.model, vocabulary, grammar.vocab_size, rngs),
        loss=lambda model, batch, key: transformer.loss(
            model, batch, code_start=grammar.code_start, z_loss=config.loss.z
        ),
        data=rows(shards, text_drop=data.text_drop, image_drop=data.image_drop),
        unit="tokens",
        units_a_step=data.batch_size * data.row_length,
        evaluate=lambda graphdef, params, step: {},
    )


def _adopt(shards, vocabulary, workdir):
    """Copies tokenizer and text model beside the checkpoints, or checks that they are the same."""
    path = workdir / "vocabulary.json"
    if path.exists():
        ours = json.loads(path.read_text())
        if ours != vocabulary:
            changed = [name for name in vocabulary if ours.get(name) != vocabulary[name]]
            raise ValueError(
                f"{workdir} was trained on shards of another {', '.join(changed)} than {shards.path}; "
                "use another --workdir"
            )
        return
    shutil.copytree(shards.path / "tokenizer", workdir / "tokenizer", dirs_exist_ok=True)
    shutil.copy2(shards.path / "text.model", workdir / "text.model")
    path.write_text(json.dumps(vocabulary, indent=2))
