"""`mmgen tools replay --workdir DIR --step N`."""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import NamedSharding

from mmgen.runtime import checkpoint
from mmgen.runtime import config as configs
from mmgen.runtime import mesh as meshes
from mmgen.stages import loop, program


def main(argv):
    """Computes again the last step that a run skipped before it gave up, from what it wrote down, and says which
    parts of the loss and whose gradients are not finite, or the largest."""
    parser = argparse.ArgumentParser("mmgen tools replay", description=main.__doc__, allow_abbrev=False)
    parser.add_argument("--workdir", required=True, help="folder of the run")
    parser.add_argument("--step", type=int, required=True, help="as in bundles/STEP-0")
    parser.add_argument("--top", type=int, default=10, help="how many gradients to name")
    args, rest = parser.parse_known_args(argv)

    folders = sorted(
        Path(args.workdir).glob(f"bundles/{args.step}-*"), key=lambda f: int(f.name.split("-")[1])
    )
    if not folders:
        known = sorted(path.name for path in Path(args.workdir).glob("bundles/*"))
        raise FileNotFoundError(f"no bundle of step {args.step} in {args.workdir}/bundles, which has {known}")
    config = ml_collections.ConfigDict(checkpoint.read_config(args.workdir))
    for text in configs.overrides(parser, rest):  # as --config.mesh.fsdp=1, on other devices
        configs.override(config, *text.split("=", 1))
    if args.step not in checkpoint.steps(args.workdir):
        raise FileNotFoundError(
            f"checkpoint {args.step} is gone; {args.workdir} has {checkpoint.steps(args.workdir)} (see config.keep)"
        )
    stage = loop.setup(config, args.workdir)
    mesh = meshes.make_mesh(dict(config.mesh))
    layout = NamedSharding(mesh, meshes.spec(stage.axes, config.sharding))
    rows, batch = np.arange(stage.shape[0]), {}
    for folder in folders:
        part = dict(np.load(folder / "batch.npz"))
        at = part.pop("rows")
        for name, x in part.items():
            batch.setdefault(name, {}).update(zip(at.tolist(), x))
    missing = sorted(set(rows.tolist()) - set(next(iter(batch.values()))))
    if missing:
        raise ValueError(
            f"the bundles of step {args.step} lack rows {missing}: the part of some process is missing"
        )
    batch = {name: np.stack([x[row] for row in rows.tolist()]) for name, x in batch.items()}
    with meshes.use(mesh, config.sharding):
        built = program.build(config, stage.make, stage.loss, mesh)
        state = checkpoint.restore(args.workdir, args.step, built.shapes)
        batch = meshes.global_batch(batch, rows, len(rows), layout)
        sums, gradients = jax.jit(built.gradients)(state["params"], batch, args.step - 1)
    for name, (total, weight) in sums.items():
        print(f"{name:<16}{float(total / weight):.6g}")
    found = []
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        name = "/".join(entry.key for entry in path)
        finite = float(jnp.isfinite(gradient).mean())
        found.append((finite, -float(jnp.sqrt(jnp.nansum(jnp.square(gradient)))), name))
    print("\ngradients: finite, norm")
    for finite, norm, name in sorted(found)[: args.top]:
        print(f"{finite:8.2%}  {-norm:10.4g}  {name}")
