"""Our tokenizer beside vector-quantize-pytorch's FSQ in a torch autoencoder, eager and compiled, in one run.

python benchmarks/tokenizer.py --torch-python PATH/TO/ENV/bin/python --json tokenizer.json

Each part is a comparison of its own, with turns and a table as in train.py:
  fsq-1k, fsq-15k  FSQ alone, on what lies on the device, each call waited for: quantise (features -> values and
                   codes), lookup (codes -> values)
  vit, cnn         autoencoders of attention towers and of the CNN pyramid: encode (the host's uint8 images ->
                   codes), decode (codes -> uint8 images), train (forward, backward, clip, AdamW, on log_mse)
Images and weights are random. Ours is `Tokenizer`, and the step of `mmgen train`. The peer is ours written again
in torch, rotary positions and normed q and k included: of equal weights it makes equal codes and images. It has
what torch has for it: one product for q, k and v, scaled_dot_product_attention, channels_last, convolutions of
stride 2 for our cuts into squares, inference_mode, fused AdamW, torch.compile in its default mode.

Differences are left in training: ours has a `Prior` besides, which this loss leaves alone but AdamW sees, measures
PSNR and the use of codes, checks that loss and gradient are finite, and on CPU keeps its pages. In the bfloat16
of large our parameters and moments stay float32, the peer's do not.

FLOP/s are by one formula for both: 2 for each parameter and place it is multiplied with, 4 x tokens x width for a
token's attention, thrice that for training; of FSQ 10 a channel. "Own" is always the widest product of attention
towers; "loss", where nothing is trained, the mean of what came out.
"""

import argparse
import functools
import json
import math
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
from train import BETAS, CLIP, DECAY, RATE, compare, jax_ceilings, torch_ceilings, work

SMALL, LARGE = (8, 5, 5, 5), (8, 8, 8, 6, 5)  # levels
PARTS = {"fsq-1k": dict(levels=SMALL), "fsq-15k": dict(levels=LARGE), "vit": {}, "cnn": {}}
# What is called as in config.model is set there. Of FSQ alone a batch is of grids of features.
PRESETS = {
    "cpu": {
        "all": dict(levels=SMALL, batch=64, grid=64, width=256, mlp=704, dtype="float32", unroll=True, square=2048),
        "vit": dict(grid=8, patch=8, encoder_layers=4, layers=6, heads=8, kv_heads=8, head_dim=32),
        "cnn": dict(grid=8, patch=8, encoder="cnn", decoder="cnn", channels=(32, 48, 64, 96), blocks=1, batch=16),
    },
    "large": {
        "all": dict(levels=LARGE, batch=64, grid=256, width=768, mlp=2048, dtype="bfloat16", unroll=False, square=8192),
        "vit": dict(grid=16, patch=16, encoder_layers=12, layers=12, heads=12, kv_heads=12, head_dim=64),
        "cnn": dict(grid=32, patch=8, encoder="cnn", decoder="cnn", channels=(128, 128, 256, 256), blocks=2, batch=16),
    },
    "tiny": {
        "all": dict(levels=SMALL, batch=4, grid=16, width=64, mlp=128, dtype="float32", unroll=True, square=256),
        "vit": dict(grid=4, patch=4, encoder_layers=1, layers=2, heads=2, kv_heads=2, head_dim=32),
        "cnn": dict(grid=4, patch=4, encoder="cnn", decoder="cnn", channels=(8, 12, 16), blocks=2),
    },
}  # fmt: skip
STEPS = {"quantise": 20, "lookup": 20, "encode": 5, "decode": 5, "train": 5}  # of a turn
NAMES = {"ours": "ours", "compiled": "torch compiled", "eager": "torch eager"}
FSQ = ("quantise", "lookup")  # are of FSQ alone, the others of autoencoders
FLOOR, TOKENS = 1e-3, 4096  # of log_mse; of the product that is called a part's own


