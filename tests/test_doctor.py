"""The doctor says what is so: what works as ok, what is broken as a problem."""

import shutil

import numpy as np
import pytest

from mmgen.commands import doctor
from mmgen.grammar import Grammar


def levels(check):
    return [level for level, _, _ in check]


def words(check):
    return " / ".join(said for _, _, said in check)


@pytest.mark.smoke
def test_the_whole_road_works_here(capsys):
    assert doctor.main([]) == 0
    said = capsys.readouterr().out
    for part in (
        "Python",
        "packages",
        "devices",
        "memory",
        "tokenizer",
        "shards",
        "codes",
        "transformer",
        "sample",
    ):
        assert f" {part} " in said
    assert doctor.PROBLEM + " " not in said


def test_codes_read_in_another_order_are_a_problem(monkeypatch):
    """The bug that lets the loss fall while samples are noise."""
    read = Grammar.decode

    def transposed(self, tokens, text):
        document = read(self, tokens, text)
        image = document.turns[1].parts[0]
        codes = np.ascontiguousarray(image.codes.T).reshape(image.codes.shape)
        object.__setattr__(image, "codes", codes)
        return document

    monkeypatch.setattr(Grammar, "decode", transposed)
    checked = list(doctor.road())
    assert levels(checked) == [doctor.OK, doctor.OK, doctor.PROBLEM], words(checked)
    assert "order" in words(checked[-1:])


def test_versions_outside_the_pins_are_problems(monkeypatch):
    from packaging.requirements import Requirement

    wanted = [Requirement("numpy>=999"), Requirement("no-such-package>=1"), Requirement("packaging>=1")]
    monkeypatch.setattr(doctor, "requirements", lambda: wanted)
    monkeypatch.setattr(doctor, "jax_parts", lambda: iter(()))
    checked = list(doctor.packages())
    assert levels(checked) == [doctor.PROBLEM, doctor.PROBLEM, doctor.OK]
    assert "pip install 'numpy>=999'" in words(checked) and "no-such-package is not installed" in words(
        checked
    )


def test_pins_are_read_from_the_project():
    names = {requirement.name for requirement in doctor.requirements()}
    assert {"jax", "flax", "optax", "orbax-checkpoint"} <= names and "pytest" not in names


@pytest.mark.parametrize("probe, extra", [("nvidia_gpus", "mmgen[gpu]"), ("tpu_chips", "mmgen[tpu]")])
def test_an_idle_accelerator_is_a_warning_that_names_the_extra(monkeypatch, probe, extra):
    import jax

    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    for each in ("nvidia_gpus", "tpu_chips"):
        monkeypatch.setattr(doctor, each, lambda: "")
    assert levels(doctor.devices()) == [doctor.OK]
    monkeypatch.setattr(doctor, probe, lambda: "something fast")
    checked = list(doctor.devices())
    assert levels(checked) == [doctor.OK, doctor.WARNING] and extra in words(checked)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert "unset" in words(doctor.devices())


def test_little_memory_is_a_warning(monkeypatch):
    monkeypatch.setattr(doctor, "memory", lambda: doctor.NEEDED - 1)
    assert (doctor.WARNING, "memory") in [each[:2] for each in doctor.resources()]


def test_memory_is_plausible():
    assert 1 << 20 < doctor.memory() < 1 << 50


@pytest.mark.parametrize("make", [lambda folder: folder / "missing", lambda folder: folder])
def test_no_checkpoint_is_a_problem(tmp_path, make):
    assert levels(doctor.checkpoint(make(tmp_path))) == [doctor.PROBLEM]


def test_a_whole_workdir_is_ok(space):
    checked = list(doctor.checkpoint(space.transformer))
    assert levels(checked) == [doctor.OK], words(checked)
    assert "is whole" in words(checked) and "picture of" in words(checked)


def test_a_damaged_checkpoint_is_a_warning(space, tmp_path):
    workdir = shutil.copytree(space.transformer, tmp_path / "run")
    newest = max(int(path.stem) for path in (workdir / "checkpoints").glob("*.json"))
    (workdir / "checkpoints" / f"{newest}.json").write_text("0" * 64)
    assert levels(doctor.checkpoint(workdir)) == [doctor.WARNING, doctor.OK]


def test_a_problem_is_exit_status_1(monkeypatch, capsys):
    for each in ("python", "packages", "devices", "resources", "unneeded"):
        monkeypatch.setattr(doctor, each, lambda: iter([(doctor.OK, "part", "well")]))
    monkeypatch.setattr(doctor, "road", lambda: iter([(doctor.PROBLEM, "part", "broken")]))
    assert doctor.main([]) == 1
    assert "1 problems, 0 warnings, 5 checks ok" in capsys.readouterr().out
