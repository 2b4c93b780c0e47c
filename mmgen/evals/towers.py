"""Suites of the contrastive and classifier stages, and what their networks say of other models' pictures."""

import time

import numpy as np

from mmgen import world
from mmgen.data.sources import World
from mmgen.evals.metrics import auc, frechet
from mmgen.models import classifier
from mmgen.stages import refiner as refiners
from mmgen.stages import tokenizer as tokenizers
from mmgen.stages.classifier import held_out_labels
from mmgen.stages.contrastive import held_out_pairs, retrieval
from mmgen.world import tasks_judge
from mmgen.world.scene import alter, changed


def retrieve(towers, source, max_bad=0.1):
    """Retrieval among the pairs of `source` with different texts, and of a world how well right captions are told
    from wrong ones -> ({metric: value}, {} for the report).

    "text_r5" and so on as `stages.contrastive.retrieval`, and "chance_r5"; "auc" is that a picture's cosine with
    its own caption is above any picture's with a caption of which one attribute is wrong, and "auc_color" and so
    on of each attribute; "told" is how often the right one of a picture's two is above.
    """
    images, texts = held_out_pairs(source, max_bad)
    vectors = towers.embed_images(images)
    found = {"pairs": float(len(images))} | retrieval(vectors, towers.embed_texts(texts))
    found |= {f"chance_r{k}": min(k / len(images), 1.0) for k in (1, 5, 10)}
    return found | (attributes(towers, source) if isinstance(source, World) else {}), {}


def attributes(towers, source):
    """The part of `retrieve` about wrong attributes, of the items of a World."""
    images, right, wrong, kinds = [], [], [], []
    for i in range(len(source)):
        item, rng = source.item(i), np.random.default_rng([source.seed, i, 3])
        claim = alter(rng, item.claim, item.scene)
        images.append(source.pixels(i))
        right.append(item.prompt)
        wrong.append(world.say(claim, source.language(i), rng))
        kinds.append(changed(item.claim, claim))
    vectors = towers.embed_images(images)
    good, bad = (np.sum(vectors * towers.embed_texts(texts), -1) for texts in (right, wrong))
    kinds = np.array(kinds)
    found = {"auc": auc(good, bad), "told": float(np.mean(good > bad))}
    return found | {
        f"auc_{kind}": auc(good[kinds == kind], bad[kinds == kind]) for kind in sorted(set(kinds))
    }


def judge(towers, drawn, prompts, true):
    """What the towers say of drawn pictures: {"CLIPScore-NAME", "FD-NAME"}, of uint8 [H, W, 3] each.

    The CLIPScore is 100 max(cosine, 0), the mean over pictures (arXiv:2104.08718 up to its factor); the Fréchet
    distance is that of the image tower's pooled features of drawn and `true` pictures.
    """
    score = 100 * np.maximum(towers.score(drawn, prompts), 0).mean()
    distance = frechet(towers.features(drawn), towers.features(true))
    return {f"CLIPScore-{towers.name}": float(score), f"FD-{towers.name}": distance}


def reconstruct(tokenizer, source, max_bad=0.1, towers=None, tile=None, worst=16):
    """How well a tokenizer's codes give back the images of `source` -> ({metric: value}, {"pictures": the worst} for the
    report).

    "psnr", "ssim", "ms_ssim" (means over images) and "psnr_worst", the usage of codes as `stages.tokenizer.usage` with
    the entropy of each digit besides, and with `towers` "FD-NAME", the Fréchet distance of their features. Of images with alpha the colours are over middle gray.
    """
    images, codes, back = tokenizers.reconstructed(tokenizer, source, max_bad, tile)
    each = tokenizers.reconstruction(images, back, mean=False)
    found = {"images": float(len(images)), "psnr_worst": float(each["psnr"].min())}
    found |= {name: float(values.mean()) for name, values in each.items()} | tokenizers.usage(
        codes, tokenizer.levels
    )
    entropies = tokenizers.digit_entropies(codes, tokenizer.levels)
    found |= {f"digit_entropy_{i}": entropy for i, entropy in enumerate(entropies)}
    if towers:
        found[f"FD-{towers.name}"] = frechet(towers.features(images[..., :3]), towers.features(back[..., :3]))
    order = np.argsort(each["psnr"])[:worst]
    return found, {
        "worst": [(images[i, ..., :3], back[i, ..., :3], f"{each['psnr'][i]:.1f} dB") for i in order]
    }


