"""`mmgen text --source SPEC --pieces N --out FILE`."""

import argparse

from mmgen import text
from mmgen.commands.common import add_source_flags, source_from
from mmgen.data.sources import texts


def main(argv):
    """Trains a SentencePiece text model on the words of a source."""
    parser = argparse.ArgumentParser("mmgen text", description=main.__doc__)
    add_source_flags(parser)
    parser.add_argument("--pieces", type=int, default=512)
    parser.add_argument("--out", required=True, help="the .model file")
    args = parser.parse_args(argv)
    source = source_from(args)
    model = text.train(texts(source, max_bad=args.max_bad), args.pieces, args.out)
    print(f"{args.out}: {model.size} pieces, hash {model.hash}; skipped {dict(source.skipped)}")
