"""`mmgen tokenize --source SPEC --tokenizer DIR --text FILE --out DIR`."""

import argparse

from mmgen.commands.common import add_source_flags, source_from
from mmgen.stages.tokenize import tokenize


def main(argv):
    """Turns a source into tokenised shards for the transformer stage."""
    parser = argparse.ArgumentParser("mmgen tokenize", description=main.__doc__)
    add_source_flags(parser)
    parser.add_argument("--tokenizer", required=True, help="workdir of a tokenizer run")
    parser.add_argument("--text", required=True, help="SentencePiece .model (see `mmgen text`)")
    parser.add_argument("--out", required=True, help="folder of the shards")
    parser.add_argument("--max-side", type=int, default=64, help="largest image side, in patches")
    parser.add_argument("--overwrite", action="store_true", help="replace finished shards in --out")
    args = parser.parse_args(argv)
    manifest = tokenize(
        source_from(args),
        args.tokenizer,
        args.text,
        args.out,
        max_side=args.max_side,
        overwrite=args.overwrite,
    )
    print(
        f"{args.out}: {manifest['count']} documents, {manifest['tokens']} tokens, skipped {manifest['skipped']}"
    )
