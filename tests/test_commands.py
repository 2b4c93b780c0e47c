"""The commands, run as people run them: what they write, and what they say to a mistake."""

import importlib
import json
import os

import numpy as np
import pytest
from PIL import Image

from mmgen import text
from mmgen.__main__ import COMMANDS
from mmgen.runtime import memory
from mmgen.world.scene import CATEGORIES
from tests.conftest import mmgen, run_python


@pytest.fixture
def draw(space):
    """`mmgen sample` of the tiny run, always four pictures at once, so that one program is compiled."""

    def draw(*arguments, out):
        arguments = arguments or ("--prompt", "a red circle", "--prompt", "two blue stars", "--n", 2)
        return mmgen(
            "sample",
            "--checkpoint",
            space.transformer,
            "--size",
            "32x32",
            "--no-provenance",
            *arguments,
            "--out",
            out,
        )

    return draw


def pixels(path):
    return np.asarray(Image.open(path))


def test_help_lists_the_commands(capsys):
    assert mmgen("--help") == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in COMMANDS)
    assert mmgen() == 2
    assert mmgen("--version") == 0 and capsys.readouterr().out.strip().endswith("0.1.0")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name, capsys):
    assert callable(importlib.import_module(f"mmgen.commands.{name}").main)
    with pytest.raises(SystemExit) as done:
        mmgen(name, "--help")
    assert done.value.code == 0 and f"mmgen {name}" in capsys.readouterr().out


@pytest.mark.smoke
@pytest.mark.parametrize(
    "word, meant", [("smaple", "'sample'"), ("quikstart", "'quickstart'"), ("zzz", "train")]
)
def test_an_unknown_command_names_the_nearest(word, meant, capsys):
    assert mmgen(word) == 2
    assert meant in capsys.readouterr().err


def test_a_contact_sheet(draw, tmp_path, capsys):
    assert draw(out=tmp_path / "a.png") == 0
    assert str(tmp_path / "a.png") in capsys.readouterr().out
    assert pixels(tmp_path / "a.png").shape == (64, 64, 3)  # a row for each prompt, a column for each of --n
    assert draw(out=tmp_path / "b.png") == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    four = ("--prompt", "a red circle", "--prompt", "two blue stars", "--n", 2)
    assert draw(*four, "--seed", 1, "--scale", 2, out=tmp_path / "c.png") == 0
    other = pixels(tmp_path / "c.png")
    assert other.shape == (128, 128, 3) and (other[::2, ::2] != pixels(tmp_path / "a.png")).any()


