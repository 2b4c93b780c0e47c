"""Weights to give away: one file, `weights.safetensors`, in the place of a workdir's checkpoints.

Large float arrays are kept in 8 bits, in groups of 64 numbers that share a scale (as llama.cpp's Q8_0 does), or in
bfloat16; whoever loads them gets the numbers that these stand for in float32. Names are as "blocks/attention/q/w".
"""

import json
import re
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

NAME = "weights.safetensors"
GROUP = 64  # numbers that share a scale: 2 bytes for 64
KINDS = ("int8", "bfloat16", "float32")
_SCALE = ":scale"
_LEAST = 1024  # numbers of an array below which it is kept as it is


def path_of(workdir):
    """The file of a workdir whose weights are packed, or None."""
    path = Path(workdir) / NAME
    return path if path.is_file() else None


def write(path, arrays, kind, step, exact=None, rng=None):
    """Writes {name: float array} -> {name: the array that a reader will get}. exact: a pattern of names that are kept as they are.
    rng: rounds to 8 bits up or down at random, so that on average nothing is lost of what is less than half a step."""
    if kind not in KINDS:
        raise ValueError(f"weights are kept in {', '.join(KINDS)}; found {kind!r}")
    kept = {}
    for name, array in arrays.items():
        array = np.asarray(array, order="C")  # np.ascontiguousarray gives a scalar an axis
        whole = kind == "float32" or (exact and re.search(exact, name))
        if array.size < _LEAST or array.dtype != np.float32 or whole:
            kept[name] = array
        elif kind == "bfloat16":
            kept[name] = array.astype(ml_dtypes.bfloat16)
        else:
            kept[name], kept[name + _SCALE] = _rounded(array, rng)
    path = Path(path)
    temporary = path.with_name(path.name + ".saving")
    save_file(kept, temporary, {"format": "mmgen-packed", "step": str(step), "kind": kind})
    temporary.chmod(0o644)  # safetensors makes files for their owner alone
    temporary.replace(path)
    return read(path, arrays)


def names(path):
    """{name: jax.ShapeDtypeStruct, as `read` gives it}; and the step."""
    with safe_open(path, "numpy") as file:
        step = int(file.metadata()["step"])
        found = {name: file.get_slice(name) for name in file.keys() if not name.endswith(_SCALE)}
        shapes = {
            name: jax.ShapeDtypeStruct(tuple(part.get_shape()), np.float32) for name, part in found.items()
        }
    return shapes, step


def read(path, wanted):
    """{name: float32 array} of those names."""
    with safe_open(path, "numpy") as file:
        there = set(file.keys())
        return {
            name: _exact(
                file.get_tensor(name), file.get_tensor(name + _SCALE) if name + _SCALE in there else None
            )
            for name in wanted
        }


def _grouped(array):
    flat = array.reshape(-1)
    return np.pad(flat, (0, -flat.size % GROUP)).reshape(-1, GROUP)


def _rounded(array, rng=None):
    """float32 -> int8 of the same shape, and float16 scales [groups]."""
    groups = _grouped(array)
    scale = (np.abs(groups).max(1) / 127).astype(np.float16)
    # Scales too small for float16 are of numbers too small to matter: these become zeros.
    numbers = groups / np.where(scale > 0, scale, 1).astype(np.float32)[:, None] * (scale > 0)[:, None]
    whole = np.rint(numbers)
    if rng is not None:
        less = np.floor(numbers)
        chance = numbers - less
        # What lies on the grid stays there, whatever float32 makes of the quotient.
        kept = (abs(numbers - whole) < 1e-4) | (abs(numbers) > 126.5)  # the largest, which make the scale
        whole = np.where(kept, whole, less + (rng.random(numbers.shape, np.float32) < chance))
    return np.clip(whole, -127, 127).astype(np.int8).reshape(-1)[: array.size].reshape(array.shape), scale


def _exact(array, scale):
    if scale is None:
        return array.astype(np.float32)
    values = _grouped(array.astype(np.float32)) * scale.astype(np.float32)[:, None]
    return values.reshape(-1)[: array.size].reshape(array.shape)


def pack(workdir, out, kind, exact=None, more=()):
    """Packs the newest weights of a run into the folder `out`, beside its config and what else those need who load it, those that the
    pattern `exact` names as they are; returns the arrays {name: float32} that they will have. Where things lay on the machine that trained is left out.

    more: (workdir, weight) of runs that began with these weights; what each changed, times its weight, is added (task arithmetic,
    arXiv:2212.04089), so that runs on unlike tasks, side by side on machines that share nothing, make one model. To 8 bits it is rounded at random
    where those weights were packed, from one seed: they lie on their grid, and small changes would all be rounded away.
    """
    from mmgen.runtime import checkpoint

    workdir, out = Path(workdir), Path(out)
    arrays, step = checkpoint.weights(workdir)
    total, shapes = dict(arrays), lambda arrays: {(name, array.shape) for name, array in arrays.items()}
    for run, weight in more:
        theirs, _ = checkpoint.weights(run)
        if shapes(theirs) != shapes(arrays):
            raise ValueError(
                f"{run} did not begin with {workdir}: arrays of the same names and shapes were expected, but "
                f"{min(dict(shapes(theirs) ^ shapes(arrays)))} is not the same in both"
            )
        for name, array in arrays.items():
            total[name] = total[name] + np.float32(weight) * (theirs[name] - array)
    config = checkpoint.read_config(workdir)
    out.mkdir(parents=True, exist_ok=True)
    for name in ("vocabulary.json", "text.model", "calibration.json"):
        if (workdir / name).exists():
            (out / name).write_bytes((workdir / name).read_bytes())
    for tree, names in (
        (config, ("init",)),
        (config.get("data", {}), ("shards", "tokenizer", "text", "upsampler")),
    ):
        tree |= dict.fromkeys(names & tree.keys(), "")
    if "attention" in config.get("model", {}):  # whose kernel it was
        config["model"]["attention"] = "auto"
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return write(
        out / NAME, total, kind, step, exact, np.random.default_rng(0) if more and path_of(workdir) else None
    )
