"""Our contrastive step beside Hugging Face's CLIP in torch, eager and compiled, on one device in one run.

python benchmarks/contrastive.py --torch-python PATH/TO/ENV/bin/python --json contrastive.json

How turns are taken and what is printed is as in train.py. A step is both towers on random images and tokens, the
softmax loss over the batch, backward, clipping of the global norm and AdamW, learned temperature and all.

Alike are widths, layers, heads, patches, text lengths and the parameters of the blocks: their MLP has two matrices
and a GELU, ours three of two thirds of their width and SwiGLU. What is left to differ: ours has rotary positions
where theirs adds learned ones, norms q and k, pools by attention where theirs takes one token, and sees whole texts
where theirs is causal. FLOP/s are by one formula for both: 6 a token for each parameter of the blocks and 12 x layers x tokens x width for
attention.
"""

import argparse
import os
import sys

import numpy as np
from train import BETAS, CLIP, DECAY, RATE, compare, jax_ceilings, torch_ceilings, work

PRESETS = {
    "cpu": dict(width=256, layers=4, heads=8, mlp=704, side=64, patch=8, length=32, vocab=1024, batch=64,
                dtype="float32", unroll=True, remat="none", steps=5, square=2048),
    "large": dict(width=1024, layers=24, heads=16, mlp=2816, side=224, patch=14, length=64, vocab=32_768, batch=128,
                  dtype="bfloat16", unroll=False, remat="attention", steps=5, square=8192),
    "tiny": dict(width=64, layers=2, heads=2, mlp=192, side=16, patch=8, length=8, vocab=128, batch=8,
                 dtype="float32", unroll=True, remat="none", steps=2, square=256),
}  # fmt: skip
NAMES = {"ours": "ours", "compiled": "CLIP, torch compiled", "eager": "CLIP, torch eager"}


def main():
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    flags.add_argument("--preset", default="cpu", choices=PRESETS, help="large is for a GPU")
    flags.add_argument("--rounds", type=int, default=9, help="of all contestants, one after the other")
    flags.add_argument("--contestants", default=",".join(NAMES), help="some of the default, with commas")
    flags.add_argument(
        "--torch-python", default=sys.executable, help="of an environment with torch, transformers"
    )
    flags.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="CPU cores for each")
    flags.add_argument("--json", help="write the results here too")
    flags.add_argument("--worker", help=argparse.SUPPRESS)
    args = flags.parse_args()
    shape = PRESETS[args.preset] | {"threads": args.threads}
    if args.worker:
        flops = 4 * tokens(shape)[0] * shape["width"] * shape["mlp"]
        return work(args.worker, shape, ours if args.worker == "ours" else clip, flops)
    block = 4 * shape["width"] ** 2 + 3 * shape["width"] * shape["mlp"]
    flops = sum(
        count * shape["layers"] * (6 * block + 12 * count // shape["batch"] * shape["width"])
        for count in tokens(shape)
    )
    title = (
        f"{shape['batch']} pairs, {shape['side']} px in patches of {shape['patch']}, {shape['length']} pieces, width "
        f"{shape['width']}, {shape['layers']} layers each, {shape['heads']} heads, {shape['dtype']}"
    )
    compare(
        __file__,
        args,
        {name: NAMES[name] for name in NAMES if name in args.contestants.split(",")},
        shape,
        flops,
        title,
    )


def tokens(s):
    """Of a batch: patches, pieces."""
    return s["batch"] * (s["side"] // s["patch"]) ** 2, s["batch"] * s["length"]


def random_batches(s, count=4):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, s["batch"], s["side"], s["side"], 3), np.uint8)
    return images, rng.integers(0, s["vocab"], (count, s["batch"], s["length"]), dtype=np.int32)


