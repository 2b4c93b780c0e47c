"""Dialogues that clients go on with, by the id of a response: kept for a while, within a bound of memory."""

import collections
import threading
import time

from mmgen.document import Document, Image, Text, Turn


class Store:
    """{id: document}, each its client's alone. seconds: after which one that nobody asked for is forgotten. most: bytes of all, beyond
    which those go first that were asked for longest ago, of the client that has most."""

    def __init__(self, seconds=3600.0, most=64 << 20):
        self.seconds, self.most = seconds, most
        self._found = collections.OrderedDict()  # id -> (client, document, bytes, when)
        self._bytes, self._lock = 0, threading.Lock()

    def put(self, name, client, document, pixels=False):
        """Keeps a document without the pixels that codes stand for, but for those of pictures that were shown where `pixels` are asked for."""

        def bare(part, role):
            if not isinstance(part, Image):
                return part
            return Image(codes=part.codes, pixels=part.pixels if pixels and role != "assistant" else None)

        turns = [Turn(turn.role, [bare(part, turn.role) for part in turn.parts]) for turn in document.turns]
        document = Document(turns)
        size = 1000 + sum(_bytes(part) for turn in document.turns for part in turn.parts)
        with self._lock:
            self._found[name] = (client, document, size, time.monotonic())
            self._bytes += size
            while self._expired():
                self._drop(next(iter(self._found)))
            while self._bytes > self.most:  # of whoever has most, so that nobody pushes others out
                held = collections.Counter()
                for whose, _, size, _ in self._found.values():
                    held[whose] += size
                ((most, _),) = held.most_common(1)
                self._drop(next(name for name, found in self._found.items() if found[0] == most))

    def get(self, name, client):
        """The document, or None where there is none, or another's."""
        with self._lock:
            while self._expired():
                self._drop(next(iter(self._found)))
            found = self._found.get(name)
            if found is None or found[0] != client:
                return None
            self._found[name] = (*found[:3], time.monotonic())
            self._found.move_to_end(name)
            return found[1]

    def __len__(self):
        return len(self._found)

    def _expired(self):
        return self._found and next(iter(self._found.values()))[3] < time.monotonic() - self.seconds

    def _drop(self, name):
        self._bytes -= self._found.pop(name)[2]


def _bytes(part):
    if isinstance(part, Text):
        return 200 + 4 * len(part.text)
    if not isinstance(part, Image):
        return 200
    return 200 + part.codes.nbytes + (0 if part.pixels is None else part.pixels.nbytes)
