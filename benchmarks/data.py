"""Data, beside its peers: JPEGs to training images, on one core.

python benchmarks/data.py --json data.json

images: 375x500 JPEGs of quality 90 in a tar -> 256x256, covered and centre cut. Ours is a source of
documents; the peer is webdataset, with Pillow (draft mode) and its bicubic filter; the limit is to decode
alone. PSNR is against one reference: all of the image decoded, resampled in float64 by the cubic
(a = -1/2) widened to antialias, same cut. The images are 1/f noise of as many bytes as photographs have.
"""

import argparse
import io
import json
import os
import platform
import statistics
import tarfile
import tempfile
import time

import cv2
import numpy as np
import simplejpeg
import webdataset
from PIL import Image

from mmgen.data import images, sources

HEIGHT, WIDTH, SIDE = 375, 500, 256


def main():
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--part", default="images", choices=["images"])
    flags.add_argument("--count", type=int, default=64, help="images")
    flags.add_argument("--rounds", type=int, default=15, help="of all contestants, one after the other")
    flags.add_argument("--json", help="write the results here too")
    args = flags.parse_args()
    if hasattr(os, "sched_setaffinity"):  # one core: libraries count what they may use
        os.sched_setaffinity(0, list(os.sched_getaffinity(0))[-1:])
    report = {
        "images": image_part(args.count, args.rounds),
        "machine": platform.processor() or platform.machine(),
    }
    if args.json:
        with open(args.json, "w") as file:
            json.dump(report, file, indent=1)


def image_part(count, rounds):
    files = [jpeg(seed) for seed in range(count)]
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "images.tar")
        write_tar(path, files)
        contestants = {
            "ours": lambda: (document.turns[-1].parts[-1].pixels for document in documents(path)),
            "webdataset + Pillow": lambda: (peer_pixels(data) for data in samples(path)),
            "ours, bytes in memory": lambda: (images.read(data, size=(SIDE, SIDE)) for data in files),
            "Pillow, bytes in memory": lambda: (peer_pixels(data) for data in files),
            "decode alone, simplejpeg": lambda: (simplejpeg.decode_jpeg(data) for data in files),
            "decode alone, OpenCV": lambda: (
                cv2.imdecode(np.frombuffer(data, np.uint8), 1) for data in files
            ),
            "decode alone, Pillow": lambda: (np.asarray(Image.open(io.BytesIO(data))) for data in files),
        }
        quality = {
            name: statistics.mean(map(decibels, contestants[name](), map(reference, files)))
            for name in contestants
            if "alone" not in name
        }
        cpu, wall = measure(contestants, rounds)
    limit = min(
        (name for name in contestants if "alone" in name), key=lambda name: statistics.median(cpu[name])
    )
    kilobytes = statistics.mean(map(len, files)) / 1000
    print(f"{count} JPEGs of {kilobytes:.0f} kB, {rounds} rounds; medians; ratios are of CPU time\n")
    print(f"{'':26}{'img/s/core':>11}{'wall img/s':>11}{'x peer':>8}{'of limit':>10}{'PSNR dB':>9}")
    rows = {}
    for name in contestants:
        rows[name] = {
            "images_per_cpu_second": count / statistics.median(cpu[name]),
            "images_per_second": count / statistics.median(wall[name]),
            "times_peer": ratio(cpu["webdataset + Pillow"], cpu[name]),
            "share_of_decoding": ratio(cpu[limit], cpu[name]),
            "psnr_db": quality.get(name),
        }
        a, b, c, d, db = rows[name].values()
        print(f"{name:26}{a:11.0f}{b:11.0f}{c:8.2f}{d:10.0%}{f'{db:.1f}' if db else '':>9}")
    return {"kilobytes": kilobytes, "limit": limit, "rows": rows}


def measure(contestants, rounds):
    """{name: seconds of each round}, of CPU and of the clock, all contestants in turn in each round."""
    cpu, wall = {name: [] for name in contestants}, {name: [] for name in contestants}
    for round in range(rounds + 1):
        for name, run in contestants.items():
            start = time.process_time(), time.perf_counter()
            for pixels in run():
                assert pixels[0, 0, 0] < 256
            if round:  # the first warms up
                cpu[name].append(time.process_time() - start[0])
                wall[name].append(time.perf_counter() - start[1])
    return cpu, wall


def ratio(a, b):
    """The median over rounds, whose two sides saw the same machine."""
    return statistics.median(x / y for x, y in zip(a, b))


def jpeg(seed):
    """A 375x500 JPEG of quality 90 of 1/f noise in which the colours go together, 67 kB as the mean of
    photographs of that size and quality is."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(HEIGHT)[:, None], np.fft.rfftfreq(WIDTH))
    frequency[0, 0] = np.inf
    waves = np.fft.rfft2(rng.standard_normal((4, HEIGHT, WIDTH))) / frequency**1.2
    waves = np.fft.irfft2(waves[:1] + 0.1 * waves[1:], (HEIGHT, WIDTH)).transpose(1, 2, 0)
    pixels = (127 + 31 * waves / waves.std()).round().clip(0, 255).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=90)
    return out.getvalue()


def write_tar(path, files):
    with tarfile.open(path, "w") as tar:
        for i, data in enumerate(files):
            for suffix, body in (("jpg", data), ("txt", b"a picture")):
                member = tarfile.TarInfo(f"{i:06}.{suffix}")
                member.size = len(body)
                tar.addfile(member, io.BytesIO(body))


def documents(path):
    source = sources.open_source(f"tars:{path}", size=(SIDE, SIDE))
    return (document for _, document in sources.documents_of(source))


def samples(path):
    data = webdataset.WebDataset(path, shardshuffle=False, empty_check=False)
    return (sample["jpg"] for sample in data)


def peer_pixels(data):
    image = Image.open(io.BytesIO(data))
    image.draft("RGB", (SIDE, SIDE))
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    return np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=box))


def reference(data):
    """float64 [SIDE, SIDE, 3]: see the top."""
    pixels = np.asarray(Image.open(io.BytesIO(data)), float)
    left = (WIDTH - HEIGHT) // 2
    scale = HEIGHT / SIDE
    centre = (np.arange(SIDE) + 0.5) * scale
    x = np.abs(np.arange(HEIGHT) + 0.5 - centre[:, None]) / scale
    w = np.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2) * (x < 2)
    w /= w.sum(1, keepdims=True)
    cut = pixels[:, left : left + HEIGHT]
    return np.einsum("ij,jkc,lk->ilc", w, cut, w, optimize=True).clip(0, 255)


def decibels(a, b):
    return 20 * np.log10(255 / np.sqrt(np.mean((a - b) ** 2)))


if __name__ == "__main__":
    main()
