"""Our training step beside Hugging Face's Llama in torch, eager and compiled, on one device in one run.

python benchmarks/train.py --torch-python PATH/TO/ENV/bin/python --json train.json

Each contestant is a process of its own that stays, with as many threads as the others, and they take turns:
A B C, A B C ... A turn is --steps training steps on random tokens, the same for all, and then the matrix
products that are each side's ceiling: a large square, and the widest of the model's own. Compiling and
the first steps are not counted. Printed are medians over rounds, ratios of turns of the same round (median,
least and most), and CPU seconds, as the machine may be shared.

FLOP/s are by a formula, the same for all: 6 a token for each parameter that it is multiplied with (the head
is, the embedding is not) and 6 x layers x row x width for causal attention, which sees half of the row.

The step is forward, backward, clipping of the global norm and AdamW. Ours is the one of `mmgen train`, with
settings that make the architecture Llama's: no codes, so no digits and no codes around, no earlier tokens
mixed in, an untied head. What is left to differ: ours norms q and k and adds features of a token's place,
its norms have no scales, it knows of segments (one a row here) and of weights, and checks that the loss and the gradient
are finite. Preset 1b computes in bfloat16: our parameters and moments are float32 all the same, the peer's
are bfloat16, which moves fewer bytes; its attention is cuDNN's where there is a GPU.
"""

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

PRESETS = {
    "cpu": dict(width=256, layers=4, heads=4, kv_heads=4, mlp=704, vocab=1024, batch=8, row=184,
                dtype="float32", remat="none", unroll=True, chunk=0, steps=5, square=2048),
    "1b": dict(width=2048, layers=20, heads=16, kv_heads=8, mlp=5632, vocab=32_768, batch=8, row=4096,
               dtype="bfloat16", remat="attention", unroll=False, chunk=4096, steps=5, square=8192),
    "tiny": dict(width=64, layers=2, heads=4, kv_heads=2, mlp=128, vocab=256, batch=2, row=64,
                 dtype="bfloat16", remat="attention", unroll=False, chunk=64, steps=2, square=256),
}  # fmt: skip
NAMES = {"ours": "ours", "compiled": "Llama, torch compiled", "eager": "Llama, torch eager"}
CLIP, RATE, BETAS, DECAY = 1.0, 3e-4, (0.9, 0.95), 0.1


def main():
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    flags.add_argument("--preset", default="cpu", choices=PRESETS, help="tiny tries the paths of 1b anywhere")
    flags.add_argument("--rounds", type=int, default=9, help="of all contestants, one after the other")
    flags.add_argument("--contestants", default=",".join(NAMES), help="some of the default, with commas")
    flags.add_argument(
        "--torch-python", default=sys.executable, help="of an environment with torch, transformers"
    )
    flags.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="CPU cores for each")
    for name, value in PRESETS["cpu"].items():
        flags.add_argument(
            f"--{name}", type=_yes if value is True else type(value), help="instead of the preset's"
        )
    flags.add_argument("--json", help="write the results here too")
    flags.add_argument("--worker", help=argparse.SUPPRESS)
    args = flags.parse_args()
    given = {name: getattr(args, name) for name in PRESETS["cpu"] if getattr(args, name) is not None}
    shape = PRESETS[args.preset] | given | {"threads": args.threads}
    if args.worker:
        flops = 4 * shape["batch"] * shape["row"] * shape["width"] * shape["mlp"]
        return work(args.worker, shape, ours if args.worker == "ours" else llama, flops)

    names = {name: NAMES[name] for name in NAMES if name in args.contestants.split(",")}
    flops = flops_a_token(shape) * shape["batch"] * shape["row"]
    title = (
        f"{shape['batch']} x {shape['row']} tokens, width {shape['width']}, {shape['layers']} layers, "
        f"{shape['heads']} heads ({shape['kv_heads']} kv), mlp {shape['mlp']}, vocabulary {shape['vocab']}, {shape['dtype']}"
    )
    compare(__file__, args, names, shape, flops, title)


