"""`mmgen sample --checkpoint DIR --prompt "..." --n 4 --out out.png`."""

import argparse
import copy
import hashlib
import io
import json
import threading
from pathlib import Path

import jax
import numpy as np
from PIL import Image
from tqdm import tqdm

import mmgen
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
from mmgen.document import Document, Text, Turn
from mmgen.models.contrastive import load_towers
from mmgen.runtime import hardware
from mmgen.runtime.released import towers_folder
from mmgen.sampling import sampler
from mmgen.sampling.best import best_of

# What a line of a --prompts FILE.jsonl may say for itself; what it does not say, the flags do.
NUMBER = (int, float)
LINE = {
    "prompt": str, "images": list, "output": str, "size": (str, type(None)), "n": int, "number": int, "seed": int,
    "guidance": NUMBER, "image_guidance": NUMBER, "guidance_interval": list, "guidance_rescale": NUMBER,
    "temperature": NUMBER, "top_k": int, "top_p": NUMBER, "min_p": NUMBER, "keep_mode": bool,
    "text_temperature": NUMBER, "text_top_p": NUMBER, "max_tokens": (int, type(None)), "stop": list,
}  # fmt: skip
# What of a note must be the same for an answer to be that of this request.
SAME = (
    "step", "config", "grammar", "text", "tokenizer", "int8", "int8_cache", "best_of", "towers", "scale", "refined",
    "shown", "request",
)  # fmt: skip
MOST = 100_000  # answers that one line may ask for


