"""Configs: every variant loads, values keep their types, and a slip of the pen names what was meant."""

import argparse
import runpy

import pytest

from mmgen.runtime.config import ConfigError, config_folder, load, nearest, overrides
from mmgen.stages import loop

BUNDLED = {path.stem: path for path in config_folder().glob("*.py")}
TINY = "transformer:tiny"

CONFIG = """
import ml_collections
VARIANTS = ("first", "second")
def get_config(variant):
    c = ml_collections.ConfigDict(dict(whole=1, real=0.5, flag=False, name="a", pair=(1, 2), nothing=None))
    c.group = dict(inner=3)
    c.stage = variant
    return c
"""


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(CONFIG)
    return file


def variants():
    return [
        f"{name}:{variant}"
        for name in sorted(BUNDLED)
        for variant in runpy.run_path(BUNDLED[name])["VARIANTS"]
    ]


@pytest.mark.parametrize("spec", variants())
def test_every_bundled_variant_loads(spec):
    config = load(spec)
    assert config.name == spec and config.stage in (*loop.STAGES, "quickstart")
    assert config.is_locked


@pytest.mark.parametrize(
    "spec, changes, meant",
    [
        ("transfromer:tiny", [], "'transformer'"),
        ("transformer:tinny", [], "'tiny'"),
        (TINY, ["optimiser.learning_rate=1"], "'optimizer'"),
        (TINY, ["optimizer.learning_rat=1"], "'learning_rate'"),
        (TINY, ["model.wdth=8"], "'width'"),
        (TINY, ["steps.x=8"], "steps has no 'x'"),
        (TINY, ["model=8"], "group of settings"),
        ("nowhere/config.py:tiny", [], "does not exist"),
        ("", [], "known: "),
    ],
)
@pytest.mark.smoke
def test_a_slip_names_the_nearest(spec, changes, meant):
    with pytest.raises(ConfigError) as error:
        load(spec, changes)
    assert meant in str(error.value)


def test_a_misspelt_stage_names_the_nearest(tmp_path):
    config = load(TINY)
    with config.unlocked():
        config.stage = "tokeniser"
    with pytest.raises(ConfigError, match="'tokenizer'"):
        loop.train(config, tmp_path)


@pytest.mark.parametrize(
    "change, value",
    [
        ("whole=7", 7), ("whole=-7", -7), ("real=2", 2.0), ("real=3e-4", 3e-4), ("flag=true", True),
        ("flag=False", False), ("name=7", "7"), ("name=a=b", "a=b"), ("pair=3,4", (3, 4)),
        ("pair=(5,)", (5,)), ("pair=[6, 7]", (6, 7)), ("pair=8", (8,)), ("nothing=4", 4),
        ("nothing=word", "word"), ("nothing=None", None), ("group.inner=9", 9),
    ],
)  # fmt: skip
def test_values_keep_their_types(path, change, value):
    node = load(str(path), [change])
    for key in change.split("=")[0].split("."):
        node = node[key]
    assert node == value and type(node) is type(value)


@pytest.mark.parametrize(
    "change",
    ["whole=1.5", "whole=true", "whole=x", "real=x", "real=True", "flag=1", "flag=yes", "group.inner=None"],
)
def test_another_type_is_an_error(path, change):
    with pytest.raises(ConfigError, match="expected (int|float|bool)"):
        load(str(path), [change])


@pytest.mark.parametrize("name", sorted(BUNDLED))
def test_the_first_variant_is_the_default(name):
    assert load(name) == load(next(spec for spec in variants() if spec.startswith(f"{name}:")))


def test_a_path_is_a_config_too(path):
    assert load(str(path)).stage == "first"
    assert load(f"{path}:second").stage == "second"
    with pytest.raises(ConfigError, match="'second'"):
        load(f"{path}:secnod")


def test_overrides_as_flags(capsys):
    parser = argparse.ArgumentParser()
    flags = ["--config.a.b=1", "--config.c", "2", "--config.d=x=y"]
    assert overrides(parser, flags) == ["a.b=1", "c=2", "d=x=y"]
    for wrong in (["--confg.a=1"], ["--config.a"], ["stray"]):
        with pytest.raises(SystemExit):
            overrides(parser, wrong)
        assert wrong[0] in capsys.readouterr().err


def test_nearest():
    assert nearest("smaple", ["sample", "train"]) == "did you mean 'sample'?"
    assert nearest("qqqq", ["train", "sample"]) == "known: sample, train"
