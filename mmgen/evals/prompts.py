"""Prompt files of public benchmarks: pictures in the folders that their judges read. Nothing is judged here.

GenEval (arXiv:2310.11513) has a file of JSON lines, PartiPrompts (arXiv:2206.10789) a table; a .txt is a prompt a line.
"""

import hashlib
import io
import json
from pathlib import Path

from PIL import Image

from mmgen.data import files
from mmgen.data.images import straight
from mmgen.document import Document, Text, Turn
from mmgen.sampling.sampler import Request, draw_seed

SETTINGS = "settings.json"  # beside the folders, which have numbers for names


def read(path):
    """The lines of a prompt file as dicts, each with a "prompt": of .jsonl as they are; of .tsv its columns (of which
    one is Prompt) beside it; of .txt nothing else. ValueError, which names the line, for a bad one."""
    readers = {".jsonl": _json, ".tsv": _table, ".txt": _plain}
    kind = Path(path).suffix
    if kind not in readers:
        raise ValueError(f"{path}: expected a file of prompts that ends in {', '.join(readers)}")
    # Not splitlines, and not a csv reader: JSON may hold other line separators, and quotes in tables are meant.
    lines = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf").rstrip().split(b"\n")
    names, found = [], []
    for number, line in enumerate(lines, 1):
        try:
            line = line.removesuffix(b"\r").decode()
            if kind == ".tsv" and number == 1:
                names = _columns(line)
                continue
            record = readers[kind](line, names)
            prompt = record["prompt"] if isinstance(record, dict) and "prompt" in record else None
            if not isinstance(prompt, str) or not prompt.strip():
                raise ValueError(f"expected a prompt that is a text and not empty, found {prompt!r}")
            json.dumps(record, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        found.append(record)
    if not found:
        raise ValueError(f"{path}: expected at least one prompt")
    return found


def _json(line, _):
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"expected a JSON object with a prompt, found {line[:60]!r} ({error})") from error


def _columns(line):
    names = line.split("\t")
    if "Prompt" not in names:
        raise ValueError(
            f"expected the names of columns, Prompt among them, separated by tabs; found {line[:80]!r}"
        )
    return names


def _table(line, names):
    cells = line.split("\t")
    if len(cells) != len(names):
        raise ValueError(f"expected {len(names)} columns, found {len(cells)}: {line[:60]!r}")
    row = dict(zip(names, cells))
    return {"prompt": row["Prompt"]} | row


def _plain(line, _):
    return {"prompt": line}


def draw(sampler, records, out, *, n, seed, size=None, batch_size=16, **options):
    """Draws n pictures of each record of `read` that are not there yet -> how many were drawn.

    OUT/00000/metadata.jsonl is record 0 as a line of JSON and OUT/00000/samples/0000.png its first picture, the layout
    of GenEval. Sample k of prompt i has a seed made of (seed, i, k), so that a larger n later only adds. size:
    (height, width) in patches, or None; options: those of `Request`. ValueError where OUT has pictures of other
    prompts, or of another model or settings.
    """
    if n < 1:
        raise ValueError(f"expected at least one picture a prompt, found {n}")
    out = Path(out)
    requests, paths = [], []
    for i, record in enumerate(records):
        for k in range(n):
            request = Request(
                document=Document((Turn("user", (Text(record["prompt"]),)),)),
                size=size,
                seed=draw_seed(draw_seed(seed, i), k),
                **options,
            )
            requests.append(request)
            paths.append(out / f"{i:05d}" / "samples" / f"{k:04d}.png")
        try:
            sampler.room(request, sampler.prompts(request)[0])
        except ValueError as error:
            raise ValueError(f"prompt {i + 1}, {record['prompt'][:40]!r}: {error}") from error
    _check_same(out, {
        "prompts": hashlib.sha256(json.dumps(records).encode()).hexdigest()[:16],
        "step": sampler.step,
        "config": hashlib.sha256(sampler.config.to_json(sort_keys=True).encode()).hexdigest()[:16],
        "tokenizer": sampler.tokenizer.hash,
        "seed": seed,
        "size": size and list(size),
        "refined": sampler.refining and sampler.refining.about,
        "options": {name: repr(value) for name, value in sorted(options.items())},
    })  # fmt: skip
    for i, record in enumerate(records):
        folder = out / f"{i:05d}"
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        line = json.dumps(record, ensure_ascii=False) + "\n"
        files.write(str(folder / "metadata.jsonl"), line.encode())
    todo = [i for i, path in enumerate(paths) if not path.exists()]  # what is there is whole: see files.write
    if not todo:
        return 0
    for k, turn, _ in sampler.stream([requests[i] for i in todo], batch_size):
        data = io.BytesIO()
        Image.fromarray(straight(turn.parts[0].pixels)).save(data, "PNG")
        files.write(str(paths[todo[k]]), data.getvalue())
    return len(todo)


def _check_same(out, settings):
    """Notes what the pictures in a folder are of; ValueError where they are of something else already."""
    path = out / SETTINGS
    if path.is_file():
        found = json.loads(path.read_text("utf-8"))
        other = [name for name in settings if found.get(name) != settings[name]]
        if other:
            raise ValueError(
                f"{out} has pictures of another {' and '.join(other)} (see {path}): choose another --out, or "
                "remove it"
            )
    elif out.is_dir() and any(each.name.isdigit() for each in out.iterdir()):
        raise ValueError(
            f"{out} has numbered folders, but no {SETTINGS} that says of what: choose another --out"
        )
    out.mkdir(parents=True, exist_ok=True)
    files.write(str(path), json.dumps(settings, indent=1, ensure_ascii=False).encode())
