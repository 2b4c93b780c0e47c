"""Readers: how each kind of source lies in files. `sources.Source` makes Documents of what they read.

A reader has `len(reader)`; `document(i)` -> (turns, read): turns in the native format, and read(reference) ->
bytes of an image; `images(i)` -> (references, read), the same without the words; `fields(i)` for the
filters; `where(i)` for messages; and `identity`, names and sizes of its files. It is given `keep`, a
Filter, and `skipped`, a Counter by reason, when it is opened. BadImage is one document's fault.
"""

import csv
import io
import json
import os
import threading

import numpy as np
import PIL.Image
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from mmgen.data import files
from mmgen.data.images import BadImage
from mmgen.data.native import captioned, captions, check_turns, fields_of, parse, references, short

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
BLOCK = 16 << 20  # bytes of a file in memory at once while it is scanned
OPEN = 200  # ArrayRecord files that a process holds open


def _matching(pattern, what):
    found = files.expand(pattern)
    if not found:
        raise FileNotFoundError(f"{what}: no file matches {pattern} (from {os.getcwd()})")
    return found


def _identity(found):
    return list(zip(files.relative_names(found), found.values()))


# Kinds whose documents are runs of bytes in large files


class Spans:
    """Where each document lies: arrays of 20 bytes a document, whatever their number."""

    def __init__(self, paths):
        self.paths = list(paths)
        self._found = []  # (file number, starts, counts), an entry for each block that was scanned

    def add(self, number, starts, counts):
        self._found.append((np.full(len(starts), number, np.int32), np.int64(starts), np.int64(counts)))

    def finish(self):
        empty = (np.zeros(0, np.int32), np.zeros(0, np.int64), np.zeros(0, np.int64))
        self.numbers, self.starts, self.counts = map(np.concatenate, zip(empty, *self._found))
        del self._found

    def __len__(self):
        return len(self.starts)

    def where(self, i):
        return f"{self.paths[self.numbers[i]]} at byte {self.starts[i]}"

    def path(self, i):
        return self.paths[self.numbers[i]]

    def read(self, i, limit=None):
        if limit is not None and self.counts[i] > limit:
            raise BadImage("too_many_bytes", f"{self.counts[i]} bytes, at most {limit} are read")
        data = files.read(self.path(i), int(self.starts[i]), int(self.counts[i]))
        if len(data) < self.counts[i]:
            raise BadImage("truncated", "the file is shorter than when it was opened")
        return data


class Jsonl:
    """Documents in the native format, one a line. Images are paths from the JSONL file on, or URLs.

    The file is scanned once, for the ends of its lines. A line that the file's end cuts off is left out
    and counted as jsonl_truncated; blank lines are nothing.
    """

    def __init__(self, pattern, keep, skipped, limits):
        self.limits = limits
        found = _matching(pattern, f"jsonl:{pattern}")
        self.spans, self.identity = Spans(found), _identity(found)
        for number, path in enumerate(found):
            for base, block, starts, stops in _lines(path):
                kept = np.flatnonzero(np.maximum.reduceat(np.frombuffer(block, np.uint8), starts) > ord(" "))
                if len(kept) and stops[-1] == len(block) and block[-1:] != b"\n":
                    kept = kept[: len(kept) - _is_cut(block[starts[-1] :], skipped)]
                if keep.active:
                    kept = [j for j in kept if self._kept(block[starts[j] : stops[j]], keep, skipped)]
                self.spans.add(number, base + starts[kept], stops[kept] - starts[kept])
        self.spans.finish()

    def _kept(self, line, keep, skipped):
        try:
            fields = fields_of(parse(line))
            return keep.keeps(fields.get("key", line.strip()), fields)
        except BadImage as error:
            skipped[error.reason] += 1
            return False

    def __len__(self):
        return len(self.spans)

    def _record(self, i):
        return parse(self.spans.read(i, self.limits.max_bytes))

    def document(self, i):
        folder = os.path.dirname(self.spans.path(i))

        def read(reference):
            if not isinstance(reference, str):
                raise BadImage("bad_part", f"an image is a path, not {short(reference)}")
            return files.read(files.join(folder, reference), limit=self.limits.max_bytes)

        return self._record(i).get("turns"), read

    def images(self, i):
        turns, read = self.document(i)
        return references(turns), read

    def fields(self, i):
        return fields_of(self._record(i))

    def where(self, i):
        return self.spans.where(i)


