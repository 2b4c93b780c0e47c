"""`mmgen tools inspect SHARDS [SHARDS ...] [--out DIR]`."""

import argparse

from mmgen.evals import inspect


def main(argv):
    """Says what lies in tokenised shards, and writes inspect.html, a page with documents of them to look at, and
    inspect.json. Look before you train: images are decoded from the stored codes."""
    parser = argparse.ArgumentParser("mmgen tools inspect", description=main.__doc__)
    add = parser.add_argument
    add(
        "shards", nargs="+", metavar="SHARDS", help="folder of `mmgen tokenize`; several are looked at as one"
    )
    add("--out", default="runs/inspect", help="folder of the page (%(default)s)")
    add("--documents", type=int, default=24, help="how many to show, of all parts (%(default)s)")
    add("--sample", type=int, default=2000, help="how many to count tokens of (%(default)s)")
    add("--seed", type=int, default=0, help="which these are")
    add("--row-length", type=int, default=2048, help="tokens of a row, to see how full it gets (%(default)s)")
    add("--verify", action="store_true", help="read every record; exit status 1 where something is damaged")
    args = parser.parse_args(argv)
    if args.documents < 0 or args.sample < 1 or args.row_length < 1 or args.seed < 0:
        raise ValueError(
            "expected --documents and --seed of at least 0, --sample and --row-length of at least 1, found "
            f"{args.documents}, {args.seed}, {args.sample}, {args.row_length}"
        )
    damage = None
    if args.verify:
        damage = [words for folder in args.shards for words in inspect.verify(folder)]
        print("\n".join(f"damaged: {words}" for words in damage) or "verified: all is whole", flush=True)
    shards = inspect.opened(args.shards)
    found = inspect.copies(shards)
    stats = inspect.statistics(
        shards, found.text, sample=args.sample, seed=args.seed, row_length=args.row_length
    )
    print(inspect.show(stats))
    for note in found.notes:
        print(f"note: {note}")
    for words in stats["sample"]["why"]:
        print(f"damaged: {words}")
    documents = inspect.choose(shards, args.documents, args.seed)
    page = inspect.write(args.out, shards, found, stats, documents=documents, damage=damage)
    print(f"the page is {page.resolve()}")
    return 1 if damage else 0
