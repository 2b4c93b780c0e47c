"""Every kind of bad or unusual image, made here, and what becomes of it."""

import concurrent.futures
import io
import math
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from mmgen.data.images import BadImage, Buckets, Limits, fit, random_crop, read, resize


def picture(height=24, width=32):
    """A smooth picture whose four quarters differ: red grows to the right, green downwards."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 // width, y * 255 // height, np.full_like(x, 40)], -1).astype(np.uint8)


def landscape(height, width, seed=0):
    """1/f noise, as rough as a photograph."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = np.inf
    waves = np.fft.rfft2(rng.standard_normal((3, height, width))) / frequency
    waves = np.fft.irfft2(waves + waves[:1], (height, width))
    return (127 + 40 * waves / waves.std()).clip(0, 255).astype(np.uint8).transpose(1, 2, 0)


def precisely(pixels, width, height):
    """All of an image in float64 by the bicubic filter (a = -1/2), widened where it shrinks."""

    def weights(count, wanted):
        scale = max(count / wanted, 1)
        centre = (np.arange(wanted) + 0.5) * count / wanted
        x = np.abs(np.arange(count) + 0.5 - centre[:, None]) / scale
        w = np.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2) * (x < 2)
        return w / w.sum(1, keepdims=True)

    rows, columns = weights(pixels.shape[0], height), weights(pixels.shape[1], width)
    return np.einsum("ij,jkc,lk->ilc", rows, pixels.astype(float), columns, optimize=True).clip(0, 255)


def decibels(a, b):
    return 20 * math.log10(255 / np.sqrt(np.mean((a.astype(float) - b) ** 2)))


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


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_that_lies_about_its_size(progressive):
    data = encoded(picture(), "JPEG", quality=90, progressive=progressive)
    at = data.index(b"\xff\xc2" if progressive else b"\xff\xc0")
    frame = data[at : at + 2 + int.from_bytes(data[at + 2 : at + 4])]
    huge = frame[:5] + struct.pack(">HH", 60_000, 60_000) + frame[9:]
    tracemalloc.start()
    assert reason(data.replace(frame, huge)) == "too_large"
    for two in (frame + huge, huge + frame):  # each decoder may believe another one
        for size in (None, (8, 8)):
            assert reason(data.replace(frame, two), size=size) in ("too_large", "unreadable")
    assert tracemalloc.get_traced_memory()[1] < 1 << 20  # NumPy's arrays are counted too
    tracemalloc.stop()


def test_a_bomb_of_scans():
    data = encoded(Image.new("L", (1024, 1024)), "JPEG", quality=90, progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]
    bomb = data[:-2] + 10_000 * scan + data[-2:]  # hours, at the largest size that is let through
    limits = Limits(max_pixels=1 << 22)
    assert len(bomb) < 2_000_000 and reason(bomb, limits=limits) == "too_many_scans"
    assert read(data, limits=limits).shape == (1024, 1024, 3)


def test_a_wrong_checksum_is_noticed():
    data = encoded(landscape(64, 64))
    for place in (20, data.index(b"IDAT") + 2000, len(data) - 6):
        damaged = bytearray(data)
        damaged[place] ^= 1
        assert reason(bytes(damaged)) == "unreadable"


def test_what_libjpeg_only_warns_of_is_an_error():
    data = encoded(landscape(64, 64), "JPEG", quality=90)
    middle = len(data) // 2
    assert reason(data[:middle] + b"\xff\xd3" + data[middle:]) in ("truncated", "unreadable")
    assert (read(data + b"what follows the end") == read(data)).all()


