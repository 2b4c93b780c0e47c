"""`mmgen doctor [--checkpoint DIR]`: what works on this machine, in plain words."""

import argparse
import contextlib
import glob
import io
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

# Nothing else of mmgen, and no JAX, is imported up here: what is broken is to be told, not to end us.
OK, WARNING, PROBLEM = "ok", "warning", "problem"
GIB = 1 << 30
NEEDED = 4 * GIB  # of memory, for `mmgen quickstart`
SCRATCH = 1 * GIB  # of disk, for its workdir


def main(argv):
    """Checks this machine, line by line: ok, warning or problem, and what to do. Trains and samples a
    tiny model in a temporary folder. Exit status 1 where something is broken."""
    parser = argparse.ArgumentParser("mmgen doctor", description=main.__doc__)
    parser.add_argument("--checkpoint", help="check this workdir of a transformer run too")
    args = parser.parse_args(argv)

    checks = [python, packages, devices, resources, road]
    if args.checkpoint:
        checks.append(lambda: checkpoint(args.checkpoint))
    checks.append(unneeded)
    began, count = time.monotonic(), {OK: 0, WARNING: 0, PROBLEM: 0}
    for check in checks:
        for level, name, words in check():
            count[level] += 1
            print(f"{level:<9}{name:<12}{words}", flush=True)
    seconds = time.monotonic() - began
    print(f"\n{count[PROBLEM]} problems, {count[WARNING]} warnings, {count[OK]} checks ok, {seconds:.0f} s")
    return 1 if count[PROBLEM] else 0


def python():
    """The interpreter."""
    found = platform.python_version()
    supported = sys.version_info >= (3, 11)
    words = f"{found} at {sys.executable}" + ("" if supported else ": mmgen needs 3.11 or newer")
    yield (OK if supported else PROBLEM), "Python", words


def packages():
    """What is installed, against the versions that mmgen asks for."""
    fit = []
    for requirement in requirements():
        name, expected = requirement.name, requirement.specifier
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            words = f"{name} is not installed, mmgen needs {expected}: pip install '{name}{expected}'"
            yield PROBLEM, "packages", words
            continue
        if expected.contains(found, prereleases=True):
            fit.append(f"{name} {found}")
        else:
            words = f"{name} {found}, mmgen needs {expected}: pip install '{name}{expected}'"
            yield PROBLEM, "packages", words
    if fit:
        yield OK, "packages", "as mmgen asks for them: " + ", ".join(fit)
    yield from jax_parts()


def requirements():
    """The `Requirement`s of mmgen on this Python, extras left out."""
    try:
        lines = metadata.requires("mmgen") or []
    except metadata.PackageNotFoundError:  # a checkout on PYTHONPATH
        project = Path(__file__).resolve().parents[2] / "pyproject.toml"
        lines = tomllib.loads(project.read_text())["project"]["dependencies"] if project.is_file() else []
    wanted = map(Requirement, lines)
    return [each for each in wanted if not each.marker or each.marker.evaluate({"extra": ""})]


def jax_parts():
    """jaxlib and the accelerator plugins must be of the version that this JAX was made with."""
    installed = {each.name.lower(): each.version for each in metadata.distributions() if each.name}
    if "jax" not in installed:
        return
    pinned = {}  # the widest that any of jax's own lines allows, extras included
    for requirement in map(Requirement, metadata.requires("jax") or []):
        if requirement.name.startswith("jax") and requirement.specifier:
            pinned.setdefault(requirement.name.lower(), []).append(requirement.specifier)
    fit = []
    for name, allowed in pinned.items():
        if name in installed:
            if any(each.contains(installed[name], prereleases=True) for each in allowed):
                fit.append(f"{name} {installed[name]}")
            else:
                words = f"{name} {installed[name]} does not belong to jax {installed['jax']}, which needs {allowed[0]}"
                yield PROBLEM, "packages", f"{words}: pip install -U 'jax=={installed['jax']}' {name}"
    yield OK, "packages", f"jax {installed['jax']} goes with {', '.join(fit) or 'nothing else'}"


