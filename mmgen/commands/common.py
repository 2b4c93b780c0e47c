"""Flags that several commands share."""

import argparse

from mmgen.data.sources import open_source


def size(text):
    """'WIDTHxHEIGHT' -> (width, height)."""
    width, cross, height = text.lower().partition("x")
    if not (cross and width.isdigit() and height.isdigit() and int(width) and int(height)):
        raise argparse.ArgumentTypeError(f"a size is written WIDTHxHEIGHT, as in 32x32; found {text!r}")
    return int(width), int(height)


def add_source_flags(parser):
    parser.add_argument("--source", required=True, help="world:SPLIT or tars:GLOB")
    parser.add_argument("--size", type=size, default=(32, 32), help="WIDTHxHEIGHT of its images, in pixels")
    parser.add_argument("--documents", type=int, help="how many (a world has no end)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--languages", default="en", help="of the world, comma-separated: en,zh")
    parser.add_argument("--split", choices=("train", "test"), help="one side of a source's stable split")
    parser.add_argument("--split-by", default="key", help="JSON field whose equal values stay together")


def source_from(args):
    return open_source(
        args.source,
        args.size,
        args.seed,
        documents=args.documents,
        languages=args.languages.split(","),
        split=args.split,
        split_by=args.split_by,
    )
