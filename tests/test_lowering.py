"""The training step and the sampler lower for TPU and for CUDA, kernels included, on a machine that has
neither.

What is asserted is the exported module: JAX runs all its lowering rules, Pallas among them, and only the last
step, to machine code, is left to the accelerator's own compiler.
"""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export
from jax.sharding import NamedSharding

from mmgen.commands.tools.plan import Vocabulary
from mmgen.document import Document, Image, Text, Turn
from mmgen.models import transformer
from mmgen.runtime import config as configs
from mmgen.runtime import mesh as meshes
from mmgen.sampling import sampler, slots
from mmgen.stages import program
from tests.conftest import run_python

VOCABULARY = Vocabulary(100, 8, (4, 4))
KERNELS = {"tpu": ("splash", "tpu_custom_call"), "cuda": ("gpu", "__gpu$xla.gpu.triton")}
SETTINGS = [
    "model.dtype='bfloat16'", "model.width=128", "model.heads=4", "model.kv_heads=2", "model.head_dim=64",
    "model.mlp=256", "model.unroll=False", "model.vocab_multiple=128", "data.row_length=256",
    "data.batch_size=8", "loss.chunk=128", "model.remat=attention", "accumulate=2", "ema=0.99",
]  # fmt: skip


def config_of(*overrides):
    return configs.load("transformer:tiny", [text.replace("'", "") for text in (*SETTINGS, *overrides)])


def make(config):
    return lambda rngs: transformer.of_codes(
        config.model, VOCABULARY.manifest, VOCABULARY.grammar.vocab_size, rngs
    )


def exported_step(platform, *overrides):
    """The training step of the tiny model, exported from as many devices as there are -> its module's
    text."""
    config = config_of(*overrides)
    mesh = meshes.make_mesh(dict(config.mesh))
    with meshes.use(mesh, config.sharding):
        loss = lambda model, batch, key: transformer.loss(
            model, batch, code_start=VOCABULARY.grammar.code_start, **config.loss
        )
        built = program.build(config, make(config), loss, mesh)
        rows = NamedSharding(mesh, meshes.spec(("batch", "length"), config.sharding))
        shape = (config.data.batch_size, config.data.row_length)
        one = lambda dtype, *more: jax.ShapeDtypeStruct(shape + more, dtype, sharding=rows)
        batch = {
            "tokens": one(jnp.int32),
            "segments": one(jnp.int32),
            "positions": one(jnp.int32, 3),
            "weights": one(jnp.float32),
        }
        # Nothing is stored, so that no promise for older and newer versions is needed of the kernels.
        checks = [export.DisabledSafetyCheck.custom_call(call) for _, call in KERNELS.values()]
        done = export.export(built.step, platforms=[platform], disabled_checks=checks)(built.shapes, batch)
    assert done.nr_devices == jax.device_count()
    return done.mlir_module()


@pytest.mark.parametrize("platform", KERNELS)
def test_the_training_step_lowers_with_the_kernel_of_the_platform(platform):
    kernel, call = KERNELS[platform]
    fused = exported_step(platform, f"model.attention={kernel}")
    # Each layer's kernel once forward, and backward again with its own: the layers are one scanned body.
    assert fused.count(f"@{call}") >= 3, f"{fused.count(call)} calls of {call}"
    assert "@" + call not in exported_step(platform, "model.attention=xla")


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_every_remat_policy_lowers(remat):
    assert "@tpu_custom_call" in exported_step("tpu", "model.attention=splash", f"model.remat={remat}")


EIGHT = """
from tests.test_lowering import KERNELS, exported_step
for mesh in (["mesh.data=1", "mesh.fsdp=8"], ["mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"]):
    for platform, (kernel, call) in KERNELS.items():
        text = exported_step(platform, f"model.attention={kernel}", "accumulate=1", *mesh)
        assert text.count("@" + call) >= 3, (mesh, platform, text.count(call))
        assert "num_partitions = 8" in text
        print(platform, len(text))
text = exported_step("tpu", "model.attention=splash", "accumulate=1", "mesh.data=2", "mesh.context=4")
assert "collective_permute" in text  # the ring
"""


def test_eight_devices_lower_too():
    run_python(EIGHT, devices=8)


@pytest.mark.parametrize("platform", KERNELS)
@pytest.mark.parametrize("int8", [False, True])
def test_the_sampler_lowers(platform, int8):
    config, grammar = config_of("model.dtype=bfloat16"), VOCABULARY.grammar
    graphdef, state = nnx.split(make(config)(nnx.Rngs(0)))
    text = types.SimpleNamespace(encode=lambda text: [7] * len(text))
    model = sampler.Sampler(
        graphdef, nnx.to_pure_dict(state), config, grammar, text, None, int8=int8, int8_cache=int8
    )
    running = slots.Slots(model, 2, 3, 96)
    picture = Image(codes=np.zeros((2, 2), np.int32))
    document = Document([Turn("user", [picture, Text("x")])])
    running.add(sampler.Request(document, size=(4, 4), guidance=2.0, image_guidance=2.0))
    export.export(slots._fill, platforms=[platform])(
        model.params,
        model.weights,
        running._state,
        running._admit(),
        graphdef=model.graphdef,
        chunk=model.chunk,
    )
    done = export.export(slots._dispatch, platforms=[platform])(
        model.params, model.weights, running._state, running._knobs, np.ones(2, bool), np.int32(9), np.int32(0),
        graphdef=model.graphdef, grammar=grammar, branches=3,
    )  # fmt: skip
    assert [(aval.shape, aval.dtype) for aval in done.out_avals][-1:] == [((2, 96), jnp.int32)]
    assert "stablehlo.while" in done.mlir_module()
