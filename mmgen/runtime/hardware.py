"""Accelerators in numbers, what a token costs on them, and how XLA is set up for each platform."""

import math
import os
import re
from pathlib import Path
from typing import NamedTuple

import jax
import jaxlib

_GiB = 2**30


class Chip(NamedTuple):
    """An accelerator as JAX counts devices: of a TPU7x chip JAX sees two, each a half of it."""

    name: str
    platform: str  # "tpu" or "gpu"
    kinds: tuple  # regular expressions of jax.Device.device_kind
    flops: float  # peak bfloat16 FLOP/s with float32 sums, dense: no sparsity
    memory: float  # bytes
    bandwidth: float  # of the memory, bytes/s
    link: float  # bytes/s one way to its neighbours: all ICI links of a TPU together, NVLink of a GPU
    network: float | None  # bytes/s one way to other hosts, where these are not neighbours: one NIC a GPU
    per_host: int


# TPUs: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, where ICI is said per chip and for both
# directions together; memory is what XLA says it has when a program is too large (v5p "of 95.74G hbm").
# GPUs: NVIDIA's data sheets of the SXM modules, halved where they count sparsity or both directions; memory
# as nvidia-smi shows it; network as in the DGX systems (8 x 200 Gb/s with A100, 8 x 400 Gb/s since).
# Device kinds as in jax/_src/pallas/mosaic/tpu_info.py and as cuDeviceGetName says.
CHIPS = (
    Chip("v4", "tpu", ("TPU v4",), 275e12, 31.75 * _GiB, 1228e9, 300e9, None, 4),
    Chip("v5e", "tpu", ("TPU v5 lite", "TPU v5e"), 197e12, 15.75 * _GiB, 819e9, 200e9, None, 4),
    Chip("v5p", "tpu", ("TPU v5", "TPU v5p"), 459e12, 95.74 * _GiB, 2765e9, 600e9, None, 4),
    Chip("v6e", "tpu", ("TPU v6 lite", "TPU v6e"), 918e12, 31.25 * _GiB, 1638e9, 400e9, None, 4),
    Chip("tpu7x", "tpu", ("TPU7x",), 2307e12 / 2, 192 / 2 * _GiB, 7380e9 / 2, 300e9, None, 8),
    Chip("a100", "gpu", (r"NVIDIA A100.*80GB",), 312e12, 80 * _GiB, 2039e9, 300e9, 25e9, 8),
    Chip("h100", "gpu", (r"NVIDIA H100 80GB HBM3",), 989.4e12, 79.6 * _GiB, 3350e9, 450e9, 50e9, 8),
    Chip("h200", "gpu", (r"NVIDIA H200",), 989.4e12, 140.4 * _GiB, 4800e9, 450e9, 50e9, 8),
    Chip("b200", "gpu", (r"NVIDIA B200",), 2250e12, 179 * _GiB, 7700e9, 900e9, 50e9, 8),
)
_BY_NAME = {chip.name: chip for chip in CHIPS} | {"v5litepod": CHIPS[1]}


def chip_of(device):
    """The `Chip` of a jax.Device (or of its device_kind), or None where it is not in the table."""
    kind = device if isinstance(device, str) else device.device_kind
    return next((chip for chip in CHIPS if any(re.fullmatch(k, kind) for k in chip.kinds)), None)


def peak_flops(device, dtype="bfloat16"):
    """FLOP/s of a device at its dense peak; None for CPUs, unknown devices, and what is not 16 bits wide:
    there is no one number for float32, which these chips compute in several passes or at lower precision."""
    chip = chip_of(device)
    return chip.flops if chip and str(dtype) in ("bfloat16", "float16") else None


class Topology(NamedTuple):
    """A slice of a TPU pod, or GPUs in hosts of eight."""

    name: str
    chip: Chip
    devices: int  # as JAX counts them
    hosts: int
    shape: str | None  # of the chips of a TPU slice, "4x4x4"; None for GPUs