def _is_cut(line, skipped):
    """Whether the last line of a file, which no line end follows, is not the whole of one; counted."""
    try:
        parse(line)
    except BadImage:
        skipped["jsonl_truncated"] += 1
        return True
    return False


def _lines(path):
    """Yields (base, block, starts, stops): whole lines of a file, block by block, by their places in the
    block (int64 [lines]; a line's end is part of it). `base` is the block's own place in the file."""
    base, rest = 0, b""
    with files.open_file(path) as file:
        while data := file.read(BLOCK):
            block = rest + data
            stops = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + 1
            rest = block[stops[-1] :] if len(stops) else block
            if len(stops):
                block = block[: stops[-1]]
                yield base, block, np.concatenate([[0], stops[:-1]]), stops
                base += len(block)
    if rest:
        yield base, rest, np.zeros(1, np.int64), np.array([len(rest)])


class Text:
    """Plain text: a document is one page turn, a run of whole paragraphs of at most `max_chars` characters.

    Blank lines part paragraphs. A longer paragraph is split at white space, or where there is none,
    between characters. Its one field is `file`, the name of the file. A document that is not
    UTF-8 is bad_text.
    """

    def __init__(self, pattern, keep, skipped, max_chars):
        if max_chars < 1:
            raise ValueError(f"max_chars is at least 1, not {max_chars}")
        found = _matching(pattern, f"text:{pattern}")
        self.spans, self.identity = Spans(found), _identity(found)
        self.names = files.relative_names(found)
        for number, path in enumerate(found):
            fields, starts, stops = {"file": self.names[number]}, [], []
            for start, stop, paragraphs in _pages(path, max_chars):
                if not keep.active or keep.keeps(b"\n\n".join(paragraphs), fields):
                    starts.append(start)
                    stops.append(stop)
            self.spans.add(number, starts, np.int64(stops) - np.int64(starts))
        self.spans.finish()

    def __len__(self):
        return len(self.spans)

    def document(self, i):
        try:
            text = self.spans.read(i).decode()
        except UnicodeDecodeError as error:
            raise BadImage("bad_text", str(error)) from error
        return [{"role": "page", "parts": [{"text": text.replace("\r\n", "\n")}]}], None

    def images(self, i):
        return [], None

    def fields(self, i):
        return {"file": self.names[self.spans.numbers[i]]}

    def where(self, i):
        return self.spans.where(i)


def _pages(path, max_chars):
    """Yields (start, stop, paragraphs) of runs of whole paragraphs of at most `max_chars` characters, and of
    the parts of longer ones; start and stop are bytes of the file."""
    run, start, stop, chars = [], 0, 0, 0
    for place, paragraph in _paragraphs(path):
        text = paragraph.decode(errors="surrogateescape")
        if not text.strip():  # white space that ASCII does not know
            continue
        added = place - stop + len(text)  # with the blank lines before
        if run and chars + added <= max_chars:
            run.append(paragraph)
            stop, chars = place + len(paragraph), chars + added
            continue
        if run:
            yield start, stop, run
        *parts, (start, last) = (
            _split(place, text, max_chars) if len(text) > max_chars else [(place, paragraph)]
        )
        for begin, part in parts:
            yield begin, begin + len(part), [part]
        # The end of a split paragraph stands alone too: a run is of whole ones.
        run, stop, chars = [last], start + len(last), max_chars if parts else len(text)
    if run:
        yield start, stop, run


def _paragraphs(path):
    """Yields (place, bytes) of what blank lines part, without white space at its end."""
    lines, place = [], 0
    for base, block, starts, stops in _lines(path):
        if not base and block.startswith(b"\xef\xbb\xbf"):  # a mark that some editors set before UTF-8
            starts[0] = 3
        for start, stop in zip(starts.tolist(), stops.tolist()):
            line = block[start:stop]
            if line.strip():
                place = place if lines else base + start
                lines.append(line)
            elif lines:
                yield place, b"".join(lines).rstrip()
                lines = []
    if lines:
        yield place, b"".join(lines).rstrip()


