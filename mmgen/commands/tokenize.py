"""`mmgen tokenize --source SPEC --tokenizer DIR --text FILE --out DIR`."""

import argparse

from mmgen.commands.common import add_source_flags, share, source_from
from mmgen.models.contrastive import load_towers
from mmgen.runtime import checkpoint
from mmgen.runtime.mesh import process
from mmgen.runtime.released import part_of, towers_folder
from mmgen.safety import watermark
from mmgen.stages.tokenize import tokenize
from mmgen.stages.tokenizer import background


def main(argv):
    """Turns sources into tokenised shards for the transformer stage. Run again, it goes on. With
    MMGEN_DISTRIBUTED=RANK/COUNT (or auto) several processes share the work."""
    parser = argparse.ArgumentParser("mmgen tokenize", description=main.__doc__)
    add_source_flags(parser)
    add = parser.add_argument
    add(
        "--tokenizer",
        required=True,
        type=part_of("tokenizer"),
        help="workdir of a tokenizer run, or `reference`",
    )
    add(
        "--text",
        required=True,
        type=part_of("text.model"),
        help="SentencePiece .model (see `mmgen text`), or `reference`",
    )
    add("--out", required=True, help="folder of the shards")
    add("--max-side", type=int, default=64, help="largest image side, in patches")
    add("--phrasings", type=int, default=1, help="keep up to so many wordings of a document")
    add(
        "--longest",
        type=int,
        default=0,
        help="tokens that a document may have (the row length of the training)",
    )
    add(
        "--overlong",
        choices=("refuse", "cut"),
        default="refuse",
        help="longer ones: leave out, or cut at a turn",
    )
    add(
        "--towers",
        type=towers_folder,
        help="workdir of a contrastive run, or `reference`, to leave out images that do not fit their text",
    )
    add("--min-score", type=float, help="the least cosine of an image and its text, by --towers (.2)")
    add("--category", help="of a world: its kind of scene, such as counting")
    add(
        "--marked",
        type=share,
        default=0.0,
        help="share of users' images that get a watermark, as drawn ones have",
    )
    add("--shard-size", type=int, default=16384, help="documents a shard: what a stopped run has to do again")
    add("--workers", type=int, default=0, help="processes that read and draw; 0: threads")
    add("--overwrite", action="store_true", help="replace what --out holds")
    args = parser.parse_args(argv)
    if args.min_score is not None and not args.towers:
        raise ValueError(f"--min-score {args.min_score} needs --towers DIR to give scores")
    config = checkpoint.read_config(args.tokenizer, "tokenizer")
    patch = config["model"]["patch"]
    manifest = tokenize(
        source_from(
            args, multiple=patch, max_side=patch * args.max_side, category=args.category, **background(config)
        ),
        args.tokenizer,
        args.text,
        args.out,
        max_side=args.max_side,
        phrasings=args.phrasings,
        longest=args.longest,
        overlong=args.overlong,
        max_bad=args.max_bad,
        shard_size=args.shard_size,
        process=process(),
        workers=args.workers,
        overwrite=args.overwrite,
        towers=load_towers(args.towers) if args.towers else None,
        min_score=0.2 if args.min_score is None else args.min_score,
        marked=args.marked,
        watermark=watermark.embed_where_it_lasts,
    )
    if manifest is None:
        print(f"{args.out}: this process has done its shards; others are not finished yet")
    else:
        print(
            f"{args.out}: {manifest['count']} documents, {manifest['tokens']} tokens, "
            f"skipped {manifest['skipped']}, cut {manifest['cut']}"
        )
