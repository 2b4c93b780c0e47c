"""Sources: anything that yields Documents by index, named on the command line as `kind:where`.

    world:SPLIT   rendered scenes and their captions (mmgen/world)
    tars:GLOB     img2dataset/webdataset shards: key.jpg|jpeg|png|webp, key.txt, key.json

A source has `len(source)`, `source[i] -> Document` at `source.size`, `source.pixels(i)` -> uint8
[H, W, 3] at the size that the image has, `source.spec`, and `source.skipped`, a Counter by reason of
what was left out. `source[i]` and `source.pixels(i)` raise BadImage; `documents_of` skips and counts.
"""

import collections
import dataclasses
import difflib
import functools
import glob
import hashlib
import json
import os

import numpy as np

from mmgen.data import images
from mmgen.data.images import BadImage
from mmgen.document import Image, caption_to_image

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")


class TooManyBad(RuntimeError):
    """More of a source is bad than the run accepts. The message counts the reasons."""


def open_source(
    spec,
    size=(64, 64),
    seed=0,
    *,
    documents=None,
    languages=("en",),
    category=None,
    split=None,
    split_by="key",
    holdout=0.1,
    only=None,
    exclude=None,
    limits=images.Limits(),
    background=(255, 255, 255),
):
    """Opens the source named `spec`; images come at `size` (width, height).

    world: `documents` is its length; `languages` is a list, or a dict of weights, from which each
    document draws one by (seed, i); `category` gives only its kind of scene.
    tars: `split` "train" or "test" takes one side of a stable split, in which documents of equal JSON
    field `split_by` stay together and a share `holdout` of its values is test. `only` and `exclude`
    map JSON fields to a value or a list of values. `documents` keeps the first so many.
    """
    kind, _, where = spec.partition(":")
    if kind == "world" and where:
        return World(spec, where, size, seed, documents, languages, category)
    if kind == "tars" and where:
        keep = Filter(split, split_by, holdout, _lists(only), _lists(exclude))
        return Tars(spec, where, size, documents, keep, limits, background)
    known = ("world:SPLIT", "tars:GLOB")
    near = difflib.get_close_matches(kind, ("world", "tars"), 1, 0.4)
    hint = f"; did you mean {near[0]}:{where or '...'}?" if near and near[0] != kind else ""
    raise ValueError(f"unknown source {spec!r}: expected one of {', '.join(known)}{hint}")


def documents_of(source, indices=None, max_bad=0.1):
    """Yields (i, source[i]) for `indices` (default all), skipping bad ones and counting them in
    source.skipped. Raises TooManyBad when of 100 or more a share above `max_bad` is bad, or if all are."""
    bad = Bad(source, max_bad)
    for i in range(len(source)) if indices is None else indices:
        try:
            document = source[i]
        except BadImage as error:
            bad.saw(error)
        else:
            bad.saw()
            yield i, document
    if bad.seen and bad.count == bad.seen:
        raise TooManyBad(bad.report())


class Bad:
    """Counts the bad documents of a source, and gives up when they are too many."""

    def __init__(self, source, max_bad=0.1, patience=100):
        self.source, self.max_bad, self.patience = source, max_bad, patience
        self.seen = self.count = 0
        self.first = None

    def saw(self, error=None):
        """Counts one document, bad if there is an error. Raises TooManyBad."""
        self.seen += 1
        if error:
            self.count += 1
            self.first = self.first or error
            self.source.skipped[error.reason] += 1
        if self.seen >= self.patience and self.count > self.max_bad * self.seen:
            raise TooManyBad(self.report())

    def report(self):
        reasons = ", ".join(f"{reason} {n}" for reason, n in self.source.skipped.most_common())
        return (
            f"gave up on {self.source.spec}: {self.count} of {self.seen} documents are bad, more than the accepted "
            f"{self.max_bad:.0%} ({reasons}); the first: {self.first}. Repair the source or raise max_bad"
        )


