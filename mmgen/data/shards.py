"""Shards: a folder of tokenised documents.

    tokens-00000.arrayrecord ...   one record a document: its tokens, little-endian
    tokens-00000.json ...          of each: counts, digest, which items of the source it holds
    lengths.npy                    [N, P, 3], of each document's phrasings: tokens, and how many of them
                                   are text and images that a variant may drop
    manifest.json                  counts, hashes, where it all came from; written last
    job.json                       what the folder is being made of, before it is finished

A folder without a manifest is unfinished. A document in several phrasings (the same images, other words) is
one record: the first whole, the others with `<boi>` alone for each image. A variant is a phrasing and a
set of dropped spans: `phrasing * 4 + bits`, where bit 1 drops the text of system and user turns, 2 their images.

A shard is written apart, under another name, and counts once its .json stands beside it: so a run that was
killed goes on with the shard it was at, and any number of processes can each write some of the shards.
"""

import functools
import hashlib
import itertools
import json
import os
import pathlib
import resource
import uuid

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from mmgen.data.packing import DROP_IMAGES, DROP_TEXT, VARIANTS, Part
from mmgen.grammar import Grammar

VERSION = 2
_NEEDED = {
    "count",
    "shards",
    "bytes",
    "tokens",
    "longest",
    "phrasings",
    "dtype",
    "grammar",
    "grammar_hash",
    "parts",
}


class DamagedRecord(ValueError):
    """A record that cannot be read, or that is not as long as it was written."""


class Writer:
    """One shard in the making: `add` documents, then `finish`. Nothing counts before that.

    phrasings: P, how many a document has at most. mark: `mark_of` its job. Files are renamed into place whole.
    """

    def __init__(self, folder, number, grammar, phrasings=1, mark=""):
        self.folder, self.grammar, self.phrasings, self.mark = pathlib.Path(folder), grammar, phrasings, mark
        self.name = _name(number)
        self.unfinished = self.folder / f"{self.name}.{uuid.uuid4().hex}.tmp"
        self.dtype = _dtype(grammar)
        # Groups of one record: a batch reads documents from all over the file.
        self.writer = ArrayRecordWriter(str(self.unfinished), "group_size:1")
        self.lengths = []

    def add(self, phrasings):
        """Writes a document: a list of 1..P int token arrays [T], one for each of its phrasings."""
        rows = [_checked(tokens, self.grammar, len(self.lengths)) for tokens in phrasings]
        if len(rows) > self.phrasings:
            raise ValueError(f"document {len(self.lengths)}: {len(rows)} phrasings, at most {self.phrasings}")
        images = {int((tokens == self.grammar.boi).sum()) for tokens in rows}
        if len(images) > 1:
            raise ValueError(
                f"document {len(self.lengths)}: its phrasings have {sorted(images)} images, not the same"
            )
        record = np.concatenate(rows[:1] + [_without_images(tokens, self.grammar) for tokens in rows[1:]])
        self.writer.write(record.astype(self.dtype).tobytes())
        lengths = np.zeros((self.phrasings, 3), np.int32)
        for k, tokens in enumerate(rows):
            text, images = self.grammar.guidance_drops(tokens)
            lengths[k] = len(tokens), text.sum(), images.sum()
        self.lengths.append(lengths)

    def finish(self, **facts):
        """Puts the shard into its place; `facts` go into its .json beside count, tokens and digest."""
        self.writer.close()
        if not self.unfinished.exists() and (self.folder / "manifest.json").exists():
            return {"count": len(self.lengths), "tokens": 0}  # others have finished the folder, and tidied up
        digest, size = _digest(self.unfinished)
        lengths = np.array(self.lengths, np.int32).reshape(-1, self.phrasings, 3)
        _write(self.folder / f"{self.name}.npy", lambda file: np.save(file, lengths))
        os.replace(self.unfinished, self.folder / f"{self.name}.arrayrecord")
        facts = {
            "count": len(lengths),
            "tokens": int(lengths[:, 0, 0].sum()),
            "longest": int(lengths[:, :, 0].max(initial=0)),
            "bytes": size,
            "sha256": digest,
            "job": self.mark,
            **facts,
        }
        _write_json(self.folder / f"{self.name}.json", facts)
        return facts

    def abandon(self):
        """Removes what was written."""
        if self.writer.is_open():
            self.writer.close()
        self.unfinished.unlink(missing_ok=True)