def main(argv):
    """Draws pictures for prompts, or answers them: a contact sheet (--out FILE.png), or files of each answer (--out
    FOLDER). JSON beside them says all that is needed to draw them again; a folder is gone on with where it stopped."""
    parser = argparse.ArgumentParser("mmgen sample", description=main.__doc__)
    add_sampler_flags(parser)
    parser.add_argument("--prompt", action="append", default=[], help="what to draw; may be repeated")
    parser.add_argument(
        "--prompts", metavar="FILE",
        help="one prompt a line, or .jsonl (or the .json beside a picture): a line an object with any of "
        + ", ".join(LINE),
    )  # fmt: skip
    parser.add_argument(
        "--image",
        action="append",
        default=[],
        metavar="FILE",
        help="shown before the prompt; may be repeated",
    )
    parser.add_argument("--output", choices=("image", "text", "any"), default="image")
    parser.add_argument("--n", type=int, default=1, help="answers a prompt")
    parser.add_argument(
        "--size",
        type=size,
        help="WIDTHxHEIGHT in pixels, before --upscale (default: the model chooses; images in stay as they are)",
    )
    parser.add_argument("--seed", type=int, default=0)
    add_sampling_flags(parser)
    parser.add_argument("--max-tokens", type=int, help="the most that an answer takes")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends a text answer")
    parser.add_argument("--batch-size", type=int, help="answers at a time (default: all, at most 16)")
    parser.add_argument("--best-of", type=int, default=1, help="draw so many for each answer, keep the best")
    parser.add_argument(
        "--towers",
        type=towers_folder,
        metavar="DIR",
        help="workdir of a contrastive run, or `reference`, which says what is best; else the likelihood",
    )
    parser.add_argument("--by-drawing", action="store_true",
        help="best are the words from which the model itself would likeliest draw the picture that is shown; for descriptions")  # fmt: skip
    add_refiner_flags(parser)
    add_safety_flags(parser)
    parser.add_argument("--scale", type=int, default=1, help="enlarge pixels this many times in the files")
    parser.add_argument("--out", default="out.png", help="FILE.png for a contact sheet, or a folder")
    args = parser.parse_args(argv)
    args = with_defaults(args, args.checkpoint)

    lines = [{"prompt": prompt} for prompt in args.prompt] + (
        read_lines(args.prompts) if args.prompts else []
    )
    lines = lines or ([{}] if args.image else [])
    asked = [one for place, line in enumerate(lines) for one in expand(place, line, args)]
    if not asked:
        raise ValueError(
            "nothing to draw: expected --prompt TEXT or a --prompts FILE with a line in it, and --n >= 1"
        )
    if min(args.best_of, 1 if args.batch_size is None else args.batch_size, args.scale) < 1:
        raise ValueError("expected --best-of, --batch-size and --scale of at least 1")
    if args.towers and args.best_of == 1:
        raise ValueError("--towers says which is the best of several: give --best-of N of at least 2 too")
    if args.by_drawing and (args.best_of == 1 or args.towers):
        raise ValueError(
            "--by-drawing says which is the best of several: give --best-of N of at least 2 too, and no --towers"
        )
    out = Path(args.out)
    check_writable(out)  # before the work: an unwritable path should cost nothing
    sheet = bool(out.suffix)
    if sheet and any(one.output != "image" for one in asked):
        raise ValueError("a contact sheet is of pictures: give --out a folder for answers with text")

    if sheet and args.provenance:
        from mmgen.safety.provenance import FORMATS

        if out.suffix.lower() not in FORMATS:
            raise ValueError(
                f"{out.suffix} files cannot be signed: choose one of {', '.join(FORMATS)}, or --no-provenance"
            )
    hardware.set_up()
    gate, signer = safety_from(args), signer_from(args)
    looks = threading.Thread(target=gate.warm)  # compiles beside all that comes before a picture is looked at
    if args.tensor == 1:  # else programs are traced for a mesh meanwhile
        looks.start()
    model = with_refiner(load_sampler(args), args.checkpoint, args)
    if args.batch_size is None:
        args.batch_size = min(16, len(asked) * args.best_of)
    about = {
        "mmgen": mmgen.__version__, "jax": jax.__version__, "device": jax.devices()[0].device_kind,
        "checkpoint": str(Path(args.checkpoint).absolute()), "step": model.step,
        "config": hashlib.sha256(model.config.to_json(sort_keys=True).encode()).hexdigest()[:12],
        "grammar": model.grammar.hash, "text": model.text.hash, "tokenizer": model.tokenizer.hash,
        "int8": args.int8, "int8_cache": args.int8_cache, "tensor": args.tensor, "batch_size": args.batch_size,
        "best_of": args.best_of, "towers": "drawing" if args.by_drawing else args.towers, "scale": args.scale,
        "refiner": args.refiner, "refined": model.refining and model.refining.about,
        "gate": gate.about,
    }  # fmt: skip
    shown = {}  # (file, size) -> Image
    for one in asked:
        one.refusal_bias = gate.refusal_bias
    requests = [request_of(one, model, shown, signer) for one in asked]
    notes = [
        about | {"request": {name: getattr(one, name) for name in LINE}, "shown": hashes(request)}
        for one, request in zip(asked, requests)
    ]
    decisions = [passed(gate, request) for request in requests]
    for one, note, decision in zip(asked, notes, decisions):
        if not decision.allowed:
            refuse(one, note, decision)
    # What cannot be noted is an error before anything is drawn.
    json.dumps(notes, ensure_ascii=False).encode()
    names = [f"{one.place:05d}-{one.number}" for one in asked]
    todo = [
        i
        for i in range(len(asked))
        if decisions[i].allowed and (sheet or not is_there(out / names[i], notes[i]))
    ]
    if not sheet:
        for i in range(len(asked)):
            if not decisions[i].allowed and not is_there(out / names[i], notes[i]):
                write_json(out / f"{names[i]}.json", notes[i] | {"answer": []})
    elif not todo:
        return 3
    requests = [requests[i] for i in todo]
    turns, done = {}, len(asked) - len(todo)
    if looks.ident:
        looks.join()
    try:
        with tqdm(total=len(asked), initial=done, desc="sample", disable=None, leave=False) as bar:
            for k, turn in answers(model, requests, args):
                seen = gate.answered(turn)
                if not seen.allowed:
                    decisions[todo[k]] = seen
                    refuse(asked[todo[k]], notes[todo[k]], seen)
                    if not sheet:
                        write_json(out / f"{names[todo[k]]}.json", notes[todo[k]] | {"answer": []})
                elif sheet:
                    turns[todo[k]] = turn
                else:
                    write_answer(out / names[todo[k]], turn, notes[todo[k]], args.scale, signer)
                done += 1
                bar.update()
    except KeyboardInterrupt:
        if sheet and turns:
            write_sheet(out, turns, asked, notes, args.scale, signer)
        rest = "" if sheet else "; the same command goes on from there"
        print(f"\ninterrupted: {done} of {len(asked)} answers are in {out}{rest}")
        return 130
    if sheet and turns:
        write_sheet(out, turns, asked, notes, args.scale, signer)
    if turns or not sheet:
        print(out)
    return 0 if all(decision.allowed for decision in decisions) else 3


def passed(gate, request):
    """The gate's decision on a request, on its words and then on what it shows."""
    words = gate.prompt(request.document)
    shown = [image.pixels for image in request.document.images()]
    return words if not words.allowed or not shown else gate.shown(shown, edited=request.output != "text")


def refuse(one, note, decision):
    """Says, and notes, that an answer is not given."""
    note["refused"] = decision.to_dict()
    print(
        f"not shown, prompt {one.place + 1}: {decision.reason}"
        + (f" {decision.offer}" if decision.offer else "")
    )


