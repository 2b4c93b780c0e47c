"""Our attention kernel for GPUs (models/flash.py) beside JAX's Pallas one and the reference, on packed rows.

python benchmarks/attention.py --json attention.json       # on a GPU; on CPU kernels are interpreted: --small
python benchmarks/attention.py --tune 200                  # other tiles too, for at most so many seconds

Forward and backward of [rows, 1280, heads, 64] in bfloat16. Documents are of a picture, an edit or a page (about 290, 560 and
1,100 tokens), the rest of each row is padding. Time is the median of rounds in which all take a turn, each ratio one of
turns of the same round; errors are those of the output and the gradients of q, k and v to the reference in float32.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from mmgen.models import attention, flash

TUNE = {  # one kernel at a time, the slowest first
    "dkv": [(64, 128, 8, 2), (32, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2)],
    "dq": [(128, 64, 8, 3), (64, 32, 4, 3), (64, 64, 4, 2), (64, 64, 4, 3)],
    "forward": [(128, 64, 8, 3), (64, 64, 4, 3), (128, 32, 4, 3)],
}


def main():
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    flags.add_argument("--rows", type=int, default=24)
    flags.add_argument("--heads", type=int, default=5)
    flags.add_argument("--rounds", type=int, default=20)
    flags.add_argument("--tune", type=float, default=0, help="seconds for other tiles")
    flags.add_argument("--small", action="store_true", help="few short rows, interpreted")
    flags.add_argument("--json", help="write the results here too")
    args = flags.parse_args()
    B, T, N = (2, 256, 2) if args.small else (args.rows, 1280, args.heads)
    rng = np.random.default_rng(0)
    segments = jnp.asarray(_segments(rng, B, T))
    arrays = [jnp.asarray(rng.normal(size=(B, T, N, 64)), jnp.bfloat16) for _ in range(4)]
    print(jax.__version__, jax.devices()[0].device_kind, f"padding {float((segments == 0).mean()):.2f}")

    ours = lambda tiles: lambda q, k, v, s: flash.flash(q, k, v, s, tiles, args.small)
    found = {"ours": _both(ours(flash.TILES)), "xla": _both(attention.xla)}
    if theirs := _jaxs(args.small):
        found["jax"] = _both(theirs)
    times = {name: [] for name in found}
    for _ in range(args.rounds + 1):
        for name, run in found.items():
            times[name].append(_seconds(run, arrays, segments))
    times = {name: each[1:] for name, each in times.items()}
    with jax.default_matmul_precision("highest"):
        exact = [x.astype(jnp.float32)[:2] for x in arrays]
        expected = _both(attention.xla)(*exact, segments[:2])
    results = {}
    for name, run in found.items():
        got = run(*arrays, segments)
        errors = [float(jnp.abs(a[:2] - b).max() / jnp.abs(b).max()) for a, b in zip(got, expected)]
        ratio = statistics.median(a / b for a, b in zip(times[name], times["ours"]))
        results[name] = {"ms": 1e3 * statistics.median(times[name]), "times_ours": ratio, "errors": errors}
        print(
            f"{name:<6}{results[name]['ms']:9.3f} ms  {ratio:6.2f} of ours  errors",
            *(f"{e:.4f}" for e in errors),
        )
    if args.tune:
        results["tiles"] = _tune(args.tune, ours, arrays, segments)
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=2) + "\n")


def _segments(rng, rows, length):
    found = np.zeros((rows, length), np.int32)
    for row in found:
        at = document = 0
        while True:
            size = (
                int(rng.choice([290, 560, 1100], p=[0.5, 0.47, 0.03]) * rng.uniform(0.85, 1.15))
                * length
                // 1280
            )
            if at + size > length:
                break
            document += 1
            row[at : at + size] = document
            at += size
    return found


def _both(function):
    """jitted (y, dq, dk, dv) of function(q, k, v, segments)."""

    @jax.jit
    def run(q, k, v, slope, segments):
        y, back = jax.vjp(lambda *x: function(*x, segments), q, k, v)
        return y, *back(slope)

    return run


def _jaxs(interpret):
    try:  # it is to go
        from jax.experimental.pallas.ops.gpu import attention as triton
    except ImportError:
        return None
    blocks = triton.BlockSizes(128, 128, 32, 32, 32, 32)
    how = dict(sm_scale=64**-0.5, causal=True, block_sizes=blocks, interpret=interpret)
    return lambda q, k, v, segments: triton.mha(q, k, v, segments, **how)


def _seconds(run, arrays, segments):
    began = time.perf_counter()
    jax.block_until_ready(run(*arrays, segments))
    return time.perf_counter() - began


def _tune(seconds, ours, arrays, segments):
    """The fastest tiles of `TUNE`, as a line for models/flash.py."""
    began, best, least = time.monotonic(), flash.TILES, None
    for kernel, choices in [(None, [None]), *TUNE.items()]:
        for choice in choices:
            if time.monotonic() - began > seconds:
                break
            tiles = best._replace(**{kernel: flash.Tile(*choice)}) if kernel else best
            try:
                run = _both(ours(tiles))
                _seconds(run, arrays, segments)
                ms = 1e3 * statistics.median(_seconds(run, arrays, segments) for _ in range(20))
            except Exception as error:  # too much for shared memory, say
                print(kernel, choice, "failed:", str(error).splitlines()[0][:150])
                continue
            print(kernel or "as it is", choice or "", f"{ms:.3f} ms")
            if least is None or ms < least:
                best, least = tiles, ms
    line = "TILES = Tiles(" + ", ".join(f"Tile{tuple(tile)}" for tile in best) + ")"
    print(line, f" # {least:.3f} ms" if least else "")
    return line


if __name__ == "__main__":
    main()