def begin(folder, job, *, overwrite=False):
    """Makes `folder` ready for the shards of `job`, a dict that says what they will hold -> its manifest where
    the same job has finished it, else None; what an earlier run of the same job finished stays. Raises
    where the folder holds something else, unless `overwrite`, which also makes a finished folder anew."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    job = json.loads(json.dumps(job))
    path, manifest = folder / "job.json", folder / "manifest.json"
    while True:
        theirs = json.loads(manifest.read_text()) if manifest.exists() else None
        if theirs and not overwrite:
            if theirs.get("job") == mark_of(job):
                return theirs
            raise FileExistsError(
                f"{folder} already holds other finished shards; choose another folder or --overwrite"
            )
        if not theirs and _created(path, job):
            if not manifest.exists():
                return None
            path.unlink()  # another process has finished it meanwhile
            continue
        other = json.loads(path.read_text()) if path.exists() else {}
        changed = sorted(name for name in job.keys() | other.keys() if job.get(name) != other.get(name))
        if not theirs and not changed:
            return None
        if not theirs and not overwrite and any(folder.glob("tokens-*.json")):
            raise FileExistsError(
                f"{folder} holds unfinished shards of another job ({', '.join(changed)} differ); give the same "
                "command again to go on, choose another folder, or --overwrite"
            )
        # The manifest first: a folder that loses files must not look finished.
        for pattern in ("manifest.json", "tokens-*", "lengths.npy*", "job.json"):
            for stale in folder.glob(pattern):
                stale.unlink(missing_ok=True)
        overwrite = False


def _created(path, job):
    """Whether this process, and no other, has written the job."""
    unfinished = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    unfinished.write_text(json.dumps(job, indent=1))
    try:
        os.link(unfinished, path)
    except FileExistsError:
        return False
    finally:
        unfinished.unlink()
    return True


def mark_of(job):
    """What every shard of a job carries, so that those of another are not taken for its own."""
    return hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()[:16]


def finished(folder, number, mark=""):
    """The facts of shard `number` where it is finished, of that job and whole in size, else None."""
    path = pathlib.Path(folder) / f"{_name(number)}.json"
    try:
        facts = json.loads(path.read_text())
        whole = (path.with_suffix(".arrayrecord")).stat().st_size == facts["bytes"]
        return facts if whole and facts["job"] == mark and path.with_suffix(".npy").exists() else None
    except FileNotFoundError:
        return None


def finish(folder, shards, grammar, phrasings, summary, mark=""):
    """Writes lengths.npy and the manifest of a folder whose `shards` are all finished -> the manifest, or
    None where one is not. `summary(facts of each shard)` -> what else the manifest says. Several processes
    may do this at once."""
    folder = pathlib.Path(folder)
    manifest_path = folder / "manifest.json"
    found = [finished(folder, number, mark) for number in range(shards)]
    if None in found:
        return json.loads(manifest_path.read_text()) if manifest_path.exists() else None
    count, longest = (
        sum(facts["count"] for facts in found),
        max((facts["longest"] for facts in found), default=0),
    )
    if not count:
        raise ValueError(f"no document to write to {folder}: the source gave none")
    dtype = np.dtype(np.uint16 if longest < 1 << 16 else np.int32)
    manifest = {
        "version": VERSION,
        "count": count,
        "shards": [facts["count"] for facts in found],
        "bytes": [facts["bytes"] for facts in found],
        "tokens": sum(facts["tokens"] for facts in found),
        "longest": longest,
        "phrasings": phrasings,
        "dtype": _dtype(grammar).str,
        "grammar": grammar.to_dict(),
        "grammar_hash": grammar.hash,
        "job": mark,
        **summary(found),
    }

    def lengths(file):
        header = {"descr": dtype.str, "fortran_order": False, "shape": (count, phrasings, 3)}
        np.lib.format.write_array_header_1_0(file, header)
        for number in range(shards):
            file.write(np.load(folder / f"{_name(number)}.npy").astype(dtype).tobytes())

    try:
        _write(folder / "lengths.npy", lengths)
        _write_json(manifest_path, manifest)
    except FileNotFoundError:  # another process was faster, and has tidied up
        return json.loads(manifest_path.read_text())
    for path in [*folder.glob("tokens-*.npy"), *folder.glob("*.tmp"), folder / "job.json"]:
        path.unlink(missing_ok=True)
    return manifest


def write(folder, documents, grammar, *, shard_size=65536, phrasings=1, overwrite=False, **facts):
    """Writes an iterable of documents, each an int token array [T] or a list of one for each phrasing, to
    `folder` -> its manifest, with `facts` in it. This begins anew; `mmgen tokenize` goes on."""
    begin(folder, {"made": uuid.uuid4().hex}, overwrite=overwrite)
    documents, number = iter(documents), 0
    while batch := list(itertools.islice(documents, shard_size)):
        writer = Writer(folder, number, grammar, phrasings)
        try:
            for document in batch:
                writer.add(document if isinstance(document, list) else [document])
            writer.finish()
        except BaseException:
            writer.abandon()
            raise
        number += 1
    if not number:
        raise ValueError(f"no document to write to {folder}: the source gave none")
    parts = lambda found: {"parts": {"documents": sum(facts["count"] for facts in found)}, **facts}
    return finish(folder, number, grammar, phrasings, parts)


def variant_of(record, variant, grammar):
    """The tokens [T] of a document's `variant`, from its record."""
    phrasing, bits = divmod(int(variant), VARIANTS)
    tokens = _phrasing(record, phrasing, grammar)
    if not bits:
        return tokens
    text, images = grammar.guidance_drops(tokens)
    drop = np.zeros(len(tokens), bool)
    if bits & DROP_TEXT:
        drop |= text
    if bits & DROP_IMAGES:
        drop |= images
    return tokens[~drop]


