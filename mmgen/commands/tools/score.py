"""`mmgen tools score --checkpoint DIR --source SPEC`, or with `--image FILE --text "..."`."""

import argparse
import collections
import contextlib
import json
import sys

from tqdm import tqdm

from mmgen.commands.common import (
    add_sampler_flags,
    add_source_flags,
    grid_of,
    load_sampler,
    picture_for,
    source_from,
)
from mmgen.data.images import BadImage
from mmgen.data.sources import Bad
from mmgen.document import Document, Text, Turn


def main(argv):
    """The log-likelihood of given images and texts under a model, in nats, one JSON line a document: of what the
    assistant says (or the page) given all before it, image codes and text apart, and how many tokens these are.
    Documents are those of a --source, or one of --text and --image: the picture for that text or, with --caption,
    the text for that picture."""
    parser = argparse.ArgumentParser("mmgen tools score", description=main.__doc__, allow_abbrev=False)
    add_sampler_flags(parser)
    add_source_flags(parser, required=False)
    parser.set_defaults(size=None)  # an --image stays about as it is
    parser.add_argument("--text", help="of one document")
    parser.add_argument("--image", metavar="FILE", help="of one document")
    parser.add_argument("--caption", action="store_true", help="the image is given and the text is scored")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--out", metavar="FILE.jsonl", help="write the lines here; else they are printed")
    args = parser.parse_args(argv)
    if bool(args.source) == (args.text is not None) or (args.text is None) != (args.image is None):
        raise ValueError("expected either --source SPEC, or --image FILE and --text TEXT together")
    if args.batch_size < 1:
        raise ValueError(f"expected --batch-size of at least 1, found {args.batch_size}")
    with open(args.out, "w") if args.out else contextlib.nullcontext(sys.stdout) as out:
        model = load_sampler(args)
        totals = collections.Counter()
        for i, line in scored(model, documents(args, model, totals), args.batch_size, totals):
            print(json.dumps({"document": i} | line), file=out, flush=True)
            totals.update(line | {"documents": 1})
    kinds = [kind for kind in ("image", "text") if totals[f"{kind}_tokens"]]
    means = [f"{totals[kind] / totals[f'{kind}_tokens']:.4f} a token of {kind}" for kind in kinds]
    left = [f"{totals[reason]} {reason}" for reason in ("bad", "too long") if totals[reason]]
    print(", ".join([f"{totals['documents']} documents", *means, *left]), file=sys.stderr)


def documents(args, model, totals):
    """(index, document) of all that is to be scored."""
    if not args.source:
        size = args.size and grid_of(args.size, model)
        shown, words = picture_for(args.image, model, size), Text(args.text)
        asks, says = (shown, words) if args.caption else (words, shown)
        yield 0, Document([Turn("user", [asks]), Turn("assistant", [says])])
        return
    args.size = args.size or (32, 32)
    patch = model.tokenizer.patch
    source = source_from(args, multiple=patch, max_side=model.grammar.max_side * patch)
    bad = Bad(source, args.max_bad)
    for i in tqdm(range(len(source)), desc="score", disable=None, leave=False):
        try:
            document = source[i]
        except BadImage as error:
            totals["bad"] += 1
            bad.saw(error)
            continue
        bad.saw()
        yield i, document


def scored(model, found, batch_size, totals):
    """(index, {"image", "text": log-likelihood in nats, "image_tokens", "text_tokens": how many}) of each document
    that the model's rows hold."""
    waiting = []

    def flush():
        indices, parts = zip(*waiting)
        rows = [model.grammar.encode(document, model.text) for document in model.encode(parts, batch_size)]
        fitting = [n for n, row in enumerate(rows) if len(row) <= model.longest]
        totals["too long"] += len(rows) - len(fitting)
        waiting.clear()
        for n, nats in zip(fitting, model.nats([rows[n] for n in fitting], batch_size)):
            weights = lambda **kind: model.grammar.loss_weights(rows[n], **kind) > 0
            image, text = weights(text=0.0), weights(image=0.0)
            yield indices[n], {
                "image": 0.0 - float(nats[image].sum()), "text": 0.0 - float(nats[text].sum()),
                "image_tokens": int(image.sum()), "text_tokens": int(text.sum()),
            }  # fmt: skip

    for each in found:
        waiting.append(each)
        if len(waiting) == 8 * batch_size:
            yield from flush()
    if waiting:
        yield from flush()
