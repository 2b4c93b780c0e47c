"""Many devices do what one does. Eight virtual CPU devices, in a process of their own."""

import json
import shutil

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, PartitionSpec

from mmgen.models import layers
from mmgen.runtime import checkpoint
from mmgen.runtime import mesh as meshes
from mmgen.runtime.presets import SHARDING
from mmgen.stages import loop
from tests.conftest import arrays, config_of, records, run_python

MESHES = {"data": {"data": 8}, "mixed": {"data": 2, "fsdp": 2, "tensor": 2}}

# Trains on each mesh, and says how parameters and moments are laid out on the last.
EIGHT = """
import json, sys
from pathlib import Path
import jax
from flax import nnx
from mmgen.runtime import mesh as meshes, optimizer
from mmgen.stages import loop, program
from tests.conftest import config_of

out, flags, shapes = Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3])
assert jax.device_count() == 8
layouts = {}
init = program._shardings

def watched(shapes, params, mesh):
    found = init(shapes, params, mesh)
    for path, sharding in jax.tree_util.tree_leaves_with_path(found):
        layouts[jax.tree_util.keystr(path)] = str(sharding.spec)
    return found

program._shardings = watched
for name, shape in shapes.items():
    config = config_of(flags)
    with config.unlocked():
        config.mesh = shape
    loop.train(config, out / name, stop_at=2 if name == "mixed" else None)
(out / "layouts.json").write_text(json.dumps(layouts))
"""


@pytest.fixture(scope="module")
def eight(space, tmp_path_factory):
    """-> (folder with a run on each mesh, the flags of the runs)."""
    out = tmp_path_factory.mktemp("eight")
    flags = [flag for flag in space.transformer_flags if "steps" not in flag and "every" not in flag]
    flags += [
        "--config.steps=3",
        "--config.log_every=1",
        "--config.save_every=10",
        "--config.model.kv_heads=2",
    ]
    flags += ["--config.data.batch_size=8", "--config.model.layers=1"]
    run_python(EIGHT, out, json.dumps(flags), json.dumps(MESHES), devices=8)
    loop.train(config_of(flags), out / "one")
    return out, flags


def losses(workdir):
    return [line["loss"] for line in records(workdir)]


def test_eight_devices_learn_what_one_does(eight):
    out, _ = eight
    expected = losses(out / "one")
    assert len(expected) == 3 and expected[2] < expected[1]
    np.testing.assert_allclose(losses(out / "data"), expected, rtol=1e-4)
    np.testing.assert_allclose(losses(out / "mixed"), expected[:2], rtol=1e-4)


def test_saved_on_eight_goes_on_on_one(eight, tmp_path):
    out, flags = eight
    workdir = shutil.copytree(out / "mixed", tmp_path / "mixed")
    assert checkpoint.latest(workdir) == 2
    loop.train(config_of(flags), workdir)
    np.testing.assert_allclose(losses(workdir), losses(out / "one"), rtol=1e-4)
    ours, expected = arrays(workdir, 3), arrays(out / "one", 3)
    assert ours.keys() == expected.keys()
    name = "params['head']"
    np.testing.assert_allclose(ours[name], expected[name], atol=1e-3)


def test_moments_lie_as_their_parameters(eight):
    layouts = json.loads((eight[0] / "layouts.json").read_text())
    params = {
        name.removeprefix("['params']"): spec
        for name, spec in layouts.items()
        if name.startswith("['params']")
    }
    moments = {name: spec for name, spec in layouts.items() if name.startswith("['optimizer']")}
    split = [name for name, spec in params.items() if "tensor" in spec or "fsdp" in spec]
    assert len(split) == len(params)
    for name, spec in params.items():
        found = {where: moments[where] for where in moments if where.endswith(name)}
        assert found and set(found.values()) == {spec}, name


def test_a_mesh_that_does_not_fit_says_so():
    count = jax.device_count()
    assert meshes.make_mesh({"data": -1}).size == count
    for shape, words in (
        ({"data": count + 6}, f"found {count}"),
        ({"data": -1, "tensor": count + 1}, "do not divide"),
        ({"dta": 1}, "unknown mesh axes"),
        ({"data": 0}, "needs 0 devices"),
        ({"data": -1, "fsdp": -1}, "config.mesh"),
    ):
        with pytest.raises(ValueError, match=words):
            meshes.make_mesh(shape)


@pytest.mark.smoke
def test_layout_from_logical_axes():
    assert meshes.spec(("batch", None, "vocab"), SHARDING) == PartitionSpec(
        ("replica", "data", "fsdp"), None, "tensor"
    )
    with pytest.raises(ValueError, match=r"no sharding rule covers .*'emebd'"):
        meshes.spec(("emebd",), SHARDING)
    with pytest.raises(ValueError, match="twice"):
        meshes.spec(("heads", "mlp"), SHARDING)


class Model(nnx.Module):
    def __init__(self, axes=("embed", "mlp"), shape=(8, 12)):
        self.blocks = layers.stack(lambda r: layers.Linear(shape, axes, r), 3, nnx.Rngs(0))


