"""Plans against arithmetic by hand, layouts against golden files, and the table of accelerators."""

import importlib.util
import json
import math
import os

import jax
import pytest

from mmgen.commands.tools import plan
from mmgen.runtime import config as configs
from mmgen.runtime import hardware
from tests.conftest import ROOT, run_python

GiB = 2**30
VOCABULARY = plan.Vocabulary(32_000, 64, (8, 8, 8, 6, 5))
LAYOUTS = ROOT / "tests/golden/layouts"
TENSOR = ("mesh.fsdp=16", "mesh.tensor=4")
# width, layers, heads, kv_heads, mlp; as configs/transformer.py has them
SIZES = {
    "350m": (1024, 24, 16, 8, 2816),
    "1b": (2048, 20, 16, 8, 5632),
    "7b": (4096, 32, 32, 8, 11264),
}


def estimate(variant, topology, *overrides):
    config = configs.load(f"transformer:{variant}", overrides)
    return plan.estimate(config, hardware.topology(topology), VOCABULARY)


def by_hand(variant):
    """(all, multiplied) parameters of a preset, counted on paper."""
    D, L, N, K, F = SIZES[variant]
    C = D // N
    layer = D * N * C + 2 * D * K * C + N * C * D + D * 2 * F + F * D
    vocab = 32_000 + 64 + 2 * 64 + 8 * 8 * 8 * 6 * 5
    rows = math.ceil(vocab / 256) * 256
    digits = 8 + 8 + 8 + 6 + 5
    head = rows * D + digits * D
    inputs = 24 * D + 5 * digits * D + 3 * D * D  # place, around, before
    looked_up = (rows + digits) * D
    return L * layer + head + inputs + looked_up, L * layer + head + inputs


@pytest.mark.parametrize("variant", SIZES)
def test_parameters_and_flops_are_those_counted_by_hand(variant):
    found = estimate(variant, "v5p-128")
    total, multiplied = by_hand(variant)
    assert (found["parameters"]["all"], found["parameters"]["multiplied"]) == (total, multiplied)
    D, L, *_ = SIZES[variant]
    assert found["flops a token"] == 6 * multiplied + 12 * L * 4096 * D / 2


def test_7b_on_v5p_128_is_what_docs_planning_works_out():
    found = estimate("7b", "v5p-128")
    total, multiplied = by_hand("7b")
    tokens = 256 * 4096 // 64
    memory = found["memory"]
    assert memory["parameters"] == memory["ema"] == pytest.approx(4 * total / 64)
    assert memory["kept activations"] == 32 * tokens * (4096 + 4096 + 4096) * 2
    assert found["fits"] and found["needed"] == pytest.approx(sum(memory.values()), abs=10)
    assert found["step seconds"] == pytest.approx(found["flops a token"] * 256 * 4096 / (64 * 459e12 * 0.5))
    assert found["network seconds"]["fsdp"] == pytest.approx(3 * 2 * multiplied * 63 / 64 / 600e9)
    assert found["network seconds"]["data"] == found["network seconds"]["tensor"] == 0


def test_between_hosts_the_network_is_what_limits():
    found = estimate("7b", "h100x64")
    size = 2 * by_hand("7b")[1]
    assert found["network seconds"]["fsdp"] == pytest.approx(3 * size * 7 / 8 / (8 * 50e9))
    one_host = estimate("350m", "h100x8", "data.batch_size=8")
    assert one_host["network seconds"]["fsdp"] == pytest.approx(3 * 2 * by_hand("350m")[1] * 7 / 8 / 450e9)


def test_tensor_parallel_halves_are_smaller_and_cost_sums():
    alone, shared = estimate("7b", "h100x64"), estimate("7b", "h100x64", "mesh.fsdp=8", "mesh.tensor=8")
    assert shared["memory"]["parameters"] == pytest.approx(alone["memory"]["parameters"], rel=0.01)
    assert shared["memory"]["working on a layer"] < 8 * alone["memory"]["working on a layer"]
    assert shared["network seconds"]["tensor"] > 0 == alone["network seconds"]["tensor"]


