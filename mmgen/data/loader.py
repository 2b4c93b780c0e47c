"""Loading: batches as a pure function of the step, so that resuming needs the step and nothing else."""

import collections
import functools
import threading

import grain
import numpy as np

from mmgen.data import images, packing
from mmgen.data.images import BadImage
from mmgen.data.shards import DROP_IMAGES, DROP_TEXT, variant_of
from mmgen.data.sources import Bad, TooManyBad


class Rows:
    """Packed rows of tokenised documents.

    Every epoch draws which documents lose their text or images, shuffles, packs and shuffles the rows,
    all from (seed, epoch). Rows are numbered on through the epochs, and batch i is rows
    [i * batch_size, (i + 1) * batch_size).
    """

    def __init__(
        self,
        shards,
        grammar,
        *,
        batch_size,
        row_length,
        seed=0,
        text_drop=0.1,
        image_drop=0.0,
        loss=None,
        overlong="error",
        cache_bytes=512 << 20,
    ):
        """`loss` holds the weights of text, image and user tokens for grammar.loss_weights; `text_drop`
        and `image_drop` are probabilities, drawn independently; `overlong` is as in packing.pack."""
        self.shards, self.grammar, self.loss = shards, grammar, dict(loss or {})
        self.batch_size, self.row_length, self.seed = batch_size, row_length, seed
        self.text_drop, self.image_drop, self.overlong = text_drop, image_drop, overlong
        if shards.manifest["grammar_hash"] != grammar.hash:
            raise ValueError(
                f"{shards.path} was written with the grammar {shards.manifest['grammar']}, this run has "
                f"{grammar.to_dict()}: tokenise again, or train with the shards' own tokenizer and text model"
            )
        shards.preload(cache_bytes)
        self._first_rows = [0]  # the number of the first row of each epoch that has been planned
        self._plans = collections.OrderedDict()  # epoch -> (plan, row order, variants), the latest two
        self._lock = threading.Lock()

    def batch(self, step):
        """Batch `step` -> tokens int32 [B, T], segments int32 [B, T] (0 is padding, then 1, 2, ...),
        positions int32 [B, T, 3], weights float32 [B, T] of each token as a target."""
        return self.rows_of(step, 0, self.batch_size)

    def rows_of(self, step, start, stop):
        """Rows [start, stop) of batch `step`: what a process reads that holds only those (in the background
        with `prefetch(lambda step: rows.rows_of(step, start, stop))`)."""
        rows = [self._row(step * self.batch_size + row) for row in range(start, stop)]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def prefetch(self, start_step=0, **options):
        """(step, batch) from `start_step` on, for ever, prepared in the background: see `prefetch`."""
        return prefetch(self.batch, start_step, **options)

    def epoch_of(self, step):
        """The epoch that the first row of batch `step` belongs to."""
        return self._find(step * self.batch_size)[0]

    def documents(self, epoch):
        """[(document, variant), ...] of each row of an epoch, in the order they are given out."""
        plan, order, variants = self._plan(epoch)
        return [[(i, int(variants[i])) for i in plan[row].tolist()] for row in order]

    def dropped(self, epoch):
        """How many documents of an epoch are left out as longer than a row, with overlong="drop"."""
        return len(self._plan(epoch)[0].dropped)

    def _row(self, number):
        epoch, row = self._find(number)
        plan, order, variants = self._plan(epoch)
        out = {
            "tokens": np.zeros(self.row_length, np.int32),
            "segments": np.zeros(self.row_length, np.int32),
            "positions": np.zeros((self.row_length, 3), np.int32),
            "weights": np.zeros(self.row_length, np.float32),
        }
        start = 0
        for segment, i in enumerate(plan[order[row]], 1):
            tokens = variant_of(self.shards.tokens(i), variants[i], self.grammar)
            span = slice(start, start + len(tokens))
            out["tokens"][span] = tokens
            out["segments"][span] = segment
            out["positions"][span] = self.grammar.positions(tokens)
            out["weights"][span] = self.grammar.loss_weights(tokens, **self.loss)
            start += len(tokens)
        return out

    def _find(self, number):
        """Row number -> (epoch, row of the epoch)."""
        while number >= self._first_rows[-1]:
            self._plan(len(self._first_rows) - 1)
        epoch = int(np.searchsorted(self._first_rows, number, side="right")) - 1
        return epoch, number - self._first_rows[epoch]

    def _plan(self, epoch):
        """-> (Plan, the order of its rows, variant of each document), made from (seed, epoch) alone."""
        with self._lock:
            if epoch not in self._plans:
                # Separate streams: what one draws must not move the others.
                drops, order, rows = (np.random.default_rng([self.seed, epoch, use]) for use in range(3))
                count = len(self.shards)
                dropped = drops.random((count, 2)) < (self.text_drop, self.image_drop)
                variants = dropped @ np.array([DROP_TEXT, DROP_IMAGES])
                lengths = self.shards.lengths[np.arange(count), variants]
                shuffled = order.permutation(count)
                plan = packing.pack(lengths, self.row_length, shuffled, overlong=self.overlong)
                if not len(plan):
                    raise ValueError(f"{self.shards.path}: no document fits in {self.row_length} tokens")
                self._plans[epoch] = plan, rows.permutation(len(plan)), variants
                if epoch == len(self._first_rows) - 1:
                    self._first_rows.append(self._first_rows[-1] + len(plan))
                if len(self._plans) > 2:
                    self._plans.popitem(last=False)
            return self._plans[epoch]


