"""Measures of a trained model: the probe of its words, and the command that reports."""

import json

import numpy as np
import pytest
from conftest import mmgen

from mmgen.document import Document, Image, Text, Turn
from mmgen.evals import probe, suites


def test_nats_are_those_of_the_codes_alone(sampler):
    rng = np.random.default_rng(0)
    documents = [
        Document((Turn("user", (Text("a red circle" * (i + 1)),)), Turn("assistant", (Image(codes=codes),))))
        for i, codes in enumerate(rng.integers(0, 1000, (5, 4, 3)).astype(np.int32))
    ]
    nats = probe._image_nats(sampler, documents, batch_size=2)
    np.testing.assert_allclose(nats, probe._image_nats(sampler, documents, batch_size=64), rtol=1e-5)
    # A model of 8 steps knows little: near uniform over a vocabulary of over a thousand.
    assert nats.shape == (5,) and (nats > 12 * 3).all() and (nats < 12 * 12).all()


@pytest.mark.parametrize("knows", [True, False])
def test_the_probe_of_a_model_that_knows_all_and_of_one_that_knows_nothing(sampler, monkeypatch, knows):
    """Who knows all gives false prompts 50 nats more than the true one, who knows nothing gives all the same."""

    def nats(_, documents, batch_size):
        assert len(documents) == 2 * 4 * 8 + 2 * 4 * 2
        pictures = [document.turns[1].parts[0].codes.tobytes() for document in documents]
        prompts = [document.turns[0].parts[0].text for document in documents]
        ends = [0, *(8 * k for k in range(1, 9)), *(64 + 2 * k for k in range(1, 9))]
        for start, stop in zip(ends, ends[1:]):  # one picture, prompts all unlike
            assert len(set(pictures[start:stop])) == 1 and len(set(prompts[start:stop])) == stop - start
        return np.array([0.0 if i in ends or not knows else 50.0 for i in range(len(documents))]) + 7

    monkeypatch.setattr(probe, "_image_nats", nats)
    known = probe.run(sampler, 4, size=(32, 32))
    assert known["nats"] == 7 and probe.run(sampler, 0, size=(32, 32)) == {}
    for name, options in (("shape", 8), ("color", 8), ("attribution", 2)):
        assert known[name] == pytest.approx(1.0 if knows else 1 / options)


def test_settings_are_chosen_on_other_prompts_than_those_that_measure():
    asked = {
        split: {case.item.prompt for case in suites.cases(1, 20, 0, split=split)}
        for split in ("valid", "test")
    }
    assert asked["test"] == {case.item.prompt for case in suites.cases(1, 20, 0)} != asked["valid"]


def test_evaluate_reports_scores_and_the_probe(space, tmp_path, capsys):
    flags = [
        "--seen",
        1,
        "--unseen",
        1,
        "--batch-size",
        6,
        "--probe",
        2,
        "--no-keep-mode",
        "--temperature",
        0.5,
        "--split",
        "valid",
    ]
    assert mmgen("evaluate", "--checkpoint", space.transformer, "--out", tmp_path / "report", *flags) == 0
    said = capsys.readouterr().out
    assert "probe_shape" in said and "counting" in said
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert set(report["metrics"]) == {"probe_shape", "probe_color", "probe_attribution", "probe_nats"}
    assert report["config"]["keep_mode"] is False and report["config"]["split"] == "valid"
    assert mmgen("evaluate", "--checkpoint", space.transformer, "--out", tmp_path / "r", "--probe", -1) != 0
    assert "--probe" in capsys.readouterr().err
