"""The chunked cross-entropy beside a plain one on full logits: memory and time, forward and backward.

python benchmarks/loss.py --json loss.json

Hidden states [tokens, width] and a head [vocabulary, width], random, give the loss and its gradients by both. The
peer is one matrix product and optax's softmax_cross_entropy_with_integer_labels. Memory is what the compiler lays
out for what is neither input nor result (memory_analysis); time is the median over rounds in which all take a
turn, each ratio one of turns of the same round.
"""

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mmgen.models.cross_entropy import cross_entropy
from mmgen.runtime import hardware, memory


def main():
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    flags.add_argument("--tokens", type=int, default=4096)
    flags.add_argument("--width", type=int, default=512)
    flags.add_argument("--vocab", type=int, default=32_768)
    flags.add_argument("--dtype", default="float32", help="of the products; sums are float32")
    flags.add_argument("--chunks", default="0,2048,1024,512,256", help="tokens at a time; 0 is all")
    flags.add_argument("--rounds", type=int, default=7, help="of all contestants, one after the other")
    flags.add_argument("--json", help="write the results here too")
    args = flags.parse_args()
    platform_name = hardware.expected_platform()
    hardware.apply_flags(platform_name)
    if platform_name == "cpu":
        memory.keep_pages()
    T, D, V, dtype = args.tokens, args.width, args.vocab, jnp.dtype(args.dtype)
    keys = jax.random.split(jax.random.key(0), 3)
    x, head = jax.random.normal(keys[0], (1, T, D)), jax.random.normal(keys[1], (V, D)) * D**-0.5
    targets, weights = jax.random.randint(keys[2], (1, T), 0, V), jnp.ones((1, T))

    def plain(x, head):
        logits = jnp.einsum(
            "btd,vd->btv", x.astype(dtype), head.astype(dtype), preferred_element_type=jnp.float32
        )
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    def ours(chunk, x, head):
        return cross_entropy(x, head, targets, weights, V, 0.0, chunk, dtype)[0] / T

    contestants = {"plain": plain}
    for chunk in map(int, args.chunks.split(",")):
        contestants[f"ours, chunk {chunk or 'all'}"] = lambda x, head, chunk=chunk: ours(chunk, x, head)
    compiled = {
        name: jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(x, head).compile()
        for name, loss in contestants.items()
    }
    found = jax.device_get(compiled["plain"](x, head))
    for name, run in compiled.items():
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(jax.device_get(run(x, head)))):
            error = np.abs(a - b).max() / np.abs(a).max()
            assert error < (1e-4 if dtype == jnp.float32 else 3e-2), (name, error)

    load, times = os.getloadavg()[0], {name: [] for name in compiled}
    for _ in range(args.rounds):
        for name, run in compiled.items():
            wall, cpu = time.perf_counter(), time.process_time()
            jax.block_until_ready(run(x, head))
            times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    print(
        f"{T} tokens, width {D}, vocabulary {V}, {dtype}, {jax.local_devices()[0].device_kind}; {args.rounds} rounds; "
        f"load {load:.1f} before, {os.getloadavg()[0]:.1f} after\n"
    )
    print(f"{'':20}{'MB':>8}{'of plain':>10}{'s':>9}{'x plain':>9}{'least':>7}{'most':>7}{'CPU s':>8}{'x':>7}")
    rows, whole = {}, compiled["plain"].memory_analysis().temp_size_in_bytes
    for name, run in compiled.items():
        size = run.memory_analysis().temp_size_in_bytes
        wall, cpu = ([a[i] / b[i] for a, b in zip(times[name], times["plain"])] for i in (0, 1))
        rows[name] = {
            "bytes": size, "share": size / whole, "seconds": statistics.median(t for t, _ in times[name]),
            "times": [statistics.median(wall), min(wall), max(wall)],
            "cpu_seconds": statistics.median(c for _, c in times[name]), "times_cpu": statistics.median(cpu),
        }  # fmt: skip
        a, b, c, (d, e, f), g, h = rows[name].values()
        print(f"{name:20}{a / 1e6:8.0f}{b:10.1%}{c:9.3f}{d:9.2f}{e:7.2f}{f:7.2f}{g:8.2f}{h:7.2f}")
    if args.json:
        report = {"machine": platform.processor() or platform.machine(), "load": load, "rows": rows}
        Path(args.json).write_text(json.dumps(report | vars(args), indent=1))


if __name__ == "__main__":
    main()
