"""Flags that several commands share."""

import argparse
import collections
import json
import math
import sys
from pathlib import Path

from mmgen.data import files, images
from mmgen.data.sources import KINDS, Several, open_source
from mmgen.runtime import checkpoint, hardware
from mmgen.runtime.released import model_folder
from mmgen.safety.gate import Off, Safety
from mmgen.safety.images import ImageLayer, Onnx
from mmgen.safety.policy import Policy
from mmgen.sampling import sampler
from mmgen.sampling.strategies import Strategy


def printable(text):
    """A model's text without what would steer a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def size(text):
    """'WIDTHxHEIGHT' -> (width, height)."""
    width, cross, height = text.lower().partition("x")
    if not (cross and width.isdigit() and height.isdigit() and int(width) and int(height)):
        raise argparse.ArgumentTypeError(f"a size is written WIDTHxHEIGHT, as in 32x32; found {text!r}")
    return int(width), int(height)


def share(text):
    """A number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a share from 0 to 1, as in 0.1; found {text!r}")
    return value


def rule(text):
    """'FIELD=VALUE' -> (field, [values that are meant]): 512 may be a number or a text."""
    field, equals, value = text.partition("=")
    if not (field and equals):
        raise argparse.ArgumentTypeError(f"expected FIELD=VALUE, as in group=Food; found {text!r}")
    try:
        return field, [value, json.loads(value)]
    except ValueError:
        return field, [value]


def add_source_flags(parser, required=True):
    add = parser.add_argument
    add("--source", required=required, action="append", metavar="[NAME=]SPEC",
        help=f"{' '.join(KINDS.values())}; given again, sources follow one another")  # fmt: skip
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--size", type=size, default=(32, 32), metavar="WIDTHxHEIGHT",
                       help="of its images, in pixels; 32x32 if nothing is said")  # fmt: skip
    sizes.add_argument("--buckets", type=size, metavar="WIDTHxHEIGHT",
                       help="images keep about their aspect ratio, in at most this area")  # fmt: skip
    add("--documents", type=int, help="how many of each source (a world has no end)")
    add("--seed", type=int, default=0)
    add("--languages", default="en", help="of the world, comma-separated: en,zh")
    add("--split", choices=("train", "test"), help="one side of a source's stable split")
    add("--split-by", default="key", help="field whose equal values stay together")
    add("--holdout", type=share, default=0.1, help="share of the test side")
    add("--only", type=rule, action="append", default=[], metavar="FIELD=VALUE",
        help="documents with this; given again for one field, any of the values")  # fmt: skip
    add("--exclude", type=rule, action="append", default=[], metavar="FIELD=VALUE", help="documents without")
    add("--data-dir", help="folder of TFDS data sets")
    add("--max-chars", type=int, default=2000, help="characters a document of plain text may have")
    add("--max-bad", type=share, default=0.1, help="share of bad documents above which a run gives up")


def source_from(args, multiple=1, max_side=None, **options):
    """The source that the flags name, or Several. `multiple` is the patch of its tokenizer and `max_side` its
    largest image side, both in pixels; images keep to them. `options` are more of `open_source`."""
    if args.buckets:
        width, height = args.buckets
        images_at = images.Buckets(width * height, multiple=multiple, max_side=max_side)
    else:
        images_at = args.size
        for side in images_at:
            if side % multiple or (max_side and side > max_side):
                most = f" and at most {max_side}" if max_side else ""
                found = "x".join(map(str, images_at))
                raise ValueError(f"--size {found}: both sides must be multiples of {multiple}{most}")
    sources = [
        open_source(
            spec,
            images_at,
            args.seed,
            documents=args.documents,
            languages=args.languages.split(","),
            split=args.split,
            split_by=args.split_by,
            holdout=args.holdout,
            only=_rules(args.only),
            exclude=_rules(args.exclude),
            data_dir=args.data_dir,
            max_chars=args.max_chars,
            **options,
        )
        for spec in args.source
    ]
    return sources[0] if len(sources) == 1 else Several(sources)


def _rules(pairs):
    rules = collections.defaultdict(list)
    for field, values in pairs:
        rules[field] += values
    return rules


