"""Labels of images: heads on an image tower, and what their numbers mean.

Shapes: B images, L logits of all groups of labels, K classes of one group.
"""

import json
import logging
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx

from mmgen.data import images as pictures
from mmgen.models import layers
from mmgen.models.autoencoders import to_float
from mmgen.models.contrastive import ImageTower, in_batches
from mmgen.runtime import checkpoint
from mmgen.runtime import mesh as meshes
from mmgen.runtime.config import ConfigError

CALIBRATION = "calibration.json"  # of a workdir: {"step": of the weights, "groups": {group: as `fit`}}


class Group(NamedTuple):
    """Labels of one kind: exactly one of `classes` is true of an image, or with `multi` any number of them."""

    name: str
    field: str  # of a source's fields, a class or a list of them
    classes: tuple[str, ...]
    multi: bool
    start: int  # of its logits among all

    @property
    def span(self):
        return slice(self.start, self.start + len(self.classes))


def groups_of(labels):
    """The Groups of config.labels: {name: {"field", "classes", "multi"}}."""
    found, start = [], 0
    for name, each in sorted(labels.items()):
        classes = tuple(map(str, each["classes"]))
        if len(set(classes)) != len(classes) or len(classes) < (1 if each["multi"] else 2):
            raise ConfigError(
                f"config.labels.{name}.classes are different names, at least two (one if multi); found {classes}"
            )
        found.append(Group(name, each["field"], classes, each["multi"], start))
        start += len(classes)
    if not found:
        raise ConfigError("config.labels names no labels to learn")
    return tuple(found)


class Classifier(nnx.Module):
    """A linear head for all groups on an image tower's pooled features; the tower is not learned if `frozen`."""

    def __init__(self, config, groups, rngs):
        self.frozen = config.frozen
        self.image = ImageTower(config.image, rngs, dtype=jnp.dtype(config.dtype))
        if config.frozen:
            for _, variable in nnx.to_flat_state(nnx.state(self.image)):
                variable.set_metadata(frozen=True)
        L = sum(len(group.classes) for group in groups)
        self.head = layers.Linear((config.image.width, L), ("embed", "label"), rngs, bias=True)

    def __call__(self, images):
        """Images [B, H, W, 3] in [-1, 1] -> logits float32 [B, L]."""
        x = layers.rms_norm(self.image(images))
        return layers.high(self.head(jax.lax.stop_gradient(x) if self.frozen else x))


def loss(model, batch, key=None, *, groups):
    """{name: (sum, weight)}: "loss", the mean cross-entropy over the groups that are known of an image, and the
    accuracy of each group.

    batch: images uint8 [B, H, W, 3], labels float32 [B, L] (1 where true), known float32 [B, groups].
    """
    logits, labels, known = model(to_float(batch["images"])), batch["labels"], batch["known"]
    out, total = {}, 0.0
    for i, group in enumerate(groups):
        x, y = logits[:, group.span], labels[:, group.span]
        if group.multi:
            each = (jax.nn.softplus(x) - x * y).mean(-1)
            right = ((x > 0) == (y > 0)).mean(-1)
        else:
            each = -(jax.nn.log_softmax(x) * y).sum(-1)
            right = (x.argmax(-1) == y.argmax(-1)).astype(jnp.float32)
        total += (each * known[:, i]).sum()
        out[f"accuracy_{group.name}"] = (right * known[:, i]).sum(), known[:, i].sum()
    return {"loss": (total, known.sum()), **out}


def targets(groups, fields):
    """A document's fields -> labels float32 [L], known float32 [groups]: a group is unknown without its field.

    Raises ValueError for a class that the group has not, and for several of a group that takes one.
    """
    labels = np.zeros(groups[-1].span.stop, np.float32)
    known = np.zeros(len(groups), np.float32)
    for i, group in enumerate(groups):
        value = fields.get(group.field)
        if value is None:
            continue
        values = [str(each) for each in (value if isinstance(value, (list, tuple)) else [value])]
        strange = [each for each in values if each not in group.classes]
        if strange or (not group.multi and len(values) != 1):
            expected = "any of" if group.multi else "one of"
            raise ValueError(f"field {group.field!r}: expected {expected} {group.classes}, found {values}")
        labels[[group.start + group.classes.index(each) for each in values]] = 1
        known[i] = 1
    return labels, known


