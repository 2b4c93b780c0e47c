"""What lies in tokenised shards: statistics, damage, and documents of them as a page to look at.

The page shows images decoded from the codes that are stored, by the tokenizer that lies beside them: codes
written in another order than they are decoded show here, and not as a model whose pictures are noise.
"""

import collections
import hashlib
import html
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import sentencepiece
from PIL import Image
from tqdm import tqdm

from mmgen.data import packing
from mmgen.data.packing import DROP_IMAGES, DROP_TEXT, VARIANTS, Plan
from mmgen.data.shards import Shards, variant_of
from mmgen.document import Image as DocumentImage
from mmgen.evals.report import STYLE, png
from mmgen.grammar import DONE
from mmgen.models.autoencoders import load_tokenizer
from mmgen.text import Text

CHUNK = 1 << 20  # documents whose lengths are in memory at once
TOGETHER = 256  # documents that are read at once
PACKED = 4 * packing.WINDOW  # documents that are packed, to see how full rows get
LONGEST = 1 << 24  # tokens of a document: more, unless the manifest says so, is damage
PERCENTILES = (1, 10, 25, 50, 75, 90, 99)

# What the page holds at most.
SIDE, TOKENS, PICTURES, BYTES = 256, 1 << 14, 16, 6 << 20  # pixels; of a document: two; in all


def opened(folders):
    """The `Shards` of folders, or an error that says what they are instead."""
    for folder in map(Path, folders):
        if folder.is_dir() and not any(folder.glob("tokens-*")) and not (folder / "manifest.json").exists():
            raise ValueError(f"{folder} is no folder of shards: `mmgen tokenize` makes them")
    try:
        return Shards(*folders)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError) as error:
        raise ValueError(f"a manifest.json of {', '.join(map(str, folders))} is damaged: {error!r}") from None


class Copies(NamedTuple):
    """What lies beside the shards; None for what is missing, which `notes` say."""

    text: Text | None
    tokenizer: Any
    notes: list[str]


def copies(shards):
    """The text model and the tokenizer of the shards' folders. Raises ValueError where one of them, or the
    grammar, is not what the shards were written with."""
    grammar, manifest = shards.grammar, shards.manifest
    if grammar.hash != manifest["grammar_hash"]:
        raise ValueError(
            f"{shards}: the grammar in the manifest has the hash {grammar.hash}, its tokens were written with "
            f"{manifest['grammar_hash']}: they mean something else to this version; tokenise again"
        )
    found, notes = {"text": None, "tokenizer": None}, []
    for folder in shards.folders:
        for name, path, load, size, instead in (
            ("text", folder / "text.model", Text, "pieces", "text is shown as numbers of pieces"),
            (
                "tokenizer",
                folder / "tokenizer",
                load_tokenizer,
                "codes",
                "images are shown as their codes, in greys",
            ),
        ):
            if not path.exists():
                notes.append(f"{path} is missing: unless another folder has it, {instead}")
                continue
            copy, written = load(path), manifest.get(f"{name}_hash")
            known, expected = copy.size if name == "text" else copy.codes, getattr(grammar, size)
            if known != expected:
                raise ValueError(f"{path} has {known} {size}, the shards were written with {expected}")
            if written is None:
                notes.append(f"{folder}/manifest.json says no {name}_hash: {path} may be another")
            elif copy.hash != written:
                raise ValueError(
                    f"{path} has the hash {copy.hash}, the shards were written with {written}: put the right one "
                    "there, or tokenise again"
                )
            found[name] = found[name] or copy
    return Copies(**found, notes=notes)


def phrasings(record, lengths, grammar):
    """The phrasings of a record, int32 [T] each, where all is as it should be: it parses, and `lengths` [P, 3]
    are its own. Else a ValueError says what is wrong."""
    if record is None:
        raise ValueError("cannot be read, or is not as long as lengths.npy says")
    count, begun = int((lengths[:, 0] > 0).sum()), int((record == grammar.bos).sum())
    if count != begun or record[0] != grammar.bos:
        raise ValueError(f"{begun} times <bos>, lengths.npy says {count} phrasings")
    rows = []
    for k in range(count):
        tokens = variant_of(record, k * VARIANTS, grammar).astype(np.int32)
        text, images = grammar.guidance_drops(tokens)
        found, expected = [len(tokens), int(text.sum()), int(images.sum())], lengths[k].tolist()
        if found != expected:
            raise ValueError(f"phrasing {k} has lengths {found}, lengths.npy says {expected}")
        if grammar.feed(tokens).mode[0] != DONE:
            raise ValueError(f"phrasing {k} has no <eos>")
        rows.append(tokens)
    return rows