def main():
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    some = {"help": "some of the default, with commas"}
    flags.add_argument("--preset", default="cpu", choices=PRESETS, help="large is for a GPU")
    flags.add_argument("--part", default=",".join(PARTS), **some)
    flags.add_argument("--what", default=",".join(STEPS), **some)
    flags.add_argument("--rounds", type=int, default=9, help="of all contestants, one after the other")
    flags.add_argument("--contestants", default=",".join(NAMES), **some)
    flags.add_argument("--torch-python", default=sys.executable, help="with torch, vector-quantize-pytorch")
    flags.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="CPU cores for each")
    flags.add_argument("--json", help="write the results here too")
    flags.add_argument("--worker", help=argparse.SUPPRESS)
    args = flags.parse_args()
    preset, more = PRESETS[args.preset], lambda what: dict(what=what, steps=STEPS[what], threads=args.threads)
    shape = lambda part, what: preset["all"] | PARTS[part] | preset.get(part, {}) | more(what)
    if args.worker:
        s = shape(args.part, args.what)
        return work(args.worker, s, {"ours": ours}.get(args.worker, peer), 4 * TOKENS * s["width"] * s["mlp"])

    names = {name: NAMES[name] for name in NAMES if name in args.contestants.split(",")}
    parts = [(part, what) for part in args.part.split(",") for what in args.what.split(",")]
    given, wanted, found = sys.argv, args.json, {}
    for part, what in (asked for asked in parts if asked[0].startswith("fsq") == (asked[1] in FSQ)):
        sys.argv = [*given, "--part", part, "--what", what]  # which workers are started with
        s = shape(part, what)
        with tempfile.NamedTemporaryFile() as file:
            args.json = file.name
            told = ", ".join(f"{name} {s[name]}" for name in preset["all"] | preset.get(part, {}))
            compare(__file__, args, names, s, flops(s), f"{part}, {what}: {told}")
            found[f"{part} {what}"] = report = json.loads(file.read())
        unit, count = ("codes", s["batch"] * s["grid"] ** 2) if what in FSQ else ("images", s["batch"])
        each = (f"{names[name]} {count / row['seconds']:,.0f}" for name, row in report["rows"].items())
        print(f"{unit} a second: {', '.join(each)}\n", flush=True)
        if wanted:
            Path(wanted).write_text(json.dumps(found, indent=1))


def flops(s):
    """Of a call or step; see the top."""
    places, C, D = s["batch"] * s["grid"] ** 2, len(s["levels"]), s["width"]
    if "channels" in s:
        c, n = s["channels"], s["blocks"]
        finer = lambda k: 4 ** (len(c) - 1 - k)  # places of scale k, for one of the last
        scale = lambda i, o: 9 * (i * o + (2 * n - 1) * o * o) + (i != o) * i * o
        both = scale(c[-1], c[-1]) + finer(0) * 9 * 3 * c[0]
        encoder, decoder = both + c[-1] * D, both + 9 * c[-1] * D
        for k, o in enumerate(c):
            encoder += finer(k) * (scale(c[max(k - 1, 0)], o) + (k > 0) * 4 * c[k - 1] ** 2)
            decoder += finer(k) * (scale(c[min(k + 1, len(c) - 1)], o) + (k > 0) * 4 * o**2)
    elif "heads" in s:
        block = 4 * D * D + 3 * D * s["mlp"] + 2 * s["grid"] ** 2 * D
        encoder, decoder = (s[n] * block + 3 * s["patch"] ** 2 * D for n in ("encoder_layers", "layers"))
    else:
        return 10 * places * C
    encoder, decoder = 2 * places * (encoder + D * C), 2 * places * (decoder + D * C)
    return {"encode": encoder, "decode": decoder, "train": 3 * (encoder + decoder)}[s["what"]]


def random_inputs(s, count=4):
    """What `s["what"]` begins with."""
    rng, grid = np.random.default_rng(0), (count, s["batch"], s["grid"], s["grid"])
    if s["what"] == "quantise":
        return rng.standard_normal((*grid, len(s["levels"])), np.float32)
    if s["what"] in ("lookup", "decode"):
        return rng.integers(0, math.prod(s["levels"]), grid, np.int32)
    return rng.integers(0, 256, (count, s["batch"], *[s["grid"] * s["patch"]] * 2, 3), np.uint8)


def turn(once, given):
    """-> the `run` that train.py wants: `once` on one after the other of what is given."""

    def run(steps):
        for step in range(steps):
            found = once(given[step % len(given)])
        found = found[-1] if isinstance(found, tuple) else found
        return float((found * 1.0).mean())  # waits

    return run