def add_sampling_flags(parser):
    """Those of `sampling_options`, for image codes and, with --text-..., for text."""
    add = parser.add_argument
    add("--guidance", type=float, default=1.5, help="above 1: nearer to what the text says")
    add("--image-guidance", type=float, default=1.0, help="above 1: nearer to the images of the document")
    add("--guidance-interval", type=share, nargs=2, default=(0.0, 1.0), metavar=("FROM", "TO"),
        help="shares of an image between which there is guidance")  # fmt: skip
    add(
        "--guidance-rescale",
        type=share,
        default=0.0,
        help="take back the spread that guidance adds to logits",
    )
    add("--temperature", type=float,
        help="of image codes; 0 is greedy (default: config.sampling of the checkpoint, or 0.1)")  # fmt: skip
    add("--top-k", type=int, default=0)
    add("--top-p", type=float, default=1.0)
    add("--min-p", type=float, default=0.0)
    add("--keep-mode", action=argparse.BooleanOptionalAction, default=True,
        help="let a temperature below 1 begin objects as often as was learned")  # fmt: skip
    add("--text-temperature", type=float, default=0.7, help="of text; 0 is greedy")
    add("--text-top-p", type=float, default=1.0)


def with_defaults(args, workdir):
    """args, and where its flags leave the temperature open that of a run: its config's `sampling`."""
    if args.temperature is not None:
        return args
    own = checkpoint.read_config(workdir).get("sampling", {})
    return argparse.Namespace(**vars(args) | {"temperature": own.get("temperature", 0.1)})


def sampling_options(args):
    """The options of `Request` that `add_sampling_flags` asks for; args may be anything with these names."""
    return dict(
        guidance=args.guidance,
        image_guidance=args.image_guidance,
        guidance_interval=tuple(args.guidance_interval),
        guidance_rescale=args.guidance_rescale,
        image=Strategy(args.temperature, args.top_k, args.top_p, args.min_p, args.keep_mode),
        text=Strategy(args.text_temperature, top_p=args.text_top_p),
    )


def add_sampler_flags(parser):
    """How a checkpoint is loaded for sampling."""
    add = parser.add_argument
    add(
        "--checkpoint", type=model_folder, default="reference", metavar="DIR",
        help="workdir of a transformer run; left out, or `reference`: the model that comes with mmgen (docs/reference.md)",
    )  # fmt: skip
    add_loading_flags(parser)


def add_loading_flags(parser):
    """In how many bits and on how many devices; `loading_options` reads them."""
    add = parser.add_argument
    add("--int8", action="store_true", help="weights of the layers in 8 bits")
    add("--int8-cache", action="store_true", help="keys and values in 8 bits")
    add("--tensor", type=int, default=1, help="devices that share the model")


def loading_options(args):
    """What `add_loading_flags` asks for, as `sampler.load` takes it."""
    return dict(int8=args.int8, int8_cache=args.int8_cache, tensor=args.tensor)


def add_refiner_flags(parser):
    """How codes become pixels; `with_refiner` reads them."""
    add = parser.add_argument
    add("--refine", type=int, metavar="STEPS", help="pixels by a refiner in so many steps (docs/refiner.md)")
    add("--upscale", type=int, choices=(1, 2, 4), help="by one that enlarges so many times")
    add(
        "--refiner",
        default="",
        metavar="DIR",
        help="workdir of its run; left out: DIR/refiners of the checkpoint",
    )
    add(
        "--refine-guidance",
        type=float,
        default=1.0,
        help="above 1: more of the detail that the codes ask for",
    )
    add(
        "--refine-temperature",
        type=share,
        default=0.5,
        help="of its noise, from 0 to 1: less is less detail, and less that is wrong of it (docs/refiner.md)",
    )
    add("--refine-tile", type=int, metavar="CODES", help="large images in tiles of so many codes a side")


