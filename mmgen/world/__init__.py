"""A world of simple pictures whose truth is known: scenes, words for them, and a judge of pixels."""

import bisect
import itertools
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from mmgen.world.language import say
from mmgen.world.scene import Claim, Scene, random_item, recolor

SPLITS = ("train", "valid", "test")
# Training shows more of what is harder to learn.
MIXTURE = {
    "single_object": 0.05,
    "colors": 0.08,
    "two_object": 0.24,
    "position": 0.26,
    "color_attribution": 0.16,
    "counting": 0.15,
    "scene": 0.06,
}


@dataclass(frozen=True)
class Item:
    prompt: str
    claim: Claim
    scene: Scene
    category: str


def item(seed, split, i, category=None, language="en", unseen=None) -> Item:
    """Item i of a split: a pure function of its arguments, the same on every machine.

    category: one of CATEGORIES, "scene", "mixed_counting" (two groups, one of them of several), or None for the training MIXTURE.
    unseen: True states a held-out colour-shape pair; otherwise none is in the picture.
    """
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {', '.join(SPLITS)}; found {split!r}")
    if split == "train" and unseen:
        raise ValueError("unseen: the train split never shows held-out pairs; use valid or test")
    stream = f"{seed} {split} {i} {category} {bool(unseen)}"
    digest = blake2b(stream.encode(), digest_size=16).digest()
    rng = np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little")))
    if category is None:
        limits = list(itertools.accumulate(MIXTURE.values()))
        category = tuple(MIXTURE)[bisect.bisect(limits, rng.random() * limits[-1])]
    claim, scene = random_item(rng, category, bool(unseen), told=split == "train")
    return Item(say(claim, language, rng), claim, scene, category)
