"""`mmgen train --config NAME:VARIANT --workdir DIR [--config.a.b=value ...]`."""

import argparse
import os

import jax

from mmgen.runtime import config as configs
from mmgen.stages import loop


def main(argv):
    """Trains one stage; run again, it resumes."""
    parser = argparse.ArgumentParser("mmgen train", description=main.__doc__, allow_abbrev=False)
    parser.add_argument("--config", required=True, help="name:variant, or path.py:variant")
    parser.add_argument("--workdir", required=True, help="folder of the run; made, or resumed")
    args, rest = parser.parse_known_args(argv)
    config = configs.load(args.config, configs.overrides(parser, rest))
    join()
    loop.train(config, args.workdir)


def join():
    """Joins the other processes of a run, where MMGEN_DISTRIBUTED says that there are any.

    "auto" lets JAX ask SLURM or the TPU slice; "RANK/COUNT" (as 0/2) is for
    processes that know it themselves, with JAX_COORDINATOR_ADDRESS=HOST:PORT. See launch/.
    """
    place = os.environ.get("MMGEN_DISTRIBUTED")
    if place == "auto":
        jax.distributed.initialize()
    elif place:
        rank, slash, count = place.partition("/")
        if not (slash and rank.isdigit() and count.isdigit() and int(rank) < int(count)):
            raise ValueError(f"MMGEN_DISTRIBUTED is 'auto' or RANK/COUNT, as in 0/2; found {place!r}")
        jax.distributed.initialize(num_processes=int(count), process_id=int(rank))