def devices():
    """What JAX computes on, and whether an accelerator stands idle beside it."""
    try:
        import jax

        found, backend = jax.devices(), jax.default_backend()
    except Exception as error:
        yield PROBLEM, "devices", f"JAX finds none: {brief(error)}"
        return
    kinds = sorted({device.device_kind for device in found})
    yield OK, "devices", f"JAX runs on {len(found)} {backend} device(s): {', '.join(kinds)}"
    if backend != "cpu":
        return
    chosen = os.environ.get("JAX_PLATFORMS", "")
    for present, what, extra in (
        (nvidia_gpus(), "an NVIDIA GPU", "gpu"),
        (tpu_chips(), "a TPU", "tpu"),
    ):
        if present and chosen:
            yield (
                WARNING,
                "devices",
                f"{what} is here ({present}), JAX_PLATFORMS={chosen} keeps JAX on CPU: unset it",
            )
        elif present:
            words = f"{what} is here ({present}), JAX runs on CPU: pip install 'mmgen[{extra}]'"
            yield WARNING, "devices", words + (" (needs driver 580 or newer)" if extra == "gpu" else "")


def nvidia_gpus():
    """A word for the NVIDIA GPUs of this machine, '' without one."""
    if shutil.which("nvidia-smi"):
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20)
            if listed.returncode == 0 and listed.stdout.strip():
                return listed.stdout.splitlines()[0].partition(" (UUID")[0]
    return ", ".join(sorted(glob.glob("/dev/nvidia[0-9]*")))