# ---- statistics -----------------------------------------------------------------------------


def statistics(shards, text=None, *, sample=2000, seed=0, row_length=2048):
    """What can be said of shards in numbers: a dict that is JSON. "sample" is of that many documents drawn at
    random, as they are first worded; "packing" of a few windows; all else of all documents."""
    skipped = collections.Counter()
    for manifest in shards.manifests:
        skipped.update(manifest.get("skipped", {}))
    histogram, worded, parts = _lengths(shards)
    ends = np.cumsum(histogram)
    lengths = {
        "mean": shards.total / len(shards),
        "shortest": int(np.flatnonzero(histogram)[0]),
        "percentiles": {str(q): int(np.searchsorted(ends, q / 100 * ends[-1])) for q in PERCENTILES},
        "longest": int(np.flatnonzero(histogram)[-1]),
        "histogram": _bins(histogram),
    }
    return {
        "folders": [str(folder) for folder in shards.folders],
        "sources": [manifest.get("source") for manifest in shards.manifests],
        "grammar": shards.grammar.to_dict(),
        "documents": len(shards),
        "tokens": shards.total,
        "files": len(shards.files),
        "bytes": sum(sum(manifest["bytes"]) for manifest in shards.manifests),
        "parts": parts,
        "lengths": lengths,
        "phrasings": {str(k): int(n) for k, n in enumerate(worded) if n},
        "skipped": dict(skipped),
        "cut": sum(manifest.get("cut", 0) for manifest in shards.manifests),
        "packing": {**_packing(shards, row_length, seed), "longer": int(histogram[row_length + 1 :].sum())},
        "sample": _sample(shards, text, sample, seed),
    }


def _lengths(shards):
    """Of all documents, a chunk at a time: how many have each length and each number of phrasings, int [L] and
    [P + 1], and the parts."""
    histogram, worded, parts = np.zeros(1, np.int64), np.zeros(shards.phrasings + 1, np.int64), []
    for part in shards.parts:
        tokens = 0
        for start in range(part.start, part.stop, CHUNK):
            places = np.arange(start, min(start + CHUNK, part.stop))
            lengths = np.asarray(shards.lengths[places])[:, :, 0]
            if lengths.min() < 0 or lengths.max() > max(LONGEST, shards.longest) or not lengths[:, 0].all():
                raise ValueError(
                    f"{shards}: lengths.npy is damaged: among the documents from {start} on are lengths of "
                    f"{lengths[:, 0].min()} and {lengths.max()} tokens; tokenise again"
                )
            here = np.bincount(lengths[:, 0], minlength=len(histogram))
            here[: len(histogram)] += histogram
            histogram = here
            worded += np.bincount((lengths > 0).sum(1), minlength=len(worded))
            tokens += int(lengths[:, 0].sum(dtype=np.int64))
        count = part.stop - part.start
        parts.append(
            {"name": part.name, "documents": count, "tokens": tokens, "mean": tokens / max(count, 1)}
        )
    return histogram, worded, [{**part, "share": part["tokens"] / shards.total} for part in parts]