def refine(model, source, max_bad=0.1, towers=None, steps=(1, 2, 4, 8, 32), worst=16, temperature=1.0):
    """How near a refiner comes to the images of `source` from the codes of their reductions -> ({metric: value},
    {"worst": (real, base, refined) pictures} for the report), beside "base", the tokenizer's own decoder enlarged by bicubic interpolation.

    For each number of `steps` "steps4_psnr" and so on: "psnr", "ssim", "ms_ssim", "power_K" and "error_K" (see
    `stages.refiner.spectrum`), "seconds" an image, and with `towers` "FD-NAME". The deterministic up-sampler has one
    step, "steps1". Image i has the seed i. Of a world's pictures besides "right" and "words", shares of images
    (see `world.tasks_judge.shows`), which "real" has too.
    """
    real = tokenizers.real_images(model.tokenizer, source, max_bad)
    codes = model.codes(real)
    made = {"base": model.bicubic}
    for n in steps if model.flow else (1,):
        made[f"steps{n}"] = lambda codes, n=n: model.refine(
            codes, range(len(codes)), n, temperature=temperature
        )
    found, shown, true = {"images": float(len(real))}, {}, towers and towers.features(real[..., :3])
    seen = "steps4" if "steps4" in made else [*made][-1]
    found |= {f"real_{name}": share for name, share in _read(source, real).items()}
    for name, make in made.items():
        make(codes if name == "base" else codes[:1])  # compiled; steps are in full batches
        began = time.perf_counter()
        back = make(codes)
        found[f"{name}_seconds"] = (time.perf_counter() - began) / len(real)
        measured = tokenizers.reconstruction(real, back) | refiners.spectrum(real, back)
        measured |= _read(source, back)
        if towers:
            measured[f"FD-{towers.name}"] = frechet(true, towers.features(back[..., :3]))
        found |= {f"{name}_{key}": value for key, value in measured.items()}
        if name in ("base", seen):
            shown[name] = back
    each = tokenizers.reconstruction(real, shown[seen], mean=False)["psnr"]
    pictures = lambda i: (x[i, ..., :3] for x in (real, shown["base"], shown[seen]))
    order = np.argsort(each)[:worst]
    return found, {"worst": [(*pictures(i), f"real, base, {seen}: {each[i]:.1f} dB") for i in order]}


def _read(source, images):
    """{"right", "words"}: the share of a world's images that show what they should; {} for other sources."""
    if not isinstance(source, World):
        return {}
    each = [tasks_judge.shows(image[..., :3], source.shown(i)) for i, image in enumerate(images)]
    found = {name: [verdict[name] for verdict in each if name in verdict] for name in ("right", "words")}
    return {name: float(np.mean(flags)) for name, flags in found.items() if flags}


def classify(model, source, max_bad=0.1):
    """A classifier on the labelled images of `source` -> (metrics as `classifier.measure`, with the group's name
    before, {"precision_recall": {"GROUP: CLASS": (precision, recall)}} for the report).

    Probabilities are calibrated as the checkpoint says, not anew.
    """
    images, labels, known = held_out_labels(source, model.groups, max_bad)
    logits, metrics, curves = model.logits(images), {}, {}
    for i, group in enumerate(model.groups):
        rows = np.flatnonzero(known[:, i] > 0)
        if not len(rows):
            continue
        kept = model.calibration.get(group.name, {})
        x, y = logits[group.name][rows], labels[rows, group.span]
        found, drawn = classifier.measure(x, y, group, kept)
        metrics |= {f"{group.name}_{name}": value for name, value in found.items()} | {
            f"{group.name}_images": float(len(rows))
        }
        curves |= {f"{group.name}: {name}": curve for name, curve in drawn.items()}
    return metrics, {"precision_recall": curves}
