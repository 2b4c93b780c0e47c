"""Checkpoints come back bit by bit, or not at all: damage, half-written steps and wrong folders."""

import hashlib
import json
import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmgen.runtime import checkpoint
from mmgen.runtime.checkpoint import CheckpointError, Checkpoints
from tests.conftest import run_python


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


def test_what_is_kept(tmp_path):
    """The newest two, every fourth, and the best, of which a new opening knows too."""
    losses = [9, 8, 1, 7, float("nan"), 5, 4, 3]
    for half in (range(1, 5), range(5, 9)):
        with Checkpoints(tmp_path, keep=2, keep_every=4, best="loss") as checkpoints:
            for step in half:
                checkpoints.save(step, state(step), {"hash": "a"}, {"loss": losses[step - 1]})
    assert checkpoint.steps(tmp_path) == [3, 4, 7, 8]
    assert checkpoint.best_step(tmp_path, "loss") == 3 and checkpoint.best_step(tmp_path, "loss", "max") == 4
    assert checkpoint.best_step(tmp_path, "none") is None
    with Checkpoints(tmp_path, keep=1, best="loss", mode="max") as checkpoints:
        checkpoints.save(9, state(9), metrics={"accuracy": 1})
    assert checkpoint.steps(tmp_path) == [4, 9]
    with pytest.raises(ValueError, match="found 0"):
        Checkpoints(tmp_path, keep=0)


def test_the_manifest_says_what_was_recorded(tmp_path):
    record = {"config": {"model": {"width": 8, "codes": None}}, "hashes": {"grammar": "ab"}}
    checkpoint.save(tmp_path, 5, state(5), record=record, metrics={"loss": jnp.float32(0.5)})
    found = checkpoint.manifest(tmp_path, 5)
    assert (found["step"], found["record"], found["metrics"]) == (5, record, {"loss": 0.5})
    folder = tmp_path / "checkpoints" / "5"
    files = {p.relative_to(folder).as_posix(): p.stat().st_size for p in folder.rglob("*") if p.is_file()}
    assert {name: size for name, (size, _) in found["files"].items()} == files
    with pytest.raises(CheckpointError, match="cannot read"):
        checkpoint.manifest(tmp_path, 6)


def test_what_differs_is_said_line_by_line():
    old = {"config": {"width": 8, "mlp": "a", "same": [1, 2]}, "hashes": {"grammar": "ab"}}
    new = {"config": {"width": 16, "same": [1, 2], "more": None}, "hashes": {"grammar": "ab"}}
    assert checkpoint.diff(old, old) == []
    assert checkpoint.diff(old, new) == [
        'config.mlp: "a" -> (none)',
        "config.more: (none) -> null",
        "config.width: 8 -> 16",
    ]


def test_checkpoints_of_the_format_before_are_read(workdir):
    folder = workdir / "checkpoints"
    for step in (1, 2):
        (folder / f"{step}.json").unlink()
        digest = hashlib.sha256()
        for path in sorted((folder / str(step)).rglob("*")):
            if path.is_file():
                digest.update(str(path.relative_to(folder / str(step))).encode() + b"\0")
                digest.update(hashlib.sha256(path.read_bytes()).digest())
        (folder / f"{step}.sha256").write_text(digest.hexdigest())
    assert checkpoint.latest(workdir) == 2 and checkpoint.manifest(workdir, 2)["format"] == 0
    assert checkpoint.export(workdir, workdir / "copy") == 2 == checkpoint.latest(workdir / "copy")
    flip(workdir, 2)
    with Checkpoints(workdir, keep=1) as checkpoints:
        assert checkpoints.latest() == 1
        checkpoints.save(2, state(2))
    names = ["2", "2.damaged", "2.damaged.sha256", "2.json"]
    assert sorted(path.name for path in folder.iterdir()) == names


MESH = """
import sys
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from mmgen.runtime import checkpoint
workdir, before = sys.argv[1], int(sys.argv[2])
mesh = jax.make_mesh((jax.device_count(),), ("fsdp",))
place = [NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("fsdp",), (None, "fsdp"), ())]
make = lambda key: {"params": [jax.random.normal(key, (8, 16)) for _ in place]}
expected = jax.jit(make, out_shardings={"params": place})(jax.random.key(0))
with checkpoint.Checkpoints(workdir) as checkpoints:
    if before:
        assert checkpoints.latest() == before
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), expected)
        found = checkpoint.restore(workdir, before, abstract)
        for a, b in zip(found["params"], expected["params"]):
            assert a.sharding == b.sharding and (np.asarray(a) == np.asarray(b)).all()
        expected = found
    checkpoints.save(before + 1, expected)
"""


def test_any_mesh_goes_on_from_any_other(tmp_path):
    for before, devices in enumerate((8, 4, 2, 8)):
        run_python(MESH, tmp_path, before, devices=devices)
    assert checkpoint.latest(tmp_path) == 4


