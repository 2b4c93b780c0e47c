"""The judge: right on true pictures, altered prompts, damaged pictures, and other things."""

import io
import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from mmgen.world import item
from mmgen.world.judge import judge, parse
from mmgen.world.render import render
from mmgen.world.scene import (
    BACKGROUNDS,
    CATEGORIES,
    COLORS,
    SHAPES,
    SIZES,
    Claim,
    Group,
    Object,
    Scene,
    alter,
)  # fmt: skip


def jpeg(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=75)
    return np.asarray(Image.open(buffer))


def shift(pixels, dx, dy):
    height, width = pixels.shape[:2]
    padded = np.pad(pixels, ((1, 1), (1, 1), (0, 0)), mode="edge")
    return padded[1 - dy :, 1 - dx :][:height, :width]


def samples(n):
    return [item(5, "test", i, category, unseen=i % 2 == 1) for category in CATEGORIES for i in range(n)]


def rate(n, size, damage=lambda a: a):
    return np.mean([judge(damage(render(s.scene, size, size)), s.claim).ok for s in samples(n)])


@pytest.mark.parametrize("size", [32, 64, *(pytest.param(n, marks=pytest.mark.soak) for n in (48, 128))])
def test_true_pictures_are_judged_true(size):
    assert rate(50, size) == 1.0


@pytest.mark.parametrize("width, height", [(33, 70), (96, 40), (100, 100), (64, 32)])
def test_any_proportions(width, height):
    for sample in samples(10):
        assert judge(render(sample.scene, width, height), sample.claim).ok


@pytest.mark.parametrize("size", [32, 64])
def test_altered_prompts_are_judged_false(size):
    rng = np.random.default_rng(0)
    for sample in samples(50):
        wrong = alter(rng, sample.claim, sample.scene)
        verdict = judge(render(sample.scene, size, size), wrong)
        assert not verdict.ok and verdict.why


@pytest.mark.parametrize("size", [32, pytest.param(64, marks=pytest.mark.soak)])
def test_jpeg_and_a_shift_of_one_pixel_are_forgiven(size):
    rng = np.random.default_rng(0)
    count = 50 if size == 32 else 15  # each is tried in every style
    assert rate(count, size, lambda a: jpeg(shift(a, *rng.integers(-1, 2, 2)))) >= 0.98
    assert rate(count // 2, size, lambda a: shift(a, *rng.integers(-1, 2, 2))) == 1.0


def test_every_kind_on_every_background_is_read_exactly():
    rng = np.random.default_rng(0)
    for shape, color, size, background in itertools.product(SHAPES, COLORS, SIZES, BACKGROUNDS):
        x, y = rng.uniform(0.25, 0.75, 2)
        scene = Scene((Object(shape, color, size, x, y),), background)
        reading = parse(render(scene, 32, 32))
        (found,) = reading.scene.objects
        assert (found.shape, found.color, found.size) == (shape, color, size) and not reading.faults
        assert reading.scene.background == background
        assert abs(found.x - x) < 0.02 and abs(found.y - y) < 0.02


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31), st.floats(0, 9), st.floats(0, 8))
def test_noise_and_a_tint_are_forgiven(i, noise, tint):
    """What a learned decoder adds: about 28 dB."""
    rng = np.random.default_rng(i)
    sample = item(6, "test", i, CATEGORIES[i % 6])
    picture = render(sample.scene, 32, 32) + rng.normal(0, noise, (32, 32, 3)) + rng.uniform(-tint, tint, 3)
    assert judge(np.clip(picture, 0, 255).astype(np.uint8), sample.claim).ok


def other_things(size):
    """Pictures of nothing that a prompt of this world could ask for."""
    rng = np.random.default_rng(1)
    for color in (*BACKGROUNDS.values(), *COLORS.values()):
        yield np.full((size, size, 3), color, np.uint8)
    ramp = np.linspace(0, 255, size)
    for _ in range(12):
        yield rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
        for ground in BACKGROUNDS.values():
            yield np.clip(rng.normal(ground, rng.uniform(5, 90), (size, size, 3)), 0, 255).astype(np.uint8)
        a, b = rng.uniform(0, 1, (2, 3))
        yield (ramp[:, None, None] * a * 0.5 + ramp[None, :, None] * b * 0.5).astype(np.uint8)
        stripes = np.full((size, size, 3), 255, np.uint8)
        stripes[:: rng.integers(3, 9)] = rng.choice(list(COLORS.values()))
        yield stripes
        f = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.fftfreq(size)) + 1 / size
        photo = np.fft.ifft2(np.fft.fft2(rng.normal(size=(3, size, size))) / f).real.transpose(1, 2, 0)
        yield np.clip(128 + 50 * photo / photo.std(), 0, 255).astype(np.uint8)
        page = Image.new("RGB", (128, 128), "white")
        color = tuple(int(v) for v in rng.choice(list(COLORS.values())))
        ImageDraw.Draw(page).text((10, 40), "mmgen", fill=color, font_size=30)
        yield np.asarray(page.resize((size, size), Image.Resampling.BOX))