def ours(shape, _):
    import jax
    from jax.sharding import NamedSharding

    from mmgen.models import contrastive
    from mmgen.runtime import config as configs
    from mmgen.runtime import hardware, memory
    from mmgen.runtime import mesh as meshes
    from mmgen.stages import program

    platform = hardware.expected_platform()
    hardware.apply_flags(platform)
    config = configs.load("contrastive:world")
    if platform == "cpu":
        memory.keep_pages()  # before JAX has threads
    m = config.model
    m.image.patch, m.dtype, m.joint = shape["patch"], shape["dtype"], 512
    for tower in (m.image, m.text):
        tower.width, tower.layers, tower.heads = shape["width"], shape["layers"], shape["heads"]
        tower.kv_heads, tower.head_dim, tower.mlp = tower.heads, tower.width // tower.heads, shape["mlp"]
        tower.unroll, tower.remat = shape["unroll"], shape["remat"]
    o = config.optimizer
    o.name, o.learning_rate, o.clip, o.weight_decay, (o.beta1, o.beta2) = "adamw", RATE, CLIP, DECAY, BETAS
    config.steps, o.warmup, o.final, config.ema = 1_000_000, 0, 1.0, 0.0
    mesh = meshes.make_mesh(dict(config.mesh))
    layout = NamedSharding(mesh, meshes.spec(("batch",), config.sharding))
    rows = np.arange(shape["batch"])
    images, pieces = random_batches(shape)
    with meshes.use(mesh, config.sharding):
        make = lambda rngs: contrastive.Contrastive(m, shape["vocab"], rngs)
        built = program.build(config, make, contrastive.loss, mesh)
        state = built.init(jax.random.key(0))

    def run(steps):
        nonlocal state
        with meshes.use(mesh, config.sharding):
            for step in range(steps):
                batch = {
                    "images": images[step % len(images)], "tokens": pieces[step % len(images)],
                    "lengths": np.full(len(rows), shape["length"], np.int32), "same": rows.astype(np.int32),
                }  # fmt: skip
                state, measured = built.step(state, meshes.global_batch(batch, rows, len(rows), layout))
            return float(measured["loss"])

    count, _ = hardware.parameters(built.shapes["params"])
    about = f"{count / 1e6:.2f} M parameters, jax {jax.__version__}"
    return about, jax.local_devices()[0].device_kind, run, *jax_ceilings(shape, tokens(shape)[0])


def clip(shape, name):
    import torch
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    torch.manual_seed(0)
    torch.set_num_threads(shape["threads"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, shape["dtype"])
    alike = dict(
        hidden_size=shape["width"], intermediate_size=shape["mlp"] * 3 // 2, num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"], projection_dim=512,
    )  # fmt: skip
    text = CLIPTextConfig(
        vocab_size=shape["vocab"], max_position_embeddings=shape["length"], eos_token_id=2, **alike
    )
    vision = CLIPVisionConfig(image_size=shape["side"], patch_size=shape["patch"], **alike)
    model = CLIPModel(
        CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=512)
    )
    model = model.to(device, dtype).train()
    count = sum(p.numel() for p in model.parameters())
    matrices, rest = ([p for p in model.parameters() if (p.ndim > 1) == wide] for wide in (True, False))
    adam = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": DECAY}, {"params": rest, "weight_decay": 0.0}],
        lr=RATE, betas=BETAS, fused=True,
    )  # fmt: skip
    forward = torch.compile(model) if name == "compiled" else model
    images, pieces = random_batches(shape)

    def run(steps):
        for step in range(steps):
            pixels = (
                torch.from_numpy(images[step % len(images)]).to(device).permute(0, 3, 1, 2).to(dtype) / 127.5
                - 1
            )
            found = torch.from_numpy(pieces[step % len(images)]).long().to(device)
            loss = forward(input_ids=found, pixel_values=pixels, return_loss=True).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            adam.step()
            adam.zero_grad(set_to_none=True)
        return float(loss.detach())  # waits

    about = f"{count / 1e6:.2f} M parameters, torch {torch.__version__}"
    place = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return about, place, run, *torch_ceilings(shape, tokens(shape)[0], device, dtype)


if __name__ == "__main__":
    main()
