"""Loading: batches as a pure function of the step, so that resuming needs the step and nothing else."""

import functools
import os
import threading
import time

import grain
import numpy as np
from absl import flags

from mmgen.data import images, packing
from mmgen.data.images import BadImage
from mmgen.data.shards import variant_of
from mmgen.data.sources import Bad, TooManyBad


class Rows:
    """Packed rows of tokenised documents: see `packing.Plan` for which documents make a row.

    Rows are numbered on through the epochs, and batch i is rows [i * batch_size, (i + 1) * batch_size). A
    document that cannot be read leaves its place empty and is counted; too many end the run.
    """

    def __init__(
        self, shards, grammar, *, batch_size, row_length, seed=0, text_drop=0.1, image_drop=0.0, loss=None,
        mixture=None, overlong="error", max_bad=0.01, plans=None, cache_bytes=512 << 20, threads=1, workers=0,
    ):  # fmt: skip
        """`loss` holds the weights of text, image and user tokens for grammar.loss_weights. text_drop,
        image_drop, mixture and overlong are as in packing.Plan; `plans` is its folder. `threads` or, if not
        0, `workers` (processes) make batches ahead in the background."""
        self.shards, self.grammar, self.loss = shards, grammar, dict(loss or {})
        self.batch_size, self.row_length, self.max_bad = batch_size, row_length, max_bad
        self.threads, self.workers = threads, workers
        if batch_size < 1 or row_length < 1:
            raise ValueError(
                f"a batch has rows and a row tokens, at least one; found {batch_size} x {row_length}"
            )
        if shards.manifest["grammar_hash"] != grammar.hash:
            raise ValueError(
                f"{shards} was written with the grammar {shards.manifest['grammar']}, this run has "
                f"{grammar.to_dict()}: tokenise again, or train with the shards' own tokenizer and text model"
            )
        if overlong == "error" and shards.longest > row_length:
            raise ValueError(
                f"{shards}: the longest document has {shards.longest} tokens, longer than a row of {row_length}: "
                'lengthen the row, cut them (`mmgen tokenize --longest`), or leave them out with overlong="drop"'
            )
        shards.preload(cache_bytes)
        self.plan = packing.Plan(
            shards.lengths, shards.parts, row_length, seed, mixture=mixture, text_drop=text_drop,
            image_drop=image_drop, overlong=overlong, folder=plans, identity=shards.identity,
        )  # fmt: skip
        self.seen = self.bad = 0

    def batch(self, step):
        """Batch `step` -> tokens int32 [B, T], segments int32 [B, T] (0 is padding, then 1, 2, ...),
        positions int32 [B, T, 3], weights float32 [B, T] of each token as a target."""
        return self.rows_of(step, np.arange(self.batch_size))[0]

    def rows_of(self, step, rows):
        """(the rows `rows` of batch `step`, how many documents in them are damaged): what a process reads
        whose devices hold only those."""
        chosen = [self.plan.row(step * self.batch_size + row) for row in np.asarray(rows).tolist()]
        counts = [len(documents) for documents, _ in chosen]
        tokens, bad = self._tokens(*(np.concatenate(arrays) for arrays in zip(*chosen)))
        lengths = np.array([len(each) for each in tokens])
        flat = np.concatenate(tokens).astype(np.int32, copy=False)
        segments = np.concatenate([np.arange(1, count + 1, dtype=np.int32) for count in counts])
        segments = np.repeat(segments, lengths)
        ends = np.cumsum(lengths)[np.cumsum(counts) - 1]
        B, T = len(chosen), self.row_length
        out = {
            "tokens": (np.zeros((B, T), np.int32), flat),
            "segments": (np.zeros((B, T), np.int32), segments),
            "positions": (np.zeros((B, T, 3), np.int32), self.grammar.positions(flat)),
            "weights": (np.zeros((B, T), np.float32), self.grammar.loss_weights(flat, **self.loss)),
        }
        for row, (start, stop) in enumerate(zip([0, *ends[:-1].tolist()], ends.tolist())):
            for into, values in out.values():
                into[row, : stop - start] = values[start:stop]
        return {name: into for name, (into, _) in out.items()}, bad

    def prefetch(self, start_step=0, rows=None):
        """(step, rows of its batch, damaged documents) from `start_step` on, for ever, prepared in the
        background: see `prefetch`. `rows` are all unless they are given."""
        rows = np.arange(self.batch_size) if rows is None else rows
        return prefetch(self.rows_of, start_step, rows, threads=self.threads, workers=self.workers)

    def _tokens(self, documents, variants):
        """The tokens of each document's variant, a list of int arrays; empty for a damaged document."""
        tokens, bad = self.shards.records(documents), 0
        several = self.shards.phrasings > 1
        for k in range(len(tokens)) if several else np.flatnonzero(variants).tolist():
            if tokens[k] is not None:
                tokens[k] = variant_of(tokens[k], variants[k], self.grammar)
        for k, found in enumerate(tokens):
            if found is None:
                tokens[k], bad = np.zeros(0, self.shards.dtype), bad + 1
        self.seen, self.bad = self.seen + len(tokens), self.bad + bad
        if self.bad > self.max_bad * max(self.seen, 1000):
            raise TooManyBad(
                f"gave up on {self.shards}: {self.bad} of {self.seen} documents are damaged, more than the accepted "
                f"{self.max_bad:.0%}; look with `mmgen tools inspect --verify`, and tokenise again"
            )
        return tokens, bad


