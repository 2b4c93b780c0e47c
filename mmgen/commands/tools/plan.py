"""`mmgen tools plan --config transformer:VARIANT --topology NAME [--config.a.b=value ...]`."""

import argparse
import functools
import importlib.util
import json
import math
import os
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict
from jax.experimental import topologies
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding

from mmgen.grammar import Grammar
from mmgen.models import autoencoders, classifier, contrastive, refiner, transformer
from mmgen.runtime import config as configs
from mmgen.runtime import hardware
from mmgen.runtime import mesh as meshes
from mmgen.stages import program

_GiB = 2**30
_USABLE = 0.9  # of a device's memory: the rest is for the runtime, the buffers of collectives and fragments


def main(argv):
    """Says what a training run of the transformer would need on hardware that is not here: memory and time by
    arithmetic, and with --compile what the compiler says of the very step that `mmgen train` would run."""
    parser = argparse.ArgumentParser("mmgen tools plan", description=main.__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--config", required=True, help="transformer:VARIANT, or path.py:variant")
    add("--topology", required=True, help="v5p-128, v6e-256, h100x64, ...")
    add("--mfu", type=float, default=0.5, help="share of the peak that is expected (%(default)s)")
    add("--pieces", type=int, default=32_000, help="of the text model (%(default)s)")
    add("--max-side", type=int, default=64, help="of an image, in patches (%(default)s)")
    add("--levels", default="8,8,8,6,5", help="of the FSQ tokenizer (%(default)s)")
    add("--compile", action=argparse.BooleanOptionalAction, default=False,
        help="for the TPU where libtpu is installed, else for pretended CPU devices; minutes")  # fmt: skip
    add(
        "--layout",
        action="store_true",
        help="print how each parameter is laid out, of a model of any stage, and nothing else",
    )
    add("--json", metavar="FILE", help="write the numbers here too")
    args, rest = parser.parse_known_args(argv)
    if not 0 < args.mfu <= 1:
        raise ValueError(f"--mfu is a share from 0 to 1, as in 0.5; found {args.mfu}")
    config = configs.load(args.config, configs.overrides(parser, rest))
    topology = hardware.topology(args.topology)
    levels = tuple(int(level) for level in args.levels.split(","))
    vocabulary = Vocabulary(args.pieces, args.max_side, levels)
    if args.layout:
        if args.compile or args.json:
            raise ValueError("--layout prints the layout and nothing else: leave out --compile and --json")
        print("\n".join(layout(config, topology, vocabulary)))
        return
    if config.stage != "transformer":
        raise ValueError(
            f"plans are made for the transformer stage; {args.config} is of stage {config.stage!r}: of others there is "
            "--layout"
        )
    devices = stand_ins(topology) if args.compile else None
    plan = estimate(config, topology, vocabulary, args.mfu)
    print(show(plan), flush=True)
    if args.compile:
        plan["compiled"] = compile_step(config, topology, vocabulary, devices)
        print(show_compiled(plan), flush=True)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(plan, file, indent=2)


class Vocabulary:
    """What shards would say: the grammar and the FSQ levels of the codes."""

    def __init__(self, pieces, max_side, levels):
        self.grammar = Grammar(pieces=pieces, max_side=max_side, codes=math.prod(levels))
        self.manifest = {"levels": levels, "color_digits": 0, "grammar": self.grammar.to_dict()}


def _make(config, vocabulary):
    """rngs -> the model that the config's stage trains."""
    m = config.model
    of_codes = lambda rngs: transformer.of_codes(m, vocabulary.manifest, vocabulary.grammar.vocab_size, rngs)
    makes = {
        "transformer": of_codes,
        "reinforce": of_codes,
        "contrastive": lambda rngs: contrastive.Contrastive(m, vocabulary.grammar.pieces, rngs),
        "classifier": lambda rngs: classifier.Classifier(m, classifier.groups_of(config.labels), rngs),
        "tokenizer": lambda rngs: autoencoders.Autoencoder(m, rngs),
        # Its tokenizer is not at hand: codes of as many digits, and squares as large as the grids ask for.
        "refiner": lambda rngs: refiner.RefinerNet(
            m, 3, len(vocabulary.manifest["levels"]), m.patch * 2 ** (len(m.channels) - 1) // m.scale, rngs
        ),
    }
    return makes[config.stage]


def _build(config, vocabulary, mesh):
    loss = lambda model, batch, key: transformer.loss(
        model, batch, code_start=vocabulary.grammar.code_start, **config.loss
    )
    return program.build(config, _make(config, vocabulary), loss, mesh)


def _abstract(config, topology):
    """The mesh without devices."""
    types = (AxisType.Auto,) * len(meshes.AXES)
    return AbstractMesh(meshes.sizes(dict(config.mesh), topology.devices), meshes.AXES, axis_types=types)


def _batch(config, mesh):
    """The batch as ShapeDtypeStructs that carry their shardings; raises where it does not divide."""
    shape = (config.data.batch_size, config.data.row_length)
    rows = NamedSharding(mesh, meshes.spec(("batch", "length"), config.sharding))
    meshes.check_batch(rows, shape, config.accumulate)
    one = lambda dtype, *more: jax.ShapeDtypeStruct(shape + more, dtype, sharding=rows)
    return {
        "tokens": one(jnp.int32),
        "segments": one(jnp.int32),
        "positions": one(jnp.int32, 3),
        "weights": one(jnp.float32),
    }


def layout(config, topology, vocabulary):
    """A line for each parameter: path, shape, logical axes, the mesh axes they lie over, bytes on each
    device."""
    mesh = _abstract(config, topology)
    make = _make(config, vocabulary)
    state = nnx.split(nnx.eval_shape(lambda: make(None)))[1]
    shardings = flatten_dict(meshes.param_shardings(state, mesh, config.sharding))
    lines = [f"# {config.name} on {topology.name}: {_mesh(mesh)}"]
    for path, variable in nnx.to_flat_state(state):
        axes = variable.get_metadata()["axes"]
        axes = ("layers",) * (variable.ndim - len(axes)) + tuple(axes)
        sharding = shardings[path]
        over = ["+".join(e) if isinstance(e, tuple) else e or "-" for e in sharding.spec]
        size = math.prod(sharding.shard_shape(variable.shape)) * variable.dtype.itemsize
        shape = ",".join(map(str, variable.shape))
        lines.append(f"{'/'.join(map(str, path))} [{shape}] {','.join(axes)} -> {','.join(over)} {size}")
    return lines


def _mesh(mesh):
    return " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1) or "one device"


def _here(tree):
    """Bytes on each device of a tree of ShapeDtypeStructs with shardings."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def kept_a_token(model, tensor):
    """Bytes that one layer keeps of a token for the backward pass on each device, and how many all that it
    computes of it takes: by hand from models/layers.py, for a fused attention whose logits are never
    whole."""
    D, F = model.width, model.mlp / tensor
    queries, keys = (heads * model.head_dim / tensor for heads in (model.heads, model.kv_heads))
    dots = (
        3 * D + queries + 2 * keys + 2 * F
    )  # the layer's input, q, k, v, out, gate and value, and what they give
    everything = (
        dots + 2 * D + 3 * queries + 2 * keys + F
    )  # norms, normed and rotated q and k, attention, product
    numbers = {
        "none": everything,
        "dots": dots,
        "attention": 2 * D + queries,  # the streams before both halves, and the attention's output
        "full": D,
        "offload": D,
    }
    bytes_each = jnp.dtype(model.dtype).itemsize
    return numbers[model.remat] * bytes_each, everything * bytes_each


def estimate(config, topology, vocabulary, mfu=0.5):
    """The plan as a dict of numbers, by arithmetic from shapes: bytes are on each device, times in
    seconds."""
    mesh, model = _abstract(config, topology), config.model
    batch = _batch(config, mesh)
    state = _build(config, vocabulary, mesh).shapes
    total, multiplied = hardware.parameters(state["params"], model.tied)
    ways = dict(mesh.shape)
    tensor, fsdp, copies = ways["tensor"], ways["fsdp"], ways["replica"] * ways["data"]
    tokens = math.prod(batch["tokens"].sharding.shard_shape(batch["tokens"].shape)) // config.accumulate
    width = jnp.dtype(model.dtype).itemsize

    kept, everything = kept_a_token(model, tensor)
    params = _here(state["params"])
    layer = sum(x.size for x in jax.tree.leaves(state["params"]["blocks"])) / model.layers / tensor
    table = state["params"]["embedding"].size / tensor
    chunk = min(config.loss.chunk or tokens, tokens)
    memory = {
        "parameters": params,
        "optimizer": _here(state["optimizer"]),
        "ema": _here(state.get("ema", {})),
        "gradients": params * (2 if config.accumulate > 1 else 1),
        "kept activations": model.layers * tokens * kept,
        # Of two layers the weights, one that is computed and one that is on its way, and of one the
        # gradients.
        "working on a layer": tokens * 2 * everything + layer * width * 3,
        # Both tables and the head's gradient (float32, summed over chunks); logits, their softmax and
        # gradient.
        "loss": table * (2 * width + 4) + 3 * chunk * table / model.width * 4,
    }
    needed, usable = sum(memory.values()), _USABLE * topology.chip.memory
    attentions = model.layers + transformer.crossings(model)
    rate = hardware.flops_a_token(
        multiplied, attentions, config.data.row_length, model.heads * model.head_dim
    )
    all_tokens = batch["tokens"].size
    seconds = rate * all_tokens / (topology.devices * topology.chip.flops * mfu)

    # Weights are gathered forward and backward and gradients are summed once, in the computation's precision
    # and in every part of the batch; what tensor devices share is summed twice a layer and pass.
    inner = ways["context"] * tensor
    pass_of = lambda size, n, apart: hardware.gather_seconds(topology, size, n, apart)
    stream = tokens * model.width * width
    network = {
        "fsdp": config.accumulate * 3 * pass_of(multiplied / tensor * width, fsdp, inner),
        "data": 2 * pass_of(params, copies, inner * fsdp),
        "tensor": config.accumulate * model.layers * 4 * 2 * pass_of(stream, tensor, 1),
    }
    plan = {
        "config": config.name,
        "topology": topology.name,
        "devices": topology.devices,
        "hosts": topology.hosts,
        "mesh": ways,
        "parameters": {"all": total, "multiplied": multiplied, "embedding": total - multiplied},
        "batch": {
            "rows": all_tokens // config.data.row_length,
            "tokens": all_tokens,
            "tokens a device": tokens,
        },
        "memory": {name: round(size) for name, size in memory.items()},
        "needed": round(needed),
        "usable": round(usable),
        "fits": needed <= usable,
        "flops a token": rate,
        "mfu": mfu,
        "step seconds": seconds,
        "tokens a second": all_tokens / seconds,
        "network seconds": network,
    }
    plan["advice"] = [] if plan["fits"] else _advice(config, memory, needed - usable, fsdp, topology.devices)
    return plan


def _advice(config, memory, excess, fsdp, devices):
    """What to change, the cheapest first."""
    model, advice = config.model, []
    tokens = memory["kept activations"] + memory["working on a layer"]
    for remat in ("attention", "full"):
        better = model.copy_and_resolve_references()
        with better.unlocked():
            better.remat = remat
        saved = memory["kept activations"] * (1 - kept_a_token(better, 1)[0] / kept_a_token(model, 1)[0])
        if saved > 0:
            advice.append(f"--config.model.remat={remat} saves {saved / _GiB:.1f} GiB")
    if not config.loss.chunk:
        advice.append("--config.loss.chunk=2048 saves most of what the loss needs")
    for parts in (2, 4, 8, 16, 32) if config.accumulate == 1 else ():
        # The sum of the gradients then lies beside those of a part.
        saved = tokens * (1 - 1 / parts) - memory["parameters"]
        if saved >= excess:
            advice.append(
                f"--config.accumulate={parts} saves {saved / _GiB:.1f} GiB, as would 1/{parts} of the batch"
            )
            break
    if fsdp < devices:
        advice.append(
            "a larger --config.mesh.fsdp: parameters, optimizer, ema and gradients are shared by as many"
        )
    return [*advice, f"more devices: {excess / _GiB:.1f} GiB too much on each"]


def show(plan):
    """The plan as text."""
    gib = lambda size: f"{size / _GiB:8.2f} GiB"
    count, batch, memory = plan["parameters"], plan["batch"], plan["memory"]
    mesh = " x ".join(f"{axis}={size}" for axis, size in plan["mesh"].items() if size > 1) or "one device"
    least = plan["network seconds"]
    lines = [
        f"{plan['config']} on {plan['topology']}: {plan['devices']} devices, {plan['hosts']} host(s); {mesh}",
        f"parameters           {count['all'] / 1e9:.3f} B: {count['multiplied'] / 1e9:.3f} B that a token is "
        f"multiplied with, {count['embedding'] / 1e9:.3f} B that are looked up",
        f"batch                {batch['rows']} rows, {batch['tokens']} tokens; {batch['tokens a device']} on a "
        "device at a time",
        "memory of a device, by arithmetic",
        *(f"  {name:<19}{gib(size)}" for name, size in memory.items()),
        f"  {'all':<19}{gib(plan['needed'])} of {plan['usable'] / _GiB:.2f}: "
        + ("fits" if plan["fits"] else "DOES NOT FIT")
        + f", {plan['needed'] / plan['usable']:.0%} of the {_USABLE:.0%} that may be used",
        *(f"  to change: {words}" for words in plan["advice"]),
        f"FLOPs a token        {plan['flops a token'] / 1e9:.2f} G",
        f"step at {plan['mfu']:.0%} MFU      {plan['step seconds']:.3f} s, {plan['tokens a second']:,.0f} tokens/s",
        f"network, at least    {sum(least.values()):.3f} s a step, "
        f"{sum(least.values()) / plan['step seconds']:.0%} of it: "
        + ", ".join(f"{axis} {seconds:.3f}" for axis, seconds in least.items() if seconds),
    ]
    return "\n".join(lines)


def stand_ins(topology):
    """Devices to compile for: those of the TPU slice where libtpu is installed, else as many pretended CPU
    devices. To be called before JAX has done anything."""
    jax.config.update("jax_platforms", "cpu")
    if topology.chip.platform == "tpu" and importlib.util.find_spec("libtpu"):
        # It would ask a metadata server, and lock a TPU, neither of which is there.
        os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
        # Of a v4 chip the two cores are one device, as they are in a run.
        more = {"chip_config_name": "megacore"} if topology.chip.name == "v4" else {}
        name = f"{topology.chip.name}:{topology.shape}"
        devices = topologies.get_topology_desc(name, "tpu", **more).devices
    else:
        jax.config.update("jax_num_cpu_devices", topology.devices)
        devices = jax.devices()
    if len(devices) != topology.devices:
        raise RuntimeError(
            f"expected {topology.devices} devices of {topology.name}, found {len(devices)}: {devices[0]}"
        )
    return devices


def compile_step(config, topology, vocabulary, devices):
    """What the compiler says of one training step, as a dict: bytes are on each device.

    With libtpu installed (the extra `tpu`) a TPU slice need not be there to compile for it. For GPUs the
    step is compiled for as many pretended CPU devices: the partitioner is the same, so that arguments,
    outputs and what travels are exact but for what a GPU's own passes would merge; "temporary" is only a hint
    then.
    """
    real = topology.chip.platform == devices[0].platform
    kernel = {"auto": "splash" if real else "chunked"}.get(config.model.attention, config.model.attention)
    with config.unlocked():
        config.model.attention = kernel  # "auto" asks what this machine has
    sizes = meshes.sizes(dict(config.mesh), topology.devices)
    mesh = Mesh(np.array(devices).reshape(sizes), meshes.AXES, axis_types=(AxisType.Auto,) * len(sizes))
    built = _build(config, vocabulary, mesh)
    began = time.monotonic()
    with meshes.use(mesh, config.sharding):
        done = built.step.lower(built.shapes, _batch(config, mesh)).compile()
    memory = done.memory_analysis()
    of = lambda name: getattr(memory, f"{name}_size_in_bytes")
    arguments, alias = of("argument"), of("alias")
    return {
        "for": f"{topology.chip.name}, by its own compiler"
        if real
        else f"{len(devices)} pretended CPU devices",
        "attention": kernel,
        "seconds": time.monotonic() - began,
        "arguments": arguments,
        "outputs": of("output"),
        "aliases": alias,
        "temporary": of("temp"),
        "program": of("generated_code"),
        "all": arguments + of("output") - alias + of("temp") + of("generated_code"),
        "real": real,
        "collectives": collectives(done.as_text()),
    }


_COLLECTIVE = re.compile(
    r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?\("
)
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "f64": 8}


def collectives(text):
    """{name: [how many run in a step, bytes of their results on each device]} of a compiled module's text.

    What stands in the body of a loop counts as often as the constant in its condition says, and of the
    branches of a condition the one that moves most. What a TPU fuses with other work stands there several
    times, for its start, its steps and its end, and is one by its channel.
    """
    found, calls, bounds, channels, name, entry = {}, {}, {}, set(), None, None
    for line in text.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if header:
            name = header[2]
            found[name], calls[name], bounds[name] = [], [], []
            entry = name if header[1] else entry
        elif name is None:
            continue
        bounds[name] += [int(n) for n in re.findall(r" s32\[\]\S* constant\((\d+)\)", line)]
        match, channel = _COLLECTIVE.search(line), re.search(r"channel_id=(\d+)", line)
        if match and not (channel and channel[1] in channels):
            channels |= {channel[1]} if channel else set()
            shapes = re.findall(r"(\w+)\[([\d,]*)\]", match[1])
            if match[3] and match[1].startswith(
                "("
            ):  # the start of an asynchronous one gives (operands, results)
                shapes = shapes[len(shapes) // 2 :]
            count = lambda dims: math.prod(int(n) for n in dims.split(",") if n)
            size = sum(_BYTES.get(kind, 0) * count(dims) for kind, dims in shapes)
            found[name].append((match[2], 1, size))
        loop = re.search(r"condition=%?([\w.\-]+), body=%?([\w.\-]+)", line)
        if loop:
            calls[name].append(([loop[2]], loop[1]))
        for group in re.findall(r"(?:calls|to_apply|branch_computations)=(\{[^}]*\}|%?[\w.\-]+)", line):
            calls[name].append((re.findall(r"[\w.\-]+", group), None))

    @functools.cache
    def totals(name):
        """(name, count, bytes) of all that one run of a computation starts."""
        total = list(found.get(name, ()))
        for callees, condition in calls.get(
            name, ()
        ):  # a scan's condition compares its counter with a constant
            times = max(bounds.get(condition, ()), default=1)
            most = max(
                (totals(callee) for callee in callees), key=lambda run: sum(size for _, _, size in run)
            )
            total += [(kind, times * count, times * size) for kind, count, size in most]
        return total

    summed = {}
    for kind, count, size in totals(entry):
        before = summed.get(kind, [0, 0])
        summed[kind] = [before[0] + count, before[1] + size]
    return dict(sorted(summed.items()))


def show_compiled(plan):
    """What `compile_step` found, as text."""
    found = plan["compiled"]
    chip = hardware.topology(plan["topology"]).chip
    parts = ("arguments", "outputs", "aliases", "temporary", "program", "all")
    lines = [
        f"compiled in {found['seconds']:.0f} s for {found['for']}, attention {found['attention']!r}",
        *(f"  {name:<19}{found[name] / _GiB:8.2f} GiB" for name in parts),
        f"  of {chip.memory / _GiB:.2f} GiB: " + ("fits" if found["all"] <= chip.memory else "DOES NOT FIT")
        if found["real"]
        else "  what is temporary is only a hint: a CPU fuses less",
        *(
            f"  {count} {kind}: {size / _GiB:.2f} GiB a step"
            for kind, (count, size) in found["collectives"].items()
        ),
    ]
    return "\n".join(lines)