def compare(script, args, names, shape, flops, title):
    """Lets the contestants `names` {name: as shown} of `script` take turns, prints and writes what came of it."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    turns = {name: [] for name in names}
    with contextlib.ExitStack() as within:
        workers = {}
        for name, shown in names.items():
            python = sys.executable if name == "ours" else args.torch_python
            workers[name] = within.enter_context(Worker(script, python, name, sys.argv[1:]))
            print(f"{shown}: {workers[name].about['about']}", flush=True)
        before = os.getloadavg()
        for _ in range(args.rounds):
            for name, worker in workers.items():
                turns[name].append(worker.turn())
    report = {
        "machine": platform.processor() or platform.machine(),
        "device": next(iter(workers.values())).about["device"],
        "load": [before[0], os.getloadavg()[0]], "shape": shape, "flops_a_step": flops,
        "rows": {name: summary(turns, name, flops) for name in names},
    }  # fmt: skip
    show(report, args.rounds, names, title)
    if args.json:
        Path(args.json).write_text(json.dumps(report | {"turns": turns}, indent=1))


def flops_a_token(s):
    """See the top."""
    head_dim = s["width"] // s["heads"]
    attention = s["width"] * head_dim * (2 * s["heads"] + 2 * s["kv_heads"])
    multiplied = s["layers"] * (attention + 3 * s["width"] * s["mlp"]) + s["vocab"] * s["width"]
    return 6 * multiplied + 6 * s["layers"] * s["row"] * s["width"]


def summary(turns, name, flops):
    column = lambda name, key: [turn[key] for turn in turns[name]]
    median = lambda key: statistics.median(column(name, key))
    row = {
        "seconds": median("seconds"), "cpu_seconds": median("cpu"), "flops": flops / median("seconds"),
        "square": median("square"), "own": median("own"),
        "share_of_square": statistics.median(flops / t["seconds"] / t["square"] for t in turns[name]),
        "loss": turns[name][-1]["loss"], "bytes": turns[name][-1]["bytes"],
    }  # fmt: skip
    if "ours" in turns:
        ratios = [theirs / ours for theirs, ours in zip(column(name, "seconds"), column("ours", "seconds"))]
        cpu = [theirs / ours for theirs, ours in zip(column(name, "cpu"), column("ours", "cpu"))]
        row |= {"ours_times": [statistics.median(ratios), min(ratios), max(ratios)]}
        row |= {"ours_times_cpu": statistics.median(cpu)}
    return row


def show(report, rounds, names, title):
    s = report["shape"]
    print(
        f"\n{title}; {report['flops_a_step'] / 1e9:.1f} GFLOP a step\n{report['device']}, {s['threads']} threads; "
        f"{rounds} rounds of {s['steps']} steps; load {report['load'][0]:.1f} before, {report['load'][1]:.1f} after\n"
    )
    print(
        f"{'':24}{'s a step':>10}{'CPU s':>8}{'GFLOP/s':>9}{'of square':>11}{'square':>8}{'own':>7}"
        f"{'ours x':>8}{'least':>7}{'most':>6}{'CPU x':>7}{'GB':>6}{'loss':>7}"
    )
    for name, row in report["rows"].items():
        times = row.get("ours_times", [float("nan")] * 3)
        print(
            f"{names[name]:24}{row['seconds']:10.4f}{row['cpu_seconds']:8.3f}{row['flops'] / 1e9:9.0f}"
            f"{row['share_of_square']:11.0%}{row['square'] / 1e9:8.0f}{row['own'] / 1e9:7.0f}"
            f"{times[0]:8.2f}{times[1]:7.2f}{times[2]:6.2f}{row.get('ours_times_cpu', float('nan')):7.2f}"
            f"{row['bytes'] / 1e9:6.1f}{row['loss']:7.2f}"
        )


class Worker:
    """A contestant's process: a line to it asks for a turn, a line from it says how it went."""

    def __init__(self, script, python, name, arguments):
        environment = os.environ | {
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false"
        }  # a GPU is shared with the others
        self.process = subprocess.Popen(
            [python, script, *arguments, "--worker", name], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, env=environment,
        )  # fmt: skip
        self.name, self.about = name, self._read()

    def _read(self):
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"the process of {self.name!r} ended with status {self.process.wait()}; see above")
        return json.loads(line)

    def turn(self):
        print("turn", file=self.process.stdin, flush=True)
        return self._read()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait()