# The shapes that Google Cloud offers a number of chips in; the squarest where there are several.
_SHAPES = {
    2: {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"},
    3: {
        4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8",
        512: "8x8x8", 1024: "8x8x16", 2048: "8x16x16", 4096: "16x16x16",
    },
}  # fmt: skip


def topology(name):
    """The `Topology` that a name means: v5p-128, v5e-256, h100x64, ...

    v4, v5p and tpu7x names count TensorCores, two a chip (v5p-128 has 64 chips); v5e and v6e names count
    chips, and GPU names GPUs.
    """
    known = "v4-N, v5p-N, tpu7x-N (N TensorCores, two a chip), v5e-N, v6e-N (N chips), " + ", ".join(
        f"{chip.name}xN" for chip in CHIPS if chip.platform == "gpu"
    )
    match = re.fullmatch(r"([a-z]+\d*[a-z]*)([-x])([1-9]\d*)", name)
    chip = match and _BY_NAME.get(match[1])
    if not chip or (match[2] == "-") != (chip.platform == "tpu"):
        raise ValueError(f"no topology {name!r}; known: {known}")
    count = int(match[3])
    if chip.platform == "gpu":
        return Topology(name, chip, count, -(-count // chip.per_host), None)
    cores, axes = (1, 2) if chip.name in ("v5e", "v6e") else (2, 3)
    shapes = _SHAPES[axes]
    if count % cores or count // cores not in shapes:
        sizes = ", ".join(str(chips * cores) for chips in shapes)
        raise ValueError(f"no slice {name!r}: {chip.name} names end in one of {sizes}")
    chips = count // cores
    devices = count if chip.name == "tpu7x" else chips
    hosts = 1 if axes == 2 and chips == 8 else -(-devices // chip.per_host)
    return Topology(name, chip, devices, hosts, shapes[chips])


def gather_seconds(topology, size, ways, inner=1):
    """The least time in which each of `ways` devices can receive the parts of the others of an array of
    `size` bytes, or send its own sums of it away: no protocol can do it faster than the wires.

    Within a torus or a host all links of a device receive at once. Between hosts each host takes in what it
    lacks through all its NICs, once. The devices stand `inner` apart: the size of the mesh axes further in.
    """
    chip = topology.chip
    local = ways if chip.network is None else max(1, min(ways, chip.per_host // inner))
    within = size * (local - 1) / local / chip.link
    hosts = math.ceil(ways / local)
    between = size * (hosts - 1) / hosts / (local * chip.network) if hosts > 1 else 0.0
    return max(within, between)


def parameters(params, tied=False):
    """(all, multiplied) of a pytree of arrays or shapes: how many there are, and how many a token is
    multiplied with. Tables named "...embedding" are only looked up, unless they are also the head
    (`tied`)."""
    total = looked_up = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        total += leaf.size
        looked_up += leaf.size * (not tied and str(getattr(path[-1], "key", "")).endswith("embedding"))
    return total, total - looked_up


def flops_a_token(multiplied, layers, row_length, attention_width):
    """FLOPs of training on one token: 6 a parameter it is multiplied with (2 forward, 4 backward) and those
    of causal attention, 12 * layers * row_length * heads * head_dim, halved since a token sees half of its
    row.

    What the backward pass computes again is not counted, so that utilisation by it is MFU (PaLM,
    arXiv:2204.02311, appendix B, which does not halve attention). Rows packed with several documents cost
    less than this where the kernel leaves out what segments hide.
    """
    return 6 * multiplied + 6 * layers * row_length * attention_width


# -- how XLA is set up

# Flags and why. A flag that a jaxlib or libtpu does not know ends the process, so they are applied to the
# versions that they were tried with only: jaxlib 0.10 to 0.12 and libtpu 0.0.42 to 0.0.52.
_TRIED = ((0, 10), (0, 12))
_FLAGS = {
    "cpu": (
        # Fewer copies of whole tensors before they are written again: 2 % of a step, bit for bit the same. Of the
        # others tried each was slower or changed nothing.
        "--xla_cpu_copy_insertion_use_region_analysis=true",
        # A fifth less to compile, the same bits; steps take as long, and sampling a tenth less. (Level 0 takes half of
        # the compiling and doubles what is run.)
        "--xla_backend_optimization_level=1",
        "--xla_llvm_disable_expensive_passes=true",
    ),
    "gpu": (
        # Collectives start early and end late, behind the work that does not need them. Off by default.
        "--xla_gpu_enable_latency_hiding_scheduler=true",
        # The scan over layers: the next layer's weights are gathered, and the last one's gradients are
        # summed, while this one is computed, where otherwise each waits within its own turn of the loop.
        "--xla_gpu_enable_pipelined_all_gather=true",
        "--xla_gpu_enable_pipelined_reduce_scatter=true",
        "--xla_gpu_enable_pipelined_all_reduce=true",
        # Few large messages instead of one a matrix: between hosts small ones do not fill the wire. A layer
        # of the 7b preset is 0.4 GB in bfloat16. Memory grows by as much.
        "--xla_gpu_all_gather_combine_threshold_bytes=268435456",
        "--xla_gpu_reduce_scatter_combine_threshold_bytes=268435456",
        "--xla_gpu_all_reduce_combine_threshold_bytes=268435456",
        # Command buffers (CUDA graphs) keep their default, fusions and library calls, which suits both a
        # training step and the body of a sampler's loop.
    ),
    "tpu": (
        # All-gathers run beside matrix products, and are fused with them step by step (MaxText's set for
        # dense models, benchmarks/xla_flags_library.py: CF_FOR_ALL_GATHER).
        "--xla_tpu_enable_async_collective_fusion=true",
        "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true",
        "--xla_tpu_enable_async_collective_fusion_multiple_steps=true",
        "--xla_tpu_overlap_compute_collective_tc=true",
        "--xla_enable_async_all_gather=true",
        # Without this the compiler wrote each all-gather of 7b's weights over 64 chips of v5p as an
        # all-reduce of mostly zeros: twice the traffic, and none of it beside other work (docs/planning.md).
        "--xla_tpu_prefer_async_allgather_to_allreduce=true",
        # Gradient sums over data axes overlap with the backward pass (the same: DATA_PARALLEL_OVERLAP).
        "--xla_tpu_enable_data_parallel_all_reduce_opt=true",
        "--xla_tpu_data_parallel_opt_different_sized_ops=true",
    ),
}


def xla_flags(platform):
    """The XLA flags recommended for "cpu", "gpu" or "tpu"."""
    if platform not in _FLAGS:
        raise ValueError(f"no XLA flags for platform {platform!r}; known: {', '.join(_FLAGS)}")
    return _FLAGS[platform]


def expected_platform():
    """ "cpu", "gpu" or "tpu": what JAX will most likely find on this machine, without starting it."""
    asked = os.environ.get("JAX_PLATFORMS", "").split(",")[0]
    if asked:
        return {"cuda": "gpu", "rocm": "gpu"}.get(asked, asked)
    if Path("/dev/accel0").exists() or Path("/dev/vfio/0").exists():
        return "tpu"
    return "gpu" if Path("/dev/nvidiactl").exists() else "cpu"


def apply_flags(platform):
    """Puts `xla_flags(platform)` into the environment, to be called before JAX touches a device. Returns
    those set.

    GPU flags go to XLA_FLAGS and TPU flags to LIBTPU_INIT_ARGS. What is set there already stays and wins.
    MMGEN_XLA_FLAGS=off leaves all as it is, and so does a jaxlib that they were not tried with.
    """
    version = tuple(int(n) for n in jaxlib.__version__.split(".")[:2])
    if os.environ.get("MMGEN_XLA_FLAGS") == "off" or not _TRIED[0] <= version <= _TRIED[1]:
        return ()
    variable = "LIBTPU_INIT_ARGS" if platform == "tpu" else "XLA_FLAGS"
    there = os.environ.get(variable, "").split()
    named = {flag.split("=")[0] for flag in there}
    flags = tuple(flag for flag in _FLAGS.get(platform, ()) if flag.split("=")[0] not in named)
    if flags:
        os.environ[variable] = " ".join([*there, *flags])
    return flags


def hasty(on_cpu):
    """Compiler options of a program that runs once: on CPU most of its time would go into making it fast (9.0 s to compile the
    first values of tokenizer:tiny, or 3.2). None elsewhere."""
    return {"xla_backend_optimization_level": 0} if on_cpu else None


def set_up():
    """What a command that samples does before JAX looks for devices: the flags for a CPU (those of accelerators are for training
    steps), and the cache."""
    if expected_platform() == "cpu":
        apply_flags("cpu")
    compilation_cache()


def compilation_cache():
    """Keeps compiled programs on disk, so that a run that resumes starts at once. Returns the folder.

    A folder that JAX knows already (JAX_COMPILATION_CACHE_DIR) stays; else it is
    ~/.cache/mmgen/xla-VERSION: of the version, since programs of another jaxlib have crashed processes.
    """
    if not jax.config.jax_compilation_cache_dir:
        if not os.environ.get("HOME"):  # as in some containers
            return None
        folder = Path.home() / ".cache/mmgen" / f"xla-{jaxlib.__version__}"
        jax.config.update("jax_compilation_cache_dir", str(folder.absolute()))
        if (
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ
        ):  # seconds of compiling worth a file
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    return jax.config.jax_compilation_cache_dir
