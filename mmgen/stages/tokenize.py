"""Sources -> tokenised shards: the one way into the transformer stage."""

import collections
import contextlib
import itertools
import time
from pathlib import Path

import grain
import numpy as np
from tqdm import tqdm

from mmgen.data import shards
from mmgen.data.images import BadImage
from mmgen.data.loader import in_background
from mmgen.data.sources import Bad, TooManyBad
from mmgen.document import Document, Image, Turn
from mmgen.grammar import Grammar
from mmgen.models.autoencoders import load_tokenizer
from mmgen.runtime import checkpoint
from mmgen.text import Text

MOST_CODES = 2**20  # of which a transformer can still hold a row and a logit each
LOW = "low_score"  # why a document was left out whose images do not fit its text


def tokenize(
    source, tokenizer_dir, text_path, out, *, max_side, phrasings=1, longest=0, overlong="refuse", max_bad=0.1,
    shard_size=16384, process=(0, 1), workers=0, overwrite=False, batch=512, towers=None, min_score=0.0,
    marked=0.0, watermark=None,
):  # fmt: skip
    """Writes the documents of `source` to the folder `out` as shards -> the manifest.

    Run again after it was stopped, however that was, it goes on: finished shards stay. `process` is (rank,
    count) where several write the same folder, each every count-th shard of `shard_size` items; the one that
    finishes last writes the manifest, the others return None.

    phrasings: at most so many of each document are kept. longest: tokens a document may have, 0 for any
    number; a longer one is refused, and counted, or with overlong="cut" loses its last turns, also counted.
    towers, min_score: a document with images and text, of which some image's cosine with that text is less by
    `contrastive.Towers`, is left out and counted as low_score; that is no fault of the source.
    marked, watermark: share of the users' images that become watermark(pixels, key), with a mark (safety/watermark.py) as those
    have that mmgen has drawn: whoever is to change them must know them in spite of it. Which they are depends on the
    item's number alone.
    max_bad: share of bad items above which a run gives up. workers: processes that read and draw; 0 for
    threads. The folder also gets copies of the tokenizer and the text model, so that a run that learns from
    it, and the samples of that run, need nothing else.
    """
    if overlong not in ("refuse", "cut"):
        raise ValueError(f'overlong is "refuse" or "cut", not {overlong!r}')
    if shard_size < 1 or phrasings < 1 or longest < 0:
        raise ValueError(
            f"expected a shard size and phrasings of at least 1 and longest of at least 0, found {shard_size}, "
            f"{phrasings}, {longest}"
        )
    if not 0 <= marked <= 1 or (marked and not watermark):
        raise ValueError(f"marked: expected a share between 0 and 1, and who marks, found {marked}")
    if overwrite and process[1] > 1:
        raise ValueError("several processes cannot overwrite a folder at once: empty it first")
    out, (rank, count) = Path(out), process
    tokenizer, text = load_tokenizer(tokenizer_dir), Text(text_path)
    if tokenizer.codes > MOST_CODES:
        raise ValueError(
            f"{tokenizer_dir} has {tokenizer.codes} codes, and each would be a token of the transformer's vocabulary: at "
            f"most {MOST_CODES} are taken; train a tokenizer with a smaller codebook, and more codes an image"
        )
    grammar = Grammar(pieces=text.size, max_side=max_side, codes=tokenizer.codes)
    facts = {
        "source": source.spec,
        "text_hash": text.hash,
        "tokenizer_hash": tokenizer.hash,
        "patch": tokenizer.patch,
        "levels": list(tokenizer.levels),
        "color_digits": tokenizer.color_digits,
    }
    settings = {"shard_size": shard_size, "phrasings": phrasings, "longest": longest, "overlong": overlong}
    if towers:
        settings |= {"towers": towers.name, "min_score": min_score}
    if marked:
        settings["marked"] = marked
    job = {**facts, **settings, "fingerprint": source.fingerprint, "grammar": grammar.to_dict()}
    finished = shards.begin(out, job, overwrite=overwrite)
    if finished:
        return finished
    mark = shards.mark_of(job)
    if rank == 0:
        if (out / "tokenizer").resolve() != Path(tokenizer_dir).resolve():
            checkpoint.export(tokenizer_dir, out / "tokenizer")
        text.save(out / "text.model")

    opening = collections.Counter(source.skipped)  # what was skipped before any item was read
    spans = [(start, min(start + shard_size, len(source))) for start in range(0, len(source), shard_size)]
    bad, todo = Bad(source, max_bad), []
    for number in range(rank, len(spans), count):
        found = shards.finished(out, number, mark)
        if found is None:
            todo.append(number)
        else:
            bad.seen += spans[number][1] - spans[number][0]
            bad.count += sum(n for reason, n in found["skipped"].items() if reason != LOW)
            source.skipped.update(found["skipped"])
    count_of = lambda numbers: sum(spans[n][1] - spans[n][0] for n in numbers)
    total, left = count_of(range(rank, len(spans), count)), count_of(todo)
    reading = _read(source, [spans[number] for number in todo], phrasings, workers)
    items = itertools.chain.from_iterable(reading)
    bar = tqdm(desc="tokenize", total=total, initial=total - left, unit="doc", disable=None, leave=False)
    images, done, began = 0, 0, time.monotonic()
    with contextlib.closing(reading):
        for number in todo:
            start, stop = spans[number]
            writer = shards.Writer(out, number, grammar, phrasings, mark)
            skipped, parts, cut = collections.Counter(), collections.Counter(), 0
            try:
                for first in range(start, stop, batch):
                    pulled = [next(items) for _ in range(first, min(first + batch, stop))]
                    assert pulled[0][0] == first, (pulled[0][0], first)
                    pulled = _filtered(pulled, towers, min_score) if towers else pulled
                    for i, rows, drawn, shortened in _encode(
                        pulled, tokenizer, grammar, text, longest, overlong, marked, watermark
                    ):
                        if isinstance(rows, BadImage):
                            skipped[rows.reason] += 1
                            bad.saw(rows if rows.reason != LOW else None)
                        else:
                            bad.saw()
                            writer.add(rows)
                            parts[_part_of(source, i)] += 1
                            images, cut = images + drawn, cut + shortened
                    bar.update(min(first + batch, stop) - first)
                    bar.set_postfix_str(f"{images / (time.monotonic() - began):.0f} images/s")
                made = writer.finish(start=start, stop=stop, parts=parts, skipped=skipped, cut=cut)
            except BaseException:
                writer.abandon()
                raise
            done, seconds = done + stop - start, time.monotonic() - began
            tqdm.write(
                f"{writer.name} of {len(spans)}: {made['count']} documents, {made['tokens']} tokens, "
                f"{images / seconds:.0f} images/s, eta {(left - done) * seconds / done:.0f} s"
            )
    bar.close()
    if bad.seen and bad.count == bad.seen:
        raise TooManyBad(bad.report())

    def summary(found):
        total = lambda name: dict(sum((collections.Counter(f[name]) for f in found), collections.Counter()))
        counts = total("parts")
        return {
            **facts,
            "settings": settings,
            "skipped": dict(opening + collections.Counter(total("skipped"))),
            "cut": sum(f["cut"] for f in found),
            "parts": {name: counts[name] for name, _, _ in source.parts if name in counts},
        }

    return shards.finish(out, len(spans), grammar, phrasings, summary, mark)