def test_what_does_not_fit_says_what_to_change():
    found = estimate("7b", "v5e-16", "model.remat=none")
    assert not found["fits"]
    assert any("remat=full" in words for words in found["advice"])
    text = plan.show(found)
    assert "DOES NOT FIT" in text and "more devices" in text
    better = estimate("7b", "v5e-256", "model.remat=full")
    assert better["fits"] and not better["advice"]


@pytest.mark.parametrize(
    "topology, overrides, words",
    [
        ("v5p-128", ["mesh.fsdp=48"], "needs 48 devices, found 64"),
        ("v5p-128", ["data.batch_size=100"], "config.data.batch_size of 100 does not divide over 64"),
        ("v5p-128", ["accumulate=3"], "config.accumulate=3"),
    ],
)
def test_what_cannot_be_laid_out_is_an_error(topology, overrides, words):
    with pytest.raises(ValueError, match=words):
        estimate("7b", topology, *overrides)


CASES = [
    (variant, topology, overrides)
    for variant in [
        *(f"transformer:{size}" for size in SIZES),
        "contrastive:350m",
        "classifier:350m",
        "refiner:512px-x2",
    ]
    for topology, overrides in (("v5p-128", ()), ("h100x64", ()), ("h100x64", TENSOR))
]


@pytest.mark.parametrize("variant, topology, overrides", CASES)
def test_layouts_are_the_golden_ones(variant, topology, overrides):
    """MMGEN_GOLDEN=write renews the files: read their diff before it is committed."""
    lines = plan.layout(configs.load(variant, overrides), hardware.topology(topology), VOCABULARY)
    name = variant.removeprefix("transformer:").replace(":", ".")
    path = LAYOUTS / f"{name}.{topology}{'.tensor4' if overrides else ''}.txt"
    if os.environ.get("MMGEN_GOLDEN") == "write":
        path.write_text("\n".join(lines) + "\n")
    assert lines == path.read_text().splitlines(), f"{path.name} differs; MMGEN_GOLDEN=write renews it"


@pytest.mark.soak
def test_collectives_of_a_loop_count_as_often_as_it_runs(tmp_path):
    """The real command, compiling for eight pretended devices: weights of both layers are gathered in both
    passes."""
    flags = [
        "--config",
        "transformer:tiny",
        "--topology",
        "h100x8",
        "--compile",
        "--json",
        tmp_path / "plan.json",
    ]
    flags += [
        "--pieces",
        100,
        "--levels",
        "4,4",
        "--max-side",
        8,
        "--config.mesh.data=1",
        "--config.mesh.fsdp=8",
    ]
    flags += ["--config.data.batch_size=8", "--config.data.row_length=32", "--config.model.unroll=False"]
    flags += ["--config.optimizer.name=adamw", "--config.model.remat=full"]
    run_python("import sys; from mmgen.commands.tools import plan; plan.main(sys.argv[1:])", *flags)
    found = json.loads((tmp_path / "plan.json").read_text())
    compiled = found["compiled"]
    memory = found["memory"]
    state = sum(memory[name] for name in ("parameters", "optimizer", "ema"))
    assert state <= compiled["arguments"] <= state + 8 * 32 * 7 * 4  # and the batch
    assert compiled["outputs"] >= compiled["aliases"] >= state - 100  # all is donated
    count, size = compiled["collectives"]["all-gather"]
    layers = 2 * (32 * 2 * 16 + 2 * 32 * 16 + 2 * 16 * 32 + 32 * 2 * 64 + 64 * 32) * 4
    assert count >= 2 * 2 * 6 and size >= 2 * layers
    assert size <= 2 * layers + 12 * memory["parameters"] * 8


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_the_tpu_compiler_takes_the_step_and_our_flags(tmp_path):
    code = """
import sys
from mmgen.runtime import hardware
assert hardware.apply_flags("tpu") == hardware.xla_flags("tpu")
from mmgen.commands.tools import plan
plan.main(sys.argv[1:])
"""
    flags = [
        "--config",
        "transformer:tiny",
        "--topology",
        "v6e-4",
        "--compile",
        "--json",
        tmp_path / "plan.json",
    ]
    flags += [
        "--config.model.dtype=bfloat16",
        "--config.model.head_dim=128",
        "--config.data.row_length=256",
        "--config.model.unroll=False",
    ]
    run_python(code, *flags)
    compiled = json.loads((tmp_path / "plan.json").read_text())["compiled"]
    assert compiled["real"] and compiled["attention"] == "splash" and 0 < compiled["all"] < GiB


