"""Packing: which documents share a row, from their lengths alone, and in which order rows come.

An `Epoch` never holds more than a window of documents: the shuffle is a keyed permutation that gives any
of its places alone, chances are hashes of (seed, epoch, document), and a window is packed by itself. So
a billion documents need no more memory than a million; what grows is a number for each window.
"""

import bisect
import functools
import hashlib
import itertools
import math
import os
import threading
import uuid
import warnings
from typing import NamedTuple

import numpy as np

WINDOW = 8192  # documents that are packed together
VERSION = 1  # of everything here that decides which documents make a row
DROP_TEXT, DROP_IMAGES = 1, 2  # bits of a variant; above them stands the number of the phrasing
VARIANTS = 4  # of each phrasing


def best_fit(lengths, row_length):
    """Packs documents of `lengths` int [N], each at most row_length -> rows, lists of places in `lengths`.

    Longest first wins on mixed lengths, the given order on documents of nearly one length; this takes
    whichever makes fewer rows.
    """
    lengths = np.asarray(lengths)
    longest_first = np.argsort(-lengths, kind="stable")
    rows = _best_fit(longest_first, lengths, row_length)
    if len(rows) * row_length > 1.01 * lengths.sum():  # not worth a second try
        rows = min(rows, _best_fit(np.arange(len(lengths)), lengths, row_length), key=len)
    return rows


def _best_fit(documents, lengths, row_length):
    """Best fit: each document in turn goes into the fullest row that still holds it, or a new one.

    Open rows are kept in stacks by the room that is left. One big integer has bit s set while a row
    with room s exists, so the best row is the lowest bit at or above the length: no search.
    """
    rows, stacks, rooms = [], [[] for _ in range(row_length + 1)], 0
    for document, length in zip(documents.tolist(), lengths[documents].tolist()):
        roomy = rooms >> length
        if roomy:
            room = length + (roomy & -roomy).bit_length() - 1
            row = stacks[room].pop()
            row.append(document)
            if not stacks[room]:
                rooms ^= 1 << room
        else:
            room, row = row_length, [document]
            rows.append(row)
        stacks[room - length].append(row)
        rooms |= 1 << (room - length)
    return rows


# What a chance is for, so that none of them moves another.
SLOTS, ORDER, TEXT, IMAGES, PHRASING = range(5)


class Part(NamedTuple):
    """A run of documents that a mixture weighs as one: [start, stop) in the shards."""

    name: str
    start: int
    stop: int


class Window(NamedTuple):
    """Packed documents: row r holds documents[starts[r]:starts[r + 1]]."""

    documents: np.ndarray  # int64 [N]
    variants: np.ndarray  # int64 [N]
    starts: np.ndarray  # int64 [R + 1]
    dropped: int  # documents left out as longer than a row


