"""Stage `contrastive`: images <-> texts. Learns two towers that put pairs into one direction."""

import functools
import hashlib
import math
import os
import shutil
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from mmgen.data import images as pictures
from mmgen.data.images import BadImage
from mmgen.data.loader import Images
from mmgen.data.sources import Bad, World, open_source
from mmgen.models import contrastive
from mmgen.models.contrastive import Contrastive, Towers, tokens_of
from mmgen.runtime.config import ConfigError
from mmgen.stages.loop import Stage
from mmgen.text import Text
from mmgen.world.scene import holds


def setup(config, workdir):
    """See `loop.Stage`. Learns from `config.data`, is measured on `config.held_out`, and copies its text model
    to the workdir."""
    if config.accumulate != 1:
        raise ConfigError(
            f"config.accumulate={config.accumulate}: pairs of different parts would not be told apart, and the loss "
            'be another; set it to 1, and config.model.image.remat="full" if memory is short'
        )
    data = config.data
    for name, least in (("phrasings", 1), ("length", 1), ("altered", 0)):
        if data[name] < least:
            raise ConfigError(f"config.data.{name} is at least {least}, not {data[name]}")
    check_patch(config)
    path = Path(data.text) if Path(data.text).is_file() else workdir / "text.model"
    if not path.is_file():
        raise ConfigError(
            f"config.data.text={data.text!r} is no file: train a text model on the captions with "
            "`mmgen text --source SPEC --out FILE`"
        )
    text = Text(path)
    source = open_source(**data.source)
    if data.altered and not hasattr(source, "altered"):
        raise ConfigError(
            f"{source.spec} has no captions with an attribute wrong; set config.data.altered to 0"
        )
    pairs = Images(
        source,
        data.batch_size,
        config.seed,
        augment=data.augment,
        flip=False,  # a caption may say left and right
        max_bad=data.max_bad,
        beside=functools.partial(_words, text, data.length, data.phrasings, data.altered),
        threads=data.threads,
        workers=data.workers,
    )
    held_out = open_source(**config.held_out)
    pairs_held_out = functools.cache(lambda: held_out_pairs(held_out, data.max_bad))

    def evaluate(graphdef, params, step):
        model = nnx.merge(graphdef, params)
        towers = Towers(model, text, data.length, data.source.size, config.name)
        images, texts = pairs_held_out()
        return retrieval(towers.embed_images(images), towers.embed_texts(texts))

    return Stage(
        make=lambda rngs: Contrastive(config.model, text.size, rngs),
        loss=contrastive.loss,
        data=pairs,
        shape=(data.batch_size,),
        axes=("batch",),
        unit="pairs",
        units_a_step=data.batch_size,
        evaluate=evaluate,
        adopt=functools.partial(_adopt, path, workdir),
        identity={"text_hash": text.hash},
        flops=functools.partial(_flops, config),
        only=functools.partial(_only, text.hash),
    )


def _only(text_hash, run):
    """Which parameters a new run takes from another: of other pieces the table means nothing."""
    path = run / "text.model"
    return None if path.exists() and Text(path).hash == text_hash else "^(?!text/embedding)"


def check_patch(config):
    """Raises ConfigError where the images are not of whole patches."""
    size, patch = config.data.source.size, config.model.image.patch
    if any(side % patch for side in size):
        raise ConfigError(
            f"config.data.source.size={tuple(size)} is not of whole patches of config.model.image.patch={patch}"
        )


def _words(text, length, phrasings, altered, source, i, epoch):
    """What a pair has beside its image: tokens int32 [T], lengths int32 [], same int32 [2]: one number for equal
    texts, and that of the document, which may come twice in a batch, in two wordings. Each epoch another of the first `phrasings` wordings; `altered` more texts that are wrong, likewise."""
    captions = source.captions(i, phrasings)
    caption = captions[epoch % len(captions)]
    if not caption:
        raise BadImage("no_caption", f"document {i} of {source.spec} has no text")
    tokens, lengths = tokens_of([caption], text, length)
    digest = hashlib.blake2b(tokens.tobytes(), digest_size=4).digest()
    same = np.array([*np.frombuffer(digest, np.int32), i], np.int32)
    found = {"tokens": tokens[0], "lengths": lengths[0], "same": same}
    if altered:
        wrong = tokens_of(source.altered(i, altered, epoch), text, length)
        found |= dict(zip(("altered_tokens", "altered_lengths"), wrong))
    return found


def _flops(config, params):
    """FLOPs of a step, by the convention of `hardware.flops_a_token` but for attention that sees whole rows."""
    (width, height), m = config.data.source.size, config.model
    tokens = {"image": width * height // m.image.patch**2, "text": config.data.length}
    total = 0.0
    for name, T in tokens.items():
        count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params[name]["encoder"]["blocks"]))
        total += T * (6 * count + 12 * m[name].layers * T * m[name].heads * m[name].head_dim)
    return config.data.batch_size * total


def _adopt(path, workdir):
    if path.resolve() != (workdir / "text.model").resolve():
        shutil.copy2(path, workdir / "text.model.tmp")
        os.replace(workdir / "text.model.tmp", workdir / "text.model")


def held_out_pairs(source, max_bad=0.1):
    """-> images uint8 [H, W, 3] of the source's size, texts: of its documents those that are good and whose text is
    the first of its kind. Of two images with one text neither is right or wrong. Nor are they where a text is true of
    both in other words or says less, which only a world can tell: there a document is left out whose caption is true
    of one before it, or the other way round."""
    pairs, items, bad = {}, [], Bad(source, max_bad)
    for i in range(len(source)):
        try:
            text = source.captions(i, 1)[0]
            if not text:
                raise BadImage("no_caption", f"document {i} of {source.spec} has no text")
            if text in pairs:
                continue
            if isinstance(source, World):
                item = source.item(i)
                if any(holds(item.claim, one.scene) or holds(one.claim, item.scene) for one in items):
                    continue
                items.append(item)
            image = pictures.fit(source.pixels(i), *source.size)
        except BadImage as error:
            bad.saw(error)
            continue
        bad.saw()
        pairs[text] = image
    if not pairs:
        raise ValueError(f"{source.spec} has no image with a text")
    return list(pairs.values()), list(pairs)


def retrieval(images, texts, ranks=(1, 5, 10)):
    """How often the right one is among the first: "text_r1" is that of the right text for an image, "image_r1" of
    the right image for a text; unit vectors [N, E] twice. What scores as high as the right one is before it."""
    scores = images @ texts.T
    right = np.diag(scores)
    found = {}
    for name, axis, own in (("text", 1, right[:, None]), ("image", 0, right[None])):
        before = (~(scores < own)).sum(axis) - 1  # nor does what is no number come after
        found |= {f"{name}_r{k}": float(np.mean(before < k)) for k in ranks}
    return found
