"""Classifiers: targets from fields, numbers that are probabilities, thresholds, and runs of the stage."""

import json
import shutil

import numpy as np
import pytest

from mmgen.data import loader, sources
from mmgen.models import classifier
from mmgen.models.classifier import groups_of, load_classifier, targets
from mmgen.runtime import config as configs
from mmgen.runtime.config import ConfigError
from mmgen.stages import classifier as classifier_stage
from mmgen.stages import loop
from mmgen.world.scene import COLORS
from tests.conftest import arrays, assert_same_arrays, config_of, mmgen, records

LABELS = {
    "kind": {"field": "kind", "classes": ("cat", "dog", "3"), "multi": False},
    "tags": {"field": "tags", "classes": ("red", "big"), "multi": True},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The workdir of a tiny run with a group of each kind, and its flags."""
    workdir = tmp_path_factory.mktemp("classifier") / "run"
    flags = ["--config", "classifier:tiny", "--config.labels.color.multi=true", "--config.steps=8"]
    flags += ["--config.save_every=3", "--config.log_every=2", "--config.evaluate_every=8"]
    assert mmgen("train", *flags, "--workdir", workdir) == 0
    return workdir, flags


def test_targets_of_fields():
    groups = groups_of(LABELS)
    assert [(g.name, g.start) for g in groups] == [("kind", 0), ("tags", 3)]
    of = lambda **fields: [x.tolist() for x in targets(groups, fields)]
    assert of(kind="dog", tags=["big", "red"]) == [[0, 1, 0, 1, 1], [1, 1]]
    assert of(kind=3, tags=[]) == [[0, 0, 1, 0, 0], [1, 1]]  # none of several is known, too
    assert of(tags="red") == [[0, 0, 0, 1, 0], [0, 1]]
    assert of() == [[0] * 5, [0, 0]]
    for fields, words in (
        (dict(kind="cow"), "cow"),
        (dict(kind=["cat", "dog"]), "one of"),
        (dict(tags=["x"]), "any of"),
    ):
        with pytest.raises(ValueError, match=words):
            targets(groups, fields)
    for labels in (
        {},
        {"a": dict(field="a", classes=("x",), multi=False)},
        {"a": dict(field="a", classes=("x", "x"), multi=True)},
    ):
        with pytest.raises(ConfigError, match="labels"):
            groups_of(labels)


def test_the_loss_counts_what_is_known():
    groups, rng = groups_of(LABELS), np.random.default_rng(0)
    logits = rng.normal(size=(3, 5)).astype(np.float32)
    labels = np.array([[0, 1, 0, 1, 0], [1, 0, 0, 0, 0], [0, 0, 0, 1, 1]], np.float32)
    known = np.array([[1, 1], [1, 0], [0, 1]], np.float32)
    images = np.zeros((3, 8, 8, 3), np.uint8)
    found = classifier.loss(lambda _: logits, dict(images=images, labels=labels, known=known), groups=groups)
    x, total = logits.astype(np.float64), 0.0
    for i, right in ((0, 1), (1, 0)):
        total += np.log(np.exp(x[i, :3]).sum()) - x[i, right]
    for i in (0, 2):
        total += np.mean([np.log1p(np.exp(-x[i, 3 + k] * (2 * labels[i, 3 + k] - 1))) for k in range(2)])
    assert float(found["loss"][0]) == pytest.approx(total, rel=1e-5) and float(found["loss"][1]) == 4
    assert float(found["accuracy_kind"][1]) == 2 and float(found["accuracy_tags"][1]) == 2


@pytest.mark.parametrize("multi", [False, True])
def test_a_temperature_makes_numbers_true(multi):
    rng = np.random.default_rng(0)
    true = 2 * rng.normal(size=(6000, 4))
    p = classifier.probabilities(true, multi)
    if multi:
        labels = (rng.random(p.shape) < p).astype(float)
    else:
        labels = np.eye(4)[(rng.random((6000, 1)) > p.cumsum(1)).sum(1)]
    scale = classifier.temperature(3.0 * true, labels, multi)
    assert scale == pytest.approx(3.0, rel=0.08)
    error = lambda x: classifier.calibration_error(classifier.probabilities(x, multi), labels, multi)
    assert error(3 * true / scale) < 0.02 < 0.05 < error(3 * true)


def test_equal_scores_are_one_bin_and_small_ones_are_not_lost():
    half, sorted_labels = np.full((90, 1), 0.5), (np.arange(90) < 45).astype(float)[:, None]
    assert classifier.calibration_error(half, sorted_labels, True) == pytest.approx(0)
    x = np.array([[-800.0, -40.0, 40.0]])
    np.testing.assert_allclose(classifier.probabilities(x, True), [[0, np.exp(-40), 1]], rtol=1e-12)
    separable = np.array([[-9.0], [9.0]] * 20), np.array([[0.0], [1.0]] * 20)
    assert classifier.temperature(*separable, True) == pytest.approx(1 / 20, rel=1e-3)  # its bound


def test_a_group_of_which_no_class_occurs_is_measured_without_precision():
    group = groups_of(LABELS)[1]
    found, curves = classifier.measure(np.zeros((6, 2)), np.zeros((6, 2)), group, {})
    assert "average_precision" not in found and not curves and found["recall"] == 0
    assert np.isfinite(list(found.values())).all()


def test_thresholds_keep_their_promise():
    rng = np.random.default_rng(0)
    p, labels = rng.random(5000), rng.random(5000) < 0.3
    for rate in (0.001, 0.01, 0.2):
        limit = classifier.threshold(p, labels, rate)
        alarms = (p >= limit)[~labels].mean()
        assert alarms <= rate and alarms > rate - 2 / (~labels).sum()
    ties = np.full(100, 0.7)  # of equal scores all or none
    assert classifier.threshold(ties, np.zeros(100), 0.5) > 0.7
    assert classifier.threshold(ties, np.ones(100), 0.5) == 0.5  # nothing is known of the others


def test_precision_and_recall_by_hand():
    p = np.array([0.9, 0.8, 0.8, 0.4, 0.1])
    labels = np.array([1, 0, 1, 1, 0])
    precision, recall, limits, average = classifier.precision_recall(p, labels)
    np.testing.assert_allclose(limits, [0.9, 0.8, 0.4, 0.1])
    np.testing.assert_allclose(precision, [1, 2 / 3, 3 / 4, 3 / 5])
    np.testing.assert_allclose(recall, [1 / 3, 2 / 3, 1, 1])
    assert average == pytest.approx(1 / 3 + 2 / 9 + 1 / 4)


def test_a_run_resumes_and_is_calibrated(run, tmp_path):
    workdir, flags = run
    config = config_of(flags)
    loop.train(config, tmp_path, stop_at=5)
    loop.train(config, tmp_path)
    assert_same_arrays(arrays(tmp_path, 8), arrays(workdir, 8))
    assert records(tmp_path) == records(workdir)
    last = records(workdir)[-1]
    assert {"shape_accuracy", "shape_calibration_error", "color_recall", "color_false_alarms"} <= last.keys()
    found = json.loads((workdir / "calibration.json").read_text())
    kept = found["groups"]
    assert found["step"] == 8
    assert kept["color"]["false_alarms"] == 0.01 and len(kept["color"]["thresholds"]) == 8


def test_use_and_report(run, tmp_path, capsys):
    workdir, _ = run
    model = load_classifier(workdir)
    images = [np.random.default_rng(i).integers(0, 256, (40, 30, 3), np.uint8) for i in range(5)]
    found = model.probabilities(images)
    assert found["shape"].shape == (5, 8)
    np.testing.assert_allclose(found["shape"].sum(1), 1)
    for labels, p, limits in zip(
        model.labels(images), found["color"], [model.calibration["color"]["thresholds"]] * 5
    ):
        assert labels["shape"] in model.groups[-1].classes
        assert labels["color"] == [name for name, each in zip(limits, p) if each >= limits[name]]
    limits = model.calibration["shape"]["thresholds"]
    for flags, p in zip(model.flags(images), found["shape"]):  # of one choice, too, several or none
        assert flags["shape"] == [name for name, each in zip(limits, p) if each >= limits[name]]
    flags = ["--suite", "classifier", "--checkpoint", workdir, "--data", "world:test", "--documents", 60]
    assert mmgen("evaluate", *flags, "--category", "colors", "--out", tmp_path) == 0
    metrics = json.loads((tmp_path / "report.json").read_text())["metrics"]
    assert metrics["shape_images"] == 60 and 0 <= metrics["shape_accuracy"] <= 1
    page = (tmp_path / "report.html").read_text()
    assert "Precision over recall" in page and "shape: circle" in page and "polyline" in page


def test_calibration_of_other_weights_is_not_used(run, tmp_path, caplog):
    workdir = tmp_path / "copy"
    shutil.copytree(run[0], workdir)
    found = json.loads((workdir / "calibration.json").read_text())
    (workdir / "calibration.json").write_text(json.dumps(found | {"step": 3}))
    assert load_classifier(workdir).calibration == {} and "of step 3" in caplog.text
    (workdir / "calibration.json").unlink()
    assert load_classifier(workdir).calibration == {}


def test_a_field_that_nothing_has_is_said_at_once(tmp_path):
    config = configs.load("classifier:tiny")
    with config.unlocked():
        config.labels.shape.field = "shap"
    with pytest.raises(ConfigError, match="labels.shape.field='shap'.*did you mean 'shapes'"):
        loop.train(config, tmp_path)


def test_a_workdir_without_a_checkpoint_may_be_used_anew(run, tmp_path):
    config = config_of([*run[1], "--config.labels.shape.classes=('circle','square')"])
    with pytest.raises(RuntimeError, match="bad_label"):
        loop.train(config, tmp_path)
    loop.train(config_of(run[1]), tmp_path, stop_at=1)


@pytest.mark.soak
def test_a_frozen_tower_keeps_its_weights(space, tmp_path, capsys):
    text = [
        f"--config.data.text={space.text}",
        "--config.steps=8",
    ]  # as in test_contrastive.py: the same program
    assert mmgen("train", "--config", "contrastive:tiny", *text, "--workdir", tmp_path / "towers") == 0
    flags = [
        "--config",
        "classifier:tiny",
        "--config.model.frozen=true",
        f"--config.init={tmp_path / 'towers'}",
    ]
    flags += ["--config.steps=4", "--config.save_every=4", "--config.optimizer.weight_decay=0.1"]
    assert mmgen("train", *flags, "--workdir", tmp_path / "probe") == 0
    before, after = arrays(tmp_path / "towers", 8), arrays(tmp_path / "probe", 4)
    towers = [key for key in after if key.startswith("params['image']")]
    assert len(towers) > 5 and any("head" in key for key in after)
    for key in towers:
        assert np.array_equal(before[key], after[key]), key
    assert after["params['head']['b']"].any()
    assert not any("moments" in key and "'image'" in key for key in after)  # nor are moments kept
    capsys.readouterr()
    assert mmgen("train", *flags[:3], "--workdir", tmp_path / "none") == 1
    assert "config.init" in capsys.readouterr().err


def test_labels_that_do_not_fit_are_counted(tmp_path):
    config = configs.load("classifier:tiny")
    with config.unlocked():
        config.labels.shape.classes = ("circle", "square")
        del config.labels.color, config.labels.background
    with pytest.raises(RuntimeError, match="bad_label"):
        loop.train(config, tmp_path)


def test_what_is_larger_is_made_as_small(run):
    """Pictures of another source are learned from and measured on beside the source's own, at its size."""
    source = sources.open_with_larger(**json.loads((run[0] / "config.json").read_text())["data"]["source"])
    assert [len(part) for part in source.sources] == [200, 40] and source.pixels(220).shape == (48, 48, 3)
    batch = loader.Images(source, 240).batch(0)["images"]
    assert batch.shape == (240, 32, 32, 3)
    images, labels, known = classifier_stage.held_out_labels(source, groups_of(LABELS | {
        "color": dict(field="colors", classes=tuple(COLORS), multi=True)
    }))  # fmt: skip
    assert len(images) == len(labels) == 240 and {image.shape for image in images} == {(32, 32, 3)}
