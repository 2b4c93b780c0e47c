"""Safe decoding: bytes that anybody could have written -> uint8 [H, W, 3] sRGB, or `BadImage`.

Sizes are checked from the header, before a pixel is decoded. Only JPEG, PNG and WebP are read: the
fewer decoders a stranger's file can reach, the better.
"""

import dataclasses
import io
import math
import warnings

import numpy as np
from PIL import Image, ImageCms

# Process-wide on purpose: `warnings.catch_warnings` is not safe in threads, and readers are threads.
warnings.simplefilter("error", Image.DecompressionBombWarning)

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
COLOR_SPACES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}  # Pillow's mode -> ICC's name
ORIENTATION = 0x0112  # the EXIF tag, and what undoes each of its values
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImage(ValueError):
    """An image, or a document around it, that cannot be used. `reason` is a short word to count by:
    empty, too_many_bytes, bad_format, unreadable, truncated, too_large, too_small, too_many_frames;
    sources add no_caption and bad_caption."""

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


def read(data, limits=Limits(), background=(255, 255, 255)):
    """Decodes JPEG, PNG or WebP bytes -> uint8 [H, W, 3] in sRGB, upright.

    EXIF orientation is applied, an embedded colour profile is converted to sRGB, 16 bits become 8,
    alpha is composited on `background`, an animation gives its first frame. Raises BadImage.
    """
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
        image.load()  # not verify(), which misses truncated JPEGs
        return np.asarray(_upright(_flat(image, background), _orientation(image)))
    except Exception as error:
        reason = "truncated" if "truncated" in str(error).lower() else "unreadable"
        raise BadImage(reason, f"{kind} {width}x{height}: {error}") from error


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
    """The box of that size (in source pixels, at the fractions `corner` of the free room), resized."""
    left = (pixels.shape[1] - box_width) * corner[0]
    top = (pixels.shape[0] - box_height) * corner[1]
    # Rounding must not put the box a hair outside the image, which Pillow refuses.
    right, bottom = min(left + box_width, pixels.shape[1]), min(top + box_height, pixels.shape[0])
    box = (max(left, 0), max(top, 0), right, bottom)
    if box == (0, 0, width, height) and pixels.shape[:2] == (height, width):
        return pixels
    image = Image.fromarray(pixels)
    return np.asarray(image.resize((width, height), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0))


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
        if len(data) < stated:
            raise BadImage("truncated", f"{len(data)} bytes of a WebP of {stated}")
        return "WEBP"
    raise BadImage("bad_format", f"expected JPEG, PNG or WebP; the file starts with {bytes(data[:8])!r}")


def _flat(image, background):
    """Any mode that the three formats decode to -> an RGB image in sRGB without alpha."""
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion would clip it at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    if image.mode in ("1", "L", "LA"):
        image = image.convert("L")
    elif image.mode != "CMYK":
        image = image.convert("RGB")
    image = (_to_srgb(image, profile) if profile else image).convert("RGB")
    if alpha is not None:
        image = Image.composite(image, Image.new("RGB", image.size, tuple(background)), alpha)
    return image


def _to_srgb(image, profile):
    """Applies an embedded ICC profile; a broken or foreign one is ignored, as browsers do."""
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if profile.profile.xcolor_space.strip() != COLOR_SPACES[image.mode]:
            return image
        return ImageCms.profileToProfile(image, profile, SRGB, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return image


def _orientation(image):
    """The EXIF orientation, 1 to 8; 1 where there is none or the EXIF block is broken."""
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:  # EXIF is a TIFF file inside the image, with a parser as open to nonsense
        return 1


def _upright(image, orientation):
    return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image