class World:
    """Document i of a split of the world: a prompt by the user, its picture by the assistant."""

    def __init__(self, spec, split, size, seed, documents, languages, category):
        if not documents:
            raise ValueError(f"{spec} has no end: say how many documents to take from it, documents=N")
        weights = languages if isinstance(languages, dict) else dict.fromkeys(languages, 1.0)
        self.spec, self.size, self.documents = spec, tuple(size), documents
        self.split, self.seed, self.category = split, seed, category
        self.languages = list(weights)
        self.shares = np.array(list(weights.values()), float) / sum(weights.values())
        self.skipped = collections.Counter()
        self.item = functools.lru_cache(256)(
            self._item
        )  # a picture, its caption and its colours want the same

    def __len__(self):
        return self.documents

    def __getitem__(self, i):
        item = self.item(i)
        return caption_to_image(item.prompt, Image(self._render(item)))

    def _item(self, i):
        """The world's Item i: prompt, claim and scene, in the language drawn for (seed, i)."""
        from mmgen import world

        if not 0 <= i < self.documents:
            raise IndexError(f"document {i} of {self.documents} in {self.spec}")
        drawn = np.random.default_rng([self.seed, i]).choice(len(self.shares), p=self.shares)
        return world.item(self.seed, self.split, i, self.category, language=self.languages[drawn])

    def caption(self, i):
        return self.item(i).prompt

    def pixels(self, i):
        return self._render(self.item(i))

    def recolored(self, i):
        """The picture of document i with other colours, drawn from (seed, i)."""
        from mmgen.world import recolor, render

        scene = recolor(np.random.default_rng([self.seed, i, 1]), self.item(i).scene)
        return render.render(scene, *self.size)

    def _render(self, item):
        from mmgen.world import render

        return render.render(item.scene, *self.size)


class Tars:
    """Captioned images in tar shards, in sorted order of the shards, by offset into them.

    Each tar is scanned once, headers only, when the source is opened. A broken or truncated tar gives
    what is whole before the break, and counts tar_truncated or tar_corrupt.
    """

    def __init__(self, spec, pattern, size, documents, keep, limits, background):
        self.spec, self.size, self.limits, self.background = spec, tuple(size), limits, background
        self.skipped = collections.Counter()
        self.paths = sorted(glob.glob(os.path.expanduser(pattern), recursive=True))
        if not self.paths:
            raise FileNotFoundError(f"{spec}: no file matches {pattern} (from {os.getcwd()})")
        self.records = []  # (path number, key, {suffix: (offset, bytes)})
        for number, path in enumerate(self.paths):
            self._scan(number, path, keep)
        self.records = self.records[:documents]
        if not self.records:
            counts = dict(self.skipped) or "nothing was skipped"
            raise ValueError(
                f"{spec}: no image is left of {len(self.paths)} tars after the filters ({counts})"
            )

    def __len__(self):
        return len(self.records)

    def __getitem__(self, i):
        caption = self.caption(i)
        return caption_to_image(caption, Image(images.fit(self.pixels(i), *self.size)))

    def pixels(self, i):
        number, key, members = self.records[i]
        suffix = next(suffix for suffix in IMAGE_SUFFIXES if suffix in members)
        try:
            return images.read(self._bytes(i, suffix), self.limits, self.background)
        except BadImage as error:
            raise BadImage(error.reason, f"{self.paths[number]} {key}.{suffix}: {error}") from error

    def fields(self, i):
        """The JSON of record i; {} where it has none. Broken JSON is BadImage("bad_json")."""
        number, key, members = self.records[i]
        if "json" not in members:
            return {}
        return _fields(self._bytes(i, "json"), f"{self.paths[number]} {key}.json")

    def caption(self, i):
        number, key, members = self.records[i]
        where = f"{self.paths[number]} {key}"
        try:
            caption = self._bytes(i, "txt").decode() if "txt" in members else self.fields(i).get("caption")
            caption = caption.strip() if isinstance(caption, str) else ""
            caption.encode()  # refuses half of a surrogate pair, which JSON can spell
        except UnicodeError as error:
            raise BadImage("bad_caption", f"{where}: {error}") from error
        if not caption:
            raise BadImage("no_caption", f"{where} has no .txt and no caption in its .json, or an empty one")
        return caption

    def _bytes(self, i, suffix):
        number, _, members = self.records[i]
        offset, count = members[suffix]
        if suffix in IMAGE_SUFFIXES and count > self.limits.max_bytes:
            raise BadImage("too_many_bytes", f"{count} bytes, at most {self.limits.max_bytes} are read")
        # Opened anew each time: thousands of shards would not fit in a process's open files.
        with open(self.paths[number], "rb", buffering=0) as file:
            return os.pread(file.fileno(), count, offset)

    def _scan(self, number, path, keep):
        found = collections.defaultdict(dict)
        with open(path, "rb") as file:
            for name, offset, count in tar_members(file, self.skipped):
                folder, base = os.path.split(name)
                stem, _, suffix = base.partition(".")  # webdataset's rule: the key ends at the first dot
                found[os.path.join(folder, stem)].setdefault(suffix.lower(), (offset, count))
            for key, members in found.items():
                if not any(suffix in members for suffix in IMAGE_SUFFIXES):
                    self.skipped["no_image"] += 1
                    continue
                try:
                    fields = {}
                    if keep.needs_fields and "json" in members:
                        offset, count = members["json"]
                        fields = _fields(os.pread(file.fileno(), count, offset), f"{path} {key}.json")
                    if keep.keeps(key, fields):
                        self.records.append((number, key, members))
                except BadImage as error:
                    self.skipped[error.reason] += 1


