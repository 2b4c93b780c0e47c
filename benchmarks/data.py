"""Data, beside its peers, on one core: JPEGs to training images, shards to packed rows; and plans at scale.

python benchmarks/data.py --json data.json

images: 375x500 JPEGs of quality 90 in a tar -> 256x256, covered and centre cut. Ours is a source of
documents; the peer is webdataset, with Pillow (draft mode) and its bicubic filter; the limit is to decode
alone. PSNR is against one reference: all of the image decoded, resampled in float64 by the cubic
(a = -1/2) widened to antialias, same cut. The images are 1/f noise of as many bytes as photographs have.

rows: tokenised documents on disk (text and images, 270 tokens in the mean) -> rows of 2,048 tokens with
segments, positions and loss weights, shuffled and packed best fit. The peer is grain: its ArrayRecord source, its
shuffle and its first-fit packing, which give tokens, segments and positions in a text, and no weights.

plan: which documents make which rows of an epoch, from --lengths lengths alone (not with the others: minutes).
"""

import argparse
import io
import json
import os
import platform
import resource
import statistics
import tarfile
import tempfile
import time

import cv2
import grain
import numpy as np
import simplejpeg
import webdataset
from PIL import Image

from mmgen.data import images, packing, shards, sources
from mmgen.data.loader import Rows
from mmgen.grammar import Grammar

HEIGHT, WIDTH, SIDE = 375, 500, 256


def main():
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--part", default="images,rows", help="images, rows, plan; several with commas")
    flags.add_argument("--count", type=int, default=64, help="images")
    flags.add_argument("--rounds", type=int, default=15, help="of all contestants, one after the other")
    flags.add_argument("--documents", type=int, default=200_000, help="of the shards that rows are read from")
    flags.add_argument("--lengths", type=int, default=10**8, help="documents to plan")
    flags.add_argument("--json", help="write the results here too")
    args = flags.parse_args()
    if hasattr(os, "sched_setaffinity"):  # one core: libraries count what they may use
        os.sched_setaffinity(0, list(os.sched_getaffinity(0))[-1:])
    report = {"machine": platform.processor() or platform.machine()}
    for part in args.part.split(","):
        match part:
            case "images":
                report[part] = image_part(args.count, args.rounds)
            case "rows":
                report[part] = row_part(args.documents, args.rounds)
            case "plan":
                report[part] = plan_part(args.lengths)
            case _:
                flags.error(f"no part {part!r}: images, rows, plan")
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


GRAMMAR = Grammar(pieces=32_000, max_side=64, codes=16_384)
ROW, BATCH = 2048, 64


def row_part(documents, rounds, batches=20):
    """Every round goes on where the one before stopped: nothing is read twice."""
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        written = shards.write(folder, (random_document(rng) for _ in range(documents)), GRAMMAR)
        from_disk = our_rows(folder, 0)
        contestants = {
            "ours, from disk": from_disk,
            "ours, kept in memory": our_rows(folder, 1 << 32),
            "grain, from disk": grain_rows(folder),
        }
        cpu, wall, filled = ({name: [] for name in contestants} for _ in range(3))
        memory = []
        for round in range(rounds + 1):
            for name, rows in contestants.items():
                start, used = (time.process_time(), time.perf_counter()), 0
                for _ in range(batches):
                    used += int((next(rows)["segments"] > 0).sum())
                if round:  # the first warms up
                    cpu[name].append((time.process_time() - start[0]) / batches)
                    wall[name].append((time.perf_counter() - start[1]) / batches)
                    filled[name].append(used / (batches * BATCH * ROW))
            memory.append(resident())
    mean = written["tokens"] / written["count"]
    print(
        f"\n{documents} documents of {mean:.0f} tokens; {rounds} rounds of {batches} batches of {BATCH} x {ROW}\n"
    )
    print(f"{'':26}{'Mtok/s/core':>12}{'wall Mtok/s':>12}{'x peer':>8}{'filled':>8}")
    table = {}
    for name in contestants:
        table[name] = {
            "tokens_per_cpu_second": BATCH * ROW / statistics.median(cpu[name]),
            "tokens_per_second": BATCH * ROW / statistics.median(wall[name]),
            "times_peer": ratio(cpu["grain, from disk"], cpu[name]),
            "filled": statistics.mean(filled[name]),
        }
        a, b, c, d = table[name].values()
        print(f"{name:26}{a / 1e6:12.1f}{b / 1e6:12.1f}{c:8.1f}{d:8.2%}")
    print(
        f"resident memory after the first round {memory[1] >> 20} MiB, after the last {memory[-1] >> 20} MiB"
    )
    return {"mean_tokens": mean, "rows": table, "resident_bytes": memory}