def _bins(histogram, most=40):
    """Counts of 0, 1, 2, ... -> [[first, last, count]], at most `most` of them and equally wide."""
    low, high = np.flatnonzero(histogram)[[0, -1]]
    width = -(-(high - low + 1) // most)
    edges = np.arange(low, high + 1, width)
    counts = np.add.reduceat(histogram, edges)
    return [[int(a), int(min(a + width - 1, high)), int(n)] for a, n in zip(edges, counts)]


def _packing(shards, row_length, seed):
    """How full the rows of an epoch are, from its first: all of them where there are few documents."""
    plan = Plan(shards.lengths, shards.parts, row_length, seed, overlong="drop")
    documents = rows = tokens = 0
    try:
        while documents < PACKED and plan.find(rows)[0] == 0:
            chosen, variants = plan.row(rows)
            tokens += int(
                np.asarray(shards.lengths[chosen])[np.arange(len(chosen)), variants // VARIANTS, 0].sum()
            )
            documents, rows = documents + len(chosen), rows + 1
    except ValueError:  # no document fits
        pass
    filled = tokens / (rows * row_length) if rows else 0.0
    return {"row_length": row_length, "rows": rows, "documents": documents, "filled": filled}


def _sample(shards, text, sample, seed):
    """Statistics over the tokens of `sample` documents, or of all where there are fewer."""
    grammar, size = shards.grammar, min(sample, len(shards))
    chosen = np.sort(packing.permute(np.arange(size), len(shards), packing.mix(seed, len(shards))))
    counts, learned = np.zeros((2, grammar.vocab_size), np.int64)
    images, shapes, damaged, why = collections.Counter(), collections.Counter(), 0, []
    for start in range(0, size, TOGETHER):
        documents = chosen[start : start + TOGETHER]
        lengths = np.asarray(shards.lengths[documents])
        for i, record, each in zip(documents.tolist(), shards.records(documents), lengths):
            try:
                tokens = phrasings(record, each, grammar)[0]
            except ValueError as error:
                damaged += 1
                why = (why + [f"document {i}: {error}"])[:5]
                continue
            counts += np.bincount(tokens, minlength=len(counts))
            learned += np.bincount(tokens[grammar.loss_weights(tokens) > 0], minlength=len(counts))
            begun = np.flatnonzero(tokens == grammar.boi)
            heights, widths = tokens[begun + 1] - grammar.h(1) + 1, tokens[begun + 2] - grammar.w(1) + 1
            images[len(begun)] += 1
            shapes.update(f"{w}x{h}" for h, w in zip(heights.tolist(), widths.tolist()))
    ranges = {
        "text pieces": slice(0, grammar.pieces),
        "marks and roles": slice(grammar.pieces, grammar.size_start),
        "sizes": slice(grammar.size_start, grammar.code_start),
        "image codes": slice(grammar.code_start, grammar.vocab_size),
    }
    pieces, codes = counts[ranges["text pieces"]], counts[ranges["image codes"]]
    shares = codes[codes > 0] / max(codes.sum(), 1)
    common = np.argsort(-codes, kind="stable")[:12]
    return {
        "documents": size,
        "of": len(shards),
        "damaged": damaged,
        "why": why,
        "kinds": {
            name: {"tokens": int(counts[span].sum()), "learned": int(learned[span].sum())}
            for name, span in ranges.items()
        },
        "learned": {
            "text": int(learned[: grammar.pieces].sum() + learned[grammar.end]),
            "image": int(learned[grammar.size_start :].sum() + learned[grammar.boi]),
        },
        "turns": {role: int(counts[token]) for role, token in grammar.roles.items()},
        "images_per_document": {str(n): count for n, count in sorted(images.items())},
        "image_shapes": dict(shapes.most_common()),
        "codes": {
            "used": int((codes > 0).sum()),
            "of": len(codes),
            "perplexity": float(np.exp(-(shares * np.log(shares)).sum())) if len(shares) else 0.0,
            "common": {
                grammar.name(grammar.code_start + int(code)): int(codes[code])
                for code in common
                if codes[code]
            },
        },
        "text": {
            "used": int((pieces > 0).sum()),
            "of": len(pieces),
            "bytes": _spelt_in_bytes(pieces, text) if text else None,
        },
    }


def _spelt_in_bytes(counts, text):
    """Share of text pieces that are single bytes, by which a text model spells what it has no piece for."""
    pieces = _processor(text)
    is_byte = np.array([pieces.is_byte(i) for i in range(len(counts))])
    return float(counts[is_byte].sum() / max(counts.sum(), 1))


def tables(stats):
    """Statistics for people: [(title, [column], [row of texts])]."""
    sample, lengths, rows = stats["sample"], stats["lengths"], stats["packing"]
    read = sample["documents"] - sample["damaged"]
    tokens = sum(kind["tokens"] for kind in sample["kinds"].values())
    drawn = (
        "all"
        if sample["documents"] == sample["of"]
        else f"a sample of {sample['documents']:,} of {sample['of']:,}"
    )
    of = lambda n, total: f"{n / total:.1%}" if total else "-"
    skipped = [[f"skipped: {reason}", f"{count:,}"] for reason, count in stats["skipped"].items()]
    where = f"{drawn} documents" + (f", {sample['damaged']} of them damaged" if sample["damaged"] else "")
    images = [[f"documents with {n}", f"{count:,}"] for n, count in sample["images_per_document"].items()]
    shapes = list(sample["image_shapes"].items())
    if len(shapes) > 12:
        shapes = [*shapes[:12], (f"{len(shapes) - 12} other sizes", sum(count for _, count in shapes[12:]))]
    spelt = sample["text"]["bytes"]
    return [
        ("Shards", ["", ""], [
            ["documents", f"{stats['documents']:,}"],
            ["tokens", f"{stats['tokens']:,}"],
            ["files", f"{stats['files']:,}"],
            ["size", f"{stats['bytes'] / 2**20:,.2f} MiB"],
            *([f"documents in {k} wordings", f"{n:,}"] for k, n in stats["phrasings"].items() if k != "1"),
            *(skipped or [["skipped", "0"]]),
            ["cut short", f"{stats['cut']:,}"],
        ]),
        ("Parts", ["part", "documents", "tokens", "share", "mean length"], [
            [part["name"], f"{part['documents']:,}", f"{part['tokens']:,}", f"{part['share']:.1%}",
             f"{part['mean']:.1f}"] for part in stats["parts"]
        ]),
        ("Lengths, in tokens", ["mean", "least", *(f"{q}%" for q in lengths["percentiles"]), "most"], [
            [f"{lengths['mean']:.1f}"]
            + [f"{n:,}" for n in (lengths["shortest"], *lengths["percentiles"].values(), lengths["longest"])]
        ]),
        (f"Rows of {rows['row_length']:,} tokens", ["rows packed", "documents", "filled", "longer documents"], [
            [f"{rows['rows']:,}", f"{rows['documents']:,}", f"{rows['filled']:.1%}", f"{rows['longer']:,}"]
        ]),
        (f"Tokens ({where})", ["kind", "tokens", "share", "learned", "a document"], [
            [name, f"{kind['tokens']:,}", of(kind["tokens"], tokens), f"{kind['learned']:,}",
             f"{kind['tokens'] / max(read, 1):.1f}"] for name, kind in sample["kinds"].items()
        ] + [
            [f"learned as {name}", f"{n:,}", of(n, tokens), f"{n:,}", f"{n / max(read, 1):.1f}"]
            for name, n in sample["learned"].items()
        ]),
        (f"Turns ({where})", ["role", "turns"], [[role, f"{n:,}"] for role, n in sample["turns"].items() if n]),
        (f"Images ({where})", ["images", ""], images),
        (f"Image sizes ({where})", ["patches", "images"], [[shape, f"{n:,}"] for shape, n in shapes]),
        (f"Codes ({where})", ["", ""], [
            ["used", f"{sample['codes']['used']:,} of {sample['codes']['of']:,}"],
            ["perplexity", f"{sample['codes']['perplexity']:.1f}"],
            *([name, of(n, sample["kinds"]["image codes"]["tokens"])] for name, n in sample["codes"]["common"].items()),
        ]),
        (f"Text ({where})", ["", ""], [
            ["pieces used", f"{sample['text']['used']:,} of {sample['text']['of']:,}"],
            ["spelt in bytes", "unknown: no text model" if spelt is None else f"{spelt:.2%} of the pieces"],
        ]),
    ]  # fmt: skip


def show(stats):
    """The tables as text."""
    out = []
    for title, columns, rows in tables(stats):
        lines = [row for row in (columns, *rows) if any(row)]
        widths = [max(len(row[c]) for row in lines) for c in range(len(columns))]
        out.append(title)
        for first, *rest in lines:
            numbers = "".join(f"  {cell:>{width}}" for cell, width in zip(rest, widths[1:]))
            out.append(f"  {first:<{widths[0]}}{numbers}")
    return "\n".join(out)


# ---- damage ---------------------------------------------------------------------------------


def verify(folder):
    """Reads every file and every record of a folder -> [what is damaged, in words]. Records are not read while a
    file is missing or has another size."""
    folder, damage = Path(folder), []
    manifest = _json(folder / "manifest.json") or {}
    if not {"shards", "bytes"} <= manifest.keys():
        opened([folder])  # says what is wrong
    for number, (count, size) in enumerate(zip(manifest["shards"], manifest["bytes"])):
        path = folder / f"tokens-{number:05d}.arrayrecord"
        facts = _json(path.with_suffix(".json"))
        if not path.exists():
            damage.append(f"{path} is missing, with {count} documents")
        elif facts is None:
            damage.append(
                f"{path.with_suffix('.json')} is missing or damaged: no digest to compare {path.name} with"
            )
        else:
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != facts.get("sha256") or (facts.get("count"), facts.get("bytes")) != (count, size):
                damage.append(
                    f"{path} is not the file that was written: its sha256, size or count is another"
                )
    try:
        shards = opened([folder])
    except ValueError as error:
        return [*damage, f"{error} (its records were not read)"]
    bar = tqdm(desc=f"verify {folder}", total=len(shards), unit="doc", disable=None, leave=False)
    for path, first, end in zip(shards.files, shards.starts[:-1].tolist(), shards.starts[1:].tolist()):
        wrong = []
        for start in range(first, end, TOGETHER):
            documents = np.arange(start, min(start + TOGETHER, end))
            lengths = np.asarray(shards.lengths[documents])
            for i, record, each in zip(documents.tolist(), shards.records(documents), lengths):
                try:
                    phrasings(record, each, shards.grammar)
                except ValueError as error:
                    wrong.append(f"{i} ({error})")
            bar.update(len(documents))
        if wrong:
            more = f" and {len(wrong) - 10} more" if len(wrong) > 10 else ""
            damage.append(f"{path}: {len(wrong)} of {end - first} documents: {', '.join(wrong[:10])}{more}")
    bar.close()
    return damage


def _json(path):
    """A file of JSON, or None where there is none or it is damaged."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


# ---- the page -------------------------------------------------------------------------------

_MORE_STYLE = """
.tables { display: flex; flex-wrap: wrap; gap: 0 3em; } .tables td, .tables th { padding: .1em .6em; }
.where { color: #666; } .bad { color: #c22; } .turn { margin: .5em 0; padding: .4em .8em; border-left: 4px solid #bbb; }
.turn b { color: #666; font-size: 12px; } .turn p { margin: .2em 0; white-space: pre-wrap; unicode-bidi: isolate; }
.turn figure { width: auto; display: inline-block; margin: 4px 10px 4px 0; vertical-align: top; }
.turn figure img { width: auto; display: block; border: 1px solid #ccc; }
.tokens { line-height: 1.9; font: 13px/1.9 ui-monospace, monospace; margin: .6em 0 2.5em; }
.tokens i { font-style: normal; white-space: pre; padding: 1px 2px; margin-right: 2px; border-radius: 2px; }
.tokens i, .tokens summary { background: #e2e2e2; } .tokens details { display: inline-block; vertical-align: top; }
.tokens .t, .tokens .t summary { background: #b9d7ff; } .tokens .i, .tokens .i summary { background: #ffd3a6; }
.tokens summary { padding: 0 4px; }
.tokens pre { margin: 0; padding: .5em; font-size: 11px; line-height: 1.3; max-width: 1060px; max-height: 420px; }
"""


def choose(shards, count, seed=0):
    """`count` documents at random, as many of each part: sorted numbers."""
    found = []
    for p, part in enumerate(shards.parts):
        size = part.stop - part.start
        places = packing.permute(np.arange(min(count, size)), size, packing.mix(seed, p, size))
        found += [(k, p, part.start + place) for k, place in enumerate(places.tolist())]
    return sorted(document for _, _, document in sorted(found)[:count])


def write(out, shards, found, stats, *, documents, damage=None):
    """Writes inspect.html and inspect.json to the folder `out` -> path of the page.

    found: `Copies`; stats: `statistics`; documents: the numbers of those to show; damage: of `verify`, if it ran.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    title = f"mmgen tools inspect {shards}"
    notes = [(note, "where") for note in found.notes]
    notes += [(f"damaged: {words}", "bad") for words in (*stats["sample"]["why"], *(damage or ()))]
    if damage == []:
        notes.append(("every record of every shard was read: all are whole", "where"))
    body = [f"<h1>{_escape(title)}</h1>"]
    body += [f"<p class={kind}>{_escape(note)}</p>" for note, kind in notes]
    body.append("<div class=tables>")
    for heading, columns, rows in tables(stats):
        head = "".join(f"<th>{_escape(cell)}</th>" for cell in columns) if any(columns) else ""
        cells = ["".join(f"<td>{_escape(cell)}</td>" for cell in row) for row in rows]
        lines = "".join(f"<tr>{line}</tr>" for line in (head, *cells) if line)
        body.append(f"<section><h3>{_escape(heading)}</h3><table>{lines}</table></section>")
    body.append("</div>" + _bars("documents of each length", stats["lengths"]["histogram"]))
    body.append(
        "<h2>Documents</h2><p>Images are decoded from the stored codes. Below each document are its tokens, by what a "
        "run makes of them: <span class=tokens><i class=t>learned as text</i> <i class=i>learned as image</i> "
        "<i>not learned</i></span> (unless its config says that user turns are learned too).</p>"
    )
    head = f"<!doctype html><meta charset=utf-8><title>{_escape(title)}</title><style>{STYLE}{_MORE_STYLE}</style>"
    size, shown = len("\n".join([head, *body]).encode()), []
    for i in documents:
        text = _document(shards, found, i)
        size += len(text.encode())
        if size > BYTES:
            body.append(
                f"<p class=bad>{len(documents) - len(shown)} more documents: the page would be too large.</p>"
            )
            break
        body.append(text)
        shown.append(i)
    (out / "inspect.html").write_text("\n".join([head, *body]), "utf-8")
    summary = {**stats, "notes": found.notes, "damage": damage, "shown": shown}
    (out / "inspect.json").write_text(json.dumps(summary, indent=1))
    return out / "inspect.html"


def _document(shards, found, i):
    """A document as HTML."""
    grammar, shard = shards.grammar, int(np.searchsorted(shards.starts, i, side="right")) - 1
    part = next(part.name for part in shards.parts if part.start <= i < part.stop)
    path, record = Path(shards.files[shard]), i - shards.starts[shard]
    where = f"{part}, record {record} of {path.parent.name}/{path.name}"
    out = [f"<h3 id=document-{i}>Document {i}</h3>"]
    try:
        rows = phrasings(shards.records([i])[0], np.asarray(shards.lengths[np.array([i])])[0], grammar)
    except ValueError as error:
        return f"{out[0]}<p class=where>{_escape(where)}</p><p class=bad>damaged: {_escape(str(error))}</p>"
    lengths = [_variant_lengths(tokens, grammar) for tokens in rows]
    out.append(f"<p class=where>{_escape(where)}; {_escape('; '.join(lengths))}</p>")
    first, *others = [grammar.decode(tokens, found.text or _Numbers) for tokens in rows]
    pictures = iter(_pictures(first.images(), found.tokenizer, grammar))
    out.append(_turns(first, lambda image: next(pictures, "<p class=where>[one more image]</p>")))
    for k, other in enumerate(others, 2):
        out.append(
            f"<p class=where>wording {k}</p>" + _turns(other, lambda _: "<p class=where>[its image]</p>")
        )
    out.append(f"<div class=tokens>{_spans(rows[0], grammar, found.text)}</div>")
    return "\n".join(out)


def _variant_lengths(tokens, grammar):
    drops = (DROP_TEXT, DROP_IMAGES, DROP_TEXT | DROP_IMAGES)
    text, images, neither = (len(variant_of(tokens, bits, grammar)) for bits in drops)
    return (
        f"{len(tokens)} tokens (without what is asked in words {text}, in images {images}, in both {neither})"
    )


class _Numbers:
    """Stands in for a text model that is missing."""

    @staticmethod
    def decode(ids):
        return " ".join(f"⟨{i}⟩" for i in ids)


def _turns(document, picture):
    """Turns as HTML; picture(image) -> HTML."""
    out = []
    for turn in document.turns:
        parts = [
            picture(part) if isinstance(part, DocumentImage) else f"<p>{_escape(part.text, keep=chr(10))}</p>"
            for part in turn.parts
        ]
        out.append(f"<div class=turn><b>{turn.role}</b><br>{''.join(parts)}</div>")
    return "".join(out)


def _pictures(images, tokenizer, grammar):
    """The first images as HTML: decoded, or grey where there is nothing to decode them with."""
    images = images[:PICTURES]
    alike, out = collections.defaultdict(list), [None] * len(images)
    for k, image in enumerate(images):
        alike[image.codes.shape].append(k)
    for shape, places in alike.items():
        codes = np.stack([images[k].codes for k in places])
        if tokenizer is None or len(shape) > 2:
            grey = (codes.reshape(*codes.shape[:3], -1)[..., :1] * 255 // max(grammar.codes - 1, 1)).astype(
                np.uint8
            )
            pixels, kind = np.repeat(grey, 3, axis=-1), "not decoded: its codes as greys"
        else:
            pixels = tokenizer.decode(codes, batch=8)
            kind = f"{pixels.shape[2]}x{pixels.shape[1]} pixels"
        for k, each in zip(places, pixels):
            out[k] = _figure(each, f"{shape[1]}x{shape[0]} codes, {kind}")
    return out


def _figure(pixels, caption):
    picture = Image.fromarray(pixels)
    picture.thumbnail((SIDE, SIDE))  # makes large ones smaller, and no other
    zoom = max(1, 192 // max(picture.size))
    width, height = picture.width * zoom, picture.height * zoom
    return (
        f"<figure><img width={width} height={height} alt='' src='{png(np.asarray(picture))}'>"
        f"<figcaption>{_escape(caption)}</figcaption></figure>"
    )


def _spans(tokens, grammar, text):
    """Tokens as HTML, each coloured by what it weighs in the loss; the codes of an image folded."""
    weights, processor = grammar.loss_weights(tokens), text and _processor(text)
    out, at = [], 0
    while at < len(tokens):
        if at >= TOKENS:
            out.append(f"<span class=where>… {len(tokens) - at} more tokens</span>")
            break
        token, step = int(tokens[at]), 1
        is_image = token >= grammar.size_start or token == grammar.boi
        kind = ("i" if is_image else "t") if weights[at] else "g"
        if token >= grammar.code_start:
            height, width = tokens[at - 2] - grammar.h(1) + 1, tokens[at - 1] - grammar.w(1) + 1
            step = int(height * width * grammar.depth)
            codes = (tokens[at : at + step] - grammar.code_start) % grammar.codes
            digits = len(str(grammar.codes - 1))
            grid = "\n".join(
                " ".join(f"{c:>{digits}}" for c in row) for row in codes.reshape(height, -1).tolist()
            )
            out.append(
                f"<details class={kind}><summary>{step} codes {width}x{height}</summary><pre>{grid}</pre></details>"
            )
        else:
            known = processor and token < grammar.pieces
            word = processor.id_to_piece(token).replace("\u2581", " ") if known else grammar.name(token)
            out.append(f"<i class={kind} title='{token} weighs {weights[at]:g}'>{_escape(word)}</i>")
        at += step
    return "".join(out)


def _bars(title, bins, width=720, height=160):
    """[[first, last, count]] as an SVG of bars."""
    highest, step = max(count for _, _, count in bins), (width - 20) / len(bins)
    bars = []
    for k, (first, last, count) in enumerate(bins):
        tall = (height - 44) * count / highest
        shape = f"x={10 + k * step:.1f} y={height - 20 - tall:.1f} width={step * 0.9:.1f} height={tall:.1f}"
        bars.append(f"<rect {shape} fill='#1560bd'><title>{first} to {last}: {count}</title></rect>")
    words = [(10, "start", bins[0][0]), (width - 10, "end", bins[-1][1])]
    labels = [
        f"<text x={x} y={height - 5} font-size=11 text-anchor={side}>{n}</text>" for x, side, n in words
    ]
    text = f"<text x=10 y=14 font-size=12>{_escape(title)}, at most {highest} in a bar</text>"
    return f"<p><svg width={width} height={height}>{text}{''.join(bars)}{''.join(labels)}</svg></p>"


def _escape(text, keep=""):
    """Text that is safe in HTML; control characters, which it may not hold, as their pictures."""
    pictures = {c: 0x2400 + c for c in range(32) if chr(c) not in keep}
    return html.escape(text.translate(pictures))


def _processor(text):
    """The SentencePiece processor of a text model, which knows each piece's spelling."""
    return sentencepiece.SentencePieceProcessor(model_proto=text.model)