class Plan:
    """Rows of documents for ever, numbered on through the epochs: plan[number] is a lookup.

    Each epoch draws every document's variant, shuffles, cuts the order into windows and packs each, best
    fit. An epoch without a mixture has every document once. With one, {part name: weight}, it has as
    many tokens as the parts have together, shared out by weight: a part is gone through again and again,
    in a new order each time, and goes on in the next epoch where it stopped. "NAME" is all parts of that name
    (NAME#0, NAME#1, ...) together, by their tokens: their documents come as often.

    lengths: int array or memory map [N, P, 3]: of each phrasing its tokens, and those that DROP_TEXT
    and DROP_IMAGES take away; phrasings that a document does not have are 0.
    text_drop, image_drop: chances of these, drawn independently. A document longer than a row is a
    ValueError, or with overlong="drop" left out: see `dropped`.
    folder: where the number of rows of each window is kept, so that a resumed run need not pack again
    what came before; None keeps it in memory. identity: what else, by a hash, the documents are.
    """

    def __init__(
        self, lengths, parts, row_length, seed=0, *, mixture=None, text_drop=0.0, image_drop=0.0,
        overlong="error", window=WINDOW, folder=None, identity="",
    ):  # fmt: skip
        self.lengths, self.row_length, self.seed = lengths, row_length, seed
        self.drops, self.overlong, self.window = (text_drop, image_drop), overlong, window
        if overlong not in ("error", "drop"):
            raise ValueError(f'overlong is "error" or "drop", not {overlong!r}')
        if not len(lengths):
            raise ValueError("there is no document to make rows of")
        if mixture:
            count = functools.cache(self._tokens)
            mixture = _shared_out(parts, mixture, count)
            parts = _weighed(parts, mixture)
            weights = [mixture[part.name] / sum(mixture.values()) for part in parts]
            tokens = [count(part) for part in parts]
            # Documents of each part an epoch: its share of tokens, at its own mean length.
            self.rates = [
                weight * sum(tokens) * (part.stop - part.start) / own
                for weight, part, own in zip(weights, parts, tokens)
            ]
        else:
            parts = [Part("all", 0, len(lengths))]
            self.rates = [float(len(lengths))]
        self.parts = parts
        key = (VERSION, seed, row_length, window, self.drops, overlong, self.rates, parts, identity)
        self.key = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
        self.folder = folder
        if not 0 <= min(self.drops) <= max(self.drops) <= 1 or row_length < 1 or window < 1:
            raise ValueError(
                f"expected chances from 0 to 1, rows and windows of at least 1; found {self.drops}, {row_length}, {window}"
            )
        self._tables = {}  # the _Tables of the epochs that were used last
        # The number of the first row of each epoch begun.
        self._firsts = [0, *_kept(self._path(""), 1).ravel().tolist()]
        self.__setstate__({})

    def __getstate__(self):
        return {name: value for name, value in vars(self).items() if name not in ("_lock", "_windows")}

    def __setstate__(self, state):
        vars(self).update(state)
        self._lock = threading.RLock()
        self._windows = functools.lru_cache(8)(self._window)

    def row(self, number):
        """Row `number` >= 0 -> (documents, variants), int64 arrays."""
        with self._lock:
            epoch, row = self.find(number)
            self._extend(epoch, row + 1)
            table = self._table(epoch)
            at = int(np.searchsorted(table.rows, row, side="right")) - 1
            window, r = self._windows(epoch, at), row - int(table.rows[at])
        here = slice(window.starts[r], window.starts[r + 1])
        return window.documents[here], window.variants[here]

    def find(self, number):
        """Row number -> (epoch, row of the epoch)."""
        with self._lock:
            while True:
                epoch = bisect.bisect(self._firsts, number) - 1
                row = number - self._firsts[epoch]
                if epoch < len(self._firsts) - 1 or row < self._extend(epoch, row + 1):
                    return epoch, row
                self._firsts.append(self._firsts[epoch] + self._extend(epoch, None))
                if len(self._firsts) > 8 and self._firsts[-1] == self._firsts[-9]:  # not by chance
                    raise ValueError(f"no document fits in a row of {self.row_length} tokens")
                if epoch % 64 == 63:
                    _keep(self._path(""), np.array(self._firsts[1:], np.int64)[:, None])

    def rows(self, epoch):
        """How many rows an epoch has: packs all of it, unless that is known."""
        with self._lock:
            return self._extend(epoch, None)

    def dropped(self, epoch):
        """How many documents of an epoch are left out as longer than a row."""
        self.rows(epoch)
        return int(sum(self._table(epoch).dropped))

    def size(self, epoch):
        """How many documents an epoch has, those left out included."""
        return int(self._counts(epoch).sum())

    def _path(self, name):
        return self.folder and os.path.join(self.folder, f"{self.key}{name}.npy")

    def _table(self, epoch):
        table = self._tables.pop(epoch, None)
        table = table if table is not None else _Table(self._path(f"-{epoch}"))
        self._tables[epoch] = table  # now the latest
        if len(self._tables) > 3:
            del self._tables[next(iter(self._tables))]
        return table

    def _extend(self, epoch, rows):
        """Packs windows until `rows` rows of the epoch are known, or None for all -> how many are."""
        table, count = self._table(epoch), -(-self.size(epoch) // self.window)
        while len(table) < count and (rows is None or table.rows[-1] < rows):
            window = self._windows(epoch, len(table))
            table.add(len(window.starts) - 1, window.dropped, last=len(table) + 1 == count)
        return int(table.rows[-1])

    def _counts(self, epoch):
        """Documents that each part gives to an epoch: int [parts]."""
        return np.array([int((epoch + 1) * rate) - int(epoch * rate) for rate in self.rates])

    def _window(self, epoch, number):
        documents, rounds = self._documents(epoch, number)
        variants, lengths = self._variants(documents, rounds)
        fits = lengths <= self.row_length
        if self.overlong == "error" and not fits.all():
            worst = documents[lengths.argmax()]
            raise ValueError(
                f"{(~fits).sum()} of {len(fits)} documents are longer than a row of {self.row_length} tokens (the "
                f'longest, document {worst}, has {lengths.max()}): lengthen the row or use overlong="drop"'
            )
        documents, variants, lengths = documents[fits], variants[fits], lengths[fits]
        rows = best_fit(lengths, self.row_length)
        order = np.random.default_rng([self.seed, epoch, number]).permutation(len(rows))
        rows = [rows[r] for r in order.tolist()]
        places = np.fromiter((place for row in rows for place in row), np.int64, len(documents))
        starts = np.cumsum([0] + [len(row) for row in rows], dtype=np.int64)
        return Window(documents[places], variants[places], starts, int((~fits).sum()))

    def _documents(self, epoch, number):
        """The documents of a window, int64 [N], and how often their part was gone through before, [N]."""
        counts = self._counts(epoch)
        slots = np.arange(number * self.window, min((number + 1) * self.window, counts.sum()))
        if len(self.parts) > 1:  # the order of the parts
            slots = permute(slots, int(counts.sum()), mix(self.seed, SLOTS, epoch))
        ends = np.cumsum(counts)
        which = np.searchsorted(ends, slots, side="right")
        documents, rounds = np.empty(len(slots), np.int64), np.empty(len(slots), np.int64)
        for p, part in enumerate(self.parts):
            mine = np.flatnonzero(which == p)
            size = part.stop - part.start
            place = slots[mine] - (ends[p] - counts[p]) + int(epoch * self.rates[p])
            rounds[mine] = place // size
            keys = mix(self.seed, ORDER, p, rounds[mine])
            documents[mine] = part.start + permute(place % size, size, keys)
        return documents, rounds

    def _variants(self, documents, rounds):
        """The variant that each document has in that round, and its length: int64 [N] each."""
        text, images = (
            chance(self.seed, stream, rounds, documents) < share
            for stream, share in zip((TEXT, IMAGES), self.drops)
        )
        lengths = np.asarray(self.lengths[documents]).astype(np.int64)
        phrasings = (lengths[:, :, 0] > 0).sum(1)
        phrasing = (chance(self.seed, PHRASING, rounds, documents) * phrasings).astype(np.int64)
        whole, texts, pictures = lengths[np.arange(len(documents)), phrasing].T
        variants = phrasing * VARIANTS + text * DROP_TEXT + images * DROP_IMAGES
        return variants, whole - text * texts - images * pictures

    def _tokens(self, part, chunk=1 << 20):
        """The tokens that one round of a part is expected to give, what is longer than a row left out."""
        total = 0.0
        for start in range(part.start, part.stop, chunk):
            lengths = np.asarray(self.lengths[start : min(start + chunk, part.stop)]).astype(np.int64)
            whole, texts, pictures = np.moveaxis(lengths, 2, 0)
            expected = 0.0
            for text, images in itertools.product((0, 1), repeat=2):
                share = math.prod(d if drawn else 1 - d for d, drawn in zip(self.drops, (text, images)))
                left = whole - text * texts - images * pictures
                expected = expected + share * np.where(left <= self.row_length, left, 0)
            total += float((expected.sum(1) / (whole > 0).sum(1)).sum())
        if not total:
            raise ValueError(f"no document of {part.name} fits in a row of {self.row_length} tokens")
        return total


def _shared_out(parts, mixture, tokens):
    """The mixture with the weight of a name that several parts have shared out among those not named alone, by their
    tokens."""
    found = dict(mixture)
    for name, weight in mixture.items():
        same = [part for part in parts if part.name.rpartition("#")[0] == name and part.name not in mixture]
        if same and name not in (part.name for part in parts):
            sizes = [tokens(part) if weight > 0 else 1 for part in same]
            del found[name]
            found |= {part.name: weight * size / sum(sizes) for part, size in zip(same, sizes)}
    return found


def _weighed(parts, mixture):
    """The parts that a mixture names, in their order."""
    names = [part.name for part in parts]
    unknown = sorted(set(mixture) - set(names))
    weights = list(mixture.values())
    if unknown or min(weights) < 0 or not 0 < sum(weights) < math.inf:
        raise ValueError(
            f"a mixture gives each of the parts {names} a weight >= 0, not all 0; found {dict(mixture)}"
            + (f", of which {unknown} are not there" if unknown else "")
        )
    missing = [name for name in names if name not in mixture]
    if missing:
        raise ValueError(f"the mixture {dict(mixture)} leaves out {missing}: give 0 to what is not wanted")
    return [part for part in parts if mixture[part.name] > 0]


class _Table:
    """The rows before each window of an epoch, and the documents that each left out; kept in a file."""

    SAVE_EVERY = 256  # windows

    def __init__(self, path):
        self.path, self.count, self.saved = path, 0, 0
        self._rows, self.dropped = np.zeros(8, np.int64), []
        for rows, dropped in _kept(path, 2).tolist():
            self._add(rows, dropped)
        self.saved = self.count

    def __len__(self):
        return self.count

    @property
    def rows(self):
        """int64 [windows + 1]"""
        return self._rows[: self.count + 1]

    def add(self, rows, dropped, last):
        """Notes the next window."""
        self._add(rows, dropped)
        # Epochs of a few windows are packed again sooner than read.
        if self.path and (last and self.count > 4 or self.count - self.saved >= self.SAVE_EVERY):
            _keep(self.path, np.stack([np.diff(self.rows), self.dropped], 1).astype(np.int64))
            self.saved = self.count

    def _add(self, rows, dropped):
        self.count += 1
        if self.count == len(self._rows):
            self._rows = np.concatenate([self._rows, np.zeros_like(self._rows)])
        self._rows[self.count] = self._rows[self.count - 1] + rows
        self.dropped.append(dropped)


def _kept(path, columns):
    """What `_keep` wrote: int64 [N, columns]; nothing where there is no file or a damaged one."""
    nothing = np.zeros((0, columns), np.int64)
    if not path or not os.path.exists(path):
        return nothing
    try:
        known = np.load(path)
    except Exception:  # numpy reads a header as Python, which can go wrong in many ways
        return nothing
    return known if known.dtype == np.int64 and known.shape[1:] == (columns,) else nothing


def _keep(path, known):
    """Writes a table. Several processes may write one at once: each writes a true beginning of it. Without
    room for it nothing is lost but time."""
    if not path:
        return
    unfinished = f"{path}.{uuid.uuid4().hex}.tmp"
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(unfinished, "wb") as file:
            np.save(file, known)
        os.replace(unfinished, path)
    except OSError as error:
        warnings.warn(f"{path} could not be written ({error}): resuming will take longer")


# ---- chance by number -----------------------------------------------------------------------


def mix(*numbers):
    """A hash of numbers or arrays of them -> uint64, by SplitMix64's finaliser (Steele et al. 2014)."""
    state = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        for number in numbers:
            state = (state ^ np.asarray(number).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state


def chance(*numbers):
    """Uniform in [0, 1) from a hash of numbers or arrays of them: float64."""
    return (mix(*numbers) >> np.uint64(11)) * 2.0**-53


def permute(places, size, key, rounds=8):
    """Where a random permutation of range(size), chosen by `key`, puts `places` int [N] -> int64 [N].

    A Feistel network on the bits of size - 1, walked until the result is below size (Black and Rogaway
    2002, "Ciphers with arbitrary finite domains"). `key` is a uint64 or one for each place.
    """
    bits = max(int(size - 1).bit_length(), 6)  # with fewer, some orders would come more often than others
    low, high = np.uint64(bits // 2), np.uint64(bits - bits // 2)
    places = np.asarray(places).astype(np.uint64)
    keys = np.broadcast_to(np.asarray(key, np.uint64), places.shape)
    out, todo = places.copy(), np.arange(len(places))
    while len(todo):
        x, a, b = out[todo], low, high
        for n in range(rounds):
            left, right = x >> a, x & ((np.uint64(1) << a) - np.uint64(1))
            left ^= mix(keys[todo], n, right) & ((np.uint64(1) << b) - np.uint64(1))
            x, a, b = (right << b) | left, b, a
        out[todo] = x
        todo = todo[x >= np.uint64(size)]
    return out.astype(np.int64)