def _split(place, text, max_chars):
    """A paragraph -> [(place, bytes), ...] of at most `max_chars`, cut at white space if there is any."""
    parts, start = [], 0
    encoded = lambda a, b: text[a:b].encode(errors="surrogateescape")
    while True:
        first = next((k for k in range(start, len(text)) if not text[k].isspace()), len(text))
        place, start = place + len(encoded(start, first)), first
        if start == len(text):
            return parts
        stop = start + max_chars
        if stop < len(text):
            stop = next((k for k in range(stop, start, -1) if text[k].isspace()), stop)
        parts.append((place, encoded(start, stop)))
        start, place = stop, place + len(parts[-1][1])


# Kinds whose documents are records or files of their own


class Records:
    """ArrayRecord files of documents that carry their images: see `write_records`."""

    def __init__(self, pattern, keep, skipped, limits):
        self.limits = limits
        found = _matching(pattern, f"records:{pattern}")
        self.paths, self.identity = list(found), _identity(found)
        self._readers, self._lock = {}, threading.Lock()
        numbers, places = [], []
        for number, path in enumerate(self.paths):
            reader = self._reader(number)
            if not reader.ok():
                skipped["records_corrupt"] += 1
                continue
            kept = np.arange(reader.num_records(), dtype=np.int32)
            if keep.active:
                kept = np.array([k for k in kept.tolist() if self._kept(number, k, keep, skipped)], np.int32)
            numbers.append(np.full(len(kept), number, np.int32))
            places.append(kept)
        self.numbers = np.concatenate([np.zeros(0, np.int32), *numbers])
        self.places = np.concatenate([np.zeros(0, np.int32), *places])

    def _kept(self, number, place, keep, skipped):
        try:
            record, _ = self._read(number, place)
            fields = fields_of(record)
            return keep.keeps(fields.get("key", json.dumps(record)), fields)
        except BadImage as error:
            skipped[error.reason] += 1
            return False

    def __len__(self):
        return len(self.places)

    def __getstate__(self):
        return self.__dict__ | {"_readers": {}, "_lock": None}

    def __setstate__(self, state):
        self.__dict__ |= state | {"_lock": threading.Lock()}

    def _reader(self, number):
        with self._lock:
            if number not in self._readers:
                # Documents are read from all over the file, so nothing is read ahead.
                options = {"options": "readahead_buffer_size:0", "file_reader_buffer_size": 1 << 15}
                self._readers[number] = ArrayRecordReader(files.local(self.paths[number]), **options)
                if len(self._readers) > OPEN:
                    del self._readers[next(iter(self._readers))]  # whoever reads from it still holds it
            return self._readers[number]

    def _read(self, number, place):
        """-> (native document, [bytes of each image])"""
        try:
            (record,) = self._reader(number).read([int(place)])
        except Exception as error:  # RuntimeError or ValueError, by what is damaged
            raise BadImage("bad_record", str(error)) from error
        count = int.from_bytes(record[:4], "little")
        whole = 0 < count and 4 + 4 * count <= len(record)
        lengths = np.frombuffer(record[4:], "<u4", count if whole else 0).astype(np.int64)
        ends = 4 + 4 * count + np.cumsum(lengths)
        if not whole or ends[-1] != len(record):
            raise BadImage("bad_record", f"{len(record)} bytes are not what write_records writes")
        blobs = [record[end - length : end] for end, length in zip(ends.tolist(), lengths.tolist())]
        return parse(blobs[0]), blobs[1:]

    def document(self, i):
        record, blobs = self._read(self.numbers[i], self.places[i])

        def read(reference):
            if not isinstance(reference, int) or not 0 <= reference < len(blobs):
                raise BadImage("no_file", f"no image {short(reference)} among {len(blobs)}")
            if len(blobs[reference]) > self.limits.max_bytes:
                raise BadImage("too_many_bytes", f"at most {self.limits.max_bytes} bytes are read")
            return blobs[reference]

        return record.get("turns"), read

    def images(self, i):
        turns, read = self.document(i)
        return references(turns), read

    def fields(self, i):
        return fields_of(self._read(self.numbers[i], self.places[i])[0])

    def where(self, i):
        return f"{self.paths[self.numbers[i]]} record {self.places[i]}"


