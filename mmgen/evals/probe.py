"""What a model knows of a prompt's words, without drawing: are the true words the likeliest for a true picture?

Scores of drawn pictures stay near zero until everything is right at once. This measure moves from the first
hundred steps on, costs no sampling, and says which word is not understood yet (after Winoground's caption
matching, arXiv:2204.03162, by the likelihood of the picture).
"""

import numpy as np

from mmgen import world
from mmgen.document import Document, Image, Text, Turn
from mmgen.world.render import render
from mmgen.world.scene import COLORS, SHAPES


def run(sampler, n, *, size, split="valid", seed=78, batch_size=128):
    """Means over n held-out pictures of each kind, `size` (width, height) in pixels.

    Returns {"shape", "color"}: the probability of a one-object picture's true word among all eight, every
    other word as it is; "attribution": that of a two-object picture's colours beside the same ones exchanged
    (chance: 1/8, 1/8, 1/2); "nats": of the one-object pictures' codes under their true prompts. Each
    two-object picture is named in both orders: who only knows that the first colour is the upper one gets 1/2.
    n = 0 gives {}.
    """
    if not n:
        return {}
    one = [world.item(seed, split, i, category="colors") for i in range(n)]
    two = [world.item(seed, split, i, category="color_attribution") for i in range(n)]
    prompts = []  # [picture, [prompt, ...]], the true prompt first
    for item in one:
        g = item.claim.groups[0]
        prompts.append([f"a {g.color} {shape}" for shape in _first(g.shape, SHAPES)])
    for item in one:
        g = item.claim.groups[0]
        prompts.append([f"a {color} {g.shape}" for color in _first(g.color, COLORS)])
    for item in two:
        for a, b in (item.claim.groups, item.claim.groups[::-1]):
            prompts.append([f"a {x.color} {a.shape} and a {y.color} {b.shape}" for x, y in ((a, b), (b, a))])
    codes = sampler.tokenizer.encode(np.stack([render(item.scene, *size) for item in one + two]))
    codes = [*codes[:n], *codes[:n], *codes[n:].repeat(2, axis=0)]
    documents = [
        Document((Turn("user", (Text(prompt),)), Turn("assistant", (Image(codes=c),))))
        for c, choices in zip(codes, prompts, strict=True)
        for prompt in choices
    ]
    nats = iter(_image_nats(sampler, documents, batch_size))
    nats = [np.array([next(nats) for _ in choices]) for choices in prompts]
    true = [1 / np.exp(x[0] - x).sum() for x in nats]
    shape, color, attribution = (float(np.mean(part)) for part in (true[:n], true[n : 2 * n], true[2 * n :]))
    return {
        "shape": shape,
        "color": color,
        "attribution": attribution,
        "nats": float(np.mean([x[0] for x in nats[:n]])),
    }


def _first(true, words):
    return [true, *(word for word in words if word != true)]


def _image_nats(sampler, documents, batch_size):
    """The cross-entropy, in nats, of all image codes of each document."""
    nats = sampler.nats(documents, batch_size)
    tokens = (sampler.grammar.encode(document, sampler.text) for document in documents)
    codes = (each[row >= sampler.grammar.code_start] for each, row in zip(nats, tokens, strict=True))
    return np.array([each.sum() for each in codes])