def test_topologies_count_as_their_makers_do():
    found = {
        name: hardware.topology(name)[2:] for name in ("v5p-128", "v4-8", "v5e-256", "v6e-8", "tpu7x-128")
    }
    assert found == {
        "v5p-128": (64, 16, "4x4x4"),
        "v4-8": (4, 1, "2x2x1"),
        "v5e-256": (256, 64, "16x16"),
        "v6e-8": (8, 1, "2x4"),
        "tpu7x-128": (128, 16, "4x4x4"),
    }
    assert hardware.topology("h100x64")[2:] == (64, 8, None)
    assert hardware.topology("v5litepod-16") == hardware.topology("v5e-16")._replace(name="v5litepod-16")
    for wrong in ("v5p-127", "v6e-3"):
        with pytest.raises(ValueError, match="end in one of"):
            hardware.topology(wrong)
    for wrong in ("", "h100", "h100-8", "v5px8", "cpux8", "h100x0"):
        with pytest.raises(ValueError, match="known: v4-N"):
            hardware.topology(wrong)


def test_peaks_are_known_by_what_jax_calls_a_device():
    assert hardware.peak_flops(jax.devices("cpu")[0]) is None
    assert hardware.peak_flops("TPU v5") == hardware.peak_flops("TPU v5p") == 459e12
    assert hardware.peak_flops("TPU v5 lite") == 197e12
    assert hardware.peak_flops("NVIDIA H100 80GB HBM3", "bfloat16") == 989.4e12
    assert hardware.peak_flops("NVIDIA H100 80GB HBM3", "float32") is None
    assert hardware.peak_flops("NVIDIA H100 PCIe") is None  # another chip: slower, less power
    assert hardware.chip_of("NVIDIA A100-SXM4-80GB").name == "a100"


def test_flags_are_those_that_this_jaxlib_knows():
    """A flag that it does not know would end the process."""
    code = """
import os
from mmgen.runtime import hardware
os.environ["XLA_FLAGS"] += " --xla_gpu_enable_latency_hiding_scheduler=false"
flags = hardware.apply_flags("gpu")
assert flags and set(flags) < set(hardware.xla_flags("gpu")), flags
assert os.environ["XLA_FLAGS"].count("latency_hiding") == 1  # what a user says stays
known, ours = hardware.xla_flags("cpu"), hardware.apply_flags("cpu")
assert "xla_backend_optimization_level=0" in os.environ["XLA_FLAGS"] and set(known) - set(ours) == {
    "--xla_backend_optimization_level=1"
}
assert hardware.apply_flags("cpu") == ()
import jax
print(jax.jit(lambda x: x + 1)(1), jax.device_count())
"""
    assert run_python(code, devices=2).stdout.split() == ["2", "2"]


def test_flags_can_be_turned_off(monkeypatch):
    monkeypatch.setenv("MMGEN_XLA_FLAGS", "off")
    monkeypatch.setenv("XLA_FLAGS", "")
    assert hardware.apply_flags("gpu") == () and os.environ["XLA_FLAGS"] == ""
    with pytest.raises(ValueError, match="known: cpu, gpu, tpu"):
        hardware.xla_flags("ipu")


def test_the_compilation_cache_is_of_one_jaxlib(tmp_path):
    code = """
import sys, jax, jaxlib
from mmgen.runtime import hardware
assert hardware.compilation_cache() == sys.argv[1] + "/.cache/mmgen/xla-" + jaxlib.__version__
jax.config.update("jax_compilation_cache_dir", "elsewhere")
assert hardware.compilation_cache() == "elsewhere"  # what is set stays
"""
    environment = f"import os; os.environ['HOME'] = {str(tmp_path)!r}; "
    environment += "os.environ.pop('JAX_COMPILATION_CACHE_DIR', None)"
    run_python(environment + code, tmp_path)
