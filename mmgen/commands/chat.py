"""`mmgen chat --checkpoint DIR`: a dialogue in the terminal, text and images in and out."""

import argparse
import base64
import contextlib
import io
import json
import os
import sys
import threading
from pathlib import Path

import numpy as np
from PIL import Image as Pillow

from mmgen.commands.common import (
    add_refiner_flags,
    add_safety_flags,
    add_sampler_flags,
    add_sampling_flags,
    grid_of,
    load_sampler,
    picture_for,
    printable,
    safety_from,
    sampling_options,
    signer_from,
    size,
    with_defaults,
    with_refiner,
)
from mmgen.data import files
from mmgen.data.images import straight
from mmgen.document import Document, Image, Refusal, Text, Turn
from mmgen.runtime import hardware
from mmgen.sampling.dialogue import Dialogue

HELP = """What is typed is said to the model. Lines that begin with / are for this program:
  /image FILE    show this image with what is said next; /image alone drops those
  /undo          forget the last question and its answer
  /seed N        of all answers to come; /undo and the same words then draw something else
  /size 32x32    of pictures to come, in pixels; /size alone lets the model choose
  /output KIND   image, text, or any (the model chooses)
  /save [FILE]   the dialogue as JSON, which `mmgen chat --resume FILE` goes on with
  /quit          or Ctrl-D; Ctrl-C stops an answer and forgets the question"""
EVERY = 8  # tokens after which what there is of an answer is shown


def main(argv):
    """A dialogue with a model in the terminal. Images are saved in --out and, where the terminal can, shown."""
    parser = argparse.ArgumentParser(
        "mmgen chat", description=main.__doc__, epilog="In the dialogue, /help helps."
    )
    add_sampler_flags(parser)
    add_refiner_flags(parser)
    parser.add_argument("--out", default="chat", metavar="DIR", help="folder of the images; made")
    parser.add_argument("--resume", metavar="FILE", help="a dialogue that /save wrote")
    parser.add_argument("--system", help="what the model is told before the dialogue")
    parser.add_argument("--output", choices=("image", "text", "any"), default="any")
    parser.add_argument(
        "--size",
        type=size,
        help="WIDTHxHEIGHT of pictures in pixels, before --upscale (default: the model chooses)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--show", choices=("auto", "kitty", "iterm", "blocks", "none"), default="auto",
        help="how images appear in the terminal",
    )  # fmt: skip
    add_sampling_flags(parser)
    add_safety_flags(parser)
    args = parser.parse_args(argv)
    args = with_defaults(args, args.checkpoint)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  lines can be edited and called back

    hardware.set_up()
    gate, signer = safety_from(args), signer_from(args)
    model = with_refiner(load_sampler(args), args.checkpoint, args)
    document = Document([Turn("system", [Text(args.system)])] if args.system else [])
    dialogue = Dialogue(model, document, args.seed, output=args.output, **sampling_options(args))
    if model.refuses:
        dialogue.options["refusals"] = gate.refusal_bias
    if args.size:
        dialogue.options["size"] = grid_of(args.size, model)
    if args.resume and args.system:
        raise ValueError("--system is said before a dialogue; the one of --resume has begun")
    if args.resume:
        dialogue.document, dialogue.seed = read_dialogue(args.resume, model)
        print(f"{dialogue.turns} answers of {args.resume}")
    if sys.stdin.isatty():  # somebody reads and types first
        dialogue.warm()
        threading.Thread(target=_warm, args=(gate,)).start()
    way = terminal() if args.show == "auto" else args.show
    shown = []  # images for the next question
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return _leave(dialogue)
        command, _, rest = line.partition(" ")
        if command in ("/quit", "/exit"):
            return _leave(dialogue)
        turns = dialogue.turns
        try:
            if line.startswith("/"):
                obey(command, rest.strip(), dialogue, shown, out, signer)
            elif line or shown:
                answer(dialogue, [*shown, *([Text(line)] if line else [])], out, way, gate, signer)
                shown.clear()
        except KeyboardInterrupt:
            if dialogue.turns > turns:
                dialogue.rewind(turns)
            print("\n! stopped; the question is forgotten")
        except (ValueError, OSError, FloatingPointError) as error:  # the dialogue is as it was
            print(f"! {error}")


