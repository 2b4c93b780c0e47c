"""The same batches on any number of processes, and across a stop: bytes, not shapes."""

import hashlib
import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from mmgen.data.shards import write
from mmgen.stages import loop
from tests.conftest import QUICK, ROOT, config_of, records, run_python
from tests.test_shards import GRAMMAR, edit

STEPS, ROWS, DEVICES = 1000, 8, 4

# Four devices in all, two of which hold the same rows: a process reads what its devices need.
READ = """
import hashlib, json, sys
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding
from mmgen.data.loader import Rows
from mmgen.data.shards import Shards
from mmgen.runtime import mesh as meshes
from tests.test_processes import GRAMMAR, ROWS

folder, plans, start, stop, out = sys.argv[1:]
meshes.join()
mesh = meshes.make_mesh({"data": 2, "tensor": 2})
sharding = NamedSharding(mesh, meshes.spec(("batch",), {"batch": ("replica", "data", "fsdp")}))
mine = meshes.local_rows(sharding, ROWS)
loader = Rows(Shards(folder), GRAMMAR, batch_size=ROWS, row_length=96, seed=7, text_drop=.3, plans=plans)
batches, digests = loader.prefetch(int(start), mine), []
for step in range(int(start), int(stop)):
    at, batch, _ = next(batches)
    assert at == step
    digests.append({int(row): hashlib.sha256(b"".join(batch[name][k].tobytes() for name in sorted(batch))).hexdigest()
                    for k, row in enumerate(mine)})
batches.close()
whole = meshes.global_batch(batch, mine, ROWS, sharding)
for name, array in whole.items():  # each device has its own rows, and together they are the batch
    assert array.shape == (ROWS, *batch[name].shape[1:])
    for shard in array.addressable_shards:
        rows = range(*shard.index[0].indices(ROWS))
        assert (jax.device_get(shard.data) == batch[name][[list(mine).index(r) for r in rows]]).all()
total = jax.jit(lambda b: (b["tokens"] * (1 + jnp.arange(ROWS))[:, None]).sum())(whole)
json.dump({"mine": mine.tolist(), "digests": digests, "total": int(total)}, open(out, "w"))
"""


def run(processes, code, arguments, status=0, **environment):
    """Runs `code` in so many processes of one run, four devices in all, with the arguments of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {
        **os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{QUICK} --xla_force_host_platform_device_count={DEVICES // processes}", **environment,
    }  # fmt: skip
    running = []
    for rank, each in enumerate(arguments):
        if processes > 1:
            environment |= {"MMGEN_DISTRIBUTED": f"{rank}/{processes}", "JAX_COORDINATOR_ADDRESS": address}
        command = [sys.executable, "-c", code, *map(str, each)]
        running.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    for process in running:
        _, error = process.communicate(timeout=300)
        assert process.returncode == status, error[-3000:]


def read(folder, plans, processes, start, stop, tmp_path):
    """SHA-256 of each global batch, put together from what each process read -> (digests, sum of the last)."""
    outs = [tmp_path / f"{processes}-{rank}-{start}.json" for rank in range(processes)]
    run(processes, READ, [(folder, plans, start, stop, out) for out in outs])
    found = [json.loads(out.read_text()) for out in outs]
    assert {row for each in found for row in each["mine"]} == set(range(ROWS))
    if processes > 1:
        assert all(len(each["mine"]) < ROWS for each in found)
    digests = []
    for step in range(stop - start):
        rows = {}
        for each in found:
            for row, digest in each["digests"][step].items():
                assert rows.setdefault(int(row), digest) == digest  # two processes that hold one row
        digests.append(hashlib.sha256("".join(rows[row] for row in range(ROWS)).encode()).hexdigest())
    totals = {each["total"] for each in found}
    assert len(totals) == 1
    return digests, totals.pop()


@pytest.mark.soak
@pytest.mark.parametrize("first, second", [(2, 4), (4, 2)])
def test_the_first_thousand_batches_on_one_two_and_four_processes_and_across_a_stop(tmp_path, first, second):
    rng = np.random.default_rng(0)
    write(tmp_path / "shards", [edit(rng) for _ in range(5000)], GRAMMAR, shard_size=1500)
    half = STEPS // 2
    of = lambda plans, processes, start, stop: read(
        tmp_path / "shards", tmp_path / plans, processes, start, stop, tmp_path
    )
    whole, total = of("a", 1, 0, STEPS)
    assert len(set(whole)) == STEPS
    before, _ = of("b", first, 0, half)
    after, last = of("b", second, half, STEPS)
    assert before + after == whole and last == total


@pytest.mark.parametrize(
    "shape", [{"data": 8}, {"data": 2, "tensor": 4}, {"fsdp": 4, "tensor": 2}, {"data": 2, "fsdp": 4}]
)
def test_rows_follow_the_sharding(shape):
    code = """
