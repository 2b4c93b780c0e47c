"""`mmgen tools verify FILE ...`: where pictures come from."""

import argparse
import json

from mmgen.safety import provenance


def main(argv):
    """Says of image files whether they are valid (as they were signed), tampered with, unsigned, or have the watermark only."""
    parser = argparse.ArgumentParser("mmgen tools verify", description=main.__doc__)
    parser.add_argument("file", nargs="*", help="a PNG, JPEG, WebP or TIFF")
    parser.add_argument("--keys", metavar="DIR", help=f"folder of keys (default: {provenance.keys_folder()})")
    parser.add_argument("--make-keys", metavar="DIR", help="make new keys there")
    parser.add_argument("--json", action="store_true", help="all that is known, a line of JSON a file")
    args = parser.parse_args(argv)
    if bool(args.file) == bool(args.make_keys):
        raise ValueError("expected image files, or --make-keys DIR")
    if args.make_keys:
        print(provenance.make_keys(args.make_keys))
        return 0
    bad = 0
    for file in args.file:
        found = provenance.verify(file, args.keys)
        bad += found["state"] == "tampered"
        if args.json:
            print(json.dumps(found, ensure_ascii=False))
            continue
        by = (
            ""
            if found["state"] != "valid"
            else ", by our keys"
            if found["trusted"]
            else ", by keys that we don't know"
        )
        mark = "" if found["watermark"] is None else f", watermark {found['watermark']} standard deviations"
        print(f"{file}: {found['state']}{by}{mark}")
    return 1 if bad else 0