class Images:
    """Batches of pixels: every document once an epoch, in a new order each time; of a document with several
    images another one each epoch, or with `beside` the first.

    With `crop` (width, height), for `Several` sources of different sizes, a random part of that size is cut out of each.
    With `recolored` a batch also has each image in other colours, which only a drawn source can give.
    `beside(source, i, epoch)` gives what else a batch has of the document i of each image: {name: array}; it
    raises BadImage where it cannot. With `augment` a random-resized crop, mirrored half of the time if `flip`;
    else the centre. A bad image is
    replaced by the next good one; source.skipped counts each once, and too many end the run. Images are
    kept in memory up to `cache_bytes`, so that later epochs need not draw or decode them again.
    """

    def __init__(
        self, source, batch_size, seed=0, augment=False, max_bad=0.1, recolored=False, beside=None, flip=True,
        crop=None, cache_bytes=256 << 20, threads=1, workers=0,
    ):  # fmt: skip
        if recolored and not all(hasattr(s, "recolored") for s in getattr(source, "sources", [source])):
            raise ValueError(f"{source.spec} has no pictures in other colours; set config.loss.recolor to 0")
        self.crop = crop
        self.recolored, self.threads, self.workers = recolored, threads, workers
        self.beside, self.flip = beside, flip
        self.source, self.batch_size, self.seed, self.augment = source, batch_size, seed, augment
        if batch_size < 1:
            raise ValueError(f"a batch has at least one image, not {batch_size}")
        self._bad = Bad(source, max_bad)
        self._bad_images, self._bad_documents = set(), set()  # (document, which); each counted once
        self._kept, self._room = {}, cache_bytes
        self._lock = threading.Lock()

    def __getstate__(self):
        return {**vars(self), "_kept": {}, "_lock": None}  # each worker keeps what it has drawn

    def __setstate__(self, state):
        vars(self).update(state, _lock=threading.Lock())

    def batch(self, step):
        """Batch `step` -> {"images": uint8 [B, H, W, 3]}, a pure function of the step."""
        return self.rows_of(step, np.arange(self.batch_size))[0]

    def rows_of(self, step, rows):
        """(images `rows` of batch `step`, how many of them stand in for bad ones)."""
        numbers = step * self.batch_size + np.asarray(rows)
        epochs, places = np.divmod(numbers, len(self.source))
        keys = packing.mix(self.seed, packing.ORDER, epochs)
        documents = packing.permute(places, len(self.source), keys).tolist()
        drawn = [self._image(*item) for item in zip(numbers.tolist(), documents, epochs.tolist())]
        batch = {"images": np.stack([pixels for pixels, _, _ in drawn])}
        if self.beside:
            batch |= {name: np.stack([found[name] for _, found, _ in drawn]) for name in drawn[0][1]}
        if self.recolored:
            others = [self._cached(("recolored", i, 0), self._recolored) for i in documents]
            if self.crop:
                others = [self._cut(pixels, number) for pixels, number in zip(others, numbers.tolist())]
            batch["recolored"] = np.stack(others)
        return batch, sum(replaced for *_, replaced in drawn)

    def prefetch(self, start_step=0, rows=None):
        """(step, rows of its batch, replaced images) from `start_step` on, for ever, prepared in the
        background: see `prefetch`. `rows` are all unless they are given."""
        rows = np.arange(self.batch_size) if rows is None else rows
        return prefetch(self.rows_of, start_step, rows, threads=self.threads, workers=self.workers)

    def _image(self, number, document, epoch):
        pixels, found, replaced = self._good(document, epoch)
        if self.augment:
            rng = np.random.default_rng([self.seed, number])
            return images.random_crop(pixels, *self.source.size, rng, flip=self.flip), found, replaced
        if self.crop:
            return self._cut(images.fit(pixels, *self.source.size_of(document)), number), found, replaced
        return images.fit(pixels, *self.source.size), found, replaced

    def _cut(self, pixels, number):
        """Part of self.crop (width, height) of pixels that are not smaller, at a place drawn from the item's number."""
        rng, (width, height) = np.random.default_rng([self.seed, number]), self.crop
        y, x = (int(rng.integers(n - m + 1)) for n, m in zip(pixels.shape, (height, width)))
        return pixels[y : y + height, x : x + width]

    def _good(self, first, epoch):
        """Of the document or of the next one that is good: its pixels, what is beside them, and whether it is
        another."""
        for i in range(first, first + len(self.source)):
            i %= len(self.source)
            several = self.source.several_images and not self.beside
            which = epoch % max(self.source.count_images(i), 1) if several else 0
            if (i, which) in self._bad_images:
                continue
            try:
                pixels = self._cached(("image", i, which), self.source.pixels)
                found = self.beside(self.source, i, epoch) if self.beside else {}
            except BadImage as error:
                with self._lock:
                    self._bad_images.add((i, which))
                    if i not in self._bad_documents:  # another thread may have been faster
                        self._bad_documents.add(i)
                        self._bad.saw(error)
            else:
                with self._lock:
                    self._bad.saw()
                return pixels, found, i != first
        raise TooManyBad(self._bad.report())

    def _recolored(self, i, which):
        return self.source.recolored(i)

    def _cached(self, key, draw):
        """draw(i, which) of key (kind, i, which), kept while there is room."""
        pixels = self._kept.get(key)
        if pixels is None:
            pixels = draw(*key[1:])
            with self._lock:
                if key not in self._kept and pixels.nbytes <= self._room:
                    self._kept[key] = pixels
                    self._room -= pixels.nbytes
        return pixels


