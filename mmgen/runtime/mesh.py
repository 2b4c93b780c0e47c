"""The device mesh, and which mesh axes each logical axis is laid over."""

import contextlib
import math
import os

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("replica", "data", "fsdp", "context", "tensor")
_LARGE = 1_000_000  # elements from which a parameter may not lie whole where it could be shared

_current = None  # (mesh, rules) while a program is traced, so that models can name activation axes


def join():
    """Joins the other processes of a run, where MMGEN_DISTRIBUTED says that there are any.

    "auto" lets JAX ask SLURM (which then gives a task one GPU, unless JAX_LOCAL_DEVICE_IDS names several, as
    launch/slurm.py does) or the TPU slice; "RANK/COUNT" (as 0/2) is for
    processes that know it themselves, with JAX_COORDINATOR_ADDRESS=HOST:PORT. See launch/.
    """
    place = _place()
    if place == "auto":
        jax.distributed.initialize()
    elif place:
        jax.distributed.initialize(process_id=place[0], num_processes=place[1])


def process():
    """(rank, count) of this process among those that share work without talking to one another: "auto" asks
    what SLURM or the TPU slice says in the environment."""
    place = _place()
    if place != "auto":
        return place or (0, 1)
    known = os.environ
    if "SLURM_PROCID" in known:
        return int(known["SLURM_PROCID"]), int(known["SLURM_NTASKS"])
    if "TPU_WORKER_ID" in known:
        return int(known["TPU_WORKER_ID"]), len(known["TPU_WORKER_HOSTNAMES"].split(","))
    raise ValueError(
        "MMGEN_DISTRIBUTED=auto finds neither SLURM_PROCID nor TPU_WORKER_ID here: say RANK/COUNT, as in 0/2"
    )


def _place():
    """MMGEN_DISTRIBUTED: None, "auto" or (rank, count)."""
    place = os.environ.get("MMGEN_DISTRIBUTED")
    if not place or place == "auto":
        return place or None
    rank, slash, count = place.partition("/")
    if not (slash and rank.isdigit() and count.isdigit() and int(rank) < int(count)):
        raise ValueError(f"MMGEN_DISTRIBUTED is 'auto' or RANK/COUNT, as in 0/2; found {place!r}")
    return int(rank), int(count)


def sizes(shape, devices):
    """The size of every axis of AXES for `{axis: size}`; axes left out have size 1, one may be -1 (the rest).

    Raises ValueError where they do not fill the number of devices exactly.
    """
    unknown = sorted(set(shape) - set(AXES))
    if unknown:
        raise ValueError(f"unknown mesh axes {unknown}; known axes: {', '.join(AXES)}")
    found = [shape.get(axis, 1) for axis in AXES]
    if found.count(-1) == 1:
        fixed = math.prod(size for size in found if size != -1)
        if devices % fixed:
            raise ValueError(f"mesh {dict(shape)}: {devices} devices do not divide by {fixed}")
        found[found.index(-1)] = devices // fixed
    if math.prod(found) != devices or min(found) < 1:
        raise ValueError(
            f"mesh {dict(zip(AXES, found))} needs {math.prod(found)} devices, found {devices}; "
            "change config.mesh (-1 means 'all that are left')"
        )
    return tuple(found)


