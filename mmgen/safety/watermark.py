"""A watermark in the pixels, which is there still after JPEG and resizing: a keyed pattern of signs on middle frequencies.

Spread spectrum (Cox et al., 1997) in the cosine transform of the brightness of the whole picture, shrunk or enlarged to SIDE x SIDE: so sizes
do not matter, and crops and turns do (they take it away). Each of some 2,700 coefficients is moved up or down by the same; how far is tried
out on the picture itself. Detection divides each coefficient by what is usual at its frequency and adds up the signs; without a
watermark the sum is a standard normal number. (Moving each by a share of what is usual there costs 2.6 dB more of photos for the same certainty.)
"""

import bisect
import functools
import hashlib
import io

import numpy as np
from PIL import Image
from scipy import fft, ndimage

SIDE = 256
BAND = (
    12,
    60,
)  # cycles along a side: pictures have most below; a picture of SIDE pixels keeps 64 when it is halved
STRENGTHS = 0.5 * 1.2 ** np.arange(
    17
)  # root mean squares of the change that are tried, in gray levels: up to 9
SURE = 7.5  # standard deviations that are sought of the picture after JPEG of QUALITY and halving, in either order
QUALITY = 75
LEAST = 64  # pixels of the short side from which there is a watermark: of less it is seen, and does not last
FOUND = 5.0  # from which a picture counts as marked: once in 3.5 * 10^6 pictures by chance
MASK = (
    0.4,
    2.5,
)  # least and most of the change at a place, where 1 is the mean: a plain surface shows less of it than a rough one


def embed(pixels, key):
    """Pixels uint8 [H, W, 3 or 4] with the watermark of a key (bytes), by the least of STRENGTHS that is surely found again; an alpha
    stays as it is."""
    change = _change(pixels, key)
    marked = lambda strength: _moved(pixels, strength * change)
    sure = lambda strength: all(score(worn, key) >= SURE for worn in _worn(marked(strength)))
    # Where one is sure the stronger ones are, so this is the first of them, or the last of all where none is.
    return marked(STRENGTHS[bisect.bisect_left(STRENGTHS[:-1], True, key=sure)])


def embed_where_it_lasts(pixels, key):
    """As `embed`; pictures of less than LEAST pixels as they are."""
    return embed(pixels, key) if min(pixels.shape[:2]) >= LEAST else pixels


def remove(pixels, key):
    """Pixels as they were before `embed` with that key, as nearly as can be told, for a model that draws from them; as they are where
    there is no such mark. What was white or black and was to become more so stayed what it was."""
    if min(pixels.shape[:2]) < LEAST or not detect(pixels, key):
        return pixels
    found = pixels
    # The mask is that of the picture without a mark, of which a median tells more while much of the mark is left.
    for guide in (_median, _median, _median, np.asarray):
        change = _change(guide(found), key)[..., None]
        stayed = ((pixels[..., :3] == 255) & (change > 0)) | ((pixels[..., :3] == 0) & (change < 0))
        change = np.where(stayed, 0.0, change)
        without = lambda strength: _moved(pixels, -strength * change)
        # A picture has no more of the pattern than of any other; the score falls with what is taken off.
        at = bisect.bisect_left(STRENGTHS[:-1], True, key=lambda s: score(without(s), key) <= 0)
        nearest = (without(s) for s in STRENGTHS[max(at - 1, 0) : at + 1])
        found = min(nearest, key=lambda each: abs(score(each, key)))
    return found


def _median(pixels):
    return ndimage.median_filter(pixels, size=(3, 3, 1))


def _change(pixels, key):
    """What `embed` adds to each channel at strength 1: float32 [H, W]."""
    signs, places = _pattern(key)
    move = np.zeros((SIDE, SIDE))
    move[places] = signs * SIDE / np.sqrt(len(signs))
    change = Image.fromarray((_mask(pixels) * fft.idctn(move, norm="ortho")).astype(np.float32))
    return np.asarray(change.resize(pixels.shape[1::-1], Image.Resampling.BICUBIC))


def _moved(pixels, change):
    """Pixels and a change [H, W] of all or [H, W, 3] of each colour; an alpha stays as it is."""
    out, change = pixels.copy(), change if change.ndim == 3 else change[..., None]
    out[..., :3] = np.clip(np.round(pixels[..., :3] + change), 0, 255).astype(np.uint8)
    return out


def _mask(pixels):
    """How much of the change there may be at each place, [SIDE, SIDE], by how rough the picture is there."""
    small = _small(pixels)
    mean = ndimage.gaussian_filter(small, 3)
    rough = np.sqrt(np.maximum(ndimage.gaussian_filter(np.square(small), 3) - np.square(mean), 0)) + 1.0
    mask = np.clip(np.sqrt(rough / rough.mean()), *MASK)
    return mask / np.sqrt(np.mean(np.square(mask)))


def _worn(pixels):
    """What JPEG and halving leave of a picture, in either order."""
    image = Image.fromarray(pixels[..., :3])
    half = [max(side // 2, 1) for side in image.size]
    yield np.asarray(_jpeg(image.resize(half, Image.Resampling.BICUBIC)))
    yield np.asarray(_jpeg(image).resize(half, Image.Resampling.BICUBIC))


def _jpeg(image):
    data = io.BytesIO()
    image.save(data, "JPEG", quality=QUALITY)
    return Image.open(data)


def score(pixels, key):
    """How many standard deviations the pattern of the key stands out of what a picture without it has."""
    signs, places = _pattern(key)
    coefficients = fft.dctn(_small(pixels), norm="ortho")
    relative = coefficients[places] / np.maximum(_usual(coefficients, places), 1e-3)
    relative = np.clip(relative, -3, 3)  # no few coefficients decide
    return float(signs @ relative / np.sqrt(np.square(relative).sum() + 1e-9))


def detect(pixels, key):
    """Whether a picture has the watermark of a key."""
    return score(pixels, key) >= FOUND


def _small(pixels):
    """Brightness float64 [SIDE, SIDE]."""
    gray = np.asarray(pixels[..., :3], np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    return np.asarray(Image.fromarray(gray).resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.float64)


@functools.lru_cache(maxsize=64)
def _pattern(key):
    """Signs float64 [N] of a key, and the places of their coefficients."""
    frequency = np.hypot(*np.indices((SIDE, SIDE)))
    places = np.nonzero((frequency >= BAND[0]) & (frequency < BAND[1]))
    seed = int.from_bytes(hashlib.sha256(b"mmgen watermark" + key).digest(), "big")
    return np.random.default_rng(seed).choice([-1.0, 1.0], len(places[0])), places


def _usual(coefficients, places):
    """The root mean square of the coefficients of about the same frequency, for each place."""
    frequency = np.hypot(*places)
    ring = ((frequency - BAND[0]) / (BAND[1] - BAND[0]) * 20).astype(int)
    power = np.bincount(ring, np.square(coefficients[places])) / np.bincount(ring)
    return np.sqrt(power)[ring]
