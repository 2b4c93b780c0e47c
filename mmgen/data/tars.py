"""Tar shards as img2dataset and webdataset write them: key.jpg|jpeg|png|webp, key.txt, key.json.

A tar is scanned once, headers only, when it is opened, and read by offset from then on. A broken or
truncated one gives what is whole before the break, and is counted as tar_truncated or tar_corrupt.
`write_index` keeps a scan beside its tar, for those whom the next opening must not cost another.
"""

import collections
import concurrent.futures
import io
import json
import os

import numpy as np

from mmgen.data import files
from mmgen.data.images import BadImage
from mmgen.data.native import captioned, captions, parse
from mmgen.data.readers import IMAGE_SUFFIXES

MEMBERS = ("image", "txt", "json")
SCANS = 8  # tars scanned at once: it is the waiting for a network that is shared
NEAR = 4096  # bytes between two members (a header, padding) that are rather read than stepped over
# 40 bytes a record, so that ten million fit in 0.4 GB. A start of 0 is a member that is not there.
RECORD = np.dtype([("tar", "<i4"), ("start", "<i8", 3), ("count", "<u4", 3)])


class Tars:
    """Captioned images in tar shards, in sorted order of the shards, by offset into them."""

    def __init__(self, pattern, keep, skipped, limits):
        self.limits = limits
        found, indexed = _tars(pattern)
        self.paths = list(found)
        self.identity = list(zip(files.relative_names(found), found.values()))

        def records_of(number):
            path = self.paths[number]
            if path in indexed:
                keys, records, counts = read_index(path, found[path])
                words = {}
            else:
                keys, records, counts, words = scan(path, found[path], keep.needs_fields)
            records["tar"] = number
            if keep.active:
                kept = [self._kept(key, record, words, keep, counts) for key, record in zip(keys, records)]
                records = records[np.array(kept, bool)]
            return records, counts

        with concurrent.futures.ThreadPoolExecutor(SCANS) as pool:
            scans = list(pool.map(records_of, range(len(found))))
        self.records = np.concatenate([records for records, _ in scans])
        skipped.update(sum((counts for _, counts in scans), collections.Counter()))

    def _kept(self, key, record, words, keep, skipped):
        try:
            if keep.needs_fields and key not in words:  # the tar itself was not read
                words = {key: self._read(record, "json").get("json", b"{}")}
            return keep.keeps(key, parse(words[key]) if keep.needs_fields else {})
        except BadImage as error:
            skipped[error.reason] += 1
            return False

    def __len__(self):
        return len(self.records)

    def document(self, i):
        words = self._read(self.records[i], "txt", "json")
        try:
            text = words["txt"].decode() if "txt" in words else None
        except UnicodeDecodeError as error:
            raise BadImage("bad_caption", str(error)) from error
        fields = parse(words["json"]) if "json" in words else {}
        (reference,), read = self.images(i)
        return captioned(captions(text, fields), reference), read

    def images(self, i):
        return ["image"], lambda reference: self._read(self.records[i], reference)[reference]

    def fields(self, i):
        words = self._read(self.records[i], "json")
        return parse(words["json"]) if words else {}

    def where(self, i):
        """Such as "a.tar 011.png": the name stands in the header before the image."""
        path = self.paths[self.records["tar"][i]]
        try:
            header = files.read(path, int(self.records["start"][i][0]) - 512, 512)
        except BadImage:  # the tar is gone, which is what the message will be about
            return f"{path} record {i}"
        return f"{path} {header[:100].partition(bytes(1))[0].decode(errors='replace')}"

    def _read(self, record, *members):
        """{member: bytes} of those that a record has, in one read where they lie side by side."""
        number, starts, counts = record.tolist()
        places = {
            name: (starts[k], counts[k]) for k, name in enumerate(MEMBERS) if name in members and starts[k]
        }
        for start, count in places.values():
            if count > self.limits.max_bytes:
                raise BadImage("too_many_bytes", f"{count} bytes, at most {self.limits.max_bytes} are read")
        if not places:
            return {}
        first = min(start for start, _ in places.values())
        span = max(start + count for start, count in places.values()) - first
        if span > sum(count for _, count in places.values()) + NEAR:
            return {name: self._read(record, name)[name] for name in places}
        data = files.read(self.paths[number], first, span)
        if len(data) < span:
            raise BadImage("truncated", "the tar is shorter than when it was opened")
        return {name: data[start - first : start - first + count] for name, (start, count) in places.items()}


