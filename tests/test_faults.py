"""Faults of files and of the disk: each is seen, none ends a training run, and the steps before stay good."""

import errno
import json
import logging
import random
import resource
import shutil
import signal

import jax
import jax.numpy as jnp
import pytest

from mmgen.runtime import checkpoint
from mmgen.runtime.checkpoint import Checkpoints
from tests.conftest import run_python
from tests.test_checkpoint import like, same, state
from tests.test_processes import run


@pytest.fixture
def workdir(tmp_path):
    for step in (1, 2):
        checkpoint.save(tmp_path, step, state(step))
    return tmp_path


def files_of(workdir, step):
    folder = workdir / "checkpoints"
    return sorted(p for p in (folder / str(step)).rglob("*") if p.is_file()) + [folder / f"{step}.json"]


def flip(path):
    data = bytearray(path.read_bytes())
    data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    path.write_bytes(data)


DAMAGES = {
    "flipped": flip,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "emptied": lambda path: path.write_bytes(b""),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "deleted": lambda path: path.unlink(),
    "accompanied": lambda path: path.with_name("extra").write_bytes(b""),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_to_every_file_is_seen(workdir, damage, caplog):
    seen = 0
    for path in files_of(workdir, 2):
        if damage == "accompanied" and path.name == "2.json":
            continue  # beside the manifest may lie what will
        if damage in ("truncated", "emptied", "flipped") and not path.stat().st_size:
            continue
        whole = path.read_bytes()
        DAMAGES[damage](path)
        good = checkpoint.latest(workdir)
        assert good == 1, path
        path.with_name("extra").unlink(missing_ok=True)
        path.write_bytes(whole)
        assert checkpoint.latest(workdir) == 2
        seen += 1
    assert seen > 20 and caplog.text.count("2 is damaged") == seen - (damage == "deleted")


def test_every_byte_of_a_manifest_counts(workdir):
    path = workdir / "checkpoints" / "2.json"
    whole = path.read_bytes()
    for at in random.sample(range(len(whole)), 300):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << random.randrange(8)]) + whole[at + 1 :])
        with pytest.raises(checkpoint.CheckpointError):
            checkpoint.manifest(workdir, 2)


def test_a_training_run_sets_damage_aside_and_a_reader_does_not(workdir, caplog):
    folder = workdir / "checkpoints"
    before = sorted(folder.rglob("*"))
    damaged = next(path for path in files_of(workdir, 2) if path.parts[-2:] == ("params", "manifest.ocdbt"))
    flip(damaged)
    weights, step = checkpoint.load_weights(workdir, jax.eval_shape(lambda: state(1)["params"]))
    assert step == 1 and sorted(folder.rglob("*")) == before
    for again in ("", ".1", ".2"):
        caplog.clear()
        with Checkpoints(workdir) as checkpoints:
            assert checkpoints.latest() == 1
            assert "damaged: params/manifest.ocdbt: expected digest" in caplog.text
            aside = folder / f"2.damaged{again}"
            assert f"kept as {aside.name}" in caplog.text and not (folder / "2").exists()
            assert aside.is_dir() and (folder / f"{aside.name}.json").is_file()
            checkpoints.save(2, state(2))  # the same step is saved again, and is damaged again
            assert checkpoints.wait() and checkpoints.latest() == 2
        flip(damaged)
    assert checkpoint.steps(workdir) == [1, 2]


def test_damage_to_the_optimizer_does_not_stop_a_sampler(workdir):
    flip(next(path for path in files_of(workdir, 2) if "optimizer/manifest" in str(path)))
    assert checkpoint.latest(workdir) == 1
    assert checkpoint.load_weights(workdir, jax.eval_shape(lambda: state(1)["params"]))[1] == 2


def test_leftovers_are_tidied_when_a_run_opens_the_folder(workdir):
    folder = workdir / "checkpoints"
    for name in ("3.saving", "3.saving.orbax-checkpoint-tmp", "4.orbax-checkpoint-tmp-17", "1.removing"):
        shutil.copytree(folder / "1", folder / name)
    (folder / "3.saving.json").write_text("{")
    shutil.copytree(folder / "1", folder / "5")
    assert checkpoint.latest(workdir) == 2
    with Checkpoints(workdir) as checkpoints:
        assert checkpoints.latest() == 2
    assert sorted(path.name for path in folder.iterdir()) == ["1", "1.json", "2", "2.json", "5.unfinished"]