def read_lines(path):
    """The lines of a file of prompts: dicts with keys of `LINE`. A .json is what this command has written."""
    text = Path(path).read_text("utf-8-sig")
    if Path(path).suffix not in (".json", ".jsonl"):
        return [{"prompt": line.strip()} for line in text.splitlines() if line.strip()]
    # Not splitlines: JSON may have other line separators within its strings.
    lines = [(0, text)] if Path(path).suffix == ".json" else enumerate(text.split("\n"), 1)
    found = []
    for number, line in lines:
        if line.strip():
            where = f"{path}, line {number}" if number else path
            try:
                line = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where}: expected JSON, found {error}") from error
            found += [checked(one, where) for one in (line if isinstance(line, list) else [line])]
    return found


def checked(line, where):
    """The line, or the "request" in it; ValueError for what no line may say."""
    line = line.get("request", line) if isinstance(line, dict) else line
    if not isinstance(line, dict) or line.keys() - LINE.keys():
        found = sorted(line.keys() - LINE.keys()) if isinstance(line, dict) else type(line).__name__
        raise ValueError(f"{where}: expected an object with any of {', '.join(LINE)}; found {found}")
    is_a = lambda value, kind: isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    for name, value in line.items():
        right = is_a(value, LINE[name])
        if right and isinstance(value, list):
            pair = name == "guidance_interval"
            right = all(is_a(each, NUMBER if pair else str) for each in value) and (
                len(value) == 2 or not pair
            )
        if right and is_a(value, NUMBER):
            right = abs(value) < 2**63 and (name != "n" or value <= MOST)
        if not right:
            raise ValueError(f"{where}: {name} cannot be {str(value)[:80]!r}")
    return line


def expand(place, line, args):
    """A namespace for each answer that a line asks for: the flags' values, and the line's over them."""
    one = copy.copy(args)
    one.place, one.prompt, one.images, one.number = place, "", args.image, 0
    one.size = args.size and "{}x{}".format(*args.size)
    vars(one).update(line)
    found = [copy.copy(one) for _ in range(one.n)]
    for k, each in enumerate(found):
        each.column, each.number, each.n = k, one.number + k, 1
        each.guidance_interval = list(one.guidance_interval)
    return found


def request_of(one, model, pictures, signer=None):
    """The `Request` of one answer. ValueError, which names its line, where it cannot be answered. `pictures` keeps
    those that were read, without the mark of the signer."""
    try:
        grid = grid_of(size(one.size), model) if one.size else None
        for path in one.images:
            if (path, grid) not in pictures:
                turn = Turn("user", (picture_for(path, model, grid, signer),))
                pictures[path, grid] = model.encoded(Document((turn,))).images()[0]
        shown = [pictures[path, grid] for path in one.images]
        words = [Text(one.prompt)] if one.prompt else []
        request = sampler.Request(
            document=Document((Turn("user", (*shown, *words)),)),
            output=one.output,
            size=grid if one.output != "text" else None,
            # Each answer has its own seed, whatever else is asked for in the same call.
            seed=sampler.draw_seed(one.seed, one.number),
            max_tokens=one.max_tokens,
            stop=tuple(one.stop),
            refusals=one.refusal_bias if model.refuses else None,
            **sampling_options(one),
        )
        model.room(request, model.prompts(request)[0])
        return request
    except (ValueError, OSError, argparse.ArgumentTypeError) as error:
        raise ValueError(f"prompt {one.place + 1}, {one.prompt[:40]!r}: {error}") from error


def hashes(request):
    """What the images of a request are known by, wherever their files lie."""
    return [hashlib.sha256(image.codes.tobytes()).hexdigest()[:12] for image in request.document.images()]


