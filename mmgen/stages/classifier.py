"""Stage `classifier`: images -> labels. Heads on an image tower, that of a contrastive run (config.init) or a fresh one."""

import functools
import itertools
import json
import os

import jax
import numpy as np
from flax import nnx

from mmgen.data import images as pictures
from mmgen.data.images import BadImage
from mmgen.data.loader import Images
from mmgen.data.sources import Bad, open_with_larger
from mmgen.models import classifier
from mmgen.models.classifier import CALIBRATION, Classes, Classifier
from mmgen.runtime.config import ConfigError, nearest
from mmgen.stages.contrastive import check_patch
from mmgen.stages.loop import Stage


def setup(config, workdir):
    """See `loop.Stage`. Learns from `config.data`, is measured on `config.held_out`, and writes what makes its
    numbers probabilities to calibration.json."""
    data, groups = config.data, classifier.groups_of(config.labels)
    if config.model.frozen and not config.init:
        raise ConfigError(
            "config.model.frozen=True, but there is no tower to keep: name a contrastive run in config.init"
        )
    if not 0 < config.false_alarms < 1:
        raise ConfigError(f"config.false_alarms is a share between 0 and 1, not {config.false_alarms}")
    check_patch(config)
    source, held_out = (open_with_larger(**each) for each in (data.source, config.held_out))
    for each in (source, held_out):
        _check_fields(each, groups)
    labelled = Images(
        source,
        data.batch_size,
        config.seed,
        augment=data.augment,
        flip=data.flip,
        max_bad=data.max_bad,
        beside=functools.partial(_labels, groups),
        threads=data.threads,
        workers=data.workers,
    )

    def evaluate(graphdef, params, step):
        images, labels, known = held_out_labels(held_out, groups, data.max_bad)
        model = Classes(nnx.merge(graphdef, params), groups, data.source.size)
        calibration, metrics = calibrate(model.logits(images), labels, known, groups, config.false_alarms)
        if jax.process_index() == 0:
            temporary = workdir / f"{CALIBRATION}.tmp"
            temporary.write_text(json.dumps({"step": step, "groups": calibration}, indent=2))
            os.replace(temporary, workdir / CALIBRATION)
        return metrics

    return Stage(
        make=lambda rngs: Classifier(config.model, groups, rngs),
        loss=functools.partial(classifier.loss, groups=groups),
        data=labelled,
        shape=(data.batch_size,),
        axes=("batch",),
        unit="images",
        units_a_step=data.batch_size,
        evaluate=evaluate,
        only=lambda run: "^image/",
        complete="^image/" if config.model.frozen else "",
    )


def _check_fields(source, groups, first=1000):
    """Raises ConfigError for a group whose field none of the first documents has: a misspelt one would be a label
    that is never learned."""
    known = set()
    for i in range(min(len(source), first)):
        try:
            known |= source.fields(i).keys()
        except BadImage:
            continue
        if all(group.field in known for group in groups):
            return
    for group in itertools.filterfalse(lambda group: group.field in known, groups):
        raise ConfigError(
            f"config.labels.{group.name}.field={group.field!r}: none of the first {first} documents of {source.spec} "
            f"has it; {nearest(group.field, sorted(known))}"
        )


def _labels(groups, source, i, epoch=0):
    """What an image has beside it: labels float32 [L], known float32 [groups]. Raises BadImage without any."""
    try:
        labels, known = classifier.targets(groups, source.fields(i))
    except BadImage:
        raise
    except ValueError as error:
        raise BadImage("bad_label", f"document {i} of {source.spec}: {error}") from None
    if not known.any():
        names = ", ".join(group.field for group in groups)
        raise BadImage("no_label", f"document {i} of {source.spec} has none of the fields {names}")
    return {"labels": labels, "known": known}


def held_out_labels(source, groups, max_bad=0.1):
    """-> images uint8 [H, W, 3] of the source's size, labels float32 [B, L], known float32 [B, groups] of its good
    documents."""
    images, found, bad = [], [], Bad(source, max_bad)
    for i in range(len(source)):
        try:
            beside = _labels(groups, source, i)
            images.append(pictures.fit(source.pixels(i), *source.size))
        except BadImage as error:
            bad.saw(error)
            continue
        bad.saw()
        found.append(beside)
    if not found:
        raise ValueError(f"{source.spec} has no image with labels: {dict(source.skipped)}")
    return images, *(np.stack([each[name] for each in found]) for name in ("labels", "known"))


def calibrate(logits, labels, known, groups, rate):
    """Calibration by one half of the images, measured on the other -> ({group: as `classifier.fit`}, metrics as
    `classifier.measure` with the group's name before)."""
    calibration, metrics = {}, {}
    for i, group in enumerate(groups):
        rows = np.flatnonzero(known[:, i] > 0)
        if len(rows) < 2:
            raise ValueError(
                f"config.held_out has {len(rows)} images with the field {group.field!r}: of labels {group.name!r} there "
                "must be two at least, one to calibrate by and one to measure on"
            )
        halves = [(logits[group.name][half], labels[half, group.span]) for half in (rows[::2], rows[1::2])]
        calibration[group.name] = classifier.fit(*halves[0], group, rate)
        found, _ = classifier.measure(*halves[1], group, calibration[group.name])
        metrics |= {f"{group.name}_{name}": value for name, value in found.items()}
    return calibration, metrics