class Shards:
    """The documents of folders that are finished, one folder after another: len, tokens(i), lengths.

    Opening checks that every file is there and has its size; ArrayRecord itself opens a missing path as
    an empty one. Files are opened when they are first read. All folders must be written with the same
    grammar, text model and tokenizer; `manifest` is that of the first. `parts` are the sources of all.
    """

    def __init__(self, *folders):
        self.folders = [pathlib.Path(folder) for folder in folders]
        self.manifests = [_manifest(folder) for folder in self.folders]
        self.manifest = self.manifests[0]
        for folder, manifest in zip(self.folders, self.manifests):
            for name in ("grammar_hash", "text_hash", "tokenizer_hash"):
                if manifest.get(name) != self.manifest.get(name):
                    raise ValueError(
                        f"{folder} and {self.folders[0]} were written with different {name[:-5]}s "
                        f"({manifest.get(name)}, {self.manifest.get(name)}): tokenise one of them again"
                    )
        self.dtype = np.dtype(self.manifest["dtype"])
        self.phrasings = max(manifest["phrasings"] for manifest in self.manifests)
        self.lengths = _Lengths(self.folders, self.manifests)
        self.files, counts = [], []
        for folder, manifest in zip(self.folders, self.manifests):
            for number, (count, size) in enumerate(zip(manifest["shards"], manifest["bytes"])):
                path = folder / f"{_name(number)}.arrayrecord"
                found = path.stat().st_size if path.exists() else "no such file"
                if found != size:
                    raise ValueError(
                        f"{path}: expected {size} bytes, found {found}: it is damaged; tokenise again"
                    )
                self.files.append(str(path))
                counts.append(count)
        self.starts = np.cumsum([0] + counts)
        if self.starts[-1] != len(self.lengths):
            raise ValueError(
                f"{self}: {self.starts[-1]} documents in the shards, {len(self.lengths)} in lengths.npy: tokenise again"
            )
        self.parts = _parts(self.manifests)
        self.longest = max(manifest["longest"] for manifest in self.manifests)
        self.total = sum(manifest["tokens"] for manifest in self.manifests)
        self.identity = hashlib.sha256(json.dumps(self.manifests, sort_keys=True).encode()).hexdigest()[:16]
        _may_open(len(self.files))
        self._readers = {}
        self._memory = None  # (all tokens, where each document starts), after preload()

    @functools.cached_property
    def grammar(self):
        return Grammar.from_dict(self.manifest["grammar"])

    def __len__(self):
        return len(self.lengths)

    def __str__(self):
        return ", ".join(map(str, self.folders))

    def __getstate__(self):
        return {**vars(self), "_readers": {}, "_memory": None}  # each process opens its own

    def tokens(self, i, variant=0):
        """Document i in that variant -> int32 [T]. Raises DamagedRecord."""
        (record,) = self.records([i])
        if record is None:
            raise DamagedRecord(f"{self}: document {i} is damaged; tokenise again")
        return variant_of(record, variant, self.grammar).astype(np.int32)

    def records(self, documents):
        """Documents int [N] -> their records, a list of int arrays [T] of the shards' own dtype; None for
        what is damaged. Many at once are read far faster than one by one."""
        documents = np.asarray(documents, np.int64)
        if len(documents) and not 0 <= documents.min() <= documents.max() < len(self):
            raise IndexError(f"documents {documents.min()} to {documents.max()} of {len(self)} in {self}")
        if self._memory:
            tokens, starts = self._memory
            return [tokens[a:b] for a, b in zip(starts[documents].tolist(), starts[documents + 1].tolist())]
        found = [None] * len(documents)
        shards = np.searchsorted(self.starts, documents, side="right") - 1
        expected = np.asarray(self.lengths[documents])[:, 0, 0].tolist()
        order = np.argsort(shards, kind="stable")
        cuts = np.flatnonzero(np.diff(shards[order])) + 1
        for places in np.split(order, cuts):
            shard = int(shards[places[0]])
            for place, data in zip(
                places.tolist(), self._read(shard, documents[places] - self.starts[shard])
            ):
                if data is not None and self._whole(data, expected[place]):
                    found[place] = np.frombuffer(data, self.dtype)
        return found

    def _whole(self, data, tokens):
        """Whether a record has the tokens that lengths.npy says. More may follow: other phrasings."""
        size = tokens * self.dtype.itemsize
        return len(data) == size or (self.phrasings > 1 and len(data) > size)

    def _read(self, shard, numbers):
        """Records `numbers` of a shard -> bytes each, None for what cannot be read."""
        numbers = numbers.tolist()
        try:
            return self._reader(shard).read(numbers)
        except (ValueError, RuntimeError, IndexError) as error:
            open(
                self.files[shard], "rb"
            ).close()  # a file that is gone, or one too many, is no damage: OSError
            if len(numbers) == 1 or isinstance(error, DamagedRecord):
                return [None] * len(numbers)
            return [self._read(shard, np.array([number]))[0] for number in numbers]

    def preload(self, max_bytes=512 << 20):
        """Reads all tokens into memory if they need at most `max_bytes`; records are then slices."""
        if self._memory or self.phrasings > 1 or self.total * self.dtype.itemsize > max_bytes:
            return
        try:
            data = b"".join(r for shard in range(len(self.files)) for r in self._reader(shard).read_all())
        except (ValueError, RuntimeError, IndexError):
            return  # something is damaged: it is counted when it is read
        tokens = np.frombuffer(data, self.dtype)
        starts = np.concatenate([[0], np.cumsum(self.lengths[:][:, 0, 0], dtype=np.int64)])
        if len(tokens) == starts[-1]:
            self._memory = tokens, starts

    def _reader(self, shard):
        if shard not in self._readers:
            count = int(self.starts[shard + 1] - self.starts[shard])
            options = {"options": "readahead_buffer_size:0", "file_reader_buffer_size": 1 << 12}
            reader = ArrayRecordReader(self.files[shard], **options)
            if not reader.ok() or reader.num_records() != count:
                raise DamagedRecord(f"{self.files[shard]}: expected {count} records; it is damaged")
            self._readers[shard] = reader
        return self._readers[shard]


