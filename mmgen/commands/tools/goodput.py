"""`mmgen tools goodput --workdir DIR`."""

import argparse

from mmgen.runtime import goodput


def main(argv):
    """Says where the wall time of a run went, over all its starts: "step" is what moved it on."""
    parser = argparse.ArgumentParser("mmgen tools goodput", description=main.__doc__, allow_abbrev=False)
    parser.add_argument("--workdir", required=True, help="folder of the run")
    args = parser.parse_args(argv)
    for cause, share in sorted(goodput.summary(args.workdir).items(), key=lambda pair: -pair[1]):
        print(f"{cause:<10}{share:7.2%}")
