"""`mmgen tools embed --towers DIR --source SPEC --out DIR`."""

import argparse
import json
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mmgen.commands.common import add_source_flags, source_from
from mmgen.data.images import BadImage
from mmgen.data.sources import Bad
from mmgen.models.contrastive import load_towers
from mmgen.runtime.released import towers_folder


def main(argv):
    """Writes the joint vectors of a source's images and texts: images.npy and texts.npy, float16 [documents, E],
    whose row i is document i (its first image, all its text; zeros where it is bad or has none), and embed.json."""
    parser = argparse.ArgumentParser("mmgen tools embed", description=main.__doc__, allow_abbrev=False)
    parser.add_argument(
        "--towers",
        type=towers_folder,
        required=True,
        metavar="DIR",
        help="workdir of a contrastive run, or `reference`",
    )
    add_source_flags(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the vectors; made")
    parser.add_argument("--batch-size", type=int, default=256)
    args = parser.parse_args(argv)
    if args.batch_size < 1:
        raise ValueError(f"expected --batch-size of at least 1, found {args.batch_size}")
    towers, source, out = load_towers(args.towers), source_from(args), Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "embed.json").unlink(missing_ok=True)  # it is written last, and says that the vectors are whole
    width = towers.model.image_out.w.shape[1]
    images, texts = (
        np.lib.format.open_memmap(out / name, "w+", np.float16, (len(source), width))
        for name in ("images.npy", "texts.npy")
    )
    bad, counts = Bad(source, args.max_bad), {"images": 0, "texts": 0}
    for start in tqdm(range(0, len(source), args.batch_size), desc="embed", disable=None, leave=False):
        found = {"images": [], "texts": []}
        for i in range(start, min(start + args.batch_size, len(source))):
            try:
                pixels = source.pixels(i) if source.count_images(i) else None
                text = source.captions(i, 1)[0]
            except BadImage as error:
                bad.saw(error)
                continue
            bad.saw()
            found["images"] += [] if pixels is None else [(i, pixels)]
            found["texts"] += [(i, text)] if text else []
        for name, into, embed in (
            ("images", images, towers.embed_images),
            ("texts", texts, towers.embed_texts),
        ):
            if found[name]:
                places, values = zip(*found[name])
                into[list(places)] = embed(list(values))
                counts[name] += len(places)
    if not any(counts.values()):
        raise ValueError(f"{source.spec} gave no image and no text: {dict(source.skipped)}")
    images.flush()
    texts.flush()
    about = {"source": source.spec, "fingerprint": source.fingerprint, "towers": towers.name, "width": width}
    about |= counts | {"documents": len(source), "skipped": dict(source.skipped)}
    (out / "embed.json").write_text(json.dumps(about, indent=1))
    print(
        f"{out}: {counts['images']} images and {counts['texts']} texts of {len(source)} documents, {width} wide"
    )