def tpu_chips():
    """A word for the TPU chips of this machine, '' without one."""
    return ", ".join(sorted(glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")))


def resources():
    """Memory, disk and cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield (
        (OK if cores > 1 else WARNING),
        "cores",
        f"{cores}" + ("" if cores > 1 else ": everything takes its time"),
    )
    free = memory()
    few = f": `mmgen quickstart` needs {NEEDED // GIB} GiB; end other programs" if free < NEEDED else ""
    yield (WARNING if few else OK), "memory", f"{free / GIB:.1f} GiB free{few}"
    for what, folder in (("this folder", Path.cwd()), ("temporary files", Path(tempfile.gettempdir()))):
        free = shutil.disk_usage(folder).free
        few = f": `mmgen quickstart` needs {SCRATCH // GIB} GiB; free some, or use another --workdir"
        if not os.access(folder, os.W_OK):
            yield WARNING, "disk", f"{folder} ({what}) cannot be written"
        else:
            level, words = (WARNING, few) if free < SCRATCH else (OK, "")
            yield level, "disk", f"{free / GIB:.1f} GiB free in {folder} ({what}){words}"


def memory():
    """Bytes that a new program may take: what is free, or what the container's limit leaves."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
    with contextlib.suppress(OSError, ValueError):  # "max" is no number: no limit
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        free = min(free, limit - int((group / "memory.current").read_text()))
    return free


def road():
    """The whole road at its smallest, in a temporary folder: text, tokenizer, shards, transformer, sample."""
    part = "start"
    try:
        from mmgen import text
        from mmgen.data.sources import open_source, texts
        from mmgen.runtime import config as configs
        from mmgen.stages import loop
        from mmgen.stages.tokenize import tokenize

        with tempfile.TemporaryDirectory(prefix="mmgen-doctor-") as folder:
            folder = Path(folder)
            coder, shards, workdir = folder / "tokenizer", folder / "shards", folder / "transformer"
            once = ["tokenizer.steps=1", "transformer.steps=1", f"transformer.data.shards={shards}"]
            config = configs.load("quickstart:tiny", once)
            # Not square: rows taken for columns must not go unseen.
            width, height = 32, 24
            source = open_source("world:train", (width, height), 0, documents=64)

            part = "tokenizer"
            with quiet() as took:
                loss = loop.train(config.tokenizer, coder)["loss"]
            yield OK, part, f"one step trained, loss {finite(loss):.3g} ({took()})"

            part = "shards"
            with quiet() as took:
                text.train(texts(source), config.text.pieces, folder / "text.model")
                made = tokenize(source, coder, folder / "text.model", shards, max_side=config.max_side)
            yield OK, part, f"{made['count']} documents, {made['tokens']} tokens ({took()})"

            part = "codes"
            with quiet() as took:
                same, patch = decoded(source, shards)
            yield OK, part, f"{same} stored pictures decode to the tokenizer's own reconstruction ({took()})"

            part = "transformer"
            with quiet() as took:
                loss = loop.train(config.transformer, workdir)["loss"]
            yield OK, part, f"one step trained, loss {finite(loss):.3g} ({took()})"

            part = "sample"
            with quiet() as took:
                words = drawn(workdir, (height // patch, width // patch))
            yield OK, part, f"{words} ({took()})"
    except Exception as error:
        yield PROBLEM, part, brief(error)


@contextlib.contextmanager
def quiet():
    """Keeps what is printed inside off the screen; gives a function that says how long it took."""
    began, printed = time.monotonic(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        yield lambda: f"{time.monotonic() - began:.1f} s"


def decoded(source, path):
    """Decodes stored codes first: codes read in another order than they were written would train a model
    whose loss falls while its pictures are noise. -> how many pictures were right, the patch.

    Raises ValueError unless all are bit for bit the tokenizer's own reconstruction of the source's
    picture, which passes through no grammar and no file.
    """
    import numpy as np

    from mmgen.data.shards import Shards
    from mmgen.grammar import Grammar
    from mmgen.models.autoencoders import load_tokenizer
    from mmgen.text import Text

    shards, text = Shards(path), Text(Path(path) / "text.model")
    grammar, tokenizer = (
        Grammar.from_dict(shards.manifest["grammar"]),
        load_tokenizer(Path(path) / "tokenizer"),
    )
    if tokenizer.hash != shards.manifest["tokenizer_hash"]:
        raise ValueError(f"{path} was written by another tokenizer than the one that lies in it")
    drawn = [source[i] for i in range(len(shards))]
    read = [grammar.decode(shards.tokens(i), text) for i in range(len(shards))]
    if any(a.turns[0] != b.turns[0] for a, b in zip(drawn, read)):
        raise ValueError("the captions in the shards are not those of the source")
    own = tokenizer.encode(np.stack([document.turns[1].parts[0].pixels for document in drawn]))
    if len(np.unique(own)) == 1:
        raise ValueError("the tokenizer gives every patch the same code, so their order cannot be checked")
    expected = tokenizer.decode(own)
    found = tokenizer.decode(np.stack([document.turns[1].parts[0].codes for document in read]))
    same = sum(map(np.array_equal, expected, found))
    if same < len(read):
        raise ValueError(
            f"only {same} of {len(read)} stored pictures decode to the tokenizer's own reconstruction: codes are "
            "not read in the order in which they were written; do not train on shards made here"
        )
    return same, tokenizer.patch


def drawn(workdir, grid=None):
    """Restores a transformer's workdir and draws one picture -> what came out."""
    from mmgen.document import Document, Text, Turn
    from mmgen.sampling import sampler

    model = sampler.load(workdir)  # compares the hashes of its text model and tokenizer
    prompt = Document((Turn("user", (Text("a large red circle"),)),))
    (turn,) = model.generate([sampler.Request(prompt, size=grid)], batch_size=1)
    height, width = turn.parts[0].pixels.shape[:2]
    return f"a picture of {width}x{height} drawn by {Path(workdir).name}"


def checkpoint(workdir):
    """A transformer's workdir: its checkpoints are whole, it holds what its samples need, it draws."""
    from mmgen.runtime import checkpoint as checkpoints

    try:
        steps = checkpoints.steps(workdir)
        good = checkpoints.latest(workdir)
        if steps and good != steps[-1]:
            yield (
                WARNING,
                "checkpoint",
                f"step {steps[-1]} of {workdir} is damaged; step {good} is used instead",
            )
        total = checkpoints.read_config(workdir, "transformer")["steps"]
        words = drawn(workdir)
        yield OK, "checkpoint", f"{workdir}: step {good} of {total} is whole, its hashes agree; {words}"
    except Exception as error:
        yield PROBLEM, "checkpoint", brief(error)


def unneeded():
    """Heavy packages that mmgen does without."""
    for name in ("tensorflow", "torch"):
        if name in sys.modules:
            yield (
                WARNING,
                name,
                "was imported by some dependency: slower to start, and it may take GPU memory",
            )
        else:
            yield OK, name, "not needed, not imported"


def finite(loss):
    if not math.isfinite(loss):
        raise ValueError(f"the loss of the first step is {loss}")
    return loss


def brief(error):
    """An exception in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