@dataclasses.dataclass(frozen=True)
class Filter:
    """Which records of a data set to take, by their key and their JSON fields: see `open_source`."""

    split: str | None
    split_by: str
    holdout: float
    only: dict
    exclude: dict

    def __post_init__(self):
        if self.split not in (None, "train", "test"):
            raise ValueError(f'split is "train", "test" or None (everything), not {self.split!r}')

    @property
    def needs_fields(self):
        return bool(self.only or self.exclude or (self.split and self.split_by != "key"))

    def keeps(self, key, fields):
        if any(fields.get(field) not in allowed for field, allowed in self.only.items()):
            return False
        if any(fields.get(field) in refused for field, refused in self.exclude.items()):
            return False
        if self.split is None:
            return True
        if self.split_by != "key" and self.split_by not in fields:
            raise BadImage(f"no_{self.split_by}", f"{key} has no {self.split_by!r} to split by")
        value = key if self.split_by == "key" else fields[self.split_by]
        return held_out(value, self.holdout) == (self.split == "test")


def held_out(value, share):
    """Whether a value belongs to the test side: a hash, so it never changes as a data set grows."""
    digest = hashlib.sha256(str(value).encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def _lists(rules):
    """{field: value or values} -> {field: values}"""
    rules = rules or {}
    return {field: value if isinstance(value, (list, tuple)) else [value] for field, value in rules.items()}


def tar_members(file, skipped):
    """Yields (name, offset, bytes) of the regular files of a tar open for reading.

    Knows ustar, GNU long names and pax headers. tarfile takes a damaged header in the middle for the
    end of the archive; here what ends the scan early is counted in `skipped`.
    """
    end = os.fstat(file.fileno()).st_size
    position, long_name, pax = 0, None, {}
    while True:
        file.seek(position)
        header = file.read(512)
        if len(header) < 512:
            skipped["tar_truncated"] += 1  # a whole tar ends with a block of zeros
            return
        if header == bytes(512):
            return
        try:
            stated = int(header[148:156].strip(b" \0"), 8)
            count = int(pax["size"]) if "size" in pax else _tar_number(header[124:136])
        except ValueError:
            stated, count = -1, -1
        if stated != sum(header) - sum(header[148:156]) + 8 * 32 or count < 0:
            skipped["tar_corrupt"] += 1
            return
        kind, offset = header[156:157], position + 512
        if offset + count > end:
            skipped["tar_truncated"] += 1
            return
        position = offset + (count + 511) // 512 * 512
        if kind == b"L":
            long_name = file.read(count).rstrip(b"\0").decode(errors="replace")
        elif kind == b"x":
            pax = _pax(file.read(count))
        elif kind != b"g":
            name = header[:100].split(b"\0")[0].decode(errors="replace")
            prefix = header[345:500].split(b"\0")[0].decode(errors="replace")
            if header[257:263] == b"ustar\0" and prefix:
                name = f"{prefix}/{name}"
            if kind in (b"0", b"\0"):
                yield pax.get("path") or long_name or name, offset, count
            long_name, pax = None, {}


def _tar_number(field):
    """Octal, or base 256 where the first bit is set (files over 8 GiB)."""
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    return int(field.strip(b" \0") or b"0", 8)


def _pax(data):
    """Records of "<length> <key>=<value>\\n" -> dict; what is malformed ends it."""
    fields = {}
    while data:
        length, _, rest = data.partition(b" ")
        if not length.isdigit() or not len(length) < int(length) <= len(data):
            break
        key, _, value = rest[: int(length) - len(length) - 2].partition(b"=")
        fields[key.decode(errors="replace")] = value.decode(errors="replace")
        data = data[int(length) :]
    return fields


def _fields(data, where):
    try:
        fields = json.loads(data)
    except ValueError as error:
        raise BadImage("bad_json", f"{where}: {error}") from error
    if not isinstance(fields, dict):
        raise BadImage("bad_json", f"{where}: expected an object, found {type(fields).__name__}")
    return fields


def captions(source, limit=None):
    """The texts of the first `limit` documents of a source, one a document, without reading images."""
    for i in range(min(len(source), limit or len(source))):
        yield source.caption(i)
