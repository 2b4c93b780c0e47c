"""Perceptual hashes, to know a picture again that was made smaller, recompressed or slightly changed: PDQ
(https://github.com/facebook/ThreatExchange, "The TMK+PDQF Video-Hashing Algorithm and the PDQ Image-Hashing Algorithm", 2019).

256 bits: which of the 16 x 16 lowest waves of the brightness are above their median. Two pictures are the same where at most CLOSE bits
differ. PDQ alone does not know a picture that is mirrored, turned or cropped: `variants` are what a list keeps of each.
"""

import json
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

CLOSE = 31  # of 256 bits, as PDQ's authors advise
_SIDE, _BITS = 64, 16
_CROPS = (0.0, 0.05, 0.1)  # shares of the sides that are cut away all around
_K = np.arange(1, _BITS + 1)[:, None]
_WAVES = np.sqrt(2 / _SIDE) * np.cos(np.pi / _SIDE * _K * (np.arange(_SIDE) + 0.5))


def pdq(pixels):
    """Pixels uint8 [H, W, 3] -> bits bool [256], and the quality from 0 (plain, which is like all other plain ones) to 100."""
    gray = pixels[..., :3].astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    if max(gray.shape) > 512:
        gray = cv2.resize(gray, (512, 512), interpolation=cv2.INTER_AREA)
    # Twice a box of half of what a cell of the small picture is wide.
    box = tuple(max(1, -(-side // (2 * _SIDE))) for side in gray.shape[1::-1])
    anchor = tuple(side - (side + 2) // 2 for side in box)
    blur = lambda x: cv2.boxFilter(x, -1, box, anchor=anchor, normalize=False, borderType=cv2.BORDER_CONSTANT)
    there = blur(np.ones_like(gray))  # at the edges fewer pixels are in a box
    for _ in range(2):
        gray = blur(gray) / there
    rows, columns = (((np.arange(_SIDE) + 0.5) * side / _SIDE).astype(int) for side in gray.shape)
    small = gray[np.ix_(rows, columns)]
    waves = _WAVES @ small @ _WAVES.T
    steps = [np.abs(np.trunc(np.diff(small, axis=axis) * 100 / 255)).sum() for axis in (0, 1)]
    return (waves > np.median(waves)).ravel()[::-1], int(min(sum(steps) / 90, 100))


def variants(pixels):
    """The hashes of a picture and of how it is commonly disguised: mirrored and turned by quarters, each whole and
    cropped: bool [24, 256]."""
    found = []
    for crop in _CROPS:
        top, left = (int(round(crop * side)) for side in pixels.shape[:2])
        part = pixels[top : pixels.shape[0] - top, left : pixels.shape[1] - left]
        for mirrored in (part, part[:, ::-1]):
            found += [pdq(np.rot90(mirrored, turns))[0] for turns in range(4)]
    return np.stack(found)


class Blocklist:
    """Hashes of pictures that are not shown: a file of lines {"hash": 64 hexadecimal digits, "category", "why"}, which `add` writes to.
    The pictures themselves are not kept."""

    def __init__(self, path=None):
        lines = Path(path).read_text("utf-8").splitlines() if path else []
        self.entries = [json.loads(line) for line in lines if line.strip()]
        bits = [
            np.unpackbits(np.frombuffer(bytes.fromhex(entry["hash"]), np.uint8)) for entry in self.entries
        ]
        self._bits = np.array(bits, bool).reshape(-1, 256)

    def find(self, pixels):
        """The entry that a picture is like, or None. Plain pictures, of which the hash says nothing, are like none."""
        if not len(self._bits):
            return None
        bits, quality = pdq(pixels)
        if quality < 20:
            return None
        distance = (self._bits != bits).sum(1)
        return self.entries[int(distance.argmin())] if distance.min() <= CLOSE else None


def add(path, pictures, category, why):
    """Adds image files to a blocklist, with all their variants; the number of lines that were written."""
    lines = []
    for picture in pictures:
        with Image.open(picture) as image:
            hashes = variants(np.asarray(image.convert("RGB")))
        for bits in np.unique(hashes, axis=0):
            lines.append(
                json.dumps(
                    {"hash": np.packbits(bits).tobytes().hex(), "category": category, "why": why},
                    ensure_ascii=False,
                )
            )
    with open(path, "a", encoding="utf-8") as file:
        file.write("".join(line + "\n" for line in lines))
    return len(lines)