class _Lengths:
    """The lengths.npy of folders, read as one [N, P, 3] but left on the disk."""

    def __init__(self, folders, manifests):
        self.arguments = folders, manifests
        self.arrays = [_lengths(folder, manifest) for folder, manifest in zip(folders, manifests)]
        self.starts = np.cumsum([0] + [len(array) for array in self.arrays])

    def __reduce__(self):  # another process maps the files itself
        return _Lengths, self.arguments

    def __len__(self):
        return int(self.starts[-1])

    def __getitem__(self, places):
        if len(self.arrays) == 1:
            return self.arrays[0][places]
        if isinstance(places, slice):
            places = np.arange(*places.indices(len(self)))
        widest = max(array.shape[1] for array in self.arrays)
        out = np.zeros((len(places), widest, 3), np.int32)
        which = np.searchsorted(self.starts, places, side="right") - 1
        for k, array in enumerate(self.arrays):
            mine = np.flatnonzero(which == k)
            out[mine, : array.shape[1]] = array[places[mine] - self.starts[k]]
        return out


def _may_open(files):
    """Lets this process hold that many files open, where the system permits it to ask for that."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = files + 1024
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _parts(manifests):
    """The sources of all folders as `Part`s: documents in the order of the folders."""
    parts, start = [], 0
    for manifest in manifests:
        for name, count in manifest["parts"].items():
            parts.append(Part(name, start, start + count))
            start += count
    names = [part.name for part in parts]
    # The same name in two folders: a mixture could not tell them apart.
    return [part._replace(name=f"{part.name}#{k}") if names.count(part.name) > 1 else part
            for k, part in enumerate(parts)]  # fmt: skip


def _manifest(folder):
    path = folder / "manifest.json"
    if not folder.is_dir():
        raise FileNotFoundError(f"no shards at {folder}: no such folder; make them: `mmgen tokenize`")
    if not path.exists():
        raise ValueError(
            f"{folder} has no manifest.json, so it was never finished: give its `mmgen tokenize` again to go on"
        )
    try:
        manifest = json.loads(path.read_text())
        version = manifest.get("version")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}): tokenise again") from None
    if version == VERSION and _NEEDED - manifest.keys():
        raise ValueError(f"{path} is damaged ({sorted(_NEEDED - manifest.keys())} missing): tokenise again")
    if version != VERSION:
        raise ValueError(f"{folder} is of shard version {version}, this code reads {VERSION}: tokenise again")
    return manifest


def _lengths(folder, manifest):
    try:
        lengths = np.load(folder / "lengths.npy", mmap_mode="r")
    except Exception as error:  # numpy reads the header as Python, which can go wrong in many ways
        raise ValueError(f"{folder}/lengths.npy cannot be read ({error}): tokenise again") from None
    if lengths.shape != (manifest["count"], manifest["phrasings"], 3) or lengths.dtype.kind not in "iu":
        raise ValueError(
            f"{folder}: the manifest counts {manifest['count']} documents, lengths.npy has {lengths.dtype} "
            f"{list(lengths.shape)}: tokenise again"
        )
    return lengths


def _checked(tokens, grammar, number):
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or not len(tokens) or tokens.min() < 0 or tokens.max() >= grammar.vocab_size:
        raise ValueError(
            f"document {number}: expected tokens [T >= 1] in [0, {grammar.vocab_size}), found shape "
            f"{list(tokens.shape)}" + (f" in [{tokens.min()}, {tokens.max()}]" if tokens.size else "")
        )
    return tokens


def _without_images(tokens, grammar):
    """tokens with `<boi>` alone for each image."""
    return tokens[(tokens < grammar.size_start) & (tokens != grammar.eoi)]


def _phrasing(record, phrasing, grammar):
    """The tokens of one phrasing of a record: its images are those of the first."""
    starts = np.append(np.flatnonzero(record == grammar.bos), len(record))
    first = record[: starts[1]]
    if phrasing == 0:
        return first
    words = record[starts[phrasing] : starts[phrasing + 1]]
    begun, ended = np.flatnonzero(first == grammar.boi), np.flatnonzero(first == grammar.eoi)
    pieces, at = [], 0
    for place, start, stop in zip(np.flatnonzero(words == grammar.boi), begun, ended, strict=True):
        pieces += [words[at:place], first[start : stop + 1]]
        at = place + 1
    return np.concatenate([*pieces, words[at:]])


def _dtype(grammar):
    return np.dtype("<u2" if grammar.vocab_size <= 1 << 16 else "<i4")


def _name(number):
    return f"tokens-{number:05d}"


def _digest(path):
    """sha256 and size of a file, which is on the disk afterwards."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest(), file.tell()


def _write(path, fill):
    """Writes a file whole or not at all."""
    unfinished = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    with open(unfinished, "wb") as file:
        fill(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def _write_json(path, value):
    _write(path, lambda file: file.write(json.dumps(value, indent=1).encode()))
