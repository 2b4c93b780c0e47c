"""Safe decoding: bytes that anybody could have written -> uint8 [H, W, 3] sRGB, or `BadImage`.

Sizes are checked from the header, before a pixel is decoded. Only JPEG, PNG and WebP are read: the
fewer decoders a stranger's file can reach, the better. Damage that a format lets one notice is an
error: a PNG's checksums are compared, and libjpeg's warnings about corrupt data are not waved through.
"""

import dataclasses
import functools
import io
import math
import struct
import warnings
import zlib

import cv2
import numpy as np
import simplejpeg
from PIL import Image, ImageCms

# Readers are threads and processes of ours: OpenCV must not start a pool of its own in each.
cv2.setNumThreads(0)

# Process-wide on purpose: `warnings.catch_warnings` is not safe in threads, and readers are threads.
warnings.simplefilter("error", Image.DecompressionBombWarning)

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
COLOR_SPACES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}  # Pillow's mode -> ICC's name and libjpeg's
ORIENTATION = 0x0112  # the EXIF tag, and what undoes each of its values
UPRIGHT = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: np.rot90(pixels),
}
MAX_SCANS = 100  # passes over the pixels of the largest JPEG that `Limits` let through; it takes ten


class BadImage(ValueError):
    """An image, or a document around it, that cannot be used. `reason` is a short word to count by:
    empty, too_many_bytes, bad_format, unreadable, truncated, too_large, too_small, too_many_frames,
    too_many_scans, alpha; sources add no_caption and bad_caption."""

    def __init__(self, reason, detail=""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class Limits:
    """What is refused before decoding. Pillow's own ceiling of 89 million pixels stays in force."""

    max_bytes: int = 64 << 20
    max_pixels: int = 64 << 20
    min_side: int = 1
    max_frames: int = 1000


@dataclasses.dataclass(frozen=True)
class Buckets:
    """A size for every aspect ratio: width * height <= `max_pixels`, both sides multiples of `multiple`
    and at most `max_side`, neither more than `max_ratio` times the other. Sizes are in pixels.

    Chosen from are the `shapes` that could not grow by one `multiple` on both sides, so all have about
    the same area (less only where `max_side` binds). `of` takes the one of nearest aspect ratio (of
    their logarithms), the larger of equals. So a square image gets the largest square, and a wider
    image never a narrower shape. The idea is that of NovelAI's aspect ratio bucketing, 2022.
    """

    max_pixels: int
    multiple: int = 1
    max_side: int | None = None
    max_ratio: float = 4.0

    def __post_init__(self):
        if self.multiple < 1 or self.max_pixels < self.multiple**2:
            raise ValueError(
                f"expected multiple >= 1 and room for one square of it, found multiple={self.multiple}, "
                f"max_pixels={self.max_pixels}: raise max_pixels or lower multiple"
            )
        if self.max_side is not None and self.max_side < self.multiple:
            raise ValueError(
                f"expected max_side >= multiple, found {self.max_side} < {self.multiple}: raise it"
            )
        if not 1 <= self.max_ratio < math.inf:
            raise ValueError(f"expected max_ratio >= 1, found {self.max_ratio}: 1 allows squares only")

    @functools.cached_property
    def shapes(self):
        """The (width, height) that `of` chooses from, the largest area first."""
        step = self.multiple
        longest = math.isqrt(math.ceil(self.max_pixels * self.max_ratio))
        longest = min(longest, self.max_side or longest) // step * step
        shapes = []
        for width in range(step, longest + 1, step):
            # The highest that fits this width, and the next: what is lower than that could grow both ways.
            highest, lowest = (
                min(self.max_pixels // w, longest) // step * step for w in (width, width + step)
            )
            heights = range(max(lowest, step) if width < longest else step, highest + 1, step)
            shapes += [(width, height) for height in heights]
        shapes = [shape for shape in shapes if max(shape) / min(shape) <= self.max_ratio]
        return sorted(shapes, key=lambda shape: (-shape[0] * shape[1], shape))

    @functools.cached_property
    def _logs(self):
        return np.log([width / height for width, height in self.shapes])

    def of(self, width, height):
        """The (width, height) of the bucket for an image of that size."""
        width, height = _size((width, height))
        return self.shapes[np.abs(self._logs - math.log(width / height)).argmin()]


ALPHA = "alpha"  # a background: see `read`
MIDDLE = (127, 127, 127)


def read(data, limits=Limits(), background=(255, 255, 255), size=None):
    """Decodes JPEG, PNG or WebP bytes -> uint8 [H, W, 3] in sRGB, upright.

    EXIF orientation is applied, an embedded colour profile is converted to sRGB, 16 bits become 8,
    alpha is composited on `background` (None refuses what is not opaque; ALPHA composites on middle gray and gives
    uint8 [H, W, 4] with alpha beside it, which resizing does not smear), an animation gives its first
    frame. With `size`, a (width, height) or Buckets, the image comes as `resize` gives it; a JPEG of
    three times that or more is decoded at a half, a quarter or an eighth. Raises BadImage.
    """
    size = size if size is None or isinstance(size, Buckets) else _size(size)
    kind = _kind(data)
    if len(data) > limits.max_bytes:
        raise BadImage("too_many_bytes", f"{len(data)} bytes, at most {limits.max_bytes} are read")
    # A decoder fed by strangers raises nearly anything (OSError, SyntaxError, struct.error,
    # ValueError, zlib.error ...): all of it means that this image is bad, none that the run is.
    try:
        image = Image.open(io.BytesIO(data), formats=[kind])
        (width, height), frames = image.size, getattr(image, "n_frames", 1)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise BadImage("too_large", str(error)) from error
    except Exception as error:
        raise BadImage("unreadable", f"{kind} header: {error}") from error
    if width * height > limits.max_pixels:
        raise BadImage("too_large", f"{width}x{height}, at most {limits.max_pixels} pixels are read")
    if min(width, height) < limits.min_side:
        raise BadImage("too_small", f"{width}x{height}, a side must be >= {limits.min_side}")
    if frames > limits.max_frames:
        raise BadImage("too_many_frames", f"{frames} frames, at most {limits.max_frames} are read")
    try:
        if kind == "JPEG":
            _check_scans(data, width * height, limits)
        else:
            if kind == "PNG":
                _check_png(data)
            image.load()  # not verify(), which misses truncation
        orientation = _orientation(image)
        upright = (height, width) if orientation in (5, 6, 7, 8) else (width, height)
        size = size.of(*upright) if isinstance(size, Buckets) else size
        if kind == "JPEG":
            image = _jpeg(data, image, max(a / b for a, b in zip(size, upright)) if size else 1)
        pixels = _flat(image, background)
        if orientation in UPRIGHT:
            pixels = np.ascontiguousarray(UPRIGHT[orientation](pixels))
        return fit(pixels, *size) if size else pixels
    except BadImage:
        raise
    except Exception as error:
        cut = any(word in str(error).lower() for word in ("truncated", "premature end"))
        detail = f"{kind} {width}x{height}: {error}"
        raise BadImage("truncated" if cut else "unreadable", detail) from error


def resize(pixels, size):
    """`fit` uint8 [H, W, 3] to `size`: a (width, height), or Buckets, which choose one for the image."""
    return fit(pixels, *(size.of(*pixels.shape[1::-1]) if isinstance(size, Buckets) else _size(size)))


def fit(pixels, width, height):
    """Resizes uint8 [H, W, 3] so that it covers width x height, and cuts the centre out."""
    scale = max(width / pixels.shape[1], height / pixels.shape[0])
    return _resize_box(pixels, width / scale, height / scale, (0.5, 0.5), width, height)


def random_crop(pixels, width, height, rng, area=(0.5, 1.0), stretch=1.15, flip=True):
    """A random part of the image at width x height: `area` is its share of the largest part with that
    aspect ratio, `stretch` bounds how much the ratio changes; mirrored half of the time if `flip`.
    The random-resized crop of Szegedy et al. 2014, with milder ranges: a tokenizer must see details.
    """
    share = rng.uniform(*area)
    ratio = math.exp(rng.uniform(-1, 1) * math.log(stretch))
    corner = rng.uniform(size=2)
    mirrored = flip and rng.random() < 0.5
    wide, high = width * ratio, height / ratio
    scale = math.sqrt(share) * min(pixels.shape[1] / wide, pixels.shape[0] / high)
    crop = _resize_box(pixels, wide * scale, high * scale, corner, width, height)
    return np.ascontiguousarray(crop[:, ::-1]) if mirrored else crop


def _resize_box(pixels, box_width, box_height, corner, width, height):
    """The box of about that size (whole source pixels, at the fractions `corner` of the room), resized.

    Enlarging is bicubic. Shrinking is bicubic with antialiasing, as Pillow's BICUBIC is, at a quarter of
    the time: the widened kernel is applied at whole source pixels, and its result interpolated.
    """
    box_width = min(max(round(box_width), 1), pixels.shape[1])
    box_height = min(max(round(box_height), 1), pixels.shape[0])
    left = int((pixels.shape[1] - box_width) * corner[0])
    top = int((pixels.shape[0] - box_height) * corner[1])
    pixels = pixels[top : top + box_height, left : left + box_width]
    # Far larger: first means over areas, to two or three times the size that is wanted. OpenCV sums an
    # area in 32 bits, which overflow beyond 2,900 x 2,900 pixels.
    x, y = (round(a / min(max(a // (2 * b), 1), 1000)) for a, b in ((box_width, width), (box_height, height)))
    if (x, y) != (box_width, box_height):
        pixels = cv2.resize(pixels, (x, y), interpolation=cv2.INTER_AREA)
    x, y = pixels.shape[1] / width, pixels.shape[0] / height
    if x == y == 1:
        return pixels
    if x > 1 or y > 1:
        kernels = _kernel(max(x, 1)), _kernel(max(y, 1))
        pixels = cv2.sepFilter2D(pixels, -1, *kernels, borderType=cv2.BORDER_REFLECT)
    return cv2.resize(pixels, (width, height), interpolation=cv2.INTER_CUBIC)


@functools.lru_cache(1024)
def _kernel(scale):
    """The cubic of Keys 1981 (a = -1/2) widened by `scale` >= 1, at whole numbers: [odd], sum 1.
    In steps of 1/256, to which OpenCV would round it without minding that a white image stays white."""
    if scale < 1.5:  # three numbers do it, the best by least squares, in two thirds of the time
        side = round(68 * (scale - 1))
        return np.array([side, 256 - 2 * side, side]) / 256
    x = np.abs(np.arange(-int(2 * scale), int(2 * scale) + 1)) / scale
    kernel = np.where(x < 1, (1.5 * x - 2.5) * x**2 + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2)
    kernel = (256 * kernel / kernel.sum()).round()
    kernel[len(kernel) // 2] += 256 - kernel.sum()
    return np.trim_zeros(kernel) / 256


def _size(size):
    """Checks a (width, height)."""
    try:
        width, height = (int(side) for side in size)
        if (width, height) == tuple(size) and min(width, height) > 0:
            return width, height
    except (TypeError, ValueError):
        pass
    raise ValueError(f"expected a size (width, height) of two whole numbers above zero, found {size!r}")


def _kind(data):
    """The format by its first bytes, so that a broken file is told from a foreign one."""
    if not data:
        raise BadImage("empty", "0 bytes")
    if data[:3] == b"\xff\xd8\xff":
        return "JPEG"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "PNG"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        stated = 8 + int.from_bytes(data[4:8], "little")
        if not stated <= len(data) <= stated + 1:  # it has no checksum; its size is all that can be checked
            reason = "truncated" if len(data) < stated else "unreadable"
            raise BadImage(reason, f"{len(data)} bytes in a WebP that says {stated}")
        return "WEBP"
    raise BadImage("bad_format", f"expected JPEG, PNG or WebP; the file starts with {bytes(data[:8])!r}")


def _check_scans(data, pixels, limits):
    """Each scan of a progressive JPEG is a pass over all pixels and can be a dozen bytes long: hours of
    work, within every other limit. A scan's header begins with the three bytes that are counted."""
    most = MAX_SCANS * limits.max_pixels
    if len(data) // 10 * pixels > most and data.count(b"\xff\xda\x00") * pixels > most:
        raise BadImage("too_many_scans", f"{data.count(bytes((0xFF, 0xDA, 0)))} scans of {pixels} pixels")


def _check_png(data):
    """Compares the checksum of every chunk up to the end; Pillow skips those of pixels."""
    view, place = memoryview(data), 8
    while place + 12 <= len(data):
        length, name = struct.unpack_from(">I4s", data, place)
        end = place + 8 + length
        if end + 4 > len(data):
            break
        if zlib.crc32(view[place + 4 : end]) != int.from_bytes(view[end : end + 4]):
            raise BadImage("unreadable", f"PNG: wrong checksum of the {name!r} at byte {place}")
        if name == b"IEND":
            return
        place = end + 4
    raise BadImage("truncated", f"PNG: {len(data)} bytes, without an end")


def _jpeg(data, image, scale):
    """Decodes a JPEG opened by Pillow, at `scale` or more -> uint8 [H, W, 3], or Pillow's image if
    more must be done to its colours.

    libjpeg-turbo is asked directly: Pillow ignores its warnings about corrupt data, and is slower.
    """
    width, height = image.size
    if simplejpeg.decode_jpeg_header(data)[:2] != (height, width):
        raise ValueError("two decoders disagree about its size")
    # Other fractions have no fast code. Half as much again as is needed leaves the filter to us: what is
    # shrunk in the decoder alone is 36 dB from the picture shrunk as it should be, this 40 or more.
    factor = next((factor for factor in (8, 4, 2) if 1.5 * scale * factor <= 1), 1)
    pixels = simplejpeg.decode_jpeg(
        data,
        COLOR_SPACES[image.mode],
        min_width=-(-width // factor),
        min_height=-(-height // factor),
        min_factor=factor,
    )
    profile = image.info.get("icc_profile")
    if image.mode == "RGB" and not (profile and _to_srgb(profile, "RGB")):
        return pixels
    pixels = 255 - pixels if image.mode == "CMYK" else pixels  # stored as light, not ink
    image = Image.frombytes(image.mode, pixels.shape[1::-1], pixels)
    image.info["icc_profile"] = profile
    return image


def _flat(image, background):
    """Any mode that the three formats decode to -> uint8 [H, W, 3] in sRGB without alpha, or [H, W, 4] for ALPHA."""
    if isinstance(image, np.ndarray):
        return opaque(image) if background == ALPHA else image
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion would clip it at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    if image.mode in ("1", "L", "LA"):
        image = image.convert("L")
    elif image.mode != "CMYK":
        image = image.convert("RGB")
    transform = profile and _to_srgb(profile, image.mode)
    image = (ImageCms.applyTransform(image, transform) if transform else image).convert("RGB")
    if alpha is not None and alpha.getextrema()[0] < 255:
        if background is None:
            raise BadImage("alpha", "parts are transparent, and no background is given")
        behind = MIDDLE if background == ALPHA else tuple(background)
        image = Image.composite(image, Image.new("RGB", image.size, behind), alpha)
    if background != ALPHA:
        return np.asarray(image)
    return opaque(np.asarray(image)) if alpha is None else np.dstack([image, alpha])


def opaque(pixels):
    """uint8 [..., 3] -> [..., 4], with an alpha of 255."""
    return np.pad(pixels, [(0, 0)] * (pixels.ndim - 1) + [(0, 1)], constant_values=255)


def straight(pixels):
    """uint8 [..., 4] as ALPHA gives it, over middle gray -> as PNGs have it: colours as if nothing were transparent,
    middle gray where everything is. [..., 3] as it is."""
    if pixels.shape[-1] == 3:
        return pixels
    color, alpha = pixels[..., :3].astype(np.float32), pixels[..., 3:].astype(np.float32) / 255
    color = MIDDLE[0] + (color - MIDDLE[0]) / np.maximum(alpha, 1 / 255)
    color = np.where(alpha > 0, color, MIDDLE[0]).round().clip(0, 255)
    return np.concatenate([color.astype(np.uint8), pixels[..., 3:]], -1)


@functools.lru_cache(64)
def _to_srgb(profile, mode):
    """What turns the colours of an embedded ICC profile into sRGB; None where nothing would change. A
    broken or foreign profile is ignored, as browsers do."""
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if profile.profile.xcolor_space.strip() != COLOR_SPACES[mode]:
            return None
        transform = ImageCms.buildTransform(profile, SRGB, mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None
    # Most are sRGB itself, for which the work would be several times that of decoding.
    colors = np.mgrid[0:256:15, 0:256:15, 0:256:15].reshape(3, -1, 18).transpose(1, 2, 0).astype(np.uint8)
    if mode == "RGB":
        changed = np.asarray(ImageCms.applyTransform(Image.fromarray(colors), transform))
        if np.abs(changed.astype(int) - colors).max() <= 1:
            return None
    return transform


def _orientation(image):
    """The EXIF orientation, 1 to 8; 1 where there is none or the EXIF block is broken."""
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:  # EXIF is a TIFF file inside the image, with a parser as open to nonsense
        return 1