def our_rows(folder, cache_bytes):
    loader = Rows(
        shards.Shards(folder),
        GRAMMAR,
        batch_size=BATCH,
        row_length=ROW,
        text_drop=0.1,
        cache_bytes=cache_bytes,
    )
    step = 0
    while True:
        yield loader.batch(step)
        step += 1


def grain_rows(folder):
    paths = sorted(os.path.join(folder, name) for name in os.listdir(folder) if name.endswith(".arrayrecord"))
    data = grain.MapDataset.source(grain.sources.ArrayRecordDataSource(paths)).seed(0).shuffle().repeat()
    data = data.map(lambda record: {"tokens": np.frombuffer(record, "<u2").astype(np.int32)})
    data = data.to_iter_dataset(grain.ReadOptions(num_threads=1))
    data = grain.experimental.FirstFitPackIterDataset(
        data, length_struct={"tokens": ROW}, num_packing_bins=BATCH
    )
    for batch in data.batch(BATCH):
        yield {"tokens": batch["tokens"], "segments": batch["tokens_segment_ids"], **batch}


def random_document(rng):
    """A page of text, or a caption and its image."""
    g = GRAMMAR
    if rng.random() < 0.3:
        words = rng.integers(0, g.pieces, rng.integers(50, 600))
        return np.concatenate([[g.bos, g.roles["page"]], words, [g.end, g.eos]])
    height, width = [(16, 16), (12, 20), (20, 12), (8, 8)][rng.integers(4)]
    words = rng.integers(0, g.pieces, rng.integers(8, 60))
    header = [g.end, g.roles["assistant"], g.boi, g.h(height), g.w(width)]
    codes = g.code_start + rng.integers(0, g.codes, height * width)
    return np.concatenate([[g.bos, g.roles["user"]], words, header, codes, [g.eoi, g.end, g.eos]])


def plan_part(count):
    """Plans a whole epoch of `count` documents; reports what finding a late row costs with its table and without."""
    with tempfile.TemporaryDirectory() as folder:
        path, rng = os.path.join(folder, "lengths.npy"), np.random.default_rng(0)
        lengths = np.lib.format.open_memmap(path, "w+", np.uint16, (count, 1, 3))
        for start in range(0, count, 1 << 20):
            whole = rng.lognormal(5.3, 0.8, min(1 << 20, count - start)).clip(16, ROW)
            lengths[start : start + len(whole), 0, 0] = whole
            lengths[start : start + len(whole), 0, 1] = whole / 8
        lengths.flush()
        tokens = sum(int(lengths[k : k + (1 << 24), 0, 0].sum()) for k in range(0, count, 1 << 24))
        before = anonymous()
        plan = lambda: packing.Plan(np.load(path, mmap_mode="r"), [], ROW, text_drop=0.1, folder=folder)
        began, whole = time.perf_counter(), plan()
        whole.row(0)
        first = time.perf_counter() - began
        rows = whole.rows(0)
        seconds, grown = time.perf_counter() - began, anonymous() - before
        began, again = time.perf_counter(), plan()
        again.row(rows - 1)
        resumed = time.perf_counter() - began
        table = sum(
            os.path.getsize(os.path.join(folder, n)) for n in os.listdir(folder) if n != "lengths.npy"
        )
    used = (tokens - 0.1 * tokens / 8) / (rows * ROW)
    print(
        f"\n{count:.0e} documents, {tokens / 1e9:.1f}e9 tokens -> {rows} rows of {ROW}, about {used:.2%} of them used\n"
        f"first row after {1e3 * first:.0f} ms; the whole epoch in {seconds:.0f} s ({1e6 * seconds / count:.2f} us a "
        f"document); memory of its own grew by {grown >> 20} MiB; the table takes {table >> 10} KiB\n"
        f"last row found again from the table in {1e3 * resumed:.0f} ms"
    )
    return {
        "documents": count, "rows": rows, "used": used, "seconds": seconds, "first_row_seconds": first,
        "resumed_seconds": resumed, "grown_bytes": grown, "table_bytes": table,
    }  # fmt: skip


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def anonymous():
    """Memory that is this process's own: pages of mapped files belong to the system, which may take them back."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))


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
