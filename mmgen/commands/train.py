"""`mmgen train --config NAME:VARIANT --workdir DIR [--config.a.b=value ...]`."""

import argparse

from mmgen.runtime import config as configs
from mmgen.runtime import hardware, mesh
from mmgen.stages import loop


def main(argv):
    """Trains one stage; run again, it resumes."""
    parser = argparse.ArgumentParser("mmgen train", description=main.__doc__, allow_abbrev=False)
    parser.add_argument("--config", required=True, help="name:variant, or path.py:variant")
    parser.add_argument("--workdir", required=True, help="folder of the run; made, or resumed")
    args, rest = parser.parse_known_args(argv)
    config = configs.load(args.config, configs.overrides(parser, rest))
    hardware.apply_flags(hardware.expected_platform())
    hardware.compilation_cache()
    mesh.join()
    loop.train(config, args.workdir)