def test_one_file_each_from_a_file_of_prompts(draw, tmp_path):
    """Characters that the text model never saw are spelt in bytes."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n\n  两个\ntwo blue stars \n🟥 é\n", "utf-8")
    assert draw("--prompts", prompts, out=tmp_path / "many" / "pictures") == 0
    files = sorted((tmp_path / "many" / "pictures").glob("*.png"))
    assert [file.name for file in files] == [f"0000{n}-0.png" for n in range(4)]
    assert all(pixels(file).shape == (32, 32, 3) for file in files)


def test_from_another_folder_as_a_process(space, tmp_path):
    code = "import sys, runpy; sys.argv[0] = 'mmgen'; runpy.run_module('mmgen', run_name='__main__')"
    flags = ["--checkpoint", os.path.relpath(space.transformer, tmp_path), "--prompt", "a red circle"]
    flags += ["--prompt", "two blue stars", "--n", 2, "--size", "32x32", "--out", "here.png"]
    run_python(code, "sample", *flags, cwd=tmp_path)
    assert pixels(tmp_path / "here.png").shape == (64, 64, 3)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--prompt", "x", "--n", "0"), "nothing to draw"),
        (("--prompts", "EMPTY"), "nothing to draw"),
        (("--prompts", "NOWHERE"), "NOWHERE"),
        (("--prompt", "x", "--size", "30x32"), "multiple of the patch"),
        (("--prompt", "x", "--size", "32"), "written WIDTHxHEIGHT"),
        (("--prompt", "x " * 300), "too long"),
        (("--prompt", "x", "--top-p", "0"), "top_p"),
    ],
)
def test_mistakes_in_sampling(draw, tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").write_text("\n \n")
    try:
        status = draw(*arguments, out=tmp_path / "out.png")
    except SystemExit as stop:
        status = stop.code
    assert status and words in capsys.readouterr().err
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize(
    "out, words",
    [
        ("none/out.png", "does not exist"),
        ("file/out.png", "file"),
        ("file/folder", "file"),
        ("out.exe", "image format"),
    ],
)
def test_where_nothing_can_be_written(draw, tmp_path, capsys, out, words):
    """Found before anything is loaded or drawn."""
    (tmp_path / "file").write_text("")
    assert draw(out=tmp_path / out) == 1
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "folder, words", [("nowhere", "not a workdir"), ("tokenizer", "holds a tokenizer run")]
)
def test_sampling_from_what_is_no_transformer(space, tmp_path, capsys, folder, words):
    out = tmp_path / "out.png"
    assert mmgen("sample", "--checkpoint", space.root / folder, "--prompt", "x", "--out", out) == 1
    assert words in capsys.readouterr().err and not out.exists()


def test_mistakes_in_training_and_tokenising(space, tmp_path, capsys):
    new = tmp_path / "new"
    train = ("train", "--workdir", new, "--config")
    tokenize = ("tokenize", "--documents", 3, "--text", space.text, "--source")
    text = ("text", "--source", "world:train", "--documents", 3)
    for arguments, words in (
        ((*train, "transformer:tinny"), "'tiny'"),
        ((*train, "transformer:tiny", "--config.stpes=1"), "'steps'"),
        ((*train, "transformer:tiny", "--config.data.shards=no"), "mmgen tokenize"),
        (("train", *space.tokenizer_flags, "--workdir", space.transformer), "holds a transformer run"),
        (
            (*tokenize, "world:train", "--tokenizer", space.transformer, "--out", new),
            "holds a transformer run",
        ),
        ((*tokenize, "world:train", "--tokenizer", space.tokenizer, "--out", space.shards), "--overwrite"),
        ((*tokenize, "word:train", "--tokenizer", space.tokenizer, "--out", new), "did you mean world"),
        ((*text, "--pieces", 5, "--out", new), "too few"),
    ):
        assert mmgen(*arguments) == 1
        assert words in capsys.readouterr().err
    assert not (new / "config.json").exists()


def test_quickstart_keeps_pages_before_any_library_starts_threads(tmp_path, monkeypatch):
    """Later is too late: heaps of SentencePiece's threads, which JAX's inherit, are given back at each step."""
    order = []

    def trained(*_):
        order.append("text")
        raise RuntimeError("far enough")

    monkeypatch.setattr(memory, "keep_pages", lambda: order.append("pages"))
    monkeypatch.setattr(text, "train", trained)
    with pytest.raises(RuntimeError, match="far enough"):
        mmgen("quickstart", "--config", "quickstart:tiny", "--workdir", tmp_path)
    assert order == ["pages", "text"]


def test_quickstart_end_to_end(tmp_path, capsys):
    flags = ["quickstart", "--config", "quickstart:tiny", "--workdir", tmp_path / "run"]
    assert mmgen(*flags) == 0
    said = capsys.readouterr().out
    assert str(tmp_path / "run" / "report.html") in said.splitlines()[-1] and "counting" in said
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert set(report) == {"scores", "intervals", "cases", "metrics", "seconds", "peak_rss_bytes", "config"}
    assert set(report["scores"]) == set(CATEGORIES)
    for score in report["scores"].values():
        assert score["seen"][1] == 2 and score["unseen"][1] == 1
        assert 0 <= score["seen"][0] <= 2 and 0 <= score["unseen"][0] <= 1 and 0 <= score["ceiling"] <= 1
    assert {"psnr", "ssim", "code_usage", "transformer_loss", "probe_shape"} <= set(report["metrics"])
    assert all(np.isfinite(value) for value in report["metrics"].values())
    assert {"tokenizer", "transformer", "total"} <= set(report["seconds"])
    assert report["peak_rss_bytes"] > 1e8 and report["config"]["name"] == "quickstart:tiny"
    page = (tmp_path / "run" / "report.html").read_text("utf-8")
    assert page.count("data:image/png;base64,") >= 19 and "<polyline" in page and "http" not in page
    # Run again, it trains nothing and reports the same.
    checkpoints = sorted((tmp_path / "run").rglob("checkpoints/*.json"))
    times = [path.stat().st_mtime_ns for path in checkpoints]
    assert mmgen(*flags) == 0
    assert [path.stat().st_mtime_ns for path in checkpoints] == times and len(times) >= 3
    again = json.loads((tmp_path / "run" / "report.json").read_text())
    assert again["scores"] == report["scores"] and again["metrics"].keys() == report["metrics"].keys()
