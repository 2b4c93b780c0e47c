"""A thousand damaged images: none crashes, hangs or is shown wrong unnoticed, and every skip is counted."""

import collections
import contextlib
import faulthandler
import io
import tarfile
import time

import numpy as np
import pytest
from PIL import Image, ImageOps

from mmgen.data import sources
from mmgen.data.images import BadImage, Limits, read
from tests.test_images import encoded, landscape

COUNT = 1000
LIMITS = Limits(max_pixels=1 << 20, max_bytes=1 << 20)
SECONDS = 2  # for one image; each takes a millisecond


def originals():
    """(kind, bytes): every way of storing that the three formats are used in."""
    pixels = landscape(72, 88)
    exif = Image.Exif()
    exif[0x0112] = 6
    alpha = np.dstack([pixels, pixels[..., :1]])
    grey = pixels[..., 0]
    for image, options in (
        (pixels, {"quality": 90}), (pixels, {"quality": 75, "subsampling": 0, "exif": exif}),
        (pixels, {"quality": 90, "progressive": True}), (grey, {"quality": 90}),
        (pixels, {"quality": 90, "restart_marker_blocks": 4}), (Image.fromarray(pixels).convert("CMYK"), {}),
    ):  # fmt: skip
        yield "JPEG", encoded(image, "JPEG", **options)
    sixteen = Image.fromarray(grey.astype(np.uint16) * 257)
    for image in (pixels, grey, alpha, sixteen, Image.fromarray(pixels).quantize(64)):
        yield "PNG", encoded(image, "PNG")
    for image, options in ((pixels, {"quality": 80}), (pixels, {"lossless": True}), (alpha, {"quality": 80})):
        yield "WEBP", encoded(image, "WEBP", **options)


def mutated(data, rng):
    """The bytes with one kind of damage, at random places, and the name of the damage."""
    a, b = np.sort(rng.integers(0, len(data), 2))
    b = min(b, a + rng.integers(1, 200))
    out = bytearray(data)
    kind = rng.choice(["flip", "bytes", "header", "cut", "zero", "insert", "repeat", "remove", "swap"])
    if kind in ("flip", "bytes", "header"):
        for place in rng.integers(0, 64 if kind == "header" else len(data), rng.integers(1, 6)):
            out[place] = rng.integers(256) if kind == "bytes" else out[place] ^ (1 << rng.integers(8))
    elif kind == "cut":
        out = out[:a]
    elif kind == "zero":
        out[a:b] = bytes(b - a)
    elif kind == "insert":
        out[a:a] = rng.bytes(b - a)
    elif kind == "repeat":
        out[a:a] = out[a:b]
    elif kind == "remove":
        del out[a:b]
    else:
        out = out[:a] + out[b:] + out[a:b]
    return bytes(out), str(kind)


@pytest.fixture(scope="module")
def damaged():
    """[(kind, damage, original, damaged)], the same on every run."""
    rng = np.random.default_rng(0)
    known = list(originals())
    files = []
    while len(files) < COUNT:
        kind, data = known[len(files) % len(known)]
        broken, damage = mutated(data, rng)
        if broken != data:
            files.append((kind, damage, data, broken))
    return files


def outcome(data, size=None):
    """The pixels, or the reason that there are none. Anything but BadImage is raised."""
    start = time.process_time()
    faulthandler.dump_traceback_later(60, exit=True)  # nothing else ends a loop in a decoder
    try:
        return read(data, LIMITS, size=size)
    except BadImage as error:
        assert error.reason and len(str(error)) < 1000
        return error.reason
    finally:
        faulthandler.cancel_dump_traceback_later()
        assert time.process_time() - start < SECONDS


def test_damaged_images_are_refused_or_what_they_were(damaged):
    accepted = collections.Counter()
    for kind, damage, data, broken in damaged:
        seen = outcome(broken)
        small = outcome(broken, size=(24, 24))
        assert isinstance(small, str) == isinstance(seen, str)
        if isinstance(seen, str):
            continue
        accepted[kind] += 1
        assert seen.dtype == np.uint8 and seen.shape[2] == 3 and small.shape == (24, 24, 3)
        same = np.array_equal(seen, read(data))
        # A PNG's checksums cover all of it; no format comes through a cut, unless nothing is lost.
        assert same or (kind != "PNG" and damage != "cut"), (kind, damage)
        if kind == "JPEG" and not same:  # its format has no checksums: the picture is what the file says
            assert np.array_equal(seen, independently(broken))
    # Most damage is found; what is accepted is in what no decoder needs, or a format without checksums.
    kinds = collections.Counter(kind for kind, *_ in damaged)
    assert accepted["PNG"] < 0.02 * kinds["PNG"]
    assert accepted["JPEG"] < 0.6 * kinds["JPEG"] and accepted["WEBP"] < 0.6 * kinds["WEBP"]


def independently(data):
    """A JPEG by Pillow's decoder, upright, unless that is what is damaged."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    with contextlib.suppress(Exception):
        image = ImageOps.exif_transpose(image)
    return np.asarray(image)


def test_every_skip_is_counted(damaged, tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i, (kind, _, _, broken) in enumerate(damaged):
            for suffix, data in (({"JPEG": "jpg"}.get(kind, kind.lower()), broken), ("txt", b"a picture")):
                member = tarfile.TarInfo(f"{i:04}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    source = sources.open_source(f"tars:{tmp_path}/*.tar", size=(24, 24), limits=LIMITS)
    read_ones = [i for i, _ in sources.documents_of(source, max_bad=1.0)]
    reasons = [outcome(broken) for *_, broken in damaged]
    assert len(source) == COUNT == len(read_ones) + sum(source.skipped.values())
    assert read_ones == [i for i, reason in enumerate(reasons) if not isinstance(reason, str)]
    assert source.skipped == collections.Counter(reason for reason in reasons if isinstance(reason, str))