def work(name, shape, contestant, flops):
    """The contestant's side: `contestant(shape, name)` -> (about, device, run(steps) -> loss, square product, own
    product, bytes held); `flops` of one own product."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print does not go to the pipe
    say = lambda words: print(json.dumps(words), file=out, flush=True)
    about, device, run, square, own, held = contestant(shape, name)
    run(3)
    say({"about": about, "device": device})
    for _ in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        loss = run(shape["steps"])
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        say({
            "seconds": wall / shape["steps"], "cpu": cpu / shape["steps"], "loss": loss,
            "square": speed(square, 2 * shape["square"] ** 3),
            "own": speed(own, flops),
            "bytes": held(),
        })  # fmt: skip


def random_batches(shape, count=4):
    """Random tokens: zeros and repeats are faster on some machines."""
    return np.random.default_rng(0).integers(
        0, shape["vocab"], (count, shape["batch"], shape["row"]), dtype=np.int32
    )


def speed(product, flops, seconds=0.1):
    """FLOP/s of `product(n)`, which does n of `flops` and waits for the last."""
    product(1)
    began, n, spent = time.perf_counter(), 4, 0.0
    while spent < seconds:
        began = time.perf_counter()
        product(n)
        spent, n = time.perf_counter() - began, 2 * n
    return flops * (n // 2) / spent


def ours(shape, _):
    import jax
    from jax.sharding import NamedSharding

    from mmgen.models import transformer
    from mmgen.runtime import config as configs
    from mmgen.runtime import hardware, memory
    from mmgen.runtime import mesh as meshes
    from mmgen.stages import program

    batches, platform = random_batches(shape), hardware.expected_platform()
    hardware.apply_flags(platform)
    config = configs.load("transformer:quickstart")
    if platform == "cpu" and config.keep_pages:
        memory.keep_pages()  # before JAX has threads
    m = config.model
    m.width, m.layers, m.heads, m.kv_heads = (shape[k] for k in ("width", "layers", "heads", "kv_heads"))
    m.head_dim, m.mlp, m.dtype = m.width // m.heads, shape["mlp"], shape["dtype"]
    m.around, m.factored, m.before, m.tied, m.rope_base = False, False, 0, False, 10_000.0
    m.remat, m.unroll = shape["remat"], shape["unroll"]
    o = config.optimizer
    o.name, o.learning_rate, o.clip, o.weight_decay, (o.beta1, o.beta2) = "adamw", RATE, CLIP, DECAY, BETAS
    config.steps, o.warmup, o.final, config.ema = 1_000_000, 0, 1.0, 0.0
    mesh = meshes.make_mesh(dict(config.mesh))
    layout = NamedSharding(mesh, meshes.spec(("batch", "length"), config.sharding))
    rows = np.arange(shape["batch"])
    V = shape["vocab"]
    loss = lambda model, batch, key: transformer.loss(model, batch, code_start=V, z=0.0, chunk=shape["chunk"])
    place = np.broadcast_to(np.arange(shape["row"], dtype=np.int32)[:, None], batches.shape[1:] + (3,))
    ones = np.ones(batches.shape[1:], np.int32)
    with meshes.use(mesh, config.sharding):
        built = program.build(config, lambda rngs: transformer.Transformer(m, V, rngs), loss, mesh)
        state = built.init(jax.random.key(0))

    def run(steps):
        nonlocal state
        with meshes.use(mesh, config.sharding):
            for step in range(steps):
                batch = {
                    "tokens": batches[step % len(batches)], "segments": ones, "positions": place,
                    "weights": ones.astype(np.float32),
                }  # fmt: skip
                batch = meshes.global_batch(batch, rows, shape["batch"], layout)
                state, measured = built.step(state, batch)
            return float(measured["loss"])

    count, _ = hardware.parameters(built.shapes["params"])
    return (
        f"{count / 1e6:.2f} M parameters, jax {jax.__version__}",
        jax.local_devices()[0].device_kind,
        run,
        *jax_ceilings(shape, shape["batch"] * shape["row"]),
    )


def jax_ceilings(shape, tokens):
    """The square product, the widest of the model's own on `tokens`, and the bytes held, in JAX."""
    import jax
    import jax.numpy as jnp

    dtype, side = jnp.dtype(shape["dtype"]), shape["square"]
    normal = lambda key, *size: jax.random.normal(jax.random.key(key), size, dtype)
    product = jax.jit(jnp.matmul)

    def repeat(a, b):
        def run(n):
            for _ in range(n):
                last = product(a, b)
            last.block_until_ready()

        return run

    def held():
        found = jax.local_devices()[0].memory_stats() or {}
        return found.get("peak_bytes_in_use", 0) or peak_resident()

    return (
        repeat(normal(1, side, side), normal(2, side, side)),
        repeat(normal(3, tokens, shape["width"]), normal(4, shape["width"], 2 * shape["mlp"])),
        held,
    )