def add_safety_flags(parser):
    """What may be drawn, and how it is signed; `safety_from` and `signer_from` read them."""
    add = parser.add_argument
    add(
        "--safety",
        default="auto",
        metavar="LEVEL",
        help="strictness: auto or low; off lets everything through, for research, and is noted in what is drawn (docs/safety.md)",
    )
    add(
        "--safety-images",
        metavar="DIR",
        help="workdir of a classifier run that looks at pictures (default: DIR/safety of the checkpoint, where there is one)",
    )
    add(
        "--blocklist",
        metavar="FILE",
        help="hashes of pictures that are not shown (mmgen tools policy blocklist)",
    )
    add(
        "--image-classifier",
        action="append",
        default=[],
        metavar="FILE.onnx",
        help="another's, with FILE.onnx.json (docs/safety.md)",
    )
    add(
        "--safety-log",
        metavar="FILE",
        help="a line of JSON for every decision, without the words that were asked",
    )
    add("--safety-log-words", action="store_true", help="the log has the words of prompts too")
    add("--keys", metavar="DIR", help="keys to sign pictures with (default: your own, made at the first use)")
    add(
        "--provenance",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="sign pictures, and put a watermark in their pixels",
    )


def safety_from(args):
    """The gate that `add_safety_flags` asks for."""
    if args.safety != "off":
        beside = Path(args.checkpoint) / "safety"
        classifier = args.safety_images or (beside if beside.exists() else None)
        look = lambda: ImageLayer(Policy(), classifier, args.blocklist, map(Onnx, args.image_classifier))
        eyes = classifier or args.blocklist or args.image_classifier
        return Safety(args.safety, args.safety_log, args.safety_log_words, images=look if eyes else None)
    print(
        "! SAFETY IS OFF: nothing that is asked or drawn is checked; what is drawn says so", file=sys.stderr
    )
    return Off(args.safety_log)


def signer_from(args):
    """The `Signer` that they ask for, or None."""
    if not args.provenance:
        return None
    # Its libraries are slow to load, and who signs nothing needs none.
    from mmgen.safety.provenance import Signer

    return Signer(args.keys)


def refiner_flags(args):
    """Those of `add_refiner_flags` that were given, as they are written."""
    left_out = {
        "refine": None,
        "upscale": None,
        "refiner": "",
        "refine_guidance": 1.0,
        "refine_temperature": 0.5,
        "refine_tile": None,
    }
    return [f"--{name.replace('_', '-')}" for name, value in left_out.items() if getattr(args, name) != value]


def with_refiner(model, workdir, args):
    """The sampler of a transformer's workdir, whose images are refined where `add_refiner_flags` ask for it."""
    given = refiner_flags(args)
    if args.refine is None and given:
        raise ValueError(f"{', '.join(given)}: for --refine STEPS, such as --refine 4: give it too")
    if args.refine is None:
        return model
    if args.refine < 1 or (args.refine_tile is not None and args.refine_tile < 1):
        raise ValueError(
            f"expected --refine and --refine-tile of at least 1, found {args.refine}, {args.refine_tile}"
        )
    if not math.isfinite(args.refine_guidance):
        raise ValueError(f"expected a finite --refine-guidance, found {args.refine_guidance}")
    model.refining = sampler.refining(
        workdir, model.tokenizer, refiner=args.refiner, upscale=args.upscale, steps=args.refine,
        guidance=args.refine_guidance, tile=args.refine_tile, temperature=args.refine_temperature,
    )  # fmt: skip
    return model


def load_sampler(args):
    """The `Sampler` that `add_sampler_flags` asks for, and a compilation cache for its programs."""
    hardware.set_up()
    return sampler.load(args.checkpoint, **loading_options(args))


def picture_for(path, model, size=None, signer=None):
    """An image file as a sampler is shown it: see `Sampler.shown`. Errors name the file."""
    background = images.ALPHA if model.tokenizer.alpha else (255, 255, 255)
    try:
        data = files.read(str(path), limit=images.Limits().max_bytes)
        pixels = images.read(data, background=background)
    except images.BadImage as error:
        raise ValueError(f"{path}: {error}") from error
    return model.shown(pixels, data, size, signer)


def grid_of(size, model):
    """(width, height) in pixels -> (height, width) in patches. ValueError where the patch does not divide them, or
    they are longer than the grammar's sides."""
    patch, most = model.tokenizer.patch, model.grammar.max_side * model.tokenizer.patch
    if any(side % patch or side > most for side in size):
        raise ValueError(
            f"--size must be a multiple of the patch, {patch}, up to {most}; found {size[0]}x{size[1]}"
        )
    return size[1] // patch, size[0] // patch