def make_mesh(shape):
    """The mesh of all devices from `{axis: size}`, see `sizes`."""
    across, *within = sizes(shape, jax.device_count())
    auto = (AxisType.Auto,) * len(AXES)
    slices = len({getattr(device, "slice_index", 0) for device in jax.devices()})
    if slices == 1:
        return jax.make_mesh((across, *within), AXES, axis_types=auto)
    # Several TPU slices: within one the wires are fast, between them is the data centre's network. Only the axis
    # "replica" crosses it, where gradients alone are summed.
    if across % slices:
        raise ValueError(
            f"{slices} slices are joined by the data centre's network, which the axis replica={across} does not "
            f"cover: make config.mesh.replica a multiple of {slices}"
        )
    devices = mesh_utils.create_hybrid_device_mesh(
        (across // slices, *within), (slices, 1, 1, 1, 1), jax.devices()
    )
    return jax.sharding.Mesh(devices, AXES, axis_types=auto)


def whole():
    """The sharding of what every device holds whole, or None where no mesh is in use: outputs of a jitted function
    that processes are to read on the host."""
    return None if current() is None else NamedSharding(current()[0], PartitionSpec())


def describe(mesh):
    """One line: "mesh data=2 x fsdp=4, 8 devices of 2 processes"."""
    shape = " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1) or "of one"
    return f"mesh {shape}, {mesh.size} device(s) of {jax.process_count()} process(es)"


def spec(axes, rules):
    """The PartitionSpec of logical axis names; every name must have a rule: a mesh axis, several (a tuple, or a
    text with commas, as on the command line), or nothing (None or ""), which is replicated."""
    missing = [axis for axis in axes if axis is not None and axis not in rules]
    if missing:
        raise ValueError(
            f"no sharding rule covers the logical axes {missing}; "
            f"add them to config.sharding (has: {', '.join(sorted(rules))})"
        )
    entries = [mesh_axes(rules[axis]) if axis is not None else () for axis in axes]
    used = [a for entry in entries for a in entry]
    unknown = sorted(set(used) - set(AXES))
    if unknown:
        raise ValueError(
            f"the rules of {axes} name unknown mesh axes {unknown}; known axes: {', '.join(AXES)}"
        )
    if len(used) != len(set(used)):
        raise ValueError(f"logical axes {axes} are laid twice over a mesh axis: {entries}")
    return PartitionSpec(*(entry[0] if len(entry) == 1 else entry or None for entry in entries))


def mesh_axes(rule):
    """A rule as a tuple of mesh axes."""
    return tuple(filter(None, rule.split(","))) if isinstance(rule, str) else tuple(rule or ())


def param_shardings(state, mesh, rules):
    """Pure dict of NamedShardings for an `nnx.State`, from each parameter's own `axes`.

    Raises ValueError where a parameter names no axes, an axis has no rule or does not divide, and where a large
    parameter lies whole on devices that could share it: one with over 1 % of all elements and over a million,
    along a mesh axis of those that the rules split parameters over.
    """
    flat = nnx.to_flat_state(state)
    total = sum(variable.size for _, variable in flat)
    logical = [axis for _, variable in flat for axis in variable.get_metadata().get("axes") or ()]
    splitting = {a for name in logical for a in mesh_axes(rules.get(name))}

    def one(path, variable):
        axes = variable.get_metadata().get("axes")
        name = "/".join(map(str, path))
        if axes is None:
            raise ValueError(f"parameter {name} names no logical axes; create it with axes=(...)")
        if variable.ndim == len(axes) + 1:  # stacked layers lead with one more axis
            axes = ("layers",) + tuple(axes)
        if variable.ndim != len(axes):
            raise ValueError(f"parameter {name}: shape {variable.shape} but axes {axes}")
        partition = spec(axes, rules)
        for axis, size, entry in zip(axes, variable.shape, partition):
            ways = math.prod(mesh.shape[a] for a in mesh_axes(entry))
            if size % ways:
                raise ValueError(
                    f"parameter {name}: its axis {axis!r} of size {size} does not divide over {ways} devices of mesh "
                    f"axes {entry}; change the size, config.mesh, or replicate it with config.sharding.{axis}="
                )
        over = {a for entry in partition for a in mesh_axes(entry)}
        whole = [a for a in AXES if a in splitting - over and mesh.shape[a] > 1]
        if whole and variable.size > max(_LARGE, total // 100):
            raise ValueError(
                f"parameter {name} {variable.shape}, {variable.size / total:.0%} of all, lies whole along mesh axes "
                f"{whole}, of {[mesh.shape[a] for a in whole]} devices: give one of its axes {axes} a rule in config.sharding"
            )
        return NamedSharding(mesh, partition)

    return nnx.to_pure_dict(nnx.from_flat_state([(path, one(path, v)) for path, v in flat]))


def local_rows(sharding, size):
    """The rows of a batch of `size` that this process's devices hold under `sharding`: sorted int [n].
    From the sharding itself: devices may hold rows in any order, and share them over other mesh axes."""
    spans = [
        index[0].indices(size)[:2] for index in sharding.addressable_devices_indices_map((size,)).values()
    ]
    return np.unique(np.concatenate([np.arange(*span) for span in spans]))


def check_batch(sharding, shape, parts=1):
    """Raises ValueError where a batch of `shape` (rows, or rows and tokens of a row) does not divide over the devices,
    or a device's rows not into `parts`."""
    settings = ("config.data.batch_size", "config.data.row_length")
    for size, entry, setting in zip(shape, (*sharding.spec, None, None), settings):
        names = mesh_axes(entry)
        ways = math.prod(sharding.mesh.shape[name] for name in names)
        if size < 1 or size % ways:
            raise ValueError(
                f"{setting} of {size} does not divide over {ways} devices of mesh axes {names}; change "
                f"it to a multiple of {ways}, or config.mesh"
            )
    mine = sharding.shard_shape(tuple(shape))[0]
    if parts < 1 or mine % parts:
        raise ValueError(
            f"config.accumulate={parts} does not divide the {mine} rows that each device has of config.data.batch_size="
            f"{shape[0]}; change one of them, or config.mesh"
        )


def global_batch(batch, rows, size, sharding):
    """A dict of arrays [n, ...] that hold the rows `rows` of a batch of `size` -> of global arrays [size, ...]."""

    def one(x):
        def part(index):  # the devices' rows are runs of the batch, and all of them are here
            start, stop, _ = index[0].indices(size)
            first = np.searchsorted(rows, start)
            return x[(slice(first, first + stop - start), *index[1:])]

        return jax.make_array_from_callback((size, *x.shape[1:]), sharding, part)

    return {name: one(x) for name, x in batch.items()}


@contextlib.contextmanager
def use(mesh, rules):
    """Makes `mesh` current and `rules` those that `constrain` reads."""
    global _current
    before, _current = _current, (mesh, rules)
    try:
        with jax.set_mesh(mesh):
            yield mesh
    finally:
        _current = before


def current():
    """(mesh, rules) within `use` where the mesh has several devices, else None: nothing is to be laid out."""
    return _current if _current and _current[0].size > 1 else None


def of_rows(devices):
    """A mesh of some devices that share rows: of one process's own, within a mesh of all."""
    shape = [len(devices) if axis == "data" else 1 for axis in AXES]
    return Mesh(np.array(devices).reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(shape))


def fetched(params):
    """The parameters whole on this process's first device, wherever on the current mesh they lie."""
    if current():
        params = jax.jit(lambda params: params, out_shardings=whole())(params)
    return jax.tree.map(lambda x: x.addressable_data(0), params)


def constrain(x, axes):
    """Lays activation `x` out by its logical axes; outside `use` it does nothing."""
    if _current is None:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes, _current[1]))