def write_records(path, documents):
    """Writes native documents (dicts) with their images to one ArrayRecord file -> how many.

    An image is given as bytes of JPEG, PNG or WebP, as a path or URL, or as pixels, uint8 [H, W, 3], which
    are kept as PNG. A record is a number of blobs: uint32 count, uint32 length of each, then their bytes,
    all little-endian. The first blob is the JSON, in which {"image": k} is blob k + 1.
    """
    if files.is_remote(str(path)):
        raise ValueError(f"{path}: ArrayRecord writes local files only; write here and copy it there")
    unfinished, count = f"{path}.tmp", 0
    writer = ArrayRecordWriter(unfinished, "group_size:1")  # a batch reads documents from all over the file
    for document in documents:
        blobs = []
        turns = [
            turn | {"parts": [_stored(part, blobs) for part in turn["parts"]]} for turn in document["turns"]
        ]
        check_turns(turns)
        blobs.insert(0, json.dumps(document | {"turns": turns}).encode())
        writer.write(np.array([len(blobs), *map(len, blobs)], "<u4").tobytes() + b"".join(blobs))
        count += 1
    writer.close()
    os.replace(unfinished, path)
    return count


def _stored(part, blobs):
    """A part with its image, if it has one, moved to `blobs` and replaced by its number there."""
    if "image" not in part:
        return part
    image = part["image"]
    if isinstance(image, np.ndarray):
        png = io.BytesIO()
        PIL.Image.fromarray(image).save(png, "PNG")
        image = png.getvalue()
    blobs.append(files.read(image) if isinstance(image, str) else bytes(image))
    return {"image": len(blobs) - 1}


class Folder:
    """An image folder with its subfolders, by path.

    A caption is in a row of a metadata.jsonl or metadata.csv in the image's folder or one above (`file_name`,
    relative to it; `text` or `caption`; all columns are fields), or in name.txt beside the image.
    """

    def __init__(self, folder, keep, skipped, limits):
        self.limits, self.folder = limits, files.normal(folder).rstrip("/")
        found = files.walk(self.folder)
        self.identity = _identity(found)
        rows = {}  # image path -> fields
        for path in found:
            if os.path.basename(path) in ("metadata.jsonl", "metadata.csv"):
                self._rows(path, found, rows, skipped)
        self.paths, self.metadata, self.has_text = [], [], []
        for path in found:
            stem, _, suffix = path.rpartition(".")
            if suffix.lower() not in IMAGE_SUFFIXES:
                continue
            fields = rows.get(path, {})
            try:
                kept = keep.keeps(path[len(self.folder) + 1 :], fields)
            except BadImage as error:
                skipped[error.reason] += 1
                continue
            if kept:
                self.paths.append(path)
                self.metadata.append(fields)
                self.has_text.append(f"{stem}.txt" in found)

    def _rows(self, path, found, rows, skipped):
        """Reads a metadata file into `rows`; a row that is of no use is counted."""
        folder = os.path.dirname(path)
        data = files.read(path)
        read = _json_rows(data, skipped) if path.endswith(".jsonl") else _csv_rows(data, skipped)
        for row in read:
            name = row.pop("file_name", None)
            image = os.path.normpath(name) if isinstance(name, str) else None
            image = files.join(folder, image) if image else None
            if image in found:
                rows[image] = row
            else:
                skipped["no_file" if image else "bad_metadata"] += 1

    def __len__(self):
        return len(self.paths)

    def document(self, i):
        fields, first = self.metadata[i], None
        if self.has_text[i] and not fields.keys() & {"text", "caption", "captions"}:
            try:
                first = files.read(
                    self.paths[i].rpartition(".")[0] + ".txt", limit=self.limits.max_bytes
                ).decode()
            except UnicodeDecodeError as error:
                raise BadImage("bad_caption", str(error)) from error
        (reference,), read = self.images(i)
        return captioned(captions(first, fields), reference), read

    def images(self, i):
        return [self.paths[i]], lambda path: files.read(path, limit=self.limits.max_bytes)

    def fields(self, i):
        return self.metadata[i]

    def where(self, i):
        return self.paths[i]


def _json_rows(data, skipped):
    for line in data.splitlines():
        if line.strip():
            try:
                yield parse(line)
            except BadImage as error:
                skipped[error.reason] += 1


def _csv_rows(data, skipped):
    # Bytes that are not UTF-8 become lone surrogates, which make their own captions bad and no others.
    table = csv.reader(io.StringIO(data.decode("utf-8-sig", "surrogateescape"), newline=""))
    names = None
    while True:
        try:
            row = next(table)
        except StopIteration:
            return
        except csv.Error:
            row = ()
        if names is None:
            names = row
        elif len(row) == len(names):
            yield dict(zip(names, row))
        elif row != []:  # a blank line
            skipped["bad_metadata"] += 1
