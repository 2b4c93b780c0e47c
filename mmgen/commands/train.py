"""`mmgen train --config NAME:VARIANT --workdir DIR [--config.a.b=value ...]`."""

import argparse
import os
import sys

import jax

from mmgen.runtime import config as configs
from mmgen.runtime import hardware, mesh
from mmgen.runtime.preemption import EXIT, Preempted
from mmgen.runtime.released import model_folder, part_of
from mmgen.stages import loop


def main(argv):
    """Trains one stage; run again, it resumes."""
    parser = argparse.ArgumentParser("mmgen train", description=main.__doc__, allow_abbrev=False)
    parser.add_argument("--config", required=True, help="name:variant, or path.py:variant")
    parser.add_argument("--workdir", required=True, help="folder of the run; made, or resumed")
    args, rest = parser.parse_known_args(argv)
    config = _placed(configs.load(args.config, configs.overrides(parser, rest)))
    hardware.apply_flags(hardware.expected_platform())
    hardware.compilation_cache()
    mesh.join()
    try:
        loop.train(config, args.workdir)
    except Preempted:
        if jax.process_count() > 1:
            raise  # an orderly end: the others are told
        # All is saved. A thread that is stuck in reading would hold up an orderly end until the machine is gone.
        print("stopped by a signal, after saving; run again to go on", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(EXIT)


# What of the model that comes with mmgen a stage begins with, where config.init is its name `reference`; others its transformer
_BEGUN = {"tokenizer": "tokenizer", "contrastive": "towers", "classifier": "safety", "refiner": "refiners/x2"}
_NAMED = (("loss", "towers", "towers"), ("data", "tokenizer", "tokenizer"), ("data", "text", "text.model"))


def _placed(config):
    """The config, with the places of what is called `reference` in it."""
    if config.get("init"):
        begun = _BEGUN.get(config.get("stage"))
        config.init = (part_of(begun) if begun else model_folder)(config.init)
    for node, key, part in _NAMED:
        if config.get(node, {}).get(key):
            config[node][key] = part_of(part)(config[node][key])
    return config