def _warm(gate):
    with contextlib.suppress(Exception):  # it is told when a picture is to be looked at
        gate.warm()


def _leave(dialogue):
    """Ends at once where an orderly end would wait for the compiler: all that is to be kept is written."""
    if dialogue.warming:
        sys.stdout.flush()
        os._exit(0)


def obey(command, rest, dialogue, shown, out, signer):
    """One line that begins with /."""
    model = dialogue.sampler
    if command == "/image" and not rest:
        shown.clear()
    elif command == "/image":
        shown.append(picture_for(os.path.expanduser(rest), model, signer=signer))
        height, width = shown[-1].pixels.shape[:2]
        print(f"an image of {width}x{height} goes with what is said next")
    elif command == "/undo":
        if not dialogue.turns:
            raise ValueError("there is nothing to undo")
        dialogue.rewind(dialogue.turns - 1)
        print(f"back to {dialogue.turns} answers")
    elif command == "/seed":
        dialogue.seed = int(rest)
        print(f"seed {dialogue.seed}")
    elif command == "/size":
        try:
            dialogue.options["size"] = grid_of(size(rest), model) if rest else None
        except argparse.ArgumentTypeError as error:
            raise ValueError(str(error)) from None
    elif command == "/output":
        if rest not in ("image", "text", "any"):
            raise ValueError(f"/output is image, text or any; found {rest!r}")
        dialogue.options["output"] = rest
    elif command == "/save":
        path = Path(rest) if rest else out / "dialogue.json"
        write_dialogue(path, dialogue)
        print(path)
    else:
        print(HELP)


def answer(dialogue, parts, out, way, gate, signer):
    """Asks, shows the answer as it comes, and saves its images, signed if there is a signer. What the gate does not let through is not asked."""
    turns, cut = dialogue.turns, dialogue.cut
    check(gate.prompt(Document((*dialogue.document.turns, Turn("user", parts)))))
    if images := [part.pixels for part in parts if isinstance(part, Image)]:
        check(gate.shown(images, edited=dialogue.options["output"] != "text"))
    written = ""  # of the answer's text, on the screen
    live = sys.stdout.isatty()
    for turn, done in dialogue.stream(*parts, every=EVERY):
        words = "".join(part.text for part in turn.parts if isinstance(part, Text))
        # Bytes that are no character, or half of one that the next piece completes, are not in the final text.
        words = printable(words.replace("\N{REPLACEMENT CHARACTER}", ""))
        print(words[len(written) :], end="", flush=True)
        written = words
        begun = [part for part in turn.parts if isinstance(part, Image) and part.codes is None]
        if live and begun:
            print("\r(drawing) ", end="", flush=True)
    seen = gate.answered(turn)
    if not seen.allowed and seen.layer != "model":  # as if it had not been asked; a refusal is an answer
        dialogue.rewind(turns)
        check(seen)
    print("\r" if live and not written else "\n" if written else "", end="")
    for part in turn.parts:
        if isinstance(part, Image):
            names = (
                out / f"turn-{dialogue.turns:03d}{n}.png" for n in ("", *(f"-{k}" for k in range(2, 10_000)))
            )
            name = next(name for name in names if not name.exists())  # what was undone stays
            pixels = straight(part.pixels)
            data = png(signer.mark(pixels) if signer else pixels)
            if signer:
                recipe = {
                    "seed": dialogue.seed,
                    "step": dialogue.sampler.step,
                    "tokenizer": dialogue.sampler.tokenizer.hash,
                }
                data = signer.sign(data, ".png", recipe | {"gate": gate.about}, codes=part.codes)
            files.write(str(name), data)
            print(drawn(pixels, data, way), end="")
            print(name)
    if dialogue.cut and not cut:
        print(
            f"(this model reads {dialogue.sampler.longest} tokens at once: from here on it does not see the oldest of this dialogue)"
        )