def test_a_webp_is_as_long_as_it_says():
    data = encoded(landscape(64, 64), "WEBP", quality=90)
    assert reason(data[:-2]) == "truncated" and reason(data + b"ab") == "unreadable"


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
        assert reason(encoded(pixels, kind, **options), background=None) == "alpha"
        opaque = encoded(np.dstack([picture(), np.full((24, 32), 255, np.uint8)]), kind, **options)
        assert (read(opaque, background=None) == picture()).all()
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
    assert_close(read(encoded(picture(), icc_profile=srgb)), picture(), 0)
    # A profile with red and blue primaries exchanged, made from sRGB's own tags.
    swapped = srgb.replace(b"rXYZ", b"tXYZ").replace(b"bXYZ", b"rXYZ").replace(b"tXYZ", b"bXYZ")
    assert_close(read(encoded(picture(), icc_profile=swapped)), picture()[..., ::-1], 8)
    jpeg = encoded(picture(), "JPEG", quality=95, icc_profile=swapped)
    assert_close(read(jpeg), picture()[..., ::-1], 9)
    assert_close(read(jpeg, size=(16, 16)), fit(picture()[..., ::-1], 16, 16), 9)
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


@pytest.mark.parametrize("side", [280, 256, 197, 180, 140, 128, 96, 64, 48, 40, 20])
def test_shrinking_is_antialiased_and_precise(side):
    pixels = landscape(288, 288)
    assert decibels(fit(pixels, side, side), precisely(pixels, side, side)) > 41
    stripes = np.zeros((288, 288, 3), np.uint8)
    stripes[:, ::2] = 255  # finer than 180 pixels can show: grey
    if side <= 140:
        assert np.ptp(fit(stripes, side, side)[4:-4, 4:-4].astype(int)) < 20


def test_enlarging_is_smooth():
    pixels = landscape(40, 40)
    large = fit(pixels, 160, 160)
    assert decibels(large, precisely(pixels, 160, 160)) > 38
    assert len(np.unique(fit(picture(8, 8), 256, 256)[128, :, 0])) > 150


@pytest.mark.parametrize("value", [0, 1, 128, 254, 255])
@pytest.mark.parametrize("sides", [(375, 256), (375, 100), (375, 30), (30, 31), (9, 100), (300, 1)])
def test_what_is_flat_stays_flat(value, sides):
    assert (fit(np.full((sides[0], sides[0] + 7, 3), value, np.uint8), sides[1], sides[1]) == value).all()


def test_a_mean_of_very_many_pixels_does_not_overflow():
    assert (fit(np.full((6000, 6000, 3), 255, np.uint8), 1, 1) == 255).all()


def test_a_pixel_stays_where_it_is():
    pixels = np.zeros((300, 420, 3), np.uint8)
    pixels[100:110, 60:70] = 255  # in the crop's left third
    for side in (200, 100, 48):
        y, x = np.argwhere(fit(pixels, side, side)[..., 0] > 60).mean(0) + 0.5
        assert abs(y - 105 * side / 300) < 0.6 and abs(x - 5 * side / 300) < 0.6


@pytest.mark.parametrize(
    "kind, options", [("JPEG", {"quality": 90}), ("PNG", {}), ("WEBP", {"lossless": True})]
)
@pytest.mark.parametrize("shape", [(304, 400), (420, 300), (1024, 704), (60, 50)])
def test_reading_at_a_size_is_reading_and_fitting(kind, options, shape):
    data = encoded(landscape(*shape), kind, **options)
    # Cuts are whole pixels, here of a half or a quarter of the image: not always the very same frame.
    for size, least in (((128, 128), 40), ((200, 100), 40), ((64, 96), 34), (Buckets(128 * 128, 16), 34)):
        small, whole = read(data, size=size), resize(read(data), size)
        assert small.shape == whole.shape
        assert (small == whole).all() or kind == "JPEG" and decibels(small, whole) > least


def test_reading_at_a_size_obeys_the_orientation():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(np.rot90(picture(600, 800), 1).copy(), "JPEG", quality=95, exif=exif)
    assert_close(read(data, size=(80, 60)), fit(picture(600, 800), 80, 60), 2)
    assert read(data, size=Buckets(64 * 64, 8)).shape == (56, 72, 3)