@pytest.mark.parametrize("size", [32, 64])
def test_other_things_are_never_read_as_a_scene(size):
    for picture in other_things(size):
        reading = parse(picture)
        assert reading.faults or not reading.scene.objects
        assert not judge(picture, Claim((Group("circle"),))).ok


def drawn(shape, draw):
    """A picture of an object on white, then drawn upon; 256 px reduced to 32."""
    scene = Scene((Object(shape, "red", "large", 0.5, 0.5),), "white")
    image = Image.fromarray(render(scene, 256, 256))
    draw(ImageDraw.Draw(image))
    return np.asarray(image.resize((32, 32), Image.Resampling.BOX))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_deformed_object_is_no_object(shape):
    """A third of it cut off, or a lump grown on it."""
    claim = Claim((Group(shape),))
    at = lambda *sizes: tuple(128 + 256 * SIZES["large"] * size for size in sizes)  # from the centre
    assert judge(drawn(shape, lambda d: None), claim).ok
    assert not judge(drawn(shape, lambda d: d.rectangle((0, 0, *at(-0.19), 255), fill="white")), claim).ok
    lump = at(0.14, -0.37, 0.79, 0.37)
    assert not judge(drawn(shape, lambda d: d.ellipse(lump, fill=COLORS["red"])), claim).ok


def test_an_extra_object_or_color_is_noticed():
    claim = Claim((Group("square", "red"),))
    assert judge(drawn("square", lambda d: None), claim).ok
    assert not judge(drawn("square", lambda d: d.ellipse((10, 10, 50, 50), fill="black")), claim).ok
    assert not judge(drawn("square", lambda d: d.rectangle((0, 128, 255, 255), fill="white")), claim).ok
    assert not judge(
        drawn("square", lambda d: d.rectangle((93, 128, 162, 162), fill=COLORS["blue"])), claim
    ).ok
    assert not judge(drawn("square", lambda d: d.rectangle((93, 93, 162, 162), fill=(139, 69, 19))), claim).ok


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "ring"])  # two rings are no ring
def test_an_inside_of_another_color_is_noticed(shape, size):
    """A small object on a large one of its shape: a rim of about 1.5 pixels of 32."""
    for rim, inside, background in itertools.product(
        COLORS, COLORS, BACKGROUNDS if size == 32 else ("white",)
    ):
        things = Object(shape, rim, "large", 0.5, 0.5), Object(shape, inside, "small", 0.5, 0.5)
        reading = parse(render(Scene(things, background), size, size))
        # Larger pictures may be read as what they are: one thing in front of the other.
        assert bool(reading.faults or len(reading.scene.objects) == 2) == (rim != inside)


def test_a_few_stray_pixels_are_forgiven():
    sample = item(5, "test", 0, "color_attribution")
    picture = render(sample.scene, 32, 32)
    empty = np.argwhere((picture == picture[0, 0]).all(-1))
    picture[tuple(empty[0])] = picture[tuple(empty[-1])] = 128, 30, 60
    assert judge(picture, sample.claim).ok


def test_large_pictures_are_read_as_small_ones_are():
    scene = item(5, "test", 3, "two_object").scene
    small, large = (parse(render(scene, side, side)) for side in (64, 1024))
    kinds = lambda scene: {(thing.shape, thing.color, thing.size) for thing in scene.objects}
    assert not large.faults and kinds(large.scene) == kinds(small.scene) == kinds(scene)
    pixel = replace(scene, style="pixel")
    assert parse(render(pixel, 512, 384)).scene.style == "pixel"


@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (50, 1), (2, 2)])
def test_lines_of_pixels_show_nothing(shape):
    reading = parse(np.full((*shape, 3), 255, np.uint8))
    assert bool(reading.faults) == (min(shape) == 1) and not reading.scene.objects


def test_bad_pixels_say_what_was_expected():
    with pytest.raises(ValueError, match=r"uint8 \[H, W, 3\]"):
        parse(np.zeros((32, 32, 4), np.uint8))
    with pytest.raises(ValueError, match="float"):
        parse(np.zeros((32, 32, 3)))