def check(decision):
    """ValueError, with what to say, where the gate lets nothing through."""
    if not decision.allowed:
        raise ValueError(f"{decision.reason}" + (f" {decision.offer}" if decision.offer else ""))


def write_dialogue(path, dialogue):
    """The dialogue as JSON: its turns, with the codes of images, and the seed."""
    part = lambda p: (
        {"text": p.text}
        if isinstance(p, Text)
        else {"refusal": p.category}
        if isinstance(p, Refusal)
        else {"codes": p.codes.tolist()}
    )
    turns = [{"role": t.role, "parts": [part(p) for p in t.parts]} for t in dialogue.document.turns]
    about = {"tokenizer": dialogue.sampler.tokenizer.hash, "seed": dialogue.seed, "turns": turns}
    files.write(str(path), json.dumps(about, ensure_ascii=False).encode())


def read_dialogue(path, model):
    """What `write_dialogue` wrote -> document, seed. ValueError for anything else, or codes of another tokenizer."""
    try:
        found = json.loads(Path(path).read_text("utf-8"))
        part = lambda p: (
            Text(p["text"])
            if "text" in p
            else Refusal(p["refusal"])
            if "refusal" in p
            else Image(codes=np.array(p["codes"]))
        )
        turns = [Turn(turn["role"], [part(p) for p in turn["parts"]]) for turn in found["turns"]]
        tokenizer, seed = found["tokenizer"], int(found["seed"])
        if tokenizer == model.tokenizer.hash:
            model.grammar.encode(Document(turns), model.text)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(
            f"{path} is no dialogue that /save wrote: {type(error).__name__}: {error}"
        ) from error
    if tokenizer != model.tokenizer.hash:
        raise ValueError(f"{path} has codes of tokenizer {tokenizer}; this model's is {model.tokenizer.hash}")
    return Document(turns), seed


def terminal():
    """How this terminal can show images."""
    environment = os.environ
    if not sys.stdout.isatty():
        return "none"
    if "KITTY_WINDOW_ID" in environment or environment.get("TERM_PROGRAM") == "ghostty":
        return "kitty"
    if environment.get("TERM_PROGRAM") in ("iTerm.app", "WezTerm"):
        return "iterm"
    return "blocks" if environment.get("COLORTERM") in ("truecolor", "24bit") else "none"


def drawn(pixels, data, way):
    """The characters that show an image, given as pixels and as the bytes of a PNG: kitty's graphics protocol,
    iTerm2's inline images, or two pixels a character in 24-bit colour."""
    if way == "kitty":
        text = base64.standard_b64encode(data).decode()
        chunks = [text[i : i + 4096] for i in range(0, len(text), 4096)]
        more = [1] * (len(chunks) - 1) + [0]
        head = ["a=T,f=100,"] + [""] * (len(chunks) - 1)
        return "".join(f"\033_G{h}m={m};{c}\033\\" for h, m, c in zip(head, more, chunks)) + "\n"
    if way == "iterm":
        text = base64.standard_b64encode(data).decode()
        return f"\033]1337;File=inline=1;size={len(data)}:{text}\a\n"
    if way == "none":
        return ""
    image = Pillow.fromarray(pixels[..., :3])
    image.thumbnail((64, 64))
    rows = np.asarray(image)
    if len(rows) % 2:
        rows = np.concatenate([rows, rows[-1:]])
    color = lambda top, bottom: "\033[38;2;{};{};{}m\033[48;2;{};{};{}m\u2580".format(*top, *bottom)
    pairs = zip(rows[::2].tolist(), rows[1::2].tolist())
    return "".join("".join(map(color, top, bottom)) + "\033[0m\n" for top, bottom in pairs)


def png(pixels):
    data = io.BytesIO()
    Pillow.fromarray(pixels).save(data, "PNG")
    return data.getvalue()
