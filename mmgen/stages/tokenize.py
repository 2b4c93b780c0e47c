"""Source -> tokenised shards: the one way into the transformer stage."""

import shutil
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mmgen.data import shards
from mmgen.data.sources import documents_of
from mmgen.document import Document, Image, Turn
from mmgen.grammar import Grammar
from mmgen.models.autoencoders import load_tokenizer
from mmgen.runtime import checkpoint
from mmgen.text import Text


def tokenize(source, tokenizer_dir, text_path, out, *, max_side, overwrite=False, batch=256):
    """Writes the documents of `source` to the folder `out` as shards -> the manifest.

    The folder also gets copies of the tokenizer and the text model, so that a run that learns from
    it, and the samples of that run, need nothing else.
    """
    out = Path(out)
    tokenizer, text = load_tokenizer(tokenizer_dir), Text(text_path)
    grammar = Grammar(pieces=text.size, max_side=max_side, codes=tokenizer.codes)
    extra = {
        "source": source.spec,
        "skipped": source.skipped,
        "text_hash": text.hash,
        "tokenizer_hash": tokenizer.hash,
        "patch": tokenizer.patch,
        "levels": list(tokenizer.levels),
        "color_digits": tokenizer.color_digits,
    }

    def encoded():
        pending = []
        for _, document in tqdm(documents_of(source), "tokenize", len(source), disable=None, leave=False):
            pending.append(document)
            if len(pending) == batch:
                yield from _encode(pending, tokenizer, grammar, text)
                pending = []
        yield from _encode(pending, tokenizer, grammar, text)

    if out.exists() and (out / "manifest.json").exists() and not overwrite:
        raise FileExistsError(f"{out} already holds finished shards; choose another folder or --overwrite")
    out.mkdir(parents=True, exist_ok=True)
    checkpoint.export(tokenizer_dir, out / "tokenizer")
    shutil.copy2(text_path, out / "text.model")
    return shards.write(out, encoded(), grammar, manifest_extra=extra, overwrite=overwrite)


def _encode(documents, tokenizer, grammar, text):
    """Documents with pixels -> token arrays; images of equal size are encoded together."""
    places = {}
    for d, document in enumerate(documents):
        for t, turn in enumerate(document.turns):
            for p, part in enumerate(turn.parts):
                if isinstance(part, Image) and part.codes is None:
                    places.setdefault(part.pixels.shape, []).append((d, t, p))
    codes = {}
    for found in places.values():
        pixels = np.stack([documents[d].turns[t].parts[p].pixels for d, t, p in found])
        codes.update(zip(found, tokenizer.encode(pixels)))
    for d, document in enumerate(documents):
        turns = [
            Turn(turn.role, tuple(Image(codes=codes[d, t, p]) if (d, t, p) in codes else part
                                  for p, part in enumerate(turn.parts)))
            for t, turn in enumerate(document.turns)
        ]  # fmt: skip
        yield grammar.encode(Document(tuple(turns)), text)
