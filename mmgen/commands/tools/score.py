"""`mmgen tools score --checkpoint DIR --source SPEC`, or with `--image FILE --text "..."`."""

import argparse
import json

from tqdm import tqdm

from mmgen.commands.common import (
    add_sampler_flags,
    add_source_flags,
    load_sampler,
    picture_for,
    source_from,
)
from mmgen.data import files
from mmgen.data.images import BadImage
from mmgen.data.sources import Bad
from mmgen.document import Document, Text, Turn


def main(argv):
    """The log-likelihood of given images and texts under a model, in nats, one JSON line a document: of what the
    assistant says (or the page) given all before it, image codes and text apart, and how many tokens these are.
    Documents are those of a --source, or one of --text and --image: the picture for that text and, with --caption,
    the text for that picture."""
    parser = argparse.ArgumentParser("mmgen tools score", description=main.__doc__, allow_abbrev=False)
    add_sampler_flags(parser)
    add_source_flags(parser, required=False)
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
    model = load_sampler(args)
    if args.source:
        most = model.grammar.max_side * model.tokenizer.patch
        source = source_from(args, multiple=model.tokenizer.patch, max_side=most)
        found, bad = [], Bad(source, args.max_bad)
        for i in tqdm(range(len(source)), desc="read", disable=None, leave=False):
            try:
                found.append((i, source[i]))
                bad.saw()
            except BadImage as error:
                bad.saw(error)
    else:
        shown, words = picture_for(args.image, model, args.size), Text(args.text)
        asks, says = (shown, words) if args.caption else (words, shown)
        found = [(0, Document([Turn("user", [asks]), Turn("assistant", [says])]))]
    lines = [
        {"document": i} | line
        for (i, _), line in zip(found, scores(model, [d for _, d in found], args.batch_size))
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    if args.out:
        files.write(args.out, text.encode())
    else:
        print(text, end="")
    means = {
        kind: sum(line[kind] for line in lines) / count
        for kind in ("image", "text")
        if (count := sum(line[f"{kind}_tokens"] for line in lines))
    }
    print(
        f"{len(lines)} documents"
        + "".join(f", {value:.4f} a token of {kind}" for kind, value in means.items())
    )


def scores(model, documents, batch_size):
    """For each document {"image", "text": log-likelihood in nats, "image_tokens", "text_tokens": how many}."""
    documents = model.encode(documents, batch_size)
    found = []
    for document, nats in zip(documents, model.nats(documents, batch_size), strict=True):
        tokens = model.grammar.encode(document, model.text)
        of = lambda **kind: model.grammar.loss_weights(tokens, **kind) > 0
        image, text = of(text=0.0), of(image=0.0)
        found.append({
            "image": -float(nats[image].sum()), "text": -float(nats[text].sum()),
            "image_tokens": int(image.sum()), "text_tokens": int(text.sum()),
        })  # fmt: skip
    return found
