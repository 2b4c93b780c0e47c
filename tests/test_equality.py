"""One run on many meshes and processes: the same losses, step for step, while much is learned.

Fifty steps at the preset's own learning rate (transformer:quickstart and its warmup), in which the loss falls by far
more than it would have to for an error in a gradient to show.
"""

import json

import numpy as np
import pytest

from tests.conftest import records, run_python
from tests.test_processes import TRAIN, run

STEPS = 50
SIZES = {
    "model.width": 32, "model.layers": 2, "model.heads": 4, "model.kv_heads": 4, "model.head_dim": 8,
    "model.mlp": 64, "model.vocab_multiple": 8, "data.batch_size": 8, "keep_pages": False,
}  # fmt: skip
MESHES = {
    "one": ({}, {}),
    "data": ({"data": 8}, {}),
    "fsdp": ({"fsdp": 8}, {"loss.chunk": 50}),
    "tensor": ({"tensor": 4, "fsdp": 2}, {"model.remat": "dots", "accumulate": 2}),
    "context": ({"context": 4, "data": 2}, {"model.attention": "chunked"}),
    # All at once, with activations that are split over tokens between the halves of a block.
    "all": (
        {"context": 2, "tensor": 2, "fsdp": 2},
        {"sharding.stream": "context,tensor", "loss.chunk": 64, "model.remat": "full", "accumulate": 4},
    ),
    "heads": ({"tensor": 2, "data": 4}, {"sharding.kv_heads": "", "model.unroll": False}),
}

CURVES = """
import json, sys
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding
from mmgen.runtime import config as configs, mesh as meshes
from mmgen.stages import loop, program as programs

shards, dtype, steps, work, settings, runs, out = sys.argv[1:]
jax.config.update("jax_enable_x64", dtype == "float64")
curves = {}
for name, (shape, more) in json.loads(runs).items():
    texts = {"data.shards": shards, "model.dtype": dtype} | json.loads(settings) | more
    config = configs.load("transformer:quickstart", [f"{key}={value}" for key, value in texts.items()])
    stage = loop.setup(config, work)
    sizes = [shape.get(axis, 1) for axis in meshes.AXES]
    mesh = Mesh(np.array(jax.devices()[: np.prod(sizes)]).reshape(sizes), meshes.AXES)
    layout = NamedSharding(mesh, meshes.spec(stage.axes, config.sharding))
    rows = np.arange(stage.shape[0])
    with meshes.use(mesh, config.sharding):
        program = programs.build(config, stage.make, stage.loss, mesh)
        state, curves[name] = program.init(jax.random.key(config.seed)), []
        for step, batch, _ in stage.data.prefetch(0, rows):
            if step == int(steps):
                break
            state, measured = program.step(state, meshes.global_batch(batch, rows, len(rows), layout))
            curves[name].append(float(measured["loss"]))
        assert {str(leaf.dtype) for leaf in jax.tree.leaves(state["params"])} == {dtype}
json.dump(curves, open(out, "w"))
"""


def assert_close(curve, expected, tolerance):
    assert len(curve) == len(expected) == STEPS and expected[-1] < 0.7 * expected[0]
    np.testing.assert_allclose(curve, expected, rtol=tolerance)


def eight(space, tmp_path, dtype, tolerance, names):
    meshes = {name: MESHES[name] for name in ("one", *names)}
    out = tmp_path / "curves.json"
    run_python(
        CURVES, space.shards, dtype, STEPS, tmp_path / "work", json.dumps(SIZES), json.dumps(meshes), out, devices=8,
    )  # fmt: skip
    curves = json.loads(out.read_text())
    expected = curves.pop("one")
    for name in names:
        assert_close(curves[name], expected, tolerance)


@pytest.mark.soak
def test_eight_devices_learn_what_one_does(space, tmp_path):
    """All axes at once, the most exacting; tests/test_mesh.py has a short one that is always run."""
    eight(space, tmp_path, "float64", 1e-9, ("all",))


@pytest.mark.soak
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("float64", 1e-9)])
def test_every_mesh_of_eight_devices_learns_what_one_does(space, tmp_path, dtype, tolerance):
    eight(space, tmp_path, dtype, tolerance, tuple(MESHES)[1:])


@pytest.mark.parametrize(
    "processes, shape",
    [
        pytest.param(2, {"context": 4}, marks=pytest.mark.soak),
        pytest.param(4, {"fsdp": 2, "tensor": 2}, marks=pytest.mark.soak),
        pytest.param(2, {"data": 4}, marks=pytest.mark.soak),
        pytest.param(4, {"fsdp": 4}, marks=pytest.mark.soak),
        pytest.param(4, {"tensor": 2, "context": 2}, marks=pytest.mark.soak),
    ],
)
def test_processes_learn_what_one_does(space, tmp_path, processes, shape):
    settings = SIZES | {"steps": 8200, "log_every": 1, "data.shards": space.shards, "mesh.data": 1}
    flags = [
        "--config",
        "transformer:quickstart",
        *(f"--config.{key}={value}" for key, value in settings.items()),
    ]
    for count, mesh in ((1, {"data": 4}), (processes, shape)):
        sizes = [f"--config.mesh.{axis}={size}" for axis, size in mesh.items()]
        run(count, TRAIN, [(tmp_path / str(count), STEPS, *flags, *sizes)] * count)
    one, several = ([line["loss"] for line in records(tmp_path / str(count))] for count in (1, processes))
    assert_close(several, one, 1e-5)
