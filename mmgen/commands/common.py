"""Flags that several commands share."""

import argparse
import collections
import json

from mmgen.data import images
from mmgen.data.sources import KINDS, Several, open_source


def size(text):
    """'WIDTHxHEIGHT' -> (width, height)."""
    width, cross, height = text.lower().partition("x")
    if not (cross and width.isdigit() and height.isdigit() and int(width) and int(height)):
        raise argparse.ArgumentTypeError(f"a size is written WIDTHxHEIGHT, as in 32x32; found {text!r}")
    return int(width), int(height)


def share(text):
    """A number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a share from 0 to 1, as in 0.1; found {text!r}")
    return value


def rule(text):
    """'FIELD=VALUE' -> (field, [values that are meant]): 512 may be a number or a text."""
    field, equals, value = text.partition("=")
    if not (field and equals):
        raise argparse.ArgumentTypeError(f"expected FIELD=VALUE, as in group=Food; found {text!r}")
    try:
        return field, [value, json.loads(value)]
    except ValueError:
        return field, [value]


def add_source_flags(parser):
    add = parser.add_argument
    add("--source", required=True, action="append", metavar="[NAME=]SPEC",
        help=f"{' '.join(KINDS.values())}; given again, sources follow one another")  # fmt: skip
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--size", type=size, default=(32, 32), metavar="WIDTHxHEIGHT",
                       help="of its images, in pixels; 32x32 if nothing is said")  # fmt: skip
    sizes.add_argument("--buckets", type=size, metavar="WIDTHxHEIGHT",
                       help="images keep about their aspect ratio, in at most this area")  # fmt: skip
    add("--documents", type=int, help="how many of each source (a world has no end)")
    add("--seed", type=int, default=0)
    add("--languages", default="en", help="of the world, comma-separated: en,zh")
    add("--split", choices=("train", "test"), help="one side of a source's stable split")
    add("--split-by", default="key", help="field whose equal values stay together")
    add("--holdout", type=share, default=0.1, help="share of the test side")
    add("--only", type=rule, action="append", default=[], metavar="FIELD=VALUE",
        help="documents with this; given again for one field, any of the values")  # fmt: skip
    add("--exclude", type=rule, action="append", default=[], metavar="FIELD=VALUE", help="documents without")
    add("--data-dir", help="folder of TFDS data sets")
    add("--max-chars", type=int, default=2000, help="characters a document of plain text may have")
    add("--max-bad", type=share, default=0.1, help="share of bad documents above which a run gives up")


def source_from(args, multiple=1, max_side=None, **options):
    """The source that the flags name, or Several. `multiple` is the patch of its tokenizer and `max_side` its
    largest image side, both in pixels; images keep to them. `options` are more of `open_source`."""
    if args.buckets:
        width, height = args.buckets
        images_at = images.Buckets(width * height, multiple=multiple, max_side=max_side)
    else:
        images_at = args.size
        for side in images_at:
            if side % multiple or (max_side and side > max_side):
                most = f" and at most {max_side}" if max_side else ""
                found = "x".join(map(str, images_at))
                raise ValueError(f"--size {found}: both sides must be multiples of {multiple}{most}")
    sources = [
        open_source(
            spec,
            images_at,
            args.seed,
            documents=args.documents,
            languages=args.languages.split(","),
            split=args.split,
            split_by=args.split_by,
            holdout=args.holdout,
            only=_rules(args.only),
            exclude=_rules(args.exclude),
            data_dir=args.data_dir,
            max_chars=args.max_chars,
            **options,
        )
        for spec in args.source
    ]
    return sources[0] if len(sources) == 1 else Several(sources)


def _rules(pairs):
    rules = collections.defaultdict(list)
    for field, values in pairs:
        rules[field] += values
    return rules
