"""Our sampler beside Hugging Face's `generate`: guided decoding of images, on one device in one run.

python benchmarks/sample.py --torch-python PATH/TO/ENV/bin/python --json sample.json

Processes and turns are as in train.py, A B C, A B C ..., with new processes for each of --batch. A turn
answers a batch of new random prompts, token ids to token ids: 40 pieces of text and 4 marks, guidance with
two rows a request, temperature 1 over all that may be drawn, and codes + 5 new tokens (<boi> <h> <w> ...
<eoi> <end>). Pixels are no part of it. "ms a token" is the whole turn, prompts included, by new tokens: one
is a step for all rows of the batch. Weights are random; compiling and the first two turns are not counted.
Printed are medians over rounds, ratios of turns of the same round (median, least and most) and of CPU
seconds, as the machine may be shared.

  ours       `Slots`, driven as the sampler does; the grammar says what may be drawn, as always
  hf         LlamaForCausalLM of the same dims through `generate`, with its dynamic cache, not compiled
  hf-static  the same with cache_implementation="static" and generate's own torch.compile of the decoding
             step: on GPUs it does so by itself (CUDA graphs), on a CPU it is told to (_compile_all_devices)

The peer's own guidance_scale runs the model twice a step, which would be unfair to it. Here its batch holds
each prompt and one without text, a logits processor makes free + guidance * (full - free) of the two rows'
logits and adds one Gumbel noise to both, and the largest, a draw at temperature 1, is the same for both rows.
The prompt without text is as long as the other, so that nothing is padded and no mask needed; ours has 4
tokens there. It has no <eos> and never stops early. It makes one forward pass less than new tokens, ours as
many. --int8 and --int8-cache are of ours alone.

The floor of a step is what it must read, by the rate at which the same process reads after each turn: sums
over the rows of float32 [4096, 32768], 512 MiB. To read are, times the bytes of a number,
    weights  layers x (2 x width x head_dim x (heads + kv_heads) + 3 x width x mlp) + width x vocabulary
    cache    batch x ((44 + new / 2) + (4 + new / 2)) x 2 x layers x kv_heads x head_dim
without scales of int8, activations and logits. Where a CPU's cache holds the weights, it is a yardstick only.

--features is another table, of ours alone, in one process and in turns: what a feature does to the tokens a
second of all requests together, beside plain guided decoding at batch 8. An image in the prompt is as large
as the one that is drawn. A dispatch of "streaming" writes a sixteenth of an image. "Unlike sizes" are 24
requests, sides from half to whole, for 8 slots: 8 at once, then one more after each such dispatch; "slots
used" says how many were on average, the last requests included.

--cold CHECKPOINT is the wall time of fresh processes of `mmgen sample`, from start to end, a picture
written: the first with an empty compilation cache, then 5 with what it left there.
"""

import argparse
import contextlib
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

import numpy as np
from train import Worker, speed

PRESETS = {
    "cpu": dict(width=256, layers=4, heads=4, kv_heads=4, mlp=704, codebook=512, codes=256, dtype="float32"),
    "775m": dict(width=1280, layers=36, heads=20, kv_heads=20, mlp=3456, codebook=16_384, codes=256,
                 dtype="bfloat16"),
    "tiny": dict(width=64, layers=2, heads=4, kv_heads=2, mlp=128, codebook=64, codes=16, dtype="bfloat16"),
}  # fmt: skip
NAMES = {"ours": "ours", "hf": "Llama, dynamic cache", "hf-static": "Llama, static, compiled"}
PIECES, SIDE, GUIDANCE = 384, 32, 1.5  # text pieces, the grammar's longest side
TEXT, FREE, MARKS = 40, 4, 5  # tokens of a prompt's text, of a prompt without it, of an answer beside codes
PROMPT, SLOTS = TEXT + FREE, 8  # requests at once of --features
READ = (4096, 32_768)  # float32