def prefetch(rows_of, start_step, rows, *, threads=1, workers=0, ahead=4):
    """Iterator of (step, *rows_of(step, rows)) from `start_step` on, for ever, made in the background: see
    `in_background`."""
    steps = grain.MapDataset.source(_Steps(rows_of, rows)).slice(slice(start_step, None))
    return in_background(steps, threads, workers, ahead)


def in_background(dataset, threads, workers, ahead):
    """Iterator of a grain MapDataset, in its order, made by `threads` or, if not 0, by `workers` processes,
    about `ahead` items early. Call its close() when done, which may wait ten seconds for a worker that is
    busy. An error in an item is raised by next()."""
    if threads < 1 or workers < 0:
        raise ValueError(f"threads are at least 1 and workers at least 0, not {threads} and {workers}")
    if not workers:
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(ahead, threads))
        iterator = iter(dataset.to_iter_dataset(options))
        iterator.start_prefetch()
        return iterator
    if not flags.FLAGS.is_parsed():  # grain reads flags of its own there; ours are argparse's
        flags.FLAGS.mark_as_parsed()
    options = grain.MultiprocessingOptions(workers, per_worker_buffer_size=max(ahead // workers, 1))
    data = dataset.to_iter_dataset(grain.ReadOptions(num_threads=1))
    return iter(data.mp_prefetch(options, functools.partial(_end_with, os.getpid())))


def _end_with(parent, *_):
    """In a worker: ends it when its parent is gone, which nobody else would after a SIGTERM or SIGKILL."""

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class _Steps:
    """A function of the step as the endless random-access source that grain wants."""

    def __init__(self, rows_of, rows):
        self.rows_of, self.rows = rows_of, rows

    def __len__(self):
        return 1 << 48

    def __getitem__(self, step):
        return step, *self.rows_of(step, self.rows)