def llama(shape, name):
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from transformers import LlamaConfig, LlamaForCausalLM

    batches = random_batches(shape)
    torch.manual_seed(0)
    torch.set_num_threads(shape["threads"])
    gpu = torch.cuda.is_available()
    device, dtype = "cuda" if gpu else "cpu", getattr(torch, shape["dtype"])
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape["vocab"], hidden_size=shape["width"], intermediate_size=shape["mlp"],
            num_hidden_layers=shape["layers"], num_attention_heads=shape["heads"],
            num_key_value_heads=shape["kv_heads"], max_position_embeddings=shape["row"], use_cache=False,
            tie_word_embeddings=False, attn_implementation="sdpa",
        )
    )  # fmt: skip
    model = model.to(device, dtype).train()
    count = sum(p.numel() for p in model.parameters())
    matrices = [p for p in model.parameters() if p.ndim > 1]
    norms = [p for p in model.parameters() if p.ndim == 1]
    adam = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": DECAY}, {"params": norms, "weight_decay": 0.0}],
        lr=RATE, betas=BETAS, fused=True,
    )  # fmt: skip
    forward = torch.compile(model) if name == "compiled" else model
    kernel = lambda: sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if gpu else contextlib.nullcontext()

    def run(steps):
        for step in range(steps):
            tokens = torch.from_numpy(batches[step % len(batches)]).long().to(device)
            with kernel():
                loss = forward(input_ids=tokens, labels=tokens).loss
                loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            adam.step()
            adam.zero_grad(set_to_none=True)
        return float(loss)  # waits

    return (
        f"{count / 1e6:.2f} M parameters, torch {torch.__version__}",
        torch.cuda.get_device_name() if gpu else "cpu",
        run,
        *torch_ceilings(shape, shape["batch"] * shape["row"], device, dtype),
    )


def torch_ceilings(shape, tokens, device, dtype):
    """As `jax_ceilings`."""
    import torch

    side, gpu = shape["square"], device == "cuda"
    normal = lambda *size: torch.randn(*size, device=device, dtype=dtype)

    def repeat(a, b):
        def run(n):
            with torch.no_grad():
                for _ in range(n):
                    a @ b
                if gpu:
                    torch.cuda.synchronize()

        return run

    return (
        repeat(normal(side, side), normal(side, side)),
        repeat(normal(tokens, shape["width"]), normal(shape["width"], 2 * shape["mlp"])),
        lambda: torch.cuda.max_memory_allocated() if gpu else peak_resident(),
    )


def peak_resident():
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _yes(text):
    return {"true": True, "false": False}[text.lower()]


if __name__ == "__main__":
    main()