# ---- what logits mean: probabilities that are true, and decisions at a stated rate of false alarms ----


def probabilities(logits, multi):
    """Logits [B, K] -> probabilities float64 [B, K]."""
    x = np.asarray(logits, np.float64)
    if multi:
        return np.exp(-np.logaddexp(0, -x))  # exact where it is small, as thresholds may be
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def temperature(logits, labels, multi):
    """The one number by which logits [B, K] are divided so that `labels` [B, K] are likeliest
    (arXiv:1706.04599), by golden section of its logarithm within [1/20, 20]."""

    def nats(log):
        x = np.asarray(logits, np.float64) / np.exp(log)
        if multi:
            return np.mean(np.logaddexp(0, np.where(labels > 0, -x, x)))
        x = x - x.max(-1, keepdims=True)
        return np.mean(np.log(np.exp(x).sum(-1)) - (x * labels).sum(-1))

    low, high, ratio = -np.log(20), np.log(20), (5**0.5 - 1) / 2
    for _ in range(60):
        a, b = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, b) if nats(a) <= nats(b) else (a, high)
    return float(np.exp((low + high) / 2))


def calibration_error(p, labels, multi, bins=15):
    """Expected calibration error (arXiv:1706.04599) of probabilities [B, K]: of the class that is likeliest, or
    of each of several; bins of about equal counts, so that none has too few; equal ones share a bin."""
    if multi:
        sure, right = p.ravel(), labels.ravel()
    else:
        sure, right = p.max(-1), labels[np.arange(len(p)), p.argmax(-1)]
    _, place, count = np.unique(sure, return_inverse=True, return_counts=True)
    before = np.cumsum(count) - count  # how many are smaller
    gaps = np.bincount((before * bins // len(sure))[place], sure - right)
    return float(np.abs(gaps).sum() / len(sure))


def threshold(p, labels, rate):
    """The least probability such that at most a share `rate` of images without the label, of p [B], reach it."""
    wrong = np.sort(p[labels == 0])[::-1]
    if not len(wrong):
        return 0.5
    allowed = int(rate * len(wrong))
    return float(np.nextafter(wrong[allowed], np.inf)) if allowed < len(wrong) else 0.0


def precision_recall(p, labels):
    """Scores [B] and labels [B] -> precision, recall, thresholds [N], from the greatest score down, a point for
    each different score; and the average precision, the area under their steps."""
    order = np.argsort(-p, kind="stable")
    p, labels = p[order], labels[order] > 0
    last = np.append(np.flatnonzero(np.diff(p)), len(p) - 1)  # of each run of equal scores
    hits = np.cumsum(labels)[last]
    precision, recall = hits / (last + 1), hits / max(labels.sum(), 1)
    average = float(np.sum(np.diff(recall, prepend=0.0) * precision))
    return precision, recall, p[last], average


def fit(logits, labels, group, rate):
    """What makes numbers of logits [B, K]: {"temperature", "false_alarms": rate, "thresholds": {class: p}}."""
    scale = temperature(logits, labels, group.multi)
    p = probabilities(logits / scale, group.multi)
    limits = {name: threshold(p[:, k], labels[:, k], rate) for k, name in enumerate(group.classes)}
    return {"temperature": scale, "false_alarms": rate, "thresholds": limits}


def measure(logits, labels, group, kept):
    """How good logits [B, K] are with `kept`, which other images gave `fit` -> (metrics, curves).

    accuracy (of a multi-label group: of all its decisions at 1/2), calibration_error before ("raw_") and after,
    average_precision (the mean over the classes that occur, if any), and over all classes the share of false_alarms
    and the recall at the thresholds. curves: {class: (precision [N], recall [N])}.
    """
    raw = probabilities(logits, group.multi)
    p = probabilities(logits / kept.get("temperature", 1.0), group.multi)
    right = (p > 0.5) == (labels > 0) if group.multi else p.argmax(-1) == labels.argmax(-1)
    flagged = p >= np.array([kept.get("thresholds", {}).get(name, 0.5) for name in group.classes])
    drawn = {
        name: precision_recall(p[:, k], labels[:, k])
        for k, name in enumerate(group.classes)
        if labels[:, k].any()
    }
    found = {
        "accuracy": right.mean(),
        "raw_calibration_error": calibration_error(raw, labels, group.multi),
        "calibration_error": calibration_error(p, labels, group.multi),
        "false_alarms": (flagged & (labels == 0)).sum() / max((labels == 0).sum(), 1),
        "recall": (flagged & (labels > 0)).sum() / max((labels > 0).sum(), 1),
    }
    if drawn:
        found["average_precision"] = np.mean([average for *_, average in drawn.values()])
    curves = {name: (precision, recall) for name, (precision, recall, *_) in drawn.items()}
    return {name: float(value) for name, value in found.items()}, curves


class Classes:
    """A trained classifier for use: pictures -> probabilities and labels.

    calibration: {group: {"temperature": t, "thresholds": {class: p}}}, as the stage writes it.
    """

    def __init__(self, model, groups, size, calibration=None):
        self.groups, self.size, self.calibration = groups, tuple(size), calibration or {}
        graphdef, self._params = nnx.split(model)
        self._logits = jax.jit(lambda p, x: nnx.merge(graphdef, p)(to_float(x)), out_shardings=meshes.whole())

    def logits(self, images):
        """Images uint8 [H, W, 3] each of any size -> {group: float32 [B, K]}, not calibrated."""
        fitted = np.stack([pictures.fit(image, *self.size) for image in images])
        found = in_batches(self._logits, self._params, (fitted,))
        return {group.name: found[:, group.span] for group in self.groups}

    def probabilities(self, images):
        """-> {group: float64 [B, K]}, calibrated."""
        found = self.logits(images)
        scale = lambda name: self.calibration.get(name, {}).get("temperature", 1.0)
        return {g.name: probabilities(found[g.name] / scale(g.name), g.multi) for g in self.groups}

    def labels(self, images):
        """-> for each image {group: its likeliest class, or of several (`multi`) those that are flagged}."""
        found = self.probabilities(images)
        likeliest = lambda g, i: g.classes[int(found[g.name][i].argmax())]
        return [
            {g.name: each[g.name] if g.multi else likeliest(g, i) for g in self.groups}
            for i, each in enumerate(self.flagged(found))
        ]

    def flags(self, images):
        """-> for each image {group: the classes whose probability reaches its threshold}: at the rate of false
        alarms that was asked for, one class or of any group several or none."""
        return self.flagged(self.probabilities(images))

    def flagged(self, found):
        """The same of what `probabilities` gives."""
        def of(group, p):
            limits = self.calibration.get(group.name, {}).get("thresholds", {})
            return [name for name, each in zip(group.classes, p) if each >= limits.get(name, 0.5)]

        rows = len(found[self.groups[0].name])
        return [{g.name: of(g, found[g.name][i]) for g in self.groups} for i in range(rows)]


def load_classifier(workdir):
    """The `Classes` of a classifier run; says so where its calibration is missing or of other weights."""
    config = ml_collections.ConfigDict(checkpoint.read_config(workdir, "classifier"))
    groups = groups_of(config.labels)
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: Classifier(config.model, groups, None)))
    params, step = checkpoint.load_weights(workdir, nnx.to_pure_dict(abstract))
    path = Path(workdir) / CALIBRATION
    found = json.loads(path.read_text()) if path.exists() else {"step": None, "groups": None}
    if found["step"] != step:
        logging.warning(
            "%s is of step %s, the weights of %s are of step %d: probabilities are not calibrated, thresholds are 1/2; "
            "train on to the next evaluation",
            CALIBRATION, found["step"], workdir, step,
        )  # fmt: skip
        found["groups"] = None
    return Classes(nnx.merge(graphdef, params), groups, config.data.source.size, found["groups"])
