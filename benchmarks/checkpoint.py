"""Checkpoints beside plain Orbax: save until it counts and restore, in MB/s, and how long the training thread waits.

python benchmarks/checkpoint.py --json checkpoint.json

Random float32 arrays, one folder on one disk, all contestants in turn in each round, one manager each, kept open.
Ours saves until the manifest is on the disk, with the digests of all files, and restores after comparing all of
them. The peers are Orbax's CheckpointManager with its defaults; the same without compression, which is how our
arrays are stored, and so what digests cost; and its StandardCheckpointer. A peer's save ends when its files have
their final name; it compares nothing. The managers delete the step before within a save, as ours do. Files are
read back from the cache of the system, by all alike.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from mmgen.runtime import checkpoint


def main():
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    flags.add_argument("--arrays", type=int, default=16)
    flags.add_argument("--mib", type=int, default=16, help="of each array")
    flags.add_argument("--rounds", type=int, default=9, help="of all contestants, one after the other")
    flags.add_argument("--folder", help="on the disk to measure (default: a temporary one)")
    flags.add_argument("--json", help="write the results here too")
    args = flags.parse_args()
    rng = np.random.default_rng(0)
    params = {
        f"w{i}": jax.numpy.asarray(rng.standard_normal((args.mib, 1 << 18), np.float32))
        for i in range(args.arrays)
    }
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), params)
    contestants = {
        "ours": Ours,
        "Orbax": Plain,
        "Orbax, not compressed": Bare,
        "StandardCheckpointer": Standard,
    }
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        opened = {name: make(Path(folder) / str(i)) for i, (name, make) in enumerate(contestants.items())}
        times = {name: [] for name in contestants}
        for step in range(args.rounds + 1):
            for name, one in opened.items():
                measured = measure(one, step, params, abstract)
                if step:  # the first warms up
                    times[name].append(measured)
    megabytes = args.arrays * args.mib * (1 << 20) / 1e6
    print(
        f"{args.arrays} x {args.mib} MiB float32, {args.rounds} rounds; medians of MB/s, ratios over rounds\n"
    )
    print(f"{'':24}{'save':>8}{'ours x':>8}{'restore':>9}{'ours x':>8}{'blocked ms':>12}")
    rows = {}
    for name, each in times.items():
        save, restore, blocked = (list(column) for column in zip(*each))
        ours = list(zip(*times["ours"]))
        rows[name] = {
            "save_mb_per_second": megabytes / statistics.median(save),
            "ours_times_save": ratio(save, ours[0]),
            "restore_mb_per_second": megabytes / statistics.median(restore),
            "ours_times_restore": ratio(restore, ours[1]),
            "blocked_ms": 1e3 * statistics.median(blocked),
        }
        a, b, c, d, e = rows[name].values()
        print(f"{name:24}{a:8.0f}{b:8.2f}{c:9.0f}{d:8.2f}{e:12.1f}")
    if args.json:
        report = {
            "machine": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "rows": rows,
        }
        Path(args.json).write_text(json.dumps(report | vars(args), indent=1))


def measure(one, step, params, abstract):
    """(seconds to save, to restore, that `save` blocks) of one contestant; what comes back is compared."""
    began = time.perf_counter()
    one.save(step, params)
    blocked = time.perf_counter() - began
    one.wait()
    saved = time.perf_counter() - began
    began = time.perf_counter()
    restored = jax.block_until_ready(one.restore(step, abstract))
    seconds = time.perf_counter() - began
    assert all(np.array_equal(restored[name], params[name]) for name in params)
    one.tidy(step)
    return saved, seconds, blocked


class Ours:
    def __init__(self, folder):
        self.folder, self.checkpoints = folder, checkpoint.Checkpoints(folder, keep=1)

    def save(self, step, params):
        self.checkpoints.save(step, {"params": params})

    def wait(self):
        assert self.checkpoints.wait(), self.checkpoints.error

    def restore(self, step, abstract):
        assert self.checkpoints.latest() == step
        return checkpoint.restore(self.folder, step, {"params": abstract})["params"]

    def tidy(self, step):
        """The save of the next step deletes this one, and that is measured; so does the manager of a peer."""


class Plain:
    def __init__(self, folder):
        self.manager = ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(max_to_keep=1))

    def save(self, step, params):
        self.manager.save(step, args=ocp.args.StandardSave(params))

    def wait(self):
        self.manager.wait_until_finished()

    def restore(self, step, abstract):
        return self.manager.restore(step, args=ocp.args.StandardRestore(abstract))

    tidy = Ours.tidy


class Bare(Plain):
    def __init__(self, folder):
        self.manager = ocp.CheckpointManager(
            folder,
            options=ocp.CheckpointManagerOptions(max_to_keep=1),
            item_handlers=ocp.PyTreeCheckpointHandler(use_compression=False),
        )

    def save(self, step, params):
        self.manager.save(step, args=ocp.args.PyTreeSave(params))

    def restore(self, step, abstract):
        how = ocp.checkpoint_utils.construct_restore_args(abstract)
        return self.manager.restore(step, args=ocp.args.PyTreeRestore(abstract, restore_args=how))


class Standard:
    def __init__(self, folder):
        self.folder, self.checkpointer = folder, ocp.StandardCheckpointer()

    def save(self, step, params):
        self.checkpointer.save(self.folder / str(step), params)

    def wait(self):
        self.checkpointer.wait_until_finished()

    def restore(self, step, abstract):
        return self.checkpointer.restore(self.folder / str(step), abstract)

    def tidy(self, step):
        shutil.rmtree(self.folder / str(step))


def ratio(a, b):
    """The median over rounds, whose two sides saw the same machine."""
    return statistics.median(x / y for x, y in zip(a, b))


if __name__ == "__main__":
    main()
