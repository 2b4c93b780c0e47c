"""`mmgen tools pack --checkpoint DIR --out DIR`."""

import argparse
import json
import math
import shutil
from pathlib import Path

from mmgen.models.autoencoders import load_tokenizer
from mmgen.runtime import checkpoint, packed
from mmgen.runtime.released import model_folder


def main(argv):
    """Packs a transformer run, with all that its samples need and what lies beside it (refiners/, safety/, towers/), into a
    small folder to give away: weights of the transformer, of towers and of refiners in 8 bits, of the rest in bfloat16, but for what makes codes of
    pixels, which stays as it is. Every command takes the
    folder as it takes a workdir, to sample, to evaluate, and to begin a training with (config.init)."""
    parser = argparse.ArgumentParser("mmgen tools pack", description=main.__doc__, allow_abbrev=False)
    add = parser.add_argument
    add(
        "--checkpoint",
        type=model_folder,
        required=True,
        metavar="DIR",
        help="workdir of a transformer run, or `reference`",
    )
    add("--out", required=True, metavar="DIR", help="a new folder")
    add(
        "--kind",
        choices=packed.KINDS,
        default="int8",
        help="of large arrays of the transformer, of towers and of refiners",
    )
    add(
        "--add",
        action="append",
        default=[],
        metavar="DIR[=WEIGHT]",
        help="another run that began with these weights (config.init): what it has learned since, times WEIGHT (1), is added "
        "to them; as often as there are runs. To weights that were packed already it is rounded at random, so that small changes are not lost",
    )
    args = parser.parse_args(argv)
    source, out = Path(args.checkpoint), Path(args.out)
    checkpoint.read_config(source, "transformer", "reinforce")
    more = [_addend(source, each) for each in args.add]
    if out.exists():
        raise ValueError(f"{out} exists already: name a new folder, or remove it")
    making = out.with_name(out.name + ".packing")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)

    packed.pack(source, making, args.kind, more=more)
    # A code is what its features are rounded to, and those of the commonest patches lie at a border: whoever rounds the encoder
    # too gives a transformer other codes than it was trained on.
    packed.pack(source / "tokenizer", making / "tokenizer", "bfloat16", exact="^(encoder|to_features)/")
    was = load_tokenizer(source / "tokenizer").hash
    for each in sorted((source / "refiners").glob("*/")):
        theirs = load_tokenizer(each / "tokenizer").hash if (each / "tokenizer").exists() else was
        if theirs != was:
            raise ValueError(
                f"{each} reads the codes of tokenizer {theirs}, the transformer writes those of {was}"
            )
        packed.pack(each, making / "refiners" / each.name, args.kind)
        if (each / "upsampler").exists():
            packed.pack(each / "upsampler", making / "refiners" / each.name / "upsampler", args.kind)
    for name, kind in (("safety", "bfloat16"), ("towers", args.kind)):
        if (source / name).exists():
            packed.pack(source / name, making / name, kind)
    # Rounded, it is another tokenizer, and everything that is packed here goes with that one.
    vocabulary = json.loads((making / "vocabulary.json").read_text())
    vocabulary |= {"tokenizer_hash": load_tokenizer(making / "tokenizer").hash, "packed_from": was}
    (making / "vocabulary.json").write_text(json.dumps(vocabulary, indent=2) + "\n")
    making.rename(out)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"{out}: {size / 1e6:.1f} MB")


def _addend(source, text):
    """DIR[=WEIGHT] as (the workdir, the weight), where it is a run whose tokens mean what those of `source` mean."""
    name, equals, weight = ("", "", "") if Path(text).is_dir() else text.rpartition("=")
    try:
        run, weight = (Path(name), float(weight)) if equals else (Path(text), 1.0)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise ValueError(f"--add: expected DIR or DIR=WEIGHT, as in runs/more=0.5; found {text!r}")
    checkpoint.read_config(run, "transformer", "reinforce")
    ours, theirs = (json.loads((each / "vocabulary.json").read_text()) for each in (source, run))
    wrong = [name for name in ("grammar_hash", "text_hash", "tokenizer_hash") if ours[name] != theirs[name]]
    if wrong:
        raise ValueError(
            f"--add: the tokens of {run} mean other things than those of {source} ({', '.join(wrong)} differ)"
        )
    return run, weight
