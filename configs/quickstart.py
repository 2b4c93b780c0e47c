"""The whole road on the embedded world, sized for two CPU cores and ten minutes.

mmgen quickstart --workdir runs/quickstart
"""

import ml_collections

from mmgen.runtime import config as configs

VARIANTS = ("default", "tiny")


def get_config(variant):
    c = ml_collections.ConfigDict()
    c.stage = "quickstart"
    c.source = dict(spec="world:train", size=(32, 32), seed=0, documents=90_000, languages=("en",))
    c.text = dict(pieces=384, lines=5_000)  # of the SentencePiece model, and captions it learns from
    c.max_side = 16  # largest side of an image, in patches, that the vocabulary has tokens for
    c.tokenizer = configs.load("tokenizer:quickstart")
    c.transformer = configs.load("transformer:quickstart")
    # Held-out prompts a suite, on combinations seen in training and on others.
    c.suites = dict(
        seed=1, seen=200, unseen=50, probe=64, batch_size=50, guidance=1.5,
        image=dict(temperature=0.1, top_k=0, top_p=1.0, keep_mode=True),
    )  # fmt: skip
    if variant == "tiny":  # for tests: does everything, learns nothing
        c.source.documents, c.text.lines = 300, 300
        c.tokenizer, c.transformer = configs.load("tokenizer:tiny"), configs.load("transformer:tiny")
        c.suites.seen, c.suites.unseen, c.suites.probe, c.suites.batch_size = 2, 1, 2, 6
    return c