def ours(s, _):
    import jax
    from flax import nnx
    from jax.sharding import NamedSharding

    from mmgen.models import autoencoders, quantizers
    from mmgen.runtime import config as configs
    from mmgen.runtime import hardware, memory
    from mmgen.runtime import mesh as meshes
    from mmgen.stages import program, tokenizer

    platform, given = hardware.expected_platform(), random_inputs(s)
    hardware.apply_flags(platform)
    config = configs.load("tokenizer:64px-1k")
    if platform == "cpu" and config.keep_pages and s["what"] == "train":
        memory.keep_pages()  # before JAX has threads
    m, o = config.model, config.optimizer
    m.update({name: value for name, value in s.items() if name in m})
    m.quantizer.levels = s["levels"]
    o.name, o.learning_rate, o.clip, o.weight_decay, (o.beta1, o.beta2) = "adamw", RATE, CLIP, DECAY, BETAS
    config.steps, o.warmup, o.final, config.ema = 1_000_000, 0, 1.0, 0.0
    make = lambda rngs: autoencoders.Autoencoder(m, rngs)
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    del shapes["prior"]
    count = sum(x.size for x in jax.tree.leaves(shapes)) if "patch" in s else 0

    if s["what"] in FSQ:
        fsq = quantizers.FSQ(s["levels"])
        apply = jax.jit(fsq.lookup if s["what"] == "lookup" else lambda z: (fsq(z)[0], fsq.index(z)))
        run = turn(lambda x: jax.block_until_ready(apply(x)), [jax.device_put(x) for x in given])
    elif s["what"] in ("encode", "decode"):
        weights = jax.jit(lambda key: nnx.split(make(nnx.Rngs(key)))[1])(jax.random.key(0))
        apply = getattr(autoencoders.Tokenizer(nnx.merge(graphdef, weights)), s["what"])
        run = turn(lambda x: apply(x, batch=s["batch"]), given)
    else:
        mesh, rows = meshes.make_mesh(dict(config.mesh)), np.arange(s["batch"])
        layout = NamedSharding(mesh, meshes.spec(("batch",), config.sharding))
        terms = dict(weights=dict.fromkeys(config.loss.weights, 0.0) | {"log_mse": 1.0}, floor=FLOOR)
        off = dict(noise=0.0, recolor=0.0, color_digits=0, gan=None)
        loss = functools.partial(tokenizer.loss, **terms, **off)
        with meshes.use(mesh, config.sharding):
            built = program.build(config, make, loss, mesh)
            state = built.init(jax.random.key(0))

        def step(images):
            nonlocal state
            with meshes.use(mesh, config.sharding):
                batch = meshes.global_batch({"images": images}, rows, len(rows), layout)
                state, measured = built.step(state, batch)
            return measured["loss"]

        run = turn(step, given)
    about = f"{count:,} parameters, jax {jax.__version__}"
    return about, jax.local_devices()[0].device_kind, run, *jax_ceilings(s, TOKENS)


def peer(s, name):
    import torch
    import vector_quantize_pytorch

    torch.manual_seed(0)
    torch.set_num_threads(s["threads"])
    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", getattr(torch, s["dtype"])
    compiled = torch.compile if name == "compiled" else lambda function: function
    there = lambda x: torch.from_numpy(x).to(device)
    given, count = random_inputs(s), 0
    fsq = vector_quantize_pytorch.FSQ(list(s["levels"])).to(device)
    if "patch" in s:
        model = autoencoder(s, fsq).to(device, dtype, memory_format=torch.channels_last)
        count = sum(p.numel() for p in model.parameters())

    if s["what"] in FSQ:
        apply = compiled(fsq if s["what"] == "quantise" else fsq.indices_to_codes)
        given = [there(x).flatten(1, 2) for x in given]  # of two axes of places it wants channels first
        wait = torch.cuda.synchronize if device == "cuda" else lambda: None
        once = torch.inference_mode()(lambda x: (apply(x), wait())[0])
    elif s["what"] in ("encode", "decode"):
        apply = compiled(getattr(model, s["what"]))
        once = torch.inference_mode()(lambda x: apply(there(x)).cpu().numpy())
    else:
        adam = torch.optim.AdamW(model.parameters(), lr=RATE, betas=BETAS, weight_decay=DECAY, fused=True)
        apply = compiled(model)

        def once(images):
            loss = apply(there(images))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            adam.step()
            adam.zero_grad(set_to_none=True)
            return loss.detach()

    about = f"{count:,} parameters, torch {torch.__version__}"
    place = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return about, place, turn(once, given), *torch_ceilings(s, TOKENS, device, dtype)