class _Items:
    """The items of a source in `spans` [(start, stop), ...], RUN at a time, as the random-access source that
    grain wants. A bad item is its error: raised, it would end the reading."""

    RUN = 16  # grain takes .1 ms for what it gives, whatever it is

    def __init__(self, source, spans, phrasings):
        self.source, self.spans, self.phrasings = source, spans, phrasings
        self.stops = np.cumsum([-(-(stop - start) // self.RUN) for start, stop in spans])

    def __len__(self):
        return int(self.stops[-1])

    def __getitem__(self, k):
        number = int(np.searchsorted(self.stops, k, side="right"))
        start, stop = self.spans[number]
        first = (
            stop - (int(self.stops[number]) - k) * self.RUN
        )  # counted from the end, so the first run is short
        return [(i, self._item(i)) for i in range(max(first, start), first + self.RUN)]

    def _item(self, i):
        try:
            return self.source.alternatives(i, self.phrasings)
        except BadImage as error:
            return error


def _read(source, spans, phrasings, workers):
    """Iterator of runs of (i, [Document, ...] or BadImage) for i in `spans`, read ahead in the background."""
    if not spans:
        return (run for run in ())
    items = grain.MapDataset.source(_Items(source, spans, phrasings))
    return in_background(items, threads=1, workers=workers, ahead=8)


def _filtered(items, towers, least):
    """(i, [Document, ...] or BadImage) each -> the same, with a BadImage of reason LOW for those whose images do not
    fit their text: the score is that of the worst image."""
    where, images, texts = [], [], []
    for k, (_, found) in enumerate(items):
        if not isinstance(found, BadImage) and (text := found[0].text()):
            pixels = [image.pixels for image in found[0].images() if image.pixels is not None]
            where += [k] * len(pixels)
            images += pixels
            texts += [text] * len(pixels)
    items = list(items)
    for k, score in zip(where, towers.score(images, texts) if images else ()):
        i, found = items[k]
        if score < least:
            items[k] = i, BadImage(LOW, f"document {i}: an image's score with its text is {score:.3f}")
    return items


def _encode(items, tokenizer, grammar, text, longest, overlong, marked, watermark):
    """(i, [Document, ...] or BadImage) each -> (i, a token array for each phrasing or BadImage, how many
    images, whether it was cut) each; images of equal size are encoded together."""
    images = {
        i: _marked(i, found[0], marked, watermark) for i, found in items if not isinstance(found, BadImage)
    }
    alike = collections.defaultdict(list)
    for i, found in images.items():
        for k, image in enumerate(found):
            if image.codes is None:
                alike[image.pixels.shape].append((i, k))
    for places in alike.values():
        pixels = np.stack([images[i][k].pixels for i, k in places])
        # A few of many shapes are not worth a whole batch each.
        rest = len(pixels) % 64 if len(pixels) % 64 <= 32 else 0
        codes = [tokenizer.encode(pixels[: len(pixels) - rest])] if len(pixels) > rest else []
        codes += [tokenizer.encode(pixels[len(pixels) - rest :], batch=16)] if rest else []
        for (i, k), code in zip(places, np.concatenate(codes)):
            images[i][k] = Image(codes=code)
    for i, found in items:
        if isinstance(found, BadImage):
            yield i, found, 0, False
            continue
        whole = [grammar.encode(_with(document, images[i]), text) for document in found]
        turns = len(found[0].turns)
        if overlong == "cut":
            turns = _turns_that_fit(whole[0], longest, grammar)
        kept = [_first_turns(tokens, turns, grammar) for tokens in whole]  # the same turns in all phrasings
        kept = [tokens for tokens in kept if 0 < len(tokens) <= (longest or len(tokens))]
        cut = bool(kept) and turns < len(found[0].turns)
        if not kept:
            kept = BadImage(
                "overlong", f"document {i} has {len(whole[0])} tokens, at most {longest} are kept"
            )
        yield i, kept, len(images[i]), cut


_KEYS = 64  # of watermarks: none is to be learned by heart


def _marked(i, document, share, watermark):
    """The images of document i, the share of those that the user shows with a watermark."""
    if not share:
        return document.images()
    rng, found = np.random.default_rng((0x3A12, i)), []
    for turn in document.turns:
        for image in turn.parts:
            if not isinstance(image, Image):
                continue
            chosen, number = rng.random() < share, int(rng.integers(_KEYS))
            if chosen and turn.role == "user" and image.pixels is not None:
                image = Image(watermark(image.pixels, number.to_bytes(1)))
            found.append(image)
    return found


def _with(document, images):
    """The document with `images` for its own, in order."""
    rest = iter(images)
    turns = [
        Turn(turn.role, [next(rest) if isinstance(part, Image) else part for part in turn.parts])
        for turn in document.turns
    ]
    return Document(turns)


def _turns_that_fit(tokens, longest, grammar):
    """How many of a document's first turns fit into `longest` tokens; 0 for any number."""
    ends = np.flatnonzero(tokens == grammar.end) + 2  # with <eos>
    return int((ends <= (longest or len(tokens))).sum())


def _first_turns(tokens, turns, grammar):
    """The document's first turns; nothing where it would be cut and nothing is left to learn."""
    ends = np.flatnonzero(tokens == grammar.end)
    if turns == len(ends):
        return tokens
    kept = np.append(tokens[: ends[turns - 1] + 1], np.int32(grammar.eos)) if turns else tokens[:0]
    return kept if grammar.loss_weights(kept).any() else kept[:0]


def _part_of(source, i):
    return next(name for name, start, stop in source.parts if start <= i < stop)
