"""Shards: a folder of tokenised documents.

    tokens-00000.arrayrecord ...   one record a document: its tokens, little-endian
    lengths.npy                    int32 [N, 4], the length of each variant of each document
    manifest.json                  counts, hashes, where it all came from; written last

A folder without a manifest is unfinished. A variant is a set of dropped spans, numbered by bits: 0
everything, 1 without the text of system and user turns, 2 without their images, 3 without both.
"""

import json
import os
import pathlib

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

VERSION = 1
DROP_TEXT, DROP_IMAGES = 1, 2
VARIANTS = 4


def write(out, documents, grammar, *, manifest_extra=None, shard_size=65536, overwrite=False):
    """Writes an iterable of int token arrays [T] to the folder `out` -> its manifest.

    `manifest_extra` (source, seed, skipped counts, hashes of text and tokenizer ...) is added to the
    manifest after the last document, so counters in it may still be counting meanwhile. `shard_size`
    is in documents. A finished folder is refused unless `overwrite`; an unfinished one is begun anew.
    """
    out = pathlib.Path(out)
    manifest_path = out / "manifest.json"
    if manifest_path.exists() and not overwrite:
        raise FileExistsError(f"{out} holds finished shards: choose another folder or pass overwrite=True")
    out.mkdir(parents=True, exist_ok=True)
    manifest_path.unlink(missing_ok=True)
    for stale in [*out.glob("tokens-*.arrayrecord"), out / "lengths.npy"]:
        stale.unlink(missing_ok=True)

    dtype = np.dtype("<u2" if grammar.vocab_size <= 1 << 16 else "<i4")
    lengths, counts, writer = [], [], None
    for tokens in documents:
        tokens = np.asarray(tokens)
        if tokens.ndim != 1 or not len(tokens) or tokens.min() < 0 or tokens.max() >= grammar.vocab_size:
            raise ValueError(
                f"document {len(lengths)}: expected tokens [T >= 1] in [0, {grammar.vocab_size}), found shape "
                f"{tokens.shape}" + (f" in [{tokens.min()}, {tokens.max()}]" if tokens.size else "")
            )
        if writer is None or counts[-1] == shard_size:
            if writer is not None:
                writer.close()
            # Groups of one record: a batch reads documents from all over the file.
            writer = ArrayRecordWriter(str(out / _shard_name(len(counts))), "group_size:1")
            counts.append(0)
        writer.write(tokens.astype(dtype).tobytes())
        counts[-1] += 1
        text, picture = grammar.guidance_drops(tokens)
        dropped = (0, text.sum(), picture.sum(), (text | picture).sum())  # by variant
        lengths.append([len(tokens) - int(n) for n in dropped])
    if writer is None:
        raise ValueError(f"no document to write to {out}: the source gave none")
    writer.close()

    lengths = np.array(lengths, np.int32)
    np.save(out / "lengths.npy", lengths)
    manifest = {
        "version": VERSION,
        "count": len(lengths),
        "shards": counts,
        "tokens": int(lengths[:, 0].sum()),
        "longest": int(lengths[:, 0].max()),
        "dtype": dtype.str,
        "grammar": grammar.to_dict(),
        "grammar_hash": grammar.hash,
        **(manifest_extra or {}),
    }
    unfinished = out / "manifest.json.tmp"
    with open(unfinished, "w") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, manifest_path)
    return manifest


def variant_of(tokens, variant, grammar):
    """tokens [T] without the spans that `variant` (bits DROP_TEXT, DROP_IMAGES) drops."""
    if not variant:
        return tokens
    text, images = grammar.guidance_drops(tokens)
    drop = np.zeros(len(tokens), bool)
    if variant & DROP_TEXT:
        drop |= text
    if variant & DROP_IMAGES:
        drop |= images
    return tokens[~drop]


class Shards:
    """The documents of a folder that `write` finished: len, tokens(i), lengths [N, 4], manifest.

    Opening checks that every file is there and whole in number; ArrayRecord itself opens a missing
    path as an empty one.
    """

    def __init__(self, path):
        self.path = pathlib.Path(path)
        manifest = self.path / "manifest.json"
        if not self.path.is_dir():
            raise FileNotFoundError(f"no shards at {self.path}: no such folder; make them: `mmgen tokenize`")
        if not manifest.exists():
            raise ValueError(f"{self.path} has no manifest.json, so it was never finished: tokenise again")
        self.manifest = json.loads(manifest.read_text())
        if self.manifest["version"] != VERSION:
            raise ValueError(
                f"{self.path} is of shard version {self.manifest['version']}, this code reads {VERSION}: tokenise again"
            )
        self.dtype = np.dtype(self.manifest["dtype"])
        counts = self.manifest["shards"]
        self.starts = np.cumsum([0] + counts)
        self.lengths = np.load(self.path / "lengths.npy")
        if self.lengths.shape != (self.manifest["count"], VARIANTS) or self.starts[-1] != len(self.lengths):
            raise ValueError(
                f"{self.path}: the manifest counts {self.manifest['count']} documents ({self.starts[-1]} in its "
                f"shards), lengths.npy has shape {self.lengths.shape}: tokenise again"
            )
        self.readers = [self._open(number, count) for number, count in enumerate(counts)]
        self._memory = None  # (all tokens, where each document starts), after preload()

    def __len__(self):
        return len(self.lengths)

    def tokens(self, i):
        """Document i -> int32 [T]."""
        if not 0 <= i < len(self):
            raise IndexError(f"document {i} of {len(self)} in {self.path}")
        if self._memory:
            tokens, starts = self._memory
            return tokens[starts[i] : starts[i + 1]].astype(np.int32)
        shard = int(np.searchsorted(self.starts, i, side="right")) - 1
        (record,) = self.readers[shard].read([int(i - self.starts[shard])])
        tokens = np.frombuffer(record, self.dtype).astype(np.int32)
        if len(tokens) != self.lengths[i, 0]:
            raise ValueError(
                f"{self.path}: document {i} has {len(tokens)} tokens where lengths.npy says {self.lengths[i, 0]}: "
                "the shards are damaged; tokenise again"
            )
        return tokens

    def preload(self, max_bytes=512 << 20):
        """Reads all tokens into memory if they need at most `max_bytes`; tokens(i) is then a slice."""
        if self._memory or self.manifest["tokens"] * self.dtype.itemsize > max_bytes:
            return
        data = b"".join(record for reader in self.readers for record in reader.read_all())
        tokens = np.frombuffer(data, self.dtype)
        starts = np.concatenate([[0], np.cumsum(self.lengths[:, 0], dtype=np.int64)])
        if len(tokens) != starts[-1]:
            raise ValueError(
                f"{self.path}: {len(tokens)} tokens in its shards where lengths.npy says {starts[-1]}: the shards are "
                "damaged; tokenise again"
            )
        self._memory = tokens, starts

    def _open(self, number, count):
        path = self.path / _shard_name(number)
        random_access = {"options": "readahead_buffer_size:0", "file_reader_buffer_size": 1 << 15}
        reader = ArrayRecordReader(str(path), **random_access)
        if not reader.ok() or reader.num_records() != count:
            found = f"{reader.num_records()} records" if path.exists() else "no such file"
            raise ValueError(
                f"{path}: expected {count} records, found {found}: it is damaged; tokenise again"
            )
        return reader


def _shard_name(number):
    return f"tokens-{number:05d}.arrayrecord"