def autoencoder(s, fsq):
    """models/autoencoders.py in torch. Channels are last in memory, the places of tokens and codes one axis."""
    import torch
    from torch import nn
    from torch.nn import functional

    D, F, C, h, patch = s["width"], s["mlp"], len(s["levels"]), s["grid"], s["patch"]
    dtype = getattr(torch, s["dtype"])
    conv = lambda i, o, side=3, bias=False: nn.Conv2d(i, o, side, padding=side // 2, bias=bias)
    norm = lambda x: functional.rms_norm(x, x.shape[-1:], eps=1e-6)
    last, first = lambda x: x.permute(0, 2, 3, 1), lambda x: x.permute(0, 3, 1, 2)
    active = lambda x: functional.silu(first(norm(last(x))))
    cut = lambda x: x.view(-1, h, patch, h, patch, 3).transpose(2, 3).reshape(-1, h * h, 3 * patch**2)
    joined = lambda x: x.view(-1, h, h, patch, patch, 3).transpose(2, 3).reshape(-1, h * patch, h * patch, 3)

    class Do(nn.Module):
        def __init__(self, function):
            super().__init__()
            self.forward = function

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.mixed = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D, bias=False)
            self.wi, self.wo = nn.Linear(D, 2 * F, bias=False), nn.Linear(F, D, bias=False)
            pairs = torch.arange(D // s["heads"] // 2)
            grid = torch.cartesian_prod(torch.arange(h), torch.arange(h))
            angles = grid[:, pairs % 2] * 100.0 ** (-pairs / len(pairs))
            self.cos, self.sin = nn.Buffer(angles.cos()), nn.Buffer(angles.sin())

        def rotate(self, x):
            a, b = norm(x).chunk(2, -1)
            return torch.cat([a * self.cos - b * self.sin, b * self.cos + a * self.sin], -1)

        def forward(self, x):
            q, k, v = self.qkv(norm(x)).unflatten(-1, (3, s["heads"], -1)).permute(2, 0, 3, 1, 4)
            y = functional.scaled_dot_product_attention(2.0 * self.rotate(q), self.rotate(k), v)
            x = x + self.mixed(y.transpose(1, 2).flatten(2))
            gate, value = self.wi(norm(x)).chunk(2, -1)
            return x + self.wo(functional.silu(gate) * value)

    class Residual(nn.Module):
        def __init__(self, i, o):
            super().__init__()
            self.conv, self.out = conv(i, o), conv(o, o)
            self.shortcut = nn.Identity() if i == o else conv(i, o, 1)

        def forward(self, x):
            return self.shortcut(x) + self.out(active(self.conv(active(x))))

    def vit():
        encoder, decoder = ([Block() for _ in range(s[name])] for name in ("encoder_layers", "layers"))
        stem, head = nn.Linear(3 * patch**2, D), nn.Linear(D, 3 * patch**2)
        return [Do(cut), stem, *encoder], [*decoder, Do(norm), head, Do(joined)]

    def cnn():
        c, scale = s["channels"], lambda i, o: [Residual(o if k else i, o) for k in range(s["blocks"])]
        encoder, decoder = [Do(first), conv(3, c[0], bias=True)], [conv(c[0], 3, bias=True), Do(last)]
        for k, o in enumerate(c):
            before, after = c[max(k - 1, 0)], c[min(k + 1, len(c) - 1)]
            down = nn.Conv2d(before, before, 2, 2, bias=False) if k else nn.Identity()
            encoder += [down, *scale(before, o)]
            up = nn.ConvTranspose2d(o, o, 2, 2, bias=False) if k else Do(active)
            decoder = [*scale(after, o), up, *decoder]
        encoder += [*scale(c[-1], c[-1]), Do(active), conv(c[-1], D, 1), Do(lambda x: last(x).flatten(1, 2))]
        whole = Do(lambda x: first(x.unflatten(1, (h, h))))
        return encoder, [whole, conv(D, c[-1]), *scale(c[-1], c[-1]), *decoder]

    class Autoencoder(nn.Module):
        def __init__(self):
            super().__init__()
            encoder, decoder = cnn() if "channels" in s else vit()
            self.encoder = nn.Sequential(*encoder, Do(norm), nn.Linear(D, C))
            self.decoder, self.fsq = nn.Sequential(nn.Linear(C, D), *decoder), fsq

        def encode(self, images):
            return self.fsq(self.encoder((images / 127.5 - 1.0).to(dtype)))[1].unflatten(1, (h, h))

        def decode(self, codes):
            values = self.fsq.indices_to_codes(codes.flatten(1)).to(dtype)
            return ((self.decoder(values).float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)

        def forward(self, images):
            images = images / 127.5 - 1.0
            back = self.decoder(self.fsq(self.encoder(images.to(dtype)))[0]).float()
            return torch.log((back - images).square().mean((1, 2, 3)) + FLOOR).mean()

    return Autoencoder()


if __name__ == "__main__":
    main()