def main():
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    flags.add_argument("--preset", default="cpu", choices=PRESETS, help="tiny tries 775m's paths anywhere")
    flags.add_argument("--batch", default="1,8,32", help="requests at once, each a comparison of its own")
    flags.add_argument("--rounds", type=int, default=9, help="of all contestants, one after the other")
    flags.add_argument("--contestants", default=",".join(NAMES), help="some of the default, with commas")
    flags.add_argument("--torch-python", default=sys.executable, help="with torch, transformers")
    flags.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="CPU cores for each")
    flags.add_argument("--kv-heads", type=int, help="instead of the preset's")
    flags.add_argument("--codes", type=int, help="of an image, a square number up to 1024")
    flags.add_argument("--int8", action="store_true", help="our weights")
    flags.add_argument("--int8-cache", action="store_true", help="our keys and values")
    flags.add_argument("--features", action="store_true", help="see the top")
    flags.add_argument("--cold", metavar="CHECKPOINT", help="see the top")
    flags.add_argument("--json", help="write the results here too")
    flags.add_argument("--worker", help=argparse.SUPPRESS)
    args = flags.parse_args()
    given = {name: getattr(args, name) for name in ("kv_heads", "codes") if getattr(args, name)}
    s = PRESETS[args.preset] | given | {n: getattr(args, n) for n in ("threads", "int8", "int8_cache")}
    s |= {"head_dim": s["width"] // s["heads"], "vocab": PIECES + 64 + 2 * SIDE + s["codebook"]}
    if math.isqrt(s["codes"]) ** 2 != s["codes"] or not 0 < s["codes"] <= SIDE**2:
        flags.error(f"--codes must be a square number up to {SIDE**2}, found {s['codes']}")
    if args.worker:
        return work(args.worker, s | {"batch": int(args.batch)})

    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    report = {"machine": platform.processor() or platform.machine(), "shape": s, "load": [os.getloadavg()[0]]}
    if not args.cold:
        print(
            f"images of {s['codes']} codes; width {s['width']}, {s['layers']} layers, {s['heads']} heads "
            f"({s['kv_heads']} kv), mlp {s['mlp']}, vocabulary {s['vocab']}, {s['dtype']}; "
            f"{s['threads']} threads, {args.rounds} rounds"
        )
    if args.cold:
        report["cold"] = cold(args.cold)
    elif args.features:
        report["features"] = features(s, args.rounds)
    else:
        names = {name: NAMES[name] for name in NAMES if name in args.contestants.split(",")}
        batches = map(int, args.batch.split(","))
        report["batches"] = {batch: compare(args, s | {"batch": batch}, names) for batch in batches}
    report["load"].append(os.getloadavg()[0])
    print(f"load {report['load'][0]:.1f} before, {report['load'][1]:.1f} after")
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=1))


def compare(args, s, names):
    """Lets the contestants take turns, prints what came of it -> {"device", "rows", "turns"}."""
    turns = {name: [] for name in names}
    with contextlib.ExitStack() as within:
        workers = {}
        for name in names:
            python = sys.executable if name == "ours" else args.torch_python
            given = [*sys.argv[1:], "--batch", str(s["batch"])]  # the last one counts
            workers[name] = within.enter_context(Worker(__file__, python, name, given))
            print(f"{names[name]}: {workers[name].about['about']}", flush=True)
        for _ in range(args.rounds):
            for name, worker in workers.items():
                turns[name].append(worker.turn())
    small = ", our weights int8" * s["int8"] + ", our cache int8" * s["int8_cache"]
    print(f"\nbatch {s['batch']}, two rows each, on {worker.about['device']}{small}")
    print(
        f"{'':24}{'ms a token':>11}{'CPU ms':>8}{'images/s':>10}{'ours x':>8}{'least':>7}{'most':>7}"
        f"{'CPU x':>7}{'GB/s':>7}{'floor ms':>10}{'x floor':>9}"
    )
    rows = {}
    for name, each in turns.items():
        ratios = lambda key: [a[key] / b[key] for a, b in zip(each, turns.get("ours", []))] or [float("nan")]
        rows[name] = row = {key: statistics.median(turn[key] for turn in each) for key in each[0]}
        row |= {"ours_times": spread(ratios("seconds")), "ours_times_cpu": statistics.median(ratios("cpu"))}
        a, b, c = row["ours_times"]
        print(
            f"{names[name]:24}{1e3 * row['seconds']:11.3f}{1e3 * row['cpu']:8.3f}{row['images']:10.2f}"
            f"{a:8.2f}{b:7.2f}{c:7.2f}{row['ours_times_cpu']:7.2f}"
            f"{row['read'] / 1e9:7.0f}{1e3 * row['floor']:10.3f}{row['times_floor']:9.2f}",
            flush=True,
        )
    return {"device": worker.about["device"], "rows": rows, "turns": turns}


