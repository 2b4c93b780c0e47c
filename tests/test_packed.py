"""Packed weights: small, near what they were, and taken by whatever takes a workdir."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import mmgen
from safetensors.numpy import load_file

from mmgen.models.autoencoders import load_tokenizer
from mmgen.runtime import checkpoint, packed
from mmgen.runtime.checkpoint import CheckpointError
from mmgen.runtime.released import model_folder


@pytest.mark.parametrize("kind, error", [("int8", 1 / 127), ("bfloat16", 2**-7), ("float32", 0)])
def test_weights_come_back_within_what_their_kind_can_tell(kind, error, tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "a/w": rng.normal(size=(37, 61)).astype(np.float32) * 0.02,  # no multiple of a group
        "a/b": rng.normal(size=8).astype(np.float32),  # small: kept as it is
        "zero": np.zeros((40, 40), np.float32),
        "tiny": np.full((40, 40), 1e-12, np.float32),
        "scale": np.float32(4.5) * np.ones((), np.float32),  # of towers
    }
    back = packed.write(tmp_path / packed.NAME, arrays, kind, 7)
    shapes, step = packed.names(tmp_path / packed.NAME)
    assert step == 7 and {name: a.shape for name, a in shapes.items()} == {
        n: a.shape for n, a in arrays.items()
    }
    np.testing.assert_array_equal(back["a/b"], arrays["a/b"])
    assert back["scale"] == 4.5
    np.testing.assert_array_equal(back["zero"], arrays["zero"])
    np.testing.assert_allclose(back["tiny"], arrays["tiny"], atol=1e-8)
    groups = np.pad(arrays["a/w"].ravel(), (0, -arrays["a/w"].size % 64)).reshape(-1, 64)
    most = np.repeat(np.abs(groups).max(1), 64)[: arrays["a/w"].size].reshape(37, 61)
    assert (np.abs(back["a/w"] - arrays["a/w"]) <= 0.51 * error * most + 1e-9).all()
    if kind == "int8":
        assert (tmp_path / packed.NAME).stat().st_size < 0.3 * sum(a.nbytes for a in arrays.values())


def test_small_changes_of_rounded_weights_are_kept_on_average(tmp_path):
    """Weights that are packed lie on their grid: rounded to the nearest, a fifth of a step is lost in every one of them."""
    rng, file = np.random.default_rng(0), tmp_path / packed.NAME
    write = lambda array, *how: packed.write(file, {"w": array}, "int8", 0, None, *how)["w"]
    base = write(rng.normal(size=(256, 64)).astype(np.float32))
    step = np.abs(base).max(1, keepdims=True) / 127
    change = 0.2 * step * (np.abs(base) < 0.9 * step * 127)  # whose largest, which make the grid, stay
    np.testing.assert_array_equal(write(base + change), base)
    found = write(base + change, np.random.default_rng(1))
    moved = (found - base) / step
    assert set(moved.round(3).ravel()) == {0.0, 1.0} and not moved[change == 0].round(3).any()
    assert moved[change > 0].mean() == pytest.approx(0.2, abs=0.02)
    np.testing.assert_array_equal(write(base + change, np.random.default_rng(1)), found)
    np.testing.assert_array_equal(write(base, np.random.default_rng(1)), base)
    np.testing.assert_array_equal(write(0 * base, np.random.default_rng(1)), 0)
    # Where the scales change too: on average right, and packed again the same.
    odd = rng.normal(size=(256, 64)).astype(np.float32)
    once = write(odd, np.random.default_rng(2))
    assert abs(((once - odd) / step).mean()) < 0.01 and (np.abs(once - odd) <= 1.01 * np.abs(odd).max(1, keepdims=True) / 127).all()
    np.testing.assert_array_equal(write(once, np.random.default_rng(3)), once)


def test_an_unknown_kind_is_refused(tmp_path):
    with pytest.raises(ValueError, match="int8, bfloat16, float32; found 'int4'"):
        packed.write(tmp_path / packed.NAME, {}, "int4", 0)


@pytest.fixture(scope="module")
def folder(space, tmp_path_factory):
    out = tmp_path_factory.mktemp("packed") / "model"
    assert mmgen("tools", "pack", "--checkpoint", space.transformer, "--out", out) == 0
    return out


def test_a_packed_model_draws_as_the_one_it_was_made_of(space, folder, tmp_path):
    for name, source in (("a", space.transformer), ("b", folder)):
        flags = ("--prompt", "a red circle", "--size", "16x16", "--out", tmp_path / name, "--no-provenance")
        assert mmgen("sample", "--checkpoint", source, *flags) == 0
    whole, _ = checkpoint.weights(space.transformer)
    small, step = checkpoint.weights(folder)
    assert step == checkpoint.latest(space.transformer)
    assert str(space.root) not in (folder / "config.json").read_text()  # nothing of the machine that trained
    for name, array in whole.items():
        assert np.abs(array - small[name]).max() <= np.abs(array).max() / 127, name


def test_a_packed_tokenizer_gives_the_same_codes(space, folder):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3), np.uint8)
    was, now = (load_tokenizer(path / "tokenizer") for path in (space.transformer, folder))
    assert was.hash != now.hash and (was.encode(pixels) == now.encode(pixels)).all()


def test_a_training_begins_with_packed_weights(space, folder, tmp_path, capsys):
    flags = [*space.transformer_flags, "--config.steps=1", f"--config.init={folder}"]
    assert mmgen("train", *flags, "--workdir", tmp_path / "run") == 0
    assert "left as initialised: none" in capsys.readouterr().out


def test_what_runs_have_learned_since_is_added(space, folder, tmp_path, capsys):
    pack = lambda *flags: mmgen("tools", "pack", "--checkpoint", space.transformer, "--kind", "float32", *flags)
    for n in (1, 2):
        flags = [*space.transformer_flags, "--config.steps=3", f"--config.seed={n}", "--config.optimizer.warmup=0"]
        assert mmgen("train", *flags, f"--config.init={space.transformer}", "--workdir", tmp_path / f"run{n}") == 0
    one, two = tmp_path / "run1", tmp_path / "run2"
    assert pack("--add", one, "--add", f"{two}=0.5", "--out", tmp_path / "both") == 0
    base, a, b, both = (
        checkpoint.weights(each)[0] for each in (space.transformer, one, two, tmp_path / "both")
    )
    assert any(np.abs(a[name] - b[name]).max() > 1e-3 for name in base)
    for name, array in both.items():
        np.testing.assert_allclose(array, 0.5 * (base[name] + b[name]) + a[name] - base[name], atol=1e-5)
    for wrong, message in (
        (folder, "mean other things"), (f"{one}=half", "expected DIR or DIR=WEIGHT"), (space.tokenizer, "transformer")
    ):  # fmt: skip
        capsys.readouterr()
        assert pack("--add", wrong, "--out", tmp_path / "wrong") != 0
        assert message in capsys.readouterr().err
    assert not (tmp_path / "wrong").exists()
    # Added to what was packed before it is rounded at random, and else to the nearest.
    packed.pack(space.transformer, tmp_path / "base", "int8")
    wide = "blocks/mlp/wi/w"
    add = lambda source, kind, out: packed.pack(source, tmp_path / out, kind, more=((one, 1.0), (two, 0.5)))
    for source, most in ((space.transformer, 0.51), (tmp_path / "base", 1.01)):
        whole, small, again = (add(source, kind, f"{most}{n}") for n, kind in enumerate(("float32", "int8", "int8")))
        for name, array in whole.items():
            np.testing.assert_array_equal(small[name], again[name])
        steps = np.abs(whole[wide]).reshape(-1, 64).max(1, keepdims=True) / 127
        error = (small[wide] - whole[wide]).reshape(-1, 64) / steps
        assert most - 0.15 < np.abs(error).max() <= most and abs(error.mean()) < 0.02
    with pytest.raises(ValueError, match="did not begin with"):
        packed.pack(space.transformer, tmp_path / "wrong", "float32", more=[(space.tokenizer, 1.0)])


def test_packed_folders_are_exported_and_tokenise(space, folder, tmp_path):
    assert checkpoint.export(folder, tmp_path / "copy") == checkpoint.latest(space.transformer)
    for name, array in checkpoint.weights(folder)[0].items():
        np.testing.assert_array_equal(array, checkpoint.weights(tmp_path / "copy")[0][name])
    with pytest.raises(CheckpointError, match="another folder"):
        checkpoint.export(folder, folder)
    source = ("--source", "world:train", "--size", "32x32", "--documents", "4", "--max-side", "16")
    made = ("--tokenizer", folder / "tokenizer", "--text", folder / "text.model", "--out", tmp_path / "shards")
    assert mmgen("tokenize", *source, *made) == 0


def test_weights_that_do_not_fit_their_config_are_an_error(folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    arrays, _ = checkpoint.weights(folder)
    arrays["head"] = arrays["head"][:-1]
    packed.write(other / packed.NAME, arrays, "float32", 1)
    for name in ("config.json", "vocabulary.json", "text.model"):
        (other / name).write_bytes((folder / name).read_bytes())
    packed.pack(folder / "tokenizer", other / "tokenizer", "float32")
    from mmgen.sampling import sampler

    with pytest.raises(
        CheckpointError, match="does not fit the model of this config: expected head of shape"
    ):
        sampler.load(other)


def test_a_folder_that_exists_is_left_alone(space, folder, capsys):
    before = json.loads((folder / "vocabulary.json").read_text())
    assert mmgen("tools", "pack", "--checkpoint", space.transformer, "--out", folder) != 0
    assert "exists already" in capsys.readouterr().err
    assert json.loads((folder / "vocabulary.json").read_text()) == before


def test_the_released_model_packed_again_is_the_same(tmp_path):
    """By its name, with all that lies beside it: what 8 bits have lost is lost once."""
    out = tmp_path / "again"
    assert mmgen("tools", "pack", "--checkpoint", "reference", "--out", out) == 0
    released = Path(model_folder("reference"))
    files = lambda folder: {each.relative_to(folder) for each in folder.rglob("*") if each.is_file()}
    assert files(out) == files(released)
    ours, theirs = (load_file(folder / "weights.safetensors") for folder in (out, released))
    assert ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)