class Images:
    """Batches of pixels for the tokenizer stage: every image once an epoch, in a new order each time.

    With `recolored` a batch also has each image in other colours, which only a drawn source can give.
    With `augment` a random-resized crop, mirrored half of the time; else the centre. A bad image is
    replaced by the next good one; source.skipped counts each once, and too many end the run. Images are
    kept in memory up to `cache_bytes`, so that later epochs need not draw or decode them again.
    """

    def __init__(
        self, source, batch_size, seed=0, augment=False, max_bad=0.1, recolored=False, cache_bytes=256 << 20
    ):
        if recolored and not hasattr(source, "recolored"):
            raise ValueError(f"{source.spec} has no pictures in other colours; set config.loss.recolor to 0")
        self.recolored = recolored
        self.source, self.batch_size, self.seed, self.augment = source, batch_size, seed, augment
        self._order = functools.lru_cache(2)(self._shuffled)
        self._bad = Bad(source, max_bad)
        self._bad_indices = set()
        self._kept, self._room = {}, cache_bytes
        self._lock = threading.Lock()

    def batch(self, step):
        """Batch `step` -> {"images": uint8 [B, H, W, 3]}, a pure function of the step."""
        return self.rows_of(step, 0, self.batch_size)

    def rows_of(self, step, start, stop):
        """Images [start, stop) of batch `step`."""
        numbers = [step * self.batch_size + b for b in range(start, stop)]
        batch = {"images": np.stack([self._image(number) for number in numbers])}
        if self.recolored:
            others = [self._cached(("recolored", self._index(n)), self.source.recolored) for n in numbers]
            batch["recolored"] = np.stack(others)
        return batch

    def prefetch(self, start_step=0, **options):
        """(step, batch) from `start_step` on, for ever, prepared in the background: see `prefetch`."""
        return prefetch(self.batch, start_step, **options)

    def _index(self, number):
        epoch, place = divmod(number, len(self.source))
        return int(self._order(epoch)[place])

    def _image(self, number):
        pixels = self._good_pixels(self._index(number))
        if self.augment:
            return images.random_crop(pixels, *self.source.size, np.random.default_rng([self.seed, number]))
        return images.fit(pixels, *self.source.size)

    def _good_pixels(self, first):
        for i in range(first, first + len(self.source)):
            i %= len(self.source)
            if i in self._bad_indices:
                continue
            try:
                pixels = self._cached(("image", i), self.source.pixels)
            except BadImage as error:
                with self._lock:
                    if i not in self._bad_indices:  # another thread may have been faster
                        self._bad_indices.add(i)
                        self._bad.saw(error)
            else:
                with self._lock:
                    self._bad.saw()
                return pixels
        raise TooManyBad(self._bad.report())

    def _cached(self, key, draw):
        """draw(i) of key (kind, i), kept while there is room."""
        pixels = self._kept.get(key)
        if pixels is None:
            pixels = draw(key[1])
            with self._lock:
                if key not in self._kept and pixels.nbytes <= self._room:
                    self._kept[key] = pixels
                    self._room -= pixels.nbytes
        return pixels

    def _shuffled(self, epoch):
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.source))


def prefetch(batch, start_step=0, *, threads=1, ahead=4):
    """Iterator of (step, batch(step)) from `start_step` on, for ever, made by `threads` in the background,
    at most `ahead` steps early. Call its close() when done. An error in `batch` is raised by next()."""
    steps = grain.MapDataset.source(_Steps(batch)).slice(slice(start_step, None))
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(ahead, threads))
    iterator = iter(steps.to_iter_dataset(options))
    iterator.start_prefetch()
    return iterator


class _Steps:
    """A function of the step as the endless random-access source that grain wants."""

    def __init__(self, batch):
        self.batch = batch

    def __len__(self):
        return 1 << 48

    def __getitem__(self, step):
        return step, self.batch(step)