def scan(path, size, with_json=False):
    """Scans a tar of `size` bytes -> the keys of its N images, their RECORDs [N], a Counter of what was
    skipped, and `with_json` {key: bytes of its JSON, b"{}" where it has none}."""
    skipped, words = collections.Counter(), {}
    groups = collections.defaultdict(dict)  # key -> {suffix: (start, count)}
    with files.open_file(path) as file:
        for name, start, count in tar_members(file, size, skipped):
            dot = name.find(".", name.rfind("/") + 1)  # webdataset's rule: the key ends at the first dot
            if dot < 0:
                continue
            key, suffix = name[:dot], name[dot + 1 :].lower()
            if suffix not in groups[key]:
                groups[key][suffix] = start, count
                if suffix == "json" and with_json:
                    file.seek(start)
                    words[key] = file.read(count)
    keys, places = [], []
    for key, members in groups.items():
        image = next((suffix for suffix in IMAGE_SUFFIXES if suffix in members), None)
        starts, counts = zip(*(members.get(name, (0, 0)) for name in (image, "txt", "json")))
        if image is None:
            skipped["no_image"] += 1
        elif max(counts) > np.iinfo(np.uint32).max:
            skipped["too_many_bytes"] += 1
        else:
            keys.append(key)
            places.append((0, starts, counts))
            words.setdefault(key, b"{}")
    return keys, np.array(places, RECORD), skipped, words


def write_index(pattern):
    """Writes the scan of every tar to NAME.tar.index beside it -> how many images there are.

    An opening then reads the index, and of the tar nothing (with a filter by fields, its JSON). For data
    behind a network, where a scan reads nearly all of them, and for many processes that open the same.
    """
    total = 0
    found, _ = _tars(pattern)
    for path, size in found.items():
        keys, records, skipped, _ = scan(path, size)
        facts = {"size": size, "skipped": skipped, "keys": keys}
        table = io.BytesIO()
        np.savez(table, facts=np.frombuffer(json.dumps(facts).encode(), np.uint8), records=records)
        files.write(path + ".index", table.getvalue())
        total += len(keys)
    return total


def read_index(path, size):
    """The index of a tar of `size` bytes -> (keys, RECORDs [N], Counter), as `scan` gives them."""
    try:
        table = np.load(io.BytesIO(files.read(path + ".index")), allow_pickle=False)
        facts, records = json.loads(table["facts"].tobytes()), table["records"].astype(RECORD)
    except Exception as error:  # NumPy's, zipfile's and json's own for what is no such file
        raise ValueError(f"{path}.index is damaged: delete it, or write_index again ({error})") from error
    if facts["size"] != size or len(facts["keys"]) != len(records):
        raise ValueError(f"{path}.index was written for another tar: delete it, or write_index again")
    return facts["keys"], records, collections.Counter(facts["skipped"])


def _tars(pattern):
    """-> {path: bytes} of the tars that a glob names, and the set of those that have an index."""
    found = {path: size for path, size in files.expand(pattern).items() if not path.endswith(".index")}
    if not found:
        raise FileNotFoundError(f"tars:{pattern}: no file matches {pattern} (from {os.getcwd()})")
    return found, {path.removesuffix(".index") for path in files.expand(pattern + ".index")}


def tar_members(file, end, skipped):
    """Yields (name, offset, bytes) of the regular files of a tar of `end` bytes, open for reading.

    Knows ustar, GNU long names and pax headers. tarfile takes a damaged header in the middle for the
    end of the archive; here what ends the scan early is counted in `skipped`.
    """
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
        # The sum of all bytes, its own field taken for blanks. Most bytes are zeros, which are slow to sum.
        total = sum(header.translate(None, b"\0")) - sum(header[148:156]) + 8 * 32
        if stated != total or count < 0:
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
            name = header[:100].partition(b"\0")[0].decode(errors="replace")
            prefix = header[345:500].partition(b"\0")[0].decode(errors="replace")
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