def test_a_jpeg_read_small_is_checked_too():
    data = encoded(landscape(800, 800), "JPEG", quality=90)
    for cut in (2, 100, len(data) // 2):
        assert reason(data[:-cut], size=(64, 64)) == "truncated"
    assert reason(data, size=(64, 64), limits=Limits(max_pixels=800 * 800 - 1)) == "too_large"


@pytest.mark.parametrize("size", [(0, 5), (5, -1), (5,), (1.5, 2), 7, "ab", (1, 2, 3)])
def test_sizes_that_are_none(size):
    for wrong in (lambda: read(encoded(picture()), size=size), lambda: resize(picture(), size)):
        with pytest.raises(ValueError, match="expected a size") as error:
            wrong()
        assert not isinstance(error.value, BadImage)


def test_the_same_bytes_on_every_call_and_in_threads():
    files = [encoded(landscape(375, 500, seed), "JPEG", quality=90) for seed in range(4)]
    once = [read(data, size=(256, 256)).tobytes() for data in files]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            again = pool.map(lambda data: read(data, size=(256, 256)).tobytes(), files * 4)
            assert list(again) == once * 4


BUCKETS = st.builds(
    Buckets,
    st.integers(4096, 70_000),
    st.sampled_from([1, 2, 8, 16, 24]),
    st.one_of(st.none(), st.integers(64, 400)),
    st.sampled_from([1, 1.5, 2, 4, 10.0]),
)


@settings(max_examples=60, deadline=None)
@given(BUCKETS, st.lists(st.tuples(st.integers(1, 5000), st.integers(1, 5000)), min_size=2, max_size=40))
def test_buckets(buckets, images):
    step, most = buckets.multiple, buckets.max_side or 10**9
    images = sorted(images, key=lambda image: image[0] / image[1])
    shapes = [buckets.of(*image) for image in images]
    for (image_width, image_height), (width, height) in zip(images, shapes):
        assert width % step == height % step == 0 and width * height <= buckets.max_pixels
        assert max(width, height) <= most and max(width, height) <= buckets.max_ratio * min(width, height)
        assert (width + step) * (height + step) > buckets.max_pixels or max(width, height) + step > most
        # What is cut is never more than half of what a step on both sides would cut.
        wanted = image_width / image_height
        wanted = min(max(wanted, 1 / buckets.max_ratio), buckets.max_ratio)
        kept = min(wanted * height / width, width / height / wanted)
        if buckets.max_ratio >= 4 and most * most >= buckets.max_pixels:
            assert kept > 1 - 1.1 * step / min(width, height)
    ratios = [width / height for width, height in shapes]
    assert ratios == sorted(ratios)
    side = min(math.isqrt(buckets.max_pixels), most) // step * step
    assert buckets.of(77, 77) == (side, side)


@pytest.mark.parametrize("max_pixels, multiple, max_side, max_ratio", [
    (700, 1, None, 4.0), (1000, 8, None, 2.5), (1000, 4, 30, 4.0), (64, 8, None, 4.0), (900, 4, 4, 9.0),
])  # fmt: skip
def test_the_shapes_of_buckets_are_all_that_cannot_grow(max_pixels, multiple, max_side, max_ratio):
    def legal(width, height):
        small = width * height <= max_pixels and max(width, height) <= (max_side or max_pixels)
        return small and max(width, height) <= max_ratio * min(width, height)

    sides = range(multiple, max_pixels + 1, multiple)
    every = [(w, h) for w in sides for h in sides if legal(w, h) and not legal(w + multiple, h + multiple)]
    assert sorted(Buckets(max_pixels, multiple, max_side, max_ratio).shapes) == sorted(every)


def test_buckets_by_example():
    buckets = Buckets(256 * 256, 16)
    assert [buckets.of(*size) for size in ((100, 100), (300, 200), (200, 300), (1920, 1080), (9000, 100))] == [
        (256, 256), (304, 208), (208, 304), (336, 192), (512, 128),
    ]  # fmt: skip
    assert Buckets(256 * 256, 16, max_side=256).of(200, 100) == (256, 128)


@pytest.mark.parametrize("options", [
    {"max_pixels": 100, "multiple": 16}, {"max_pixels": 0}, {"max_pixels": 100, "multiple": 0},
    {"max_pixels": 100, "multiple": 8, "max_side": 7}, {"max_pixels": 100, "max_ratio": 0.5},
])  # fmt: skip
def test_buckets_that_cannot_be(options):
    with pytest.raises(ValueError, match="expected .* found"):
        Buckets(**options)


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