def to_read(s, name):
    """The bytes that a step must read; see the top."""
    attention = 2 * s["width"] * s["head_dim"] * (s["heads"] + s["kv_heads"])
    weights = s["layers"] * (attention + 3 * s["width"] * s["mlp"]) + s["width"] * s["vocab"]
    tokens = s["batch"] * (PROMPT + FREE + s["codes"] + MARKS)
    cache = tokens * 2 * s["layers"] * s["kv_heads"] * s["head_dim"]
    size = {"float32": 4, "bfloat16": 2}[s["dtype"]]
    of = lambda flag: 1 if name == "ours" and s[flag] else size
    return weights * of("int8") + cache * of("int8_cache")


def spread(values):
    return [statistics.median(values), min(values), max(values)]


def work(name, s):
    """The contestant's side: `ours` and `peer` give (about, device, turn() -> steps, read(n) of READ)."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print does not go to the pipe
    say = lambda words: print(json.dumps(words), file=out, flush=True)
    about, device, turn, read = (ours if name == "ours" else peer)(s, name)
    for _ in range(2):
        turn()
    say({"about": about, "device": device})
    for _ in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        steps = turn()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        rate = speed(read, 4 * math.prod(READ))
        floor = to_read(s, name) / rate
        say({
            "seconds": wall / steps, "cpu": cpu / steps, "images": s["batch"] / wall, "read": rate,
            "floor": floor, "times_floor": wall / steps / floor,
        })  # fmt: skip


def ours(s, _):
    import jax
    import jax.numpy as jnp

    rng, sampler = np.random.default_rng(0), samplers(s)(s["int8"], s["int8_cache"])
    slots = slots_for(sampler, s["batch"], requests(s, rng, 1)[0])
    total, x = jax.jit(lambda x: x.sum(1)), jnp.ones(READ, jnp.float32)
    read = lambda n: [total(x) for _ in range(n)][-1].block_until_ready()
    turn = lambda: drive(slots, requests(s, rng, s["batch"]))[0]
    return f"jax {jax.__version__}", jax.local_devices()[0].device_kind, turn, read


def samplers(s):
    """-> make(int8, int8_cache), which makes a `Sampler` of random weights, always the same."""
    import jax
    from flax import nnx

    from mmgen.grammar import Grammar
    from mmgen.models import transformer
    from mmgen.runtime import config as configs
    from mmgen.runtime import hardware
    from mmgen.sampling.sampler import Sampler

    hardware.apply_flags(hardware.expected_platform())
    hardware.compilation_cache()
    config = configs.load("transformer:quickstart")
    m = config.model
    m.update({name: value for name, value in s.items() if name in m})
    # What makes it Llama: no digits of codes and none around, no earlier tokens mixed in.
    m.around, m.factored, m.before, m.rope_base = False, False, 0, 10_000.0
    config.data.row_length = 2 * s["codes"] + 128
    grammar = Grammar(pieces=PIECES, max_side=SIDE, codes=s["codebook"])
    build = lambda key: transformer.Transformer(m, grammar.vocab_size, nnx.Rngs(key))
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: build(0)))
    params = jax.jit(lambda key: nnx.to_pure_dict(nnx.split(build(key))[1]))(jax.random.key(0))
    text = types.SimpleNamespace(encode=lambda text: list(map(ord, text)))
    tokenizer = types.SimpleNamespace(patch=1)  # images have codes and become no pixels
    given = graphdef, params, config, grammar, text, tokenizer
    return lambda int8=False, int8_cache=False: Sampler(*given, int8=int8, int8_cache=int8_cache)


def requests(s, rng, count, same=False, source=False, sizes=None, **settings):
    """Requests for an image each. Their prompts are new at each call, as what was read of one is kept."""
    from mmgen.document import Document, Image, Text, Turn
    from mmgen.sampling.sampler import Request

    side = math.isqrt(s["codes"])

    def document():
        text = Text("".join(map(chr, rng.integers(0, PIECES, TEXT))))
        image = [Image(codes=rng.integers(0, s["codebook"], (side, side), np.int32))] if source else []
        return Document((Turn("user", (text, *image)),))

    documents = [document()] * count if same else [document() for _ in range(count)]
    settings = {"guidance": GUIDANCE} | settings
    sizes = sizes or [(side, side)] * count
    seeds = rng.integers(0, 2**31, count).tolist()
    return [Request(d, size=size, seed=seed, **settings) for d, size, seed in zip(documents, sizes, seeds)]


def slots_for(sampler, count, request):
    """`Slots` of `count` requests such as this one."""
    from mmgen.sampling.slots import Slots

    prompts = sampler.prompts(request)
    return Slots(sampler, count, len(prompts), len(prompts[0]) + sampler.room(request, prompts[0]))


def drive(slots, requests, every=None):
    """Answers requests -> steps, tokens written. As many as slots at once, then one after each dispatch."""
    for request in requests[: slots.count]:
        slots.add(request)
    later, written, steps = iter(requests[slots.count :]), {}, 0
    while slots.busy:
        found = slots.run(every)
        steps += max(len(p.tokens) - written.get(p.ticket, 0) for p in found)
        written |= {p.ticket: len(p.tokens) for p in found}
        for request in later:
            slots.add(request)
            break
    return steps, sum(written.values())


def peer(s, name):
    import torch
    import transformers

    torch.manual_seed(0)
    torch.set_num_threads(s["threads"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    new, rng = s["codes"] + MARKS, np.random.default_rng(0)
    config = transformers.LlamaConfig(
        vocab_size=s["vocab"], hidden_size=s["width"], intermediate_size=s["mlp"], head_dim=s["head_dim"],
        num_hidden_layers=s["layers"], num_attention_heads=s["heads"], num_key_value_heads=s["kv_heads"],
        max_position_embeddings=PROMPT + new, tie_word_embeddings=False, attn_implementation="sdpa",
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).to(device, getattr(torch, s["dtype"])).eval()

    def guided(_, logits):
        full, free = logits.chunk(2)
        noise = torch.empty_like(full).exponential_().log()  # less it is plus Gumbel's
        return (free + GUIDANCE * (full - free) - noise).repeat(2, 1)

    how = {"max_new_tokens": new, "do_sample": False}
    how["logits_processor"] = transformers.LogitsProcessorList([guided])
    if name == "hf-static":
        how["cache_implementation"] = "static"
    if name == "hf-static" and device == "cpu":
        how["compile_config"] = transformers.CompileConfig()
        how["compile_config"]._compile_all_devices = True

    @torch.inference_mode()
    def turn():
        prompts = np.full((2 * s["batch"], PROMPT), PIECES)  # that without text is as long, of one token
        prompts[: s["batch"]] = rng.integers(0, PIECES, (s["batch"], PROMPT))
        prompts = torch.from_numpy(prompts).to(device)
        found = model.generate(prompts, attention_mask=torch.ones_like(prompts), **how)[:, PROMPT:].cpu()
        assert found.shape[1] == new and found[: s["batch"]].equal(found[s["batch"] :]), found.shape
        return new

    x = torch.ones(READ, device=device)

    def read(n):
        for _ in range(n):
            total = x.sum(1)
        total[0].item()  # waits

    place = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return f"torch {torch.__version__}, transformers {transformers.__version__}", place, turn, read


def features(s, rounds):
    """Prints what each feature does to the tokens a second -> {feature: row}."""
    import jax

    from mmgen.sampling.strategies import Strategy

    rng, make = np.random.default_rng(0), samplers(s)
    plain, side, every = make(), math.isqrt(s["codes"]), max(s["codes"] // 16, 1)
    sizes = np.random.default_rng(1).integers(-(-side // 2), side + 1, (3 * SLOTS, 2))

    def turn(sampler, every=None, count=SLOTS, **settings):
        slots = slots_for(sampler, SLOTS, requests(s, rng, 1, **settings | {"sizes": None})[0])
        return lambda: drive(slots, requests(s, rng, count, **settings), every)

    contestants = {
        "plain": turn(plain),
        "no guidance": turn(plain, guidance=1.0),
        "an image in the prompt": turn(plain, source=True),
        "the same, three-way": turn(plain, source=True, image_guidance=1.5),
        f"streaming, {every} tokens": turn(plain, every=every),
        "unlike sizes": turn(plain, every=every, count=len(sizes), sizes=list(map(tuple, sizes.tolist()))),
        "top-k 100, top-p .9": turn(plain, image=Strategy(top_k=100, top_p=0.9)),
        "int8 weights": turn(make(int8=True)),
        "int8 cache": turn(make(int8_cache=True)),
        "int8 both": turn(make(int8=True, int8_cache=True)),
        f"{SLOTS} of one prompt": turn(plain, same=True),
    }
    found = {name: [] for name in contestants}
    for n in range(rounds + 2):
        for name, once in contestants.items():
            began = time.perf_counter()
            steps, tokens = once()
            if n > 1:  # those before compile
                found[name].append((time.perf_counter() - began, steps, tokens))
    print(f"\nbatch {SLOTS}, on {jax.local_devices()[0].device_kind}")
    print(f"{'':24}{'ms a step':>10}{'tokens/s':>10}{'x plain':>9}{'least':>7}{'most':>7}{'slots used':>12}")
    rows = {}
    for name, each in found.items():
        rates = [tokens / seconds for seconds, _, tokens in each]
        times = [rate * seconds / tokens for rate, (seconds, _, tokens) in zip(rates, found["plain"])]
        rows[name] = {
            "step_seconds": statistics.median(seconds / steps for seconds, steps, _ in each),
            "tokens_per_second": statistics.median(rates), "times_plain": spread(times),
            "used": statistics.median(tokens / steps / SLOTS for _, steps, tokens in each),
        }  # fmt: skip
        step, rate, (a, b, c), used = rows[name].values()
        print(f"{name:24}{1e3 * step:10.3f}{rate:10.0f}{a:9.2f}{b:7.2f}{c:7.2f}{used:12.0%}")
    return rows


def cold(checkpoint):
    """Prints the wall seconds of fresh processes -> those of each, the first with nothing compiled yet."""
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": f"{folder}/cache",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",  # as mmgen has it in a folder of its own
        }
        for n in range(6):
            out = Path(folder) / f"{n}.png"
            command = [sys.executable, "-m", "mmgen", "sample", "--checkpoint", checkpoint, "--out", str(out)]
            command += ["--prompt", "a red circle", "--size", "32x32"]
            began = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
            seconds.append(time.perf_counter() - began)
            assert out.exists()
    a, b, c = spread(seconds[1:])
    print(f"a picture from a fresh process: {a:.2f} s ({b:.2f} to {c:.2f})")
    print(f"the first, with nothing compiled yet, {seconds[0]:.2f} s")
    return seconds


if __name__ == "__main__":
    main()
