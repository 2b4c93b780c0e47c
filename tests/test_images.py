"""Every kind of bad or unusual image, made here, and what becomes of it."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from mmgen.data.images import BadImage, Limits, fit, random_crop, read


def picture(height=24, width=32):
    """A smooth picture whose four quarters differ: red grows to the right, green downwards."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 // width, y * 255 // height, np.full_like(x, 40)], -1).astype(np.uint8)


def encoded(image, kind="PNG", **options):
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def reason(data, **options):
    with pytest.raises(BadImage) as error:
        read(data, **options)
    return error.value.reason


def assert_close(a, b, tolerance):
    assert a.shape == b.shape and a.dtype == b.dtype == np.uint8
    assert np.abs(a.astype(int) - b).mean() <= tolerance


@pytest.mark.parametrize("kind, options, tolerance", [
    ("PNG", {}, 0), ("WEBP", {"lossless": True}, 0), ("WEBP", {"quality": 95}, 3),
    ("JPEG", {"quality": 95}, 2), ("JPEG", {"quality": 95, "progressive": True}, 2),
])  # fmt: skip
def test_plain(kind, options, tolerance):
    assert_close(read(encoded(picture(), kind, **options)), picture(), tolerance)


@pytest.mark.parametrize("kind, options", [
    ("JPEG", {"quality": 90}), ("JPEG", {"quality": 90, "progressive": True}), ("PNG", {}), ("WEBP", {"lossless": True}),
])  # fmt: skip
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_truncated(kind, options, share):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    data = encoded(noise, kind, **options)
    assert reason(data[: int(len(data) * share)]) in ("truncated", "unreadable")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_an_image_that_lost_its_end_counts_as_truncated(kind):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    data = encoded(noise, kind)
    assert reason(data[: len(data) // 2]) == "truncated"
    for cut in range(1, 40):  # never pixels that are not the image's
        try:
            assert (read(data[:-cut]) == read(data)).all()
        except BadImage as error:
            assert error.reason in ("truncated", "unreadable")


def test_a_bomb_is_refused_before_it_is_decoded():
    # 10,000 x 10,000 black pixels: some kilobytes, 300 MB when decoded.
    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    packer = zlib.compressobj(9)
    row = bytes(1 + 3 * 10_000)
    body = b"".join(packer.compress(row) for _ in range(10_000)) + packer.flush()
    header = struct.pack(">IIBBBBB", 10_000, 10_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    assert len(bomb) < 400_000
    assert reason(bomb) == "too_large"
    huge = bomb.replace(struct.pack(">II", 10_000, 10_000), struct.pack(">II", 60_000, 60_000))
    assert reason(huge) in ("too_large", "unreadable")  # Pillow's own ceiling, or the wrong checksum


def test_a_bomb_of_34_bytes():
    webp = bytes.fromhex("524946461a000000574542505650384c0e0000002ffebfff0f071011fd0f4444ff03")
    with pytest.raises(BadImage, match="too_large.*(268402689|16383x16383)"):
        read(webp)


def test_limits():
    data = encoded(picture())
    assert reason(data, limits=Limits(max_pixels=32 * 24 - 1)) == "too_large"
    assert reason(data, limits=Limits(max_bytes=len(data) - 1)) == "too_many_bytes"
    assert reason(data, limits=Limits(min_side=25)) == "too_small"
    read(data, limits=Limits(max_bytes=len(data), max_pixels=32 * 24, min_side=24))


def test_formats():
    assert reason(b"") == "empty"
    assert reason(b"<html>not found</html>") == "bad_format"
    for kind in ("GIF", "BMP", "TIFF"):
        assert reason(encoded(picture(), kind)) == "bad_format"
    assert reason(b"\x89PNG\r\n\x1a\n" + bytes(50)) == "unreadable"
    assert reason(b"\xff\xd8\xff" + bytes(50)) == "unreadable"


def test_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "green", "blue")]
    for kind, options in (("WEBP", {"lossless": True}), ("PNG", {})):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert (read(data) == (255, 0, 0)).all()
        assert reason(data, limits=Limits(max_frames=2)) == "too_many_frames"
    assert reason(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])) == "bad_format"


def test_cmyk():
    data = encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95)
    assert_close(read(data), np.full((16, 16, 3), (255, 0, 0), np.uint8), 4)


def test_sixteen_bits_are_scaled_not_clipped():
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    grey = read(encoded(Image.fromarray(ramp)))
    assert (grey[..., 0].ravel() == np.arange(256)).all()
    assert (grey == grey[..., :1]).all()


def test_grey_and_palette():
    grey = picture()[..., 0]
    assert (read(encoded(grey)) == grey[..., None]).all()
    assert_close(read(encoded(grey, "JPEG", quality=95)), np.repeat(grey[..., None], 3, -1), 2)
    assert (read(encoded(Image.new("1", (8, 8), 1))) == 255).all()
    palette = Image.fromarray(picture()).quantize(16)
    assert (read(encoded(palette)) == np.asarray(palette.convert("RGB"))).all()