import sys, jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from mmgen.runtime import mesh as meshes
mesh = meshes.make_mesh(eval(sys.argv[1]))
for spec in (PartitionSpec(("data", "fsdp")), PartitionSpec(("fsdp", "data")), PartitionSpec()):
    sharding = NamedSharding(mesh, spec)
    mine = meshes.local_rows(sharding, 16)
    assert mine.tolist() == list(range(16))
    x = np.arange(32).reshape(16, 2)
    assert (np.asarray(meshes.global_batch({"x": x}, mine, 16, sharding)["x"]) == x).all()
print("ok")
"""
    assert run_python(code, shape, devices=8).stdout.strip() == "ok"


TRAIN = """
import sys
from mmgen.runtime import mesh
from mmgen.stages import loop
from tests.conftest import config_of
mesh.join()
loop.train(config_of(sys.argv[3:]), sys.argv[1], stop_at=int(sys.argv[2]))
"""


@pytest.mark.soak  # tests/test_launch.py has two processes that are always run
def test_two_processes_train_in_one_workdir_and_one_goes_on(space, tmp_path):
    flags = ["--config", "transformer:tiny", f"--config.data.shards={space.shards}", "--config.save_every=1"]
    flags += ["--config.keep=1", "--config.log_every=1", "--config.mesh.data=4"]
    flags += ["--config.steps=2000"]  # as in test_preemption.py: the same programs
    flags += [
        f"--config.held_out.shards={space.shards}",
        "--config.held_out.batches=2",
        "--config.evaluate_every=2",
    ]
    train = lambda n, workdir, stop: run(n, TRAIN, [(tmp_path / workdir, stop, *flags)] * n)
    train(1, "one", 6)
    train(2, "two", 4)
    assert [path.name for path in (tmp_path / "two" / "checkpoints").glob("*.json")] == ["4.json"]
    train(1, "two", 6)
    expected, found = records(tmp_path / "one"), records(tmp_path / "two")
    assert [line["step"] for line in found] == [1, 2, 3, 4, 5, 6]
    for a, b in zip(expected, found):
        assert a.keys() == b.keys()
        np.testing.assert_allclose([a[name] for name in a], [b[name] for name in a], rtol=2e-4)


EVALUATE = """
import sys
from mmgen.runtime import mesh as meshes
from mmgen.stages import loop
from tests.test_processes import measured

name, text, out = sys.argv[1:]
meshes.join()
config = measured(name, text)
with config.unlocked():
    config.mesh = {"fsdp": 4} if name == "contrastive" else {"data": 4}
loop.train(config, out)
"""


def measured(name, text):
    """The config of a tiny run that is measured after its only step."""
    flags = [f"--config.data.text={text}"] if name == "contrastive" else []
    config = config_of(["--config", f"{name}:tiny", "--config.steps=1", "--config.log_every=1", *flags])
    with config.unlocked():
        config.model.image.layers = 1
    return config


@pytest.mark.soak
@pytest.mark.parametrize("name, metric", [("contrastive", "text_r10"), ("classifier", "shape_accuracy")])
def test_towers_are_measured_on_several_processes(name, metric, space, tmp_path):
    """What is measured is that of one process; parameters lie in parts, or the batch alone does."""
    run(2, EVALUATE, [(name, space.text, tmp_path / "2")] * 2)
    loop.train(measured(name, space.text), tmp_path / "1")
    one, two = (records(tmp_path / count)[-1] for count in ("1", "2"))
    assert one.keys() == two.keys() and metric in one
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
    assert two[metric] == pytest.approx(one[metric], abs=0.1)
