"""Packing: which documents share a row, from their lengths alone."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Plan:
    """Rows of documents: `plan[r]` is the int array of the documents of row r, in their order."""

    documents: np.ndarray  # int64 [N], row after row
    starts: np.ndarray  # int64 [R + 1], where each row begins in `documents`
    dropped: np.ndarray  # int64, the documents that are longer than a row

    def __len__(self):
        return len(self.starts) - 1

    def __getitem__(self, row):
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        return self.documents[self.starts[row] : self.starts[row + 1]]


def pack(lengths, row_length, order=None, *, window=8192, overlong="error"):
    """Packs documents of `lengths` int [N] into rows of `row_length` tokens -> Plan.

    `order` int [N] is the (shuffled) order to take documents in; each `window` of it is packed by
    itself, best fit, so that the plan of a window never depends on another. Deterministic.
    A document longer than a row is a ValueError, or with overlong="drop" is left out and listed.
    """
    lengths = np.asarray(lengths, np.int64)
    order = np.arange(len(lengths)) if order is None else np.asarray(order, np.int64)
    if overlong not in ("error", "drop"):
        raise ValueError(f'overlong is "error" or "drop", not {overlong!r}')
    if len(lengths) and lengths.min() < 1:
        raise ValueError(f"document {lengths.argmin()} has {lengths.min()} tokens: expected at least 1")
    fits = lengths[order] <= row_length
    dropped = order[~fits]
    if len(dropped) and overlong == "error":
        raise ValueError(
            f"{len(dropped)} of {len(order)} documents are longer than a row of {row_length} tokens (the longest, "
            f"document {dropped[lengths[dropped].argmax()]}, has {lengths[dropped].max()}): lengthen the row or "
            'leave them out with overlong="drop"'
        )
    order = order[fits]
    rows = []
    for start in range(0, len(order), window):
        documents = order[start : start + window]
        longest_first = documents[np.argsort(-lengths[documents], kind="stable")]
        # Longest first wins on mixed lengths, the drawn order on documents of nearly one length.
        rows += min((_best_fit(d, lengths, row_length) for d in (longest_first, documents)), key=len)
    starts = np.cumsum([0] + [len(row) for row in rows], dtype=np.int64)
    documents = np.fromiter((i for row in rows for i in row), np.int64, len(order))
    return Plan(documents, starts, dropped)


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
            rows[row].append(document)
            if not stacks[room]:
                rooms ^= 1 << room
        else:
            room, row = row_length, len(rows)
            rows.append([document])
        stacks[room - length].append(row)
        rooms |= 1 << (room - length)
    return rows
