"""`mmgen tools export --checkpoint DIR --out FILE.safetensors`."""

import argparse

from mmgen.runtime import checkpoint


def main(argv):
    """Writes the newest weights of a run (their moving average, where it kept one) as one safetensors file."""
    parser = argparse.ArgumentParser("mmgen tools export", description=main.__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR", help="workdir of a run of any stage")
    add("--out", required=True, metavar="FILE.safetensors", help="the file, replaced where there is one")
    args = parser.parse_args(argv)
    step = checkpoint.export_safetensors(args.checkpoint, args.out)
    print(f"{args.out}: the weights of {args.checkpoint} at step {step}")
