"""One tiny run of the whole road, made by the real commands, that many tests look at."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
STEPS = 8  # of every tiny run
# Most of the time of a test is the compiler's: a fifth of that its optimiser's, and half of the rest that of the newer of two
# ways to make loops of fused operations, which JAX 0.11 has alone. Set XLA_FLAGS yourself for what users run.
QUICK = "--xla_backend_optimization_level=0"
if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):
    QUICK += " --xla_cpu_use_fusion_emitters=false"


def pytest_configure(config):
    """One folder for the programs that are compiled: all processes of the session, a test's subprocesses too, find
    what one of them has compiled. Workers of xdist inherit it; one of your own makes later sessions faster still."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        config.add_cleanup(folder.cleanup)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = folder.name
    if (
        "PYTEST_XDIST_WORKER" not in os.environ
    ):  # keys that pictures are signed with are not made among one's own
        home = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        config.add_cleanup(home.cleanup)
        os.environ["XDG_CONFIG_HOME"] = home.name
    os.environ.setdefault("XLA_FLAGS", QUICK)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
    from mmgen.runtime import hardware  # which imports JAX, and that reads the environment

    hardware.apply_flags("cpu")  # as commands do: programs of other flags would be others


def mmgen(*arguments):
    """The exit status of `mmgen ...`, in this process."""
    from mmgen.__main__ import main

    return main([str(argument) for argument in arguments])


@pytest.fixture(scope="session")
def space(tmp_path_factory):
    """text.model, tokenizer/, shards/ and transformer/ of tiny runs, which tests only read; `tokenizer_flags` and
    `transformer_flags` are those of their `mmgen train`, without --workdir."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # of all workers: the first makes them, the others wait
    root = root / "space"
    steps = [f"--config.steps={STEPS}", "--config.save_every=3", "--config.log_every=2", "--config.keep=3"]
    here = SimpleNamespace(
        root=root, text=root / "text.model", tokenizer=root / "tokenizer",
        shards=root / "shards", transformer=root / "transformer",
        tokenizer_flags=["--config", "tokenizer:tiny", *steps],
    )  # fmt: skip
    here.transformer_flags = ["--config", "transformer:tiny", f"--config.data.shards={here.shards}", *steps]
    with open(root.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (root / "done").exists():
            shutil.rmtree(root, ignore_errors=True)  # another worker began and failed
            make_space(here)
            (root / "done").touch()
    return here


def make_space(here):
    world = ("--source", "world:train", "--documents", 200)
    tokenize = ("tokenize", *world, "--tokenizer", here.tokenizer, "--text", here.text, "--out", here.shards)
    here.root.mkdir()
    assert mmgen("text", *world, "--pieces", 384, "--out", here.text) == 0
    assert mmgen("train", *here.tokenizer_flags, "--workdir", here.tokenizer) == 0
    assert mmgen(*tokenize) == 0
    assert mmgen("train", *here.transformer_flags, "--workdir", here.transformer) == 0


@pytest.fixture(scope="session")
def policy():
    from mmgen.safety.policy import Policy

    return Policy()


@pytest.fixture(scope="session")
def layer(policy):
    from mmgen.safety.gate import PromptLayer

    return PromptLayer(policy)


@pytest.fixture(scope="session")
def sampler(space):
    from mmgen.sampling.sampler import load

    return load(space.transformer)


def whole_model(workdir):
    """(graphdef, params) of a transformer run: what it is without a sampler's cache and layout."""
    import ml_collections
    from flax import nnx

    from mmgen.grammar import Grammar
    from mmgen.models import transformer
    from mmgen.runtime import checkpoint

    config = ml_collections.ConfigDict(checkpoint.read_config(workdir, "transformer"))
    manifest = json.loads((workdir / "vocabulary.json").read_text())
    vocab = Grammar.from_dict(manifest["grammar"]).vocab_size
    make = lambda: transformer.of_codes(config.model, manifest, vocab, nnx.Rngs(0))
    graphdef, abstract = nnx.split(nnx.eval_shape(make))
    return graphdef, checkpoint.load_weights(workdir, nnx.to_pure_dict(abstract))[0]


def config_of(flags):
    """The config that `mmgen train` makes of its flags."""
    from mmgen.runtime import config

    return config.load(flags[1], [flag.removeprefix("--config.") for flag in flags[2:]])


def run_python(code, *arguments, devices=1, check=True, **options):
    """Runs Python code in a fresh process -> CompletedProcess with its output as text."""
    environment = dict(
        os.environ, PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'tests'}", JAX_PLATFORMS="cpu",
        XLA_FLAGS=f"{QUICK} --xla_force_host_platform_device_count={devices}",
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], env=environment, capture_output=True, text=True,
        timeout=600, **options,
    )  # fmt: skip
    if check:
        assert done.returncode == 0, done.stderr[-3000:]
    return done


def records(workdir):
    """The lines of metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]
    timing = ("_per_second", "data_wait", "goodput", "tflops_per_device")
    return [{name: value for name, value in line.items() if not name.endswith(timing)} for line in lines]


def arrays(workdir, step):
    """Every array of a checkpoint: {path: numpy array}."""
    import jax
    import orbax.checkpoint as ocp

    found = {}
    for item in (Path(workdir) / "checkpoints" / str(step)).iterdir():
        if item.is_dir() and item.name != "metrics":
            tree = ocp.PyTreeCheckpointer().restore(item)
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
                found[item.name + jax.tree_util.keystr(path)] = np.asarray(leaf)
    return found


def assert_same_arrays(a, b):
    assert a.keys() == b.keys() and a
    for name in a:
        assert a[name].dtype == b[name].dtype and np.array_equal(a[name], b[name]), name