def failing(monkeypatch, how):
    """Makes saves fail; returns a function that makes them work again."""
    if how == "files of no more than 64 kB":  # late, in Orbax's threads
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))

        def heal():
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
            signal.signal(signal.SIGXFSZ, handler)

        return heal

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    at = {
        "the save itself": (checkpoint.ocp.AsyncCheckpointer, "save"),
        "the digests": (checkpoint, "_digests"),
        "the manifest": (checkpoint.os, "fsync"),
        "the folder": (checkpoint, "_make_room"),
    }[how]
    monkeypatch.setattr(*at, full)
    return monkeypatch.undo


@pytest.mark.parametrize(
    "how", ["files of no more than 64 kB", "the save itself", "the digests", "the manifest", "the folder"]
)
def test_a_full_disk_does_not_end_the_run(tmp_path, monkeypatch, caplog, how):
    large = lambda seed: {"params": {"w": jax.random.normal(jax.random.key(seed), (512, 512))}}
    folder = tmp_path / "checkpoints"
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, large(1))
        assert checkpoints.wait()
        before = sorted(folder.rglob("*"))
        heal = failing(monkeypatch, how)
        try:
            for step in (2, 3):
                checkpoints.save(step, large(step))
            assert not checkpoints.wait()
        finally:
            heal()
        assert checkpoints.failed == 2 and checkpoints.error
        assert caplog.text.count("was NOT saved") == 2 and "stay valid: [1]" in caplog.text
        assert sorted(folder.rglob("*")) == before  # nothing half-written, nothing lost
        checkpoints.save(4, large(4))
        assert checkpoints.wait() and checkpoints.failed == 2 and checkpoints.latest() == 4
        assert same(checkpoint.restore(tmp_path, 4, like(large(4))), large(4))
    with pytest.raises(checkpoint.CheckpointError, match="was not saved"):
        checkpoint.save(
            tmp_path, 5, {"params": {"w": object()}}
        )  # nor does a mistake, but of that `save` tells
    assert checkpoint.latest(tmp_path) == 4


def test_what_cannot_be_recorded_is_the_callers_mistake(tmp_path):
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(TypeError):
        checkpoints.save(1, state(1), {"config": object()})


KILLED = """
import os, signal, sys
from pathlib import Path
import jax.numpy as jnp
from mmgen.runtime import checkpoint
workdir, place = sys.argv[1:]
kill = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
items = lambda seed: {"params": {f"w{i}": jnp.full((512, 512), seed * 1.0) for i in range(8)}}
with checkpoint.Checkpoints(workdir, keep=1) as checkpoints:
    checkpoints.save(1, items(1))
    assert checkpoints.wait()
    if place == "in the files' digests":
        checkpoint._digests = kill
    if place == "before the manifest":
        checkpoint._write_manifest = kill
    if place == "within the manifest":
        os.fsync = kill
    if place == "before the old step goes":
        checkpoint._delete = kill
    if place == "while the old step goes":
        checkpoint.shutil.rmtree = kill
    checkpoints.save(2, items(2))
    if place == "in the files":
        kill()
"""
PLACES = {
    "in the files": 1, "in the files' digests": 1, "before the manifest": 1, "within the manifest": 1,
    "before the old step goes": 2, "while the old step goes": 2,
}  # fmt: skip


def filled(seed):
    return {"params": {f"w{i}": jnp.full((512, 512), seed * 1.0) for i in range(8)}}


@pytest.mark.parametrize("place", PLACES)
def test_killed_while_it_saves(tmp_path, place):
    assert run_python(KILLED, tmp_path, place, check=False).returncode == -signal.SIGKILL
    expected = PLACES[place]
    assert checkpoint.latest(tmp_path) == expected
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.latest() == expected
        assert same(checkpoint.restore(tmp_path, expected, like(filled(expected))), filled(expected))
        checkpoints.save(3, filled(3))
        assert checkpoints.wait() and checkpoints.latest() == 3
    left = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert left - {"2.unfinished"} == {"3", "3.json"}


ENDLESS = """
import sys
import jax.numpy as jnp
from mmgen.runtime import checkpoint
with checkpoint.Checkpoints(sys.argv[1], keep=2) as checkpoints:
    step = checkpoints.latest() or 0
    print("open", flush=True)
    while True:
        step += 1
        checkpoints.save(step, {"params": {f"w{i}": jnp.full((512, 512), step * 1.0) for i in range(8)}})
"""