def answers(model, requests, args):
    """(index of the request, turn) as they come."""
    if not requests:
        return
    if args.best_of == 1:
        yield from ((k, turn) for k, turn, _ in model.stream(requests, args.batch_size))
        return
    score = "drawing" if args.by_drawing else load_towers(args.towers).score if args.towers else None
    at_once = max(args.batch_size // args.best_of, 1)
    for start in range(0, len(requests), at_once):
        part = requests[start : start + at_once]
        turns, _ = best_of(model, part, args.best_of, score, args.batch_size)
        yield from enumerate(turns, start)


def check_writable(out):
    """Raises where `out`, a picture or a folder, cannot be written; makes the folder."""
    if not out.suffix:
        out.mkdir(parents=True, exist_ok=True)
        return
    if not out.parent.is_dir():
        raise FileNotFoundError(f"cannot write {out}: the folder {out.parent} does not exist")
    try:
        encoded(np.zeros((1, 1, 3), np.uint8), out.suffix)
    except (KeyError, OSError) as error:
        raise ValueError(f"cannot write {out}: {out.suffix!r} is no image format; use .png") from error
    beside = out.with_suffix(".json")
    if beside.is_dir():
        raise ValueError(f"cannot write {beside}: a folder has this name")
    if beside.exists() and not is_note(beside):
        raise ValueError(
            f"{beside}, which this command has not written, would be replaced: choose another --out"
        )
    existed = out.exists()
    with out.open("ab"):  # raises where it may not be written
        pass
    if not existed:  # a run that fails leaves no empty picture
        out.unlink()


def is_note(path):
    """Whether a JSON file is what `write_sheet` leaves beside a sheet."""
    try:
        return all("request" in one and "answer" in one for one in json.loads(path.read_text("utf-8")))
    except (ValueError, TypeError, RecursionError):
        return False


def is_there(path, note):
    """Whether this very answer is written already, and whole. ValueError where another one is."""
    beside = path.with_name(path.name + ".json")
    try:
        found = json.loads(beside.read_text("utf-8"))
        written = [path.with_name(part["image"]) for part in found["answer"] if "image" in part]
    except FileNotFoundError:
        return False
    except (ValueError, KeyError, TypeError, RecursionError):  # cut short, say by a loss of power
        return False
    different = [name for name in SAME if found.get(name) != note[name]]
    if different:
        raise ValueError(
            f"{beside} is of another {' and '.join(different)}: choose another --out, or remove what is there"
        )
    return all(file.exists() for file in written)


def write_answer(path, turn, note, scale, signer=None):
    """PATH.png (PATH.1.png, ...) for images, PATH.txt for text, and PATH.json last: with it the answer is whole."""
    answer, pictures = [], 0
    for part in turn.parts:
        if isinstance(part, Text):
            answer.append({"text": part.text})
            continue
        name = f"{path.name}{f'.{pictures}' if pictures else ''}.png"
        data = file_of(straight(part.pixels), ".png", scale, note, signer, part.codes)
        files.write(str(path.with_name(name)), data)
        answer.append({"image": name, "codes": part.codes.tolist()})
        pictures += 1
    words = "\n".join(part["text"] for part in answer if "text" in part)
    if words:
        files.write(str(path.with_name(path.name + ".txt")), words.encode())
    write_json(path.with_name(path.name + ".json"), note | {"answer": answer})
    if words:
        print(printable(words))


def write_sheet(out, turns, asked, notes, scale, signer=None):
    """The pictures so far on one sheet, a row a line; and beside it a list of what each is."""
    pictures = {i: straight(turn.parts[0].pixels) for i, turn in turns.items()}
    height, width = np.max([picture.shape[:2] for picture in pictures.values()], axis=0)
    rows, columns = (1 + max(getattr(one, name) for one in asked) for name in ("place", "column"))
    # RGBA where the tokenizer has an alpha, and then a clear sheet around.
    channels = next(iter(pictures.values())).shape[2]
    canvas = np.full((rows * height, columns * width, channels), 255 if channels == 3 else 0, np.uint8)
    for i, picture in pictures.items():
        y, x = asked[i].place * height, asked[i].column * width
        canvas[y : y + picture.shape[0], x : x + picture.shape[1]] = picture
    exact = len(asked) == 1 and out.suffix.lower() == ".png"  # the picture itself
    codes = turns[0].parts[0].codes if exact else None
    files.write(str(out), file_of(canvas, out.suffix, scale, notes[min(turns)], signer, codes))
    written = [notes[i] | {"answer": [{"codes": turns[i].parts[0].codes.tolist()}]} for i in sorted(turns)]
    write_json(out.with_suffix(".json"), written)


def encoded(pixels, suffix):
    """The bytes of an image file."""
    image, data = Image.fromarray(pixels), io.BytesIO()
    if pixels.shape[2] == 4 and suffix.lower() not in (".png", ".webp"):
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    image.save(data, Image.registered_extensions()[suffix.lower()])
    return data.getvalue()


def file_of(pixels, suffix, scale, note, signer, codes=None):
    """The bytes of an image file, enlarged; with a signer marked and signed. What is signed names no words that were asked, but the codes
    of one picture."""
    pixels = pixels.repeat(scale, axis=0).repeat(scale, axis=1)
    if signer is None:
        return encoded(pixels, suffix)
    recipe = {name: note[name] for name in ("mmgen", "step", "config", "tokenizer", "gate")} | {
        "seed": note["request"]["seed"]
    }
    return signer.sign(encoded(signer.mark(pixels), suffix), suffix, recipe, codes=codes)


def write_json(path, value):
    files.write(str(path), json.dumps(value, ensure_ascii=False).encode())
