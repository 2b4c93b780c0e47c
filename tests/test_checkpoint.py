"""Checkpoints come back bit by bit, or not at all: damage, half-written steps and wrong folders."""

import json
import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmgen.runtime import checkpoint
from mmgen.runtime.checkpoint import CheckpointError


def state(seed):
    key = jax.random.key(seed)
    params = {
        "a": {"w": jax.random.normal(key, (5, 7))},
        "b": jax.random.normal(key, (3,)).astype(jnp.bfloat16),
    }
    return {"params": params, "optimizer": {"step": jnp.int32(seed), "moments": (jnp.float32(np.pi), {})}}


def like(tree):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def same(a, b):
    pairs = list(zip(jax.tree.leaves(a), jax.tree.leaves(b)))
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs
    )


@pytest.fixture
def workdir(tmp_path):
    for step in (1, 2):
        checkpoint.save(tmp_path, step, state(step))
    (tmp_path / "config.json").write_text(json.dumps({"stage": "tokenizer"}))
    return tmp_path


def flip(workdir, step, item="params"):
    """Flips one bit in the middle of the largest file of a step's item."""
    path = max(
        (workdir / "checkpoints" / str(step) / item).rglob("*"), key=lambda p: p.is_file() * p.stat().st_size
    )
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.smoke
def test_round_trip_is_exact(workdir):
    assert checkpoint.steps(workdir) == [1, 2] and checkpoint.latest(workdir) == 2
    for step in (1, 2):
        assert same(checkpoint.restore(workdir, step, like(state(step))), state(step))
    weights, step = checkpoint.load_weights(workdir, jax.eval_shape(lambda: state(2)["params"]))
    assert step == 2 and same(weights, state(2)["params"])


def test_keeps_the_last_steps(workdir):
    for step in (3, 4, 5):
        checkpoint.save(workdir, step, state(step), keep=2)
    assert checkpoint.steps(workdir) == [4, 5]
    assert sorted(p.name for p in (workdir / "checkpoints").glob("[0-9]*")) == [
        "4",
        "4.json",
        "5",
        "5.json",
    ]


@pytest.mark.parametrize("item", ["params", "optimizer"])
def test_a_damaged_step_is_passed_over_with_a_warning(workdir, item, caplog):
    flip(workdir, 2, item)
    with caplog.at_level(logging.WARNING):
        assert checkpoint.latest(workdir) == 1
    assert "damaged" in caplog.text
    flip(workdir, 1, item)
    assert checkpoint.latest(workdir) is None


def test_a_lost_or_an_added_file_is_damage(workdir):
    path = next(p for p in (workdir / "checkpoints" / "2" / "params").rglob("*") if p.is_file())
    path.rename(path.with_name("moved"))
    assert checkpoint.latest(workdir) == 1
    (workdir / "checkpoints" / "1" / "stray").write_text("")
    assert checkpoint.latest(workdir) is None


def test_a_step_without_its_manifest_was_never_finished(workdir):
    (workdir / "checkpoints" / "2.json").unlink()
    assert checkpoint.steps(workdir) == [1] and checkpoint.latest(workdir) == 1


@pytest.mark.parametrize("again", [2, 3])
@pytest.mark.parametrize("accident", ["damaged", "unfinished", "later"])
def test_going_on_from_an_earlier_step_replaces_later_ones(workdir, accident, again):
    """Orbax neither overwrites a step nor saves one before its latest, and says nothing."""
    if accident == "damaged":
        flip(workdir, 2)
    elif accident == "unfinished":
        (workdir / "checkpoints" / "2.json").unlink()
    else:
        checkpoint.save(workdir, 4, state(4))
        flip(workdir, 4)
    checkpoint.save(workdir, again, state(7))
    assert checkpoint.latest(workdir) == again == max(checkpoint.steps(workdir))
    assert same(checkpoint.restore(workdir, again, like(state(7))), state(7))


def test_the_model_must_fit(workdir):
    other = like(state(2))
    other["params"]["a"]["w"] = jax.ShapeDtypeStruct(
        (5, 8), jnp.float32, sharding=other["params"]["b"].sharding
    )
    with pytest.raises(CheckpointError, match="does not fit"):
        checkpoint.restore(workdir, 2, other)
    other = like(state(2))
    other["params"]["more"] = other["params"]["b"]
    with pytest.raises(CheckpointError, match="does not fit"):
        checkpoint.restore(workdir, 2, other)


def test_wrong_folders(workdir, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    abstract = jax.eval_shape(lambda: state(1)["params"])
    for folder, words in ((empty / "none", "does not exist"), (empty, "no checkpoint in")):
        with pytest.raises(CheckpointError, match=words):
            checkpoint.load_weights(folder, abstract)
        with pytest.raises(CheckpointError, match="not a workdir"):
            checkpoint.read_config(folder)
    with pytest.raises(CheckpointError, match="tokenizer run; expected a transformer run"):
        checkpoint.read_config(workdir, "transformer")
    assert checkpoint.read_config(workdir, "tokenizer") == checkpoint.read_config(workdir)
    assert checkpoint.steps(empty) == [] and checkpoint.latest(empty) is None
    with pytest.raises(CheckpointError, match="nothing to export"):
        checkpoint.export(empty, empty / "copy")


@pytest.mark.parametrize("average", [False, True])
def test_an_export_needs_nothing_else(workdir, tmp_path_factory, average):
    items = state(3) | ({"ema": state(9)["params"]} if average else {})
    checkpoint.save(workdir, 3, items)
    copy = tmp_path_factory.mktemp("export") / "copy"
    assert checkpoint.export(workdir, copy) == 3
    checkpoint.export(workdir, copy)  # again, over itself
    shutil.move(workdir, workdir.with_name("gone"))
    moved = shutil.move(copy, copy.with_name("moved"))
    weights, step = checkpoint.load_weights(moved, jax.eval_shape(lambda: state(3)["params"]))
    assert step == 3 and same(weights, state(9 if average else 3)["params"])
    assert checkpoint.read_config(moved, "tokenizer")
    assert not list((copy.with_name("moved") / "checkpoints").rglob("optimizer"))


def test_the_hash_of_weights_is_that_of_their_values():
    a, b = state(1)["params"], state(1)["params"]
    assert checkpoint.weights_hash(a) == checkpoint.weights_hash(b)
    b["a"]["w"] = b["a"]["w"].at[0, 0].add(1e-6)
    assert checkpoint.weights_hash(a) != checkpoint.weights_hash(b)
    assert checkpoint.weights_hash(a) != checkpoint.weights_hash({"a": a["a"], "c": a["b"]})