@pytest.mark.soak
def test_killed_at_any_moment(tmp_path):
    import subprocess
    import sys
    import time

    newest = 0
    for _ in range(30):
        running = subprocess.Popen(
            [sys.executable, "-c", ENDLESS, tmp_path], stdout=subprocess.PIPE, text=True
        )
        assert running.stdout.readline() == "open\n"
        time.sleep(random.uniform(0, 1))
        running.kill()
        running.wait()
        step = checkpoint.latest(tmp_path)
        counted = checkpoint.steps(tmp_path)
        assert (step or 0) >= newest and step == (max(counted) if counted else None)
        if step:
            assert same(checkpoint.restore(tmp_path, step, like(filled(step))), filled(step))
        newest = step or 0
    assert newest > 30


def test_what_is_saved_is_the_state_at_save(tmp_path):
    """The step donates its buffers, and trains on while they are written."""
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x * 1.5 + 1, tree), donate_argnums=0)
    items = jax.block_until_ready(
        step({"params": {f"w{i}": jnp.full((1024, 512), i * 1.0) for i in range(16)}})
    )
    expected = jax.tree.map(lambda x: x.copy(), items)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, items)
        for _ in range(20):
            items = step(items)
        assert checkpoints.wait()
    assert not same(items, expected)
    assert same(checkpoint.restore(tmp_path, 1, like(expected)), expected)


ONE_FAILS = """
import json, resource, signal, sys, time
import jax, jax.numpy as jnp
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from mmgen.runtime import checkpoint, mesh as meshes
workdir, how, out = sys.argv[1:]
meshes.join()
rank, mesh = jax.process_index(), meshes.make_mesh({"fsdp": 4})
rows = NamedSharding(mesh, PartitionSpec("fsdp"))
items = lambda seed: {"params": jax.jit(
    lambda key: {f"w{i}": jax.random.normal(key, (1024, 64)) for i in range(3)}, out_shardings=rows)(jax.random.key(seed))}
train = jax.jit(lambda x: x @ x.T @ x / 1e3)
def full(*_, **__):
    raise OSError(28, "No space left on device")
name, _, place = how.rpartition(" of ")
mine, hard = place == str(rank), resource.getrlimit(resource.RLIMIT_FSIZE)[1]
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
said = []
with checkpoint.Checkpoints(workdir, keep=1) as checkpoints:
    said.append(checkpoints.latest())
    for step in (1, 2, 3):
        right, broken = getattr(checkpoint, name, None), mine and step == 2
        if broken and right:
            setattr(checkpoint, name, full)
        elif broken:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, hard))
        state = items(step)
        checkpoints.save(step, state, {"by": rank}, {"loss": step})
        for _ in range(20):  # collectives while it is written
            w = train(state["params"]["w0"])
        w.block_until_ready()
        said.append(checkpoints.wait())
        if broken and right:
            setattr(checkpoint, name, right)
        elif broken:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    if rank == 0 and how == "none":
        path = max((checkpoints._folder / "3").rglob("*"), key=lambda p: p.is_file() * p.stat().st_size)
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    multihost_utils.sync_global_devices("damaged")
    said.append(checkpoints.latest())
    json.dump([said, checkpoints.failed], open(f"{out}{rank}", "w"))
"""


@pytest.mark.parametrize(
    "how",
    [
        "none",
        "files of 0",
        "files of 1",
        "_digests of 0",
        "_digests of 1",
        "_write_manifest of 0",
        "_make_room of 0",
    ],
)
def test_processes_agree_on_what_counts(tmp_path, how):
    run(2, ONE_FAILS, [(tmp_path / "run", how, tmp_path / "out")] * 2)
    said = [json.loads((tmp_path / f"out{rank}").read_text()) for rank in range(2)]
    if how == "none":
        assert said == [[[None, True, True, True, None], 0]] * 2  # keep=1, and that one was damaged
        assert (tmp_path / "run" / "checkpoints" / "3.damaged").is_dir()
        return
    assert said == [[[None, True, False, True, 3], 1]] * 2
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["3", "3.json"]
    # What two processes wrote, one restores.
    key = jax.random.key(3)
    expected = {"params": {f"w{i}": jax.random.normal(key, (1024, 64)) for i in range(3)}}
    assert same(checkpoint.restore(tmp_path / "run", 3, like(expected)), expected)


def test_logging_says_where_a_failure_leaves_the_run(tmp_path, caplog):
    with Checkpoints(tmp_path) as checkpoints, caplog.at_level(logging.WARNING):
        checkpoints.save(7, {"params": {"w": object()}})
        assert not checkpoints.wait()
    assert "step 7 was NOT saved" in caplog.text and "MiB free" in caplog.text
