"""`mmgen sample --checkpoint DIR --prompt "..." --n 4 --out out.png`."""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from mmgen.commands.common import size
from mmgen.data.images import straight
from mmgen.document import Document, Text, Turn
from mmgen.models.contrastive import load_towers
from mmgen.sampling import sampler
from mmgen.sampling.strategies import Strategy


def main(argv):
    """Draws pictures for prompts: a contact sheet (--out FILE.png), or one file each (--out FOLDER)."""
    parser = argparse.ArgumentParser("mmgen sample", description=main.__doc__)
    parser.add_argument("--checkpoint", required=True, help="workdir of a transformer run")
    parser.add_argument("--prompt", action="append", default=[], help="what to draw; may be repeated")
    parser.add_argument("--prompts", help="a text file with one prompt a line")
    parser.add_argument("--n", type=int, default=1, help="pictures a prompt")
    parser.add_argument("--size", type=size, help="WIDTHxHEIGHT in pixels (default: the model chooses)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guidance", type=float, default=1.5, help="above 1: nearer to the prompt")
    parser.add_argument("--temperature", type=float, default=0.1, help="of image codes; 0 is greedy")
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--min-p", type=float, default=0.0)
    parser.add_argument(
        "--keep-mode",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="let a temperature below 1 begin objects as often as was learned",
    )
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--best-of", type=int, default=1, help="draw so many for each picture, keep the best")
    parser.add_argument("--towers", help="workdir of a contrastive run, which says what is best")
    parser.add_argument("--scale", type=int, default=1, help="enlarge pixels this many times in the files")
    parser.add_argument("--out", default="out.png", help="FILE.png for a contact sheet, or a folder")
    args = parser.parse_args(argv)

    prompts = list(args.prompt)
    if args.prompts:
        prompts += [
            line.strip() for line in Path(args.prompts).read_text("utf-8").splitlines() if line.strip()
        ]
    if not prompts or args.n < 1:
        raise ValueError(
            "nothing to draw: expected --prompt TEXT or a --prompts FILE with a line in it, and --n >= 1"
        )
    if args.best_of < 1 or (args.best_of > 1) != bool(args.towers):
        raise ValueError(
            f"expected --towers DIR together with --best-of N of at least 2, found --best-of {args.best_of} and --towers {args.towers}"
        )
    towers = load_towers(args.towers) if args.towers else None
    write = _prepare(Path(args.out))  # before the work: an unwritable path should cost nothing
    model = sampler.load(args.checkpoint)
    grid = None
    if args.size:
        patch = model.tokenizer.patch
        if any(side % patch for side in args.size):
            raise ValueError(
                f"--size must be a multiple of the patch, {patch}; found {args.size[0]}x{args.size[1]}"
            )
        grid = (args.size[1] // patch, args.size[0] // patch)
    requests = [
        sampler.Request(
            document=Document((Turn("user", (Text(prompt),)),)),
            size=grid,
            # Each picture has its own seed, whatever else is asked for in the same call.
            seed=int(np.random.SeedSequence([args.seed, k]).generate_state(1)[0]),
            guidance=args.guidance,
            image=Strategy(args.temperature, args.top_k, args.top_p, args.min_p, args.keep_mode),
        )
        for prompt in prompts
        for k in range(args.n)
    ]
    batch_size = min(args.batch_size, len(requests) * args.best_of)
    if towers:
        turns, _ = sampler.best_of(model, requests, args.best_of, towers.score, batch_size)
    else:
        turns = model.generate(requests, batch_size)
    pictures = [_enlarged(straight(turn.parts[0].pixels), args.scale) for turn in turns]
    print(write(pictures, args.n))


def _prepare(out):
    """Checks that `out` can be written -> function (pictures, columns) that writes there."""
    if out.suffix:
        if not out.parent.is_dir():
            raise FileNotFoundError(f"cannot write {out}: the folder {out.parent} does not exist")
        if out.suffix.lower() not in Image.registered_extensions():
            raise ValueError(f"cannot write {out}: {out.suffix!r} is no image format; use .png")
        existed = out.exists()
        with out.open("ab"):  # raises where it may not be written
            pass
        if not existed:  # a run that fails leaves no empty picture
            out.unlink()

        def sheet(pictures, columns):
            height, width = np.max([p.shape[:2] for p in pictures], axis=0)
            rows = -(-len(pictures) // columns)
            channels = pictures[0].shape[
                2
            ]  # RGBA where the tokenizer has an alpha, with a clear sheet around
            canvas = np.full(
                (rows * height, columns * width, channels), 255 if channels == 3 else 0, np.uint8
            )
            for i, p in enumerate(pictures):
                y, x = divmod(i, columns)
                canvas[y * height : y * height + p.shape[0], x * width : x * width + p.shape[1]] = p
            sheet = Image.fromarray(canvas)
            if channels == 4 and out.suffix.lower() not in (".png", ".webp"):
                sheet = Image.alpha_composite(Image.new("RGBA", sheet.size, "white"), sheet).convert("RGB")
            sheet.save(out)
            return out

        return sheet
    out.mkdir(parents=True, exist_ok=True)

    def files(pictures, columns):
        for i, p in enumerate(pictures):
            Image.fromarray(p).save(out / f"{i // columns:05d}-{i % columns}.png")
        return out

    return files


def _enlarged(pixels, scale):
    return pixels.repeat(scale, axis=0).repeat(scale, axis=1)
