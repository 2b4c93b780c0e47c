"""How often the judge is right: on true and altered prompts, damaged pictures, other things.

python benchmarks/judge_accuracy.py --n 10000 --size 32 --json judge.json
"""

import argparse
import glob
import io
import json
import tarfile
import time
from collections import Counter

import numpy as np
from PIL import Image, ImageDraw

from mmgen.world import item
from mmgen.world.judge import judge, parse
from mmgen.world.render import render
from mmgen.world.scene import BACKGROUNDS, CATEGORIES, COLORS, SHAPES, SIZES, alter, holds

MISSING = "(none)"


def main():
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--n", type=int, default=1000, help="pictures a category, half of them unseen pairs")
    flags.add_argument("--size", type=int, default=32, help="pixels of a side")
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--tars", default="", help="also judge the images of these tar files (a glob)")
    flags.add_argument("--json", help="write the results here too")
    args = flags.parse_args()

    rng = np.random.default_rng(args.seed)
    start = time.perf_counter()
    damages = {
        "true": lambda a: a,
        "JPEG q75": jpeg,
        "shift 1 px": lambda a: shift(a, rng),
        "JPEG + shift": lambda a: jpeg(shift(a, rng)),
    }
    scores = {name: {} for name in (*damages, "altered")}
    confusion = {"true": fresh_tables(), "JPEG + shift": fresh_tables()}
    parses = seconds = 0
    for category in CATEGORIES:
        right = Counter()
        for i in range(args.n):
            sample = item(args.seed, "test", i, category, unseen=i % 2 == 1)
            picture = render(sample.scene, args.size, args.size)
            for name, damage in damages.items():
                pixels = damage(picture)
                began = time.perf_counter()
                reading = parse(pixels)
                seconds += time.perf_counter() - began
                parses += 1
                right[name] += not reading.faults and holds(sample.claim, reading.scene)
                if name == "true":
                    wrong = alter(rng, sample.claim, sample.scene)
                    right["altered"] += not reading.faults and holds(wrong, reading.scene)
                if name in confusion:
                    tally(confusion[name], sample.scene, reading.scene)
        for name, row in scores.items():
            row[category] = [right[name], args.n]

    others = {name: [0, 0, 0] for name in OTHERS}
    for name, draw in OTHERS.items():
        for i in range(max(args.n // 10, 20)):
            count(others[name], draw(rng, args.size), item(args.seed, "test", i, CATEGORIES[i % 6]).claim)
    for path in sorted(glob.glob(args.tars)):
        others[path] = [0, 0, 0]
        for i, picture in enumerate(pictures(path, args.size)):
            count(others[path], picture, item(args.seed, "test", i, CATEGORIES[i % 6]).claim)

    result = {
        "size": args.size,
        "scores": scores,
        "others": others,
        "confusion": {
            name: {kind: [[*pair, n] for pair, n in table.items()] for kind, table in tables.items()}
            for name, tables in confusion.items()
        },
        "milliseconds": 1e3 * seconds / parses,
        "seconds": time.perf_counter() - start,
    }
    report(result, confusion)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(result, file, indent=1)


def jpeg(pixels):
    """The picture after JPEG at Pillow's defaults (quality 75, hue at half resolution)."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=75)
    return np.asarray(Image.open(buffer))


def shift(pixels, rng):
    """The picture moved by one pixel to a random side or corner; the border is repeated."""
    height, width = pixels.shape[:2]
    dy, dx = ((0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1), (0, 0), (2, 2))[rng.integers(8)]
    return np.pad(pixels, ((1, 1), (1, 1), (0, 0)), mode="edge")[dy : dy + height, dx : dx + width]


# Pictures of other things


def blank(rng, size):
    """One named or random colour."""
    colors = [*BACKGROUNDS.values(), *COLORS.values(), tuple(rng.integers(0, 256, 3))]
    return np.full((size, size, 3), colors[rng.integers(len(colors))], np.uint8)


def noise(rng, size):
    """White noise, or a background under strong or weak noise."""
    if rng.random() < 0.3:
        return rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
    ground = np.array(list(BACKGROUNDS.values()))[rng.integers(len(BACKGROUNDS))]
    return np.clip(ground + rng.normal(0, rng.uniform(2, 90), (size, size, 3)), 0, 255).astype(np.uint8)


def gradient(rng, size):
    """A linear blend between random colours."""
    t = np.linspace(0, 1, size)
    a, b, c = rng.uniform(0, 255, (3, 3))
    return (a + (b - a) * t[:, None, None] * 0.5 + (c - a) * t[None, :, None] * 0.5).astype(np.uint8)


def stripes(rng, size):
    """Stripes of an object's colour on a background."""
    ground = np.array(list(BACKGROUNDS.values()))[rng.integers(len(BACKGROUNDS))]
    color = np.array(list(COLORS.values()))[rng.integers(len(COLORS))]
    y, x = np.mgrid[:size, :size]
    angle, period = rng.uniform(0, np.pi), rng.uniform(0.1, 0.5) * size
    on = (np.cos(angle) * x + np.sin(angle) * y) % period < period * rng.uniform(0.1, 0.5)
    return np.where(on[..., None], color, ground).astype(np.uint8)


def text(rng, size):
    """A random word in an object's colour."""
    image = Image.new("RGB", (128, 128), list(BACKGROUNDS.values())[rng.integers(len(BACKGROUNDS))])
    word = "".join(chr(97 + c) for c in rng.integers(0, 26, rng.integers(2, 8)))
    at = tuple(rng.integers(4, 50, 2).tolist())
    color = list(COLORS.values())[rng.integers(len(COLORS))]
    ImageDraw.Draw(image).text(at, word, fill=color, font_size=int(rng.integers(16, 48)))
    return np.asarray(image.resize((size, size), Image.Resampling.BOX))


def natural(rng, size):
    """Noise with the 1/f spectrum of photographs."""
    f = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.fftfreq(size)[None])[..., None]
    spectrum = np.fft.fft2(rng.normal(size=(size, size, 3)), axes=(0, 1)) / np.maximum(f, 1 / size)
    field = np.fft.ifft2(spectrum, axes=(0, 1)).real
    return np.clip(128 + rng.uniform(20, 70) * field / field.std(), 0, 255).astype(np.uint8)


def scribble(rng, size):
    """A random polygon in an object's colour, as large as objects are."""
    image = Image.new("RGB", (256, 256), list(BACKGROUNDS.values())[rng.integers(len(BACKGROUNDS))])
    corners = rng.integers(5, 12)
    angle, radius = np.sort(rng.uniform(0, 2 * np.pi, corners)), rng.uniform(12, 50, corners)
    x, y = rng.uniform(70, 186, (2, 1))
    points = np.stack([x + radius * np.cos(angle), y + radius * np.sin(angle)], 1)
    color = list(COLORS.values())[rng.integers(len(COLORS))]
    ImageDraw.Draw(image).polygon(list(map(tuple, points)), fill=color)
    return np.asarray(image.resize((size, size), Image.Resampling.BOX))


OTHERS = {draw.__name__: draw for draw in (blank, noise, gradient, stripes, text, natural, scribble)}


def pictures(path, size):
    """The images of a tar file on a white background."""
    with tarfile.open(path) as tar:
        for member in tar:
            if member.name.endswith((".png", ".jpg", ".webp")):
                image = Image.open(io.BytesIO(tar.extractfile(member).read())).convert("RGBA")
                ground = Image.new("RGBA", image.size, "white")
                ground.alpha_composite(image)
                yield np.asarray(ground.convert("RGB").resize((size, size), Image.Resampling.BOX))


def count(tally, picture, claim):
    """Add to [judged right, read as a scene with objects, pictures]."""
    reading = parse(picture)
    tally[0] += judge(picture, claim).ok
    tally[1] += bool(not reading.faults and reading.scene.objects)
    tally[2] += 1


# Confusions


def fresh_tables():
    return {kind: Counter() for kind in ("shape", "color", "size", "count", "background")}


def tally(tables, truth, read):
    """Compare each true object with the one read nearest to it, if within a tenth of the side."""
    tables["count"][str(len(truth.objects)), str(len(read.objects))] += 1
    tables["background"][truth.background, read.background] += 1
    for thing in truth.objects:
        near = [o for o in read.objects if max(abs(o.x - thing.x), abs(o.y - thing.y)) < 0.1]
        for kind in ("shape", "color", "size"):
            tables[kind][getattr(thing, kind), getattr(near[0], kind) if near else MISSING] += 1


ORDERS = {"shape": SHAPES, "color": COLORS, "size": SIZES, "count": "1234", "background": BACKGROUNDS}


def report(result, confusion):
    """Print the tables as Markdown."""
    size, each, whole = result["size"], result["milliseconds"], result["seconds"]
    print(f"size {size}: {each:.2f} ms a picture, {whole:.0f} s in all\n")
    print("| | " + " | ".join(CATEGORIES) + " |\n|" + " --- |" * (len(CATEGORIES) + 1))
    for name, row in result["scores"].items():
        print(f"| {name} | " + " | ".join(f"{100 * right / n:.2f} %" for right, n in row.values()) + " |")
    print("\n| picture | follows a random prompt | read as some scene | of |\n| --- | --- | --- | --- |")
    for name, row in result["others"].items():
        print(f"| {name} | {row[0]} | {row[1]} | {row[2]} |")
    for damage, tables in confusion.items():
        for kind, table in tables.items():
            rows = list(ORDERS[kind])
            cols = rows + sorted({b for _, b in table} - set(rows))
            print(f"\n{damage}: {kind} drawn (rows), read (columns)\n")
            print("| | " + " | ".join(cols) + " |\n|" + " --- |" * (len(cols) + 1))
            for a in rows:
                print(f"| {a} | " + " | ".join(str(table[a, b]) for b in cols) + " |")


if __name__ == "__main__":
    main()