def model(seed, rows, head=(6, 4)):
    a, b, c = jax.random.split(jax.random.key(seed), 3)
    blocks = {n: {"w": jax.random.normal(jax.random.fold_in(c, n), (4, 4))} for n in (0, 1)}
    return {
        "embed": jax.random.normal(a, (rows, 4)),
        "head": jax.random.normal(b, head),
        "blocks": blocks,
        f"own{seed}": jnp.ones(2),
    }


def test_a_model_starts_from_the_weights_of_another(tmp_path):
    old, new = model(1, 10), model(2, 14)
    checkpoint.save(tmp_path, 3, {"params": model(7, 10), "ema": old, "optimizer": {"step": 1}})
    with pytest.raises(
        CheckpointError, match=r"embed: expected the new model's shape \(14, 4\), found \(10, 4\)"
    ):
        checkpoint.restore_weights(tmp_path, new)

    found, report = checkpoint.restore_weights(tmp_path, new, grow={"embed": None})
    assert report == {
        "taken": ["head", "blocks/0/w", "blocks/1/w"],
        "grown": ["embed"],
        "left": ["own2"],
        "unused": ["own1"],
    }
    embed = jnp.concatenate([old["embed"], new["embed"][10:]])
    assert same(found, {"embed": embed, "head": old["head"], "blocks": old["blocks"], "own2": new["own2"]})

    # Rows are added in the middle, and the last two of the old ones are not wanted.
    spans = [(0, 0, 3), (3, 9, 5)]
    found, _ = checkpoint.restore_weights(tmp_path, new, grow={"^embed$": spans}, only="embed|head")
    rows = [old["embed"][:3], new["embed"][3:9], old["embed"][3:8]]
    assert same(found["embed"], jnp.concatenate(rows)) and same(found["head"], old["head"])
    assert same(found["blocks"], new["blocks"])

    found, report = checkpoint.restore_weights(tmp_path, new, leave="embed")
    assert same(found["embed"], new["embed"]) and report["left"] == ["embed", "own2"]
    for spans in ([(0, 0, 11)], [(0, 12, 3)], [(-1, 0, 2)]):
        with pytest.raises(CheckpointError, match="do not lie in both"):
            checkpoint.restore_weights(tmp_path, new, grow={"embed": spans})
    with pytest.raises(CheckpointError, match="head: expected the new model's shape"):
        checkpoint.restore_weights(tmp_path, model(2, 10, head=(6, 5)))


GROW = """
import sys
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from mmgen.runtime import checkpoint, mesh as meshes
mesh = meshes.make_mesh({"fsdp": 4})
rows = NamedSharding(mesh, PartitionSpec("fsdp"))
table = lambda size, by, place: jax.device_put(by * np.arange(size * 2.0, dtype=np.float32).reshape(size, 2), place)
old, new = table(5, 1, NamedSharding(mesh, PartitionSpec())), table(8, -1, rows)
checkpoint.save(sys.argv[1], 1, {"params": {"t": old}})
found, _ = checkpoint.restore_weights(sys.argv[1], {"t": new}, grow={"t": [(0, 0, 2), (2, 5, 3)]})
assert found["t"].sharding == rows
old, new = np.asarray(old), np.asarray(new)
assert (np.asarray(found["t"]) == np.concatenate([old[:2], new[2:5], old[2:]])).all()
"""


def test_a_sharded_table_grows_from_rows_that_do_not_divide(tmp_path):
    run_python(GROW, tmp_path, devices=4)


@pytest.mark.parametrize("average", [False, True])
def test_safetensors_hold_the_weights(workdir, average, capsys):
    from safetensors import safe_open

    from mmgen.commands.tools import export

    params = state(9)["params"] | {"blocks": {0: jnp.float32(2)}}
    items = {"params": state(3)["params"], "ema": params} if average else {"params": params}
    checkpoint.save(workdir, 3, items, record={"hashes": {"grammar": "ab"}})
    out = workdir / "out.safetensors"
    assert not export.main(["--checkpoint", str(workdir), "--out", str(out)])
    assert "at step 3" in capsys.readouterr().out
    with safe_open(out, "flax") as file:
        expected = {"a.w": params["a"]["w"], "b": params["b"], "blocks.0": params["blocks"][0]}
        assert set(file.keys()) == set(expected)
        assert all(same(file.get_tensor(name), array) for name, array in expected.items())
        assert file.get_slice("b").get_dtype() == "BF16"
        said = file.metadata()
    assert (said["step"], said["item"]) == ("3", "ema" if average else "params")
    assert json.loads(said["config"]) == {"stage": "tokenizer"}
    assert json.loads(said["record"]) == {"hashes": {"grammar": "ab"}}