def layout(model):
    mesh = AbstractMesh((1, 1, 2, 1, 4), meshes.AXES)
    return meshes.param_shardings(nnx.split(nnx.eval_shape(model))[1], mesh, SHARDING)


def test_every_parameter_is_covered_or_an_error():
    assert layout(Model)["blocks"]["w"].spec == PartitionSpec(None, "fsdp", "tensor")
    with pytest.raises(ValueError, match="no sharding rule covers"):
        layout(lambda: Model(("embed", "mpl")))
    with pytest.raises(
        ValueError, match="blocks/w: its axis 'mlp' of size 10 does not divide over 4 .*config.sharding.mlp="
    ):
        layout(lambda: Model(shape=(8, 10)))
    with pytest.raises(ValueError, match="blocks/w: shape"):
        layout(lambda: Model(("embed",)))

    class Bare(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(np.zeros(3))

    with pytest.raises(ValueError, match="parameter w names no logical axes"):
        layout(Bare)


def test_a_large_parameter_may_not_lie_whole_where_it_could_be_shared():
    one = lambda axes, shape: layout(lambda: layers.Linear(shape, axes, nnx.Rngs(0)))
    assert one(("embed", "mlp"), (1024, 2048))["w"].spec == PartitionSpec("fsdp", "tensor")
    assert one(("place", "mlp"), (512, 1024))["w"].spec == PartitionSpec(None, "tensor")  # not that large
    with pytest.raises(
        ValueError, match=r"w \(1024, 2048\), 100% of all, lies whole along .*'tensor'.* of \[4\] devices"
    ):
        layout(lambda: Two(("embed", "place")))


class Two(nnx.Module):
    """A large matrix of the axes given, and one that says that rules split parameters over fsdp and tensor."""

    def __init__(self, axes):
        self.w = nnx.Param(np.zeros((1024, 2048), np.float32), axes=axes)
        self.other = nnx.Param(np.zeros((8, 8), np.float32), axes=("embed", "mlp"))


def test_rules_as_they_are_written_on_a_command_line():
    rules = SHARDING | {"stream": "context,tensor", "kv_heads": ""}
    assert meshes.spec(("batch", "stream", "kv_heads"), rules) == PartitionSpec(
        ("replica", "data", "fsdp"), ("context", "tensor"), None
    )
    with pytest.raises(ValueError, match="unknown mesh axes .*'tensr'"):
        meshes.spec(("mlp",), SHARDING | {"mlp": "tensr"})


def test_slices_are_joined_by_the_axis_replica_alone(monkeypatch):
    """The slow network lies between devices of different slices: only `replica` may cross it."""

    class Device:
        platform, device_kind, process_index = "tpu", "TPU v5p", 0

        def __init__(self, i):
            self.id, self.slice_index, self.coords, self.core_on_chip = i, i // 4, (i % 4, 0, 0), 0

    devices = [Device(i) for i in range(8)]
    monkeypatch.setattr(jax, "devices", lambda *_: devices)
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    made = {}
    monkeypatch.setattr(jax.sharding, "Mesh", lambda array, axes, axis_types: made.update(array=array))
    meshes.make_mesh({"replica": 2, "fsdp": -1})
    assert made["array"].shape == (2, 1, 4, 1, 1)
    for replica in (0, 1):
        assert {d.slice_index for d in made["array"][replica].ravel()} == {replica}
    with pytest.raises(ValueError, match="multiple of 2"):
        meshes.make_mesh({"fsdp": 8})


def test_constraints_outside_a_mesh_do_nothing():
    x = jax.numpy.ones((2, 3))
    assert meshes.constrain(x, ("anything", "at all")) is x
    with meshes.use(meshes.make_mesh({"data": -1}), SHARDING), pytest.raises(ValueError, match="anything"):
        meshes.constrain(x, ("anything", None))
    assert meshes.constrain(x, ("anything", "at all")) is x


def test_which_process_this_is_on_a_cluster(monkeypatch):
    monkeypatch.setenv("MMGEN_DISTRIBUTED", "auto")
    for name in ("SLURM_PROCID", "SLURM_NTASKS", "TPU_WORKER_ID", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="RANK/COUNT"):
        meshes.process()
    monkeypatch.setenv("TPU_WORKER_ID", "2")
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "a,b,c,d")
    assert meshes.process() == (2, 4)
    monkeypatch.setenv("SLURM_PROCID", "5")
    monkeypatch.setenv("SLURM_NTASKS", "8")
    assert meshes.process() == (5, 8)


def test_which_process_this_is(monkeypatch):
    for place, expected in ((None, (0, 1)), ("", (0, 1)), ("0/1", (0, 1)), ("3/4", (3, 4))):
        monkeypatch.delenv("MMGEN_DISTRIBUTED", raising=False)
        if place is not None:
            monkeypatch.setenv("MMGEN_DISTRIBUTED", place)
        assert meshes.process() == expected
    for place in ("4/4", "1", "a/b", "-1/2", "1/"):
        monkeypatch.setenv("MMGEN_DISTRIBUTED", place)
        with pytest.raises(ValueError, match="RANK/COUNT"):
            meshes.process()