def test_alpha_is_composited_on_the_background():
    pixels = np.dstack([picture(), np.full((24, 32), 255, np.uint8)])
    pixels[:, :16, 3] = 0
    pixels[:, 16:20, 3] = 128
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True})):
        seen = read(encoded(pixels, kind, **options), background=(10, 200, 30))
        assert (seen[:, :16] == (10, 200, 30)).all()
        assert (seen[:, 20:] == picture()[:, 20:]).all()
        assert_close(
            seen[:, 16:20], ((picture()[:, 16:20].astype(int) + (10, 200, 30)) // 2).astype(np.uint8), 1
        )
    see_through = Image.fromarray(picture()).quantize(4)
    data = encoded(see_through, transparency=see_through.getpixel((0, 0)))
    assert (read(data, background=(1, 2, 3))[0, 0] == (1, 2, 3)).all()
    grey = Image.merge("LA", [Image.new("L", (4, 4), 100), Image.new("L", (4, 4), 0)])
    assert (read(encoded(grey)) == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation):
    upright = picture()
    # What a camera stores so that a viewer that obeys the tag shows `upright`.
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
        5: upright.transpose(1, 0, 2), 6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(upright, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind, options, tolerance in (
        ("JPEG", {"quality": 95}, 2),
        ("PNG", {}, 0),
        ("WEBP", {"lossless": True}, 0),
    ):
        data = encoded(np.ascontiguousarray(stored), kind, exif=exif, **options)
        assert_close(read(data), upright, tolerance)


def test_broken_exif_is_no_reason_to_lose_an_image():
    data = encoded(picture(), "JPEG", quality=95, exif=b"Exif\0\0MM\0*\xff\xff\xff\xff garbage")
    assert_close(read(data), picture(), 2)


def test_colour_profiles_become_srgb():
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert_close(read(encoded(picture(), icc_profile=srgb)), picture(), 1)
    # A profile with red and blue primaries exchanged, made from sRGB's own tags.
    swapped = srgb.replace(b"rXYZ", b"tXYZ").replace(b"bXYZ", b"rXYZ").replace(b"tXYZ", b"bXYZ")
    assert_close(read(encoded(picture(), icc_profile=swapped)), picture()[..., ::-1], 8)
    for wrong in (b"not a profile", srgb[:200]):
        assert_close(read(encoded(picture(), icc_profile=wrong)), picture(), 0)
    # A profile of three colours on a grey image does not apply.
    assert (read(encoded(picture()[..., 0], icc_profile=swapped))[..., 0] == picture()[..., 0]).all()


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(["JPEG", "PNG", "WEBP"]), st.integers(0, 2**32 - 1))
def test_mutated_files_are_read_or_refused(kind, seed):
    rng = np.random.default_rng(seed)
    data = bytearray(encoded(picture(), kind))
    for place in rng.integers(0, len(data), rng.integers(1, 8)):
        data[place] = rng.integers(256)
    try:
        pixels = read(bytes(data), limits=Limits(max_pixels=1 << 20))
    except BadImage as error:
        assert error.reason
    else:
        assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 40), st.integers(1, 40), st.integers(0, 99))
def test_any_size_to_any_size(height, width, out_width, out_height, seed):
    pixels = picture(height, width)
    assert fit(pixels, out_width, out_height).shape == (out_height, out_width, 3)
    rng = np.random.default_rng(seed)
    assert random_crop(pixels, out_width, out_height, rng).shape == (out_height, out_width, 3)


def test_fit_keeps_the_centre():
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:20] = 255
    assert (fit(pixels, 10, 10) == 255).all()
    assert (fit(pixels.transpose(1, 0, 2), 10, 10) == 255).all()
    same = picture(32, 32)
    assert (fit(same, 32, 32) == same).all()
    assert fit(np.zeros((60_000, 1, 3), np.uint8), 64, 64).shape == (64, 64, 3)  # no giant on the way


def test_random_crops_differ_and_repeat():
    pixels = picture(64, 64)
    crops = [random_crop(pixels, 16, 16, np.random.default_rng(seed)) for seed in range(40)]
    again = [random_crop(pixels, 16, 16, np.random.default_rng(seed)) for seed in range(40)]
    assert all((a == b).all() for a, b in zip(crops, again))
    assert len({crop.tobytes() for crop in crops}) == 40
    # Red grows to the right, so a mirrored crop is one where it falls.
    mirrored = sum(crop[0, 0, 0] > crop[0, -1, 0] for crop in crops)
    assert 8 <= mirrored <= 32
    assert not any(
        crop[0, 0, 0] > crop[0, -1, 0]
        for crop in (random_crop(pixels, 16, 16, np.random.default_rng(s), flip=False) for s in range(40))
    )
