"""The training loop: a run that was stopped, even killed, ends with the bits of one that never was."""

import json
import random
import shutil
import signal
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from mmgen.data.loader import Rows
from mmgen.data.shards import Shards
from mmgen.grammar import Grammar
from mmgen.runtime import checkpoint
from mmgen.runtime.config import ConfigError
from mmgen.sampling.sampler import load
from mmgen.stages import loop, program
from tests.conftest import STEPS, arrays, assert_same_arrays, config_of, mmgen, records, run_python

# Dies while batch `sys.argv[1]` is prepared in the background: at a step of the loop that nobody chose.
KILLED = """
import os, signal, sys
from mmgen.data.loader import Images, Rows
from mmgen.__main__ import main

for loader in (Images, Rows):
    def rows_of(self, step, rows, rows_of=loader.rows_of):
        if step == int(sys.argv[1]):
            os.kill(os.getpid(), signal.SIGKILL)
        return rows_of(self, step, rows)
    loader.rows_of = rows_of
main(sys.argv[2:])
"""


# A smaller program, for what is the same of any.
SMALL = ["--config.model.cell_layers=0", "--config.loss.recolor=0.0", "--config.loss.weights.rate=0.0"]


def runs(space):
    return {"tokenizer": (space.tokenizer_flags, space.tokenizer),
            "transformer": (space.transformer_flags, space.transformer)}  # fmt: skip


def assert_same_run(a, b):
    assert records(a) == records(b)
    assert_same_arrays(arrays(a, STEPS), arrays(b, STEPS))


@pytest.mark.parametrize("stage", ["tokenizer", "transformer"])
def test_stopped_and_resumed_is_bit_identical(space, tmp_path, stage):
    flags, whole = runs(space)[stage]
    at = random.randrange(1, STEPS)
    loop.train(config_of(flags), tmp_path, stop_at=at)
    assert checkpoint.latest(tmp_path) == at
    loop.train(config_of(flags), tmp_path)
    assert_same_run(tmp_path, whole)


def test_killed_and_resumed_is_bit_identical(space, tmp_path):
    at = random.randrange(5, STEPS)
    command = ["train", *space.transformer_flags, "--workdir", tmp_path]
    killed = run_python(KILLED, at, *command, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert checkpoint.latest(tmp_path) in (None, 3, 6)
    # A kill can also leave half a line, a line from after the checkpoint, and a step without a digest.
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": STEPS, "loss": 0.0}) + '\n{"step": 9, "lo')
    (tmp_path / "checkpoints" / "6.json").unlink(missing_ok=True)
    assert mmgen(*command) == 0
    assert_same_run(tmp_path, space.transformer)


def test_damage_is_repaired_by_running_again(space, tmp_path):
    flags, whole = runs(space)["tokenizer"]
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    for step in (STEPS, 6):
        path = max(
            (tmp_path / f"checkpoints/{step}/params").rglob("*"), key=lambda p: p.is_file() * p.stat().st_size
        )
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert checkpoint.latest(tmp_path) == 3
    loop.train(config_of(flags), tmp_path)
    assert_same_run(tmp_path, whole)


def test_every_log_step_once_and_a_finished_run_stays(space, tmp_path):
    for name, (flags, workdir) in runs(space).items():
        workdir = shutil.copytree(workdir, tmp_path / name)
        steps = [line["step"] for line in records(workdir)]
        assert steps == list(range(2, STEPS + 1, 2))
        before = records(workdir), checkpoint.steps(workdir)
        last = loop.train(config_of(flags), workdir)
        assert (records(workdir), checkpoint.steps(workdir)) == before
        assert {name: last[name] for name in before[0][-1] if name != "step"} == {
            name: value for name, value in before[0][-1].items() if name != "step"
        }


@pytest.mark.smoke
def test_what_a_run_writes_down(space):
    for flags, workdir in runs(space).values():
        config = json.loads((workdir / "config.json").read_text())
        assert config == json.loads(config_of(flags).to_json())
        environment = json.loads((workdir / "environment.json").read_text())
        assert (
            environment["versions"]["jax"] == jax.__version__
            and environment["devices"]
            and environment["python"]
        )
        assert "git" in environment
        first, last = records(workdir)[0], records(workdir)[-1]
        assert last["loss"] < first["loss"]
        assert list((workdir / "tensorboard").iterdir())
    measured = records(space.tokenizer)[-1]
    assert {"psnr", "ssim", "code_usage", "code_perplexity"} <= set(measured)
    assert list((space.tokenizer / "previews").glob("*.png"))


def test_what_was_held_out_is_measured_and_changes_nothing(space, tmp_path):
    held_out = tmp_path / "shards"
    made = ["--tokenizer", space.tokenizer, "--text", space.text, "--out", held_out]
    assert mmgen("tokenize", "--source", "world:valid", "--documents", 60, *made) == 0
    flags = [*space.transformer_flags, f"--config.held_out.shards={held_out}", "--config.held_out.batches=3"]
    loop.train(config_of([*flags, "--config.evaluate_every=4"]), tmp_path / "run")
    assert_same_arrays(arrays(tmp_path / "run", STEPS), arrays(space.transformer, STEPS))
    found = {line["step"]: line for line in records(tmp_path / "run")}
    names = ["held_out_loss", "held_out_image_loss", "held_out_text_loss"]
    assert [all(name in line for name in names) for line in found.values()] == [False, True, False, True]
    # The same by the sampler, which reads each document of these rows by itself, with keys and values that it keeps.
    model, shards = load(tmp_path / "run"), Shards(held_out)
    config = config_of(flags)
    rows = Rows(shards, shards.grammar, batch_size=config.data.batch_size, row_length=config.data.row_length)
    rows.plan.drops = (0.0, 0.0)
    chosen = np.concatenate([rows.plan.row(n)[0] for n in range(3 * config.data.batch_size)])
    tokens = [t.astype(np.int32) for t in shards.records(chosen)]
    nats = np.concatenate(model.nats(tokens))
    weights = np.concatenate([shards.grammar.loss_weights(t) for t in tokens])
    code = np.concatenate(tokens) >= shards.grammar.code_start
    for name, of in (("image", code), ("text", ~code)):
        mean = (nats * weights * of).sum() / (weights * of).sum()
        assert found[STEPS][f"held_out_{name}_loss"] == pytest.approx(mean, rel=1e-4)

    manifest = json.loads((held_out / "manifest.json").read_text()) | {"tokenizer_hash": "another"}
    (held_out / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match="their tokenizer_hash"):
        loop.train(config_of(flags), tmp_path / "other")
    with pytest.raises(ConfigError, match="at least 1, not 0"):
        loop.train(config_of([*flags, "--config.held_out.batches=0"]), tmp_path / "other")


def test_other_settings_need_another_workdir(space, tmp_path):
    for change in ("optimizer.learning_rate=0.5", "seed=1", "model.width=64", f"steps={STEPS + 1}"):
        with pytest.raises(ConfigError, match=change.split("=")[0]):
            loop.train(config_of([*space.transformer_flags, change]), space.transformer)
    with pytest.raises(ConfigError, match="holds a tokenizer run"):
        loop.train(config_of(space.transformer_flags), space.tokenizer)
    workdir = shutil.copytree(space.transformer, tmp_path / "run")
    loop.train(config_of([*space.transformer_flags, "log_every=3", "keep=4"]), workdir)  # these are free


def test_a_mistake_does_not_claim_the_workdir(space, tmp_path):
    flags = [flag for flag in space.transformer_flags if "shards" not in flag]
    with pytest.raises(FileNotFoundError, match="mmgen tokenize"):
        loop.train(config_of([*flags, f"data.shards={tmp_path / 'nowhere'}"]), tmp_path)
    with pytest.raises(ValueError, match="devices"):
        config = config_of(space.transformer_flags)
        with config.unlocked():
            config.mesh = {"data": 7}
        loop.train(config, tmp_path)
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize(
    "mistake, words",
    [
        ("optimizer.name=adam", "unknown optimizer"), ("best=loss", "NAME:min"), ("keep=0", "at least 1"),
        ("log_every=0", "at least 1"), ("profile=(5,)", "first step"), ("accumulate=3", "does not divide"),
        ("model.heads=3", "multiple of kv_heads"),
    ],
)  # fmt: skip
def test_no_mistake_claims_the_workdir(space, tmp_path, mistake, words):
    flags = [*space.transformer_flags, "--config.model.kv_heads=2"]
    with pytest.raises(ValueError, match=words):
        loop.train(config_of([*flags, f"--config.{mistake}"]), tmp_path)
    assert not (tmp_path / "config.json").exists() and not (tmp_path / "vocabulary.json").exists()


def test_two_runs_do_not_share_a_workdir(space, tmp_path):
    loop.train(config_of(space.tokenizer_flags), tmp_path, stop_at=2)
    with loop._claimed(tmp_path), pytest.raises(ConfigError, match="another run"):
        loop.train(config_of(space.tokenizer_flags), tmp_path)
    loop.train(config_of(space.tokenizer_flags), tmp_path)


@pytest.mark.parametrize("failures, ends_well", [(1, True), pytest.param(9, False, marks=pytest.mark.soak)])
def test_the_last_save_is_tried_again_and_its_loss_is_not_silent(
    space, tmp_path, monkeypatch, failures, ends_well
):
    write, failed = checkpoint._write_manifest, []

    def full(folder, step, content):
        if step == STEPS and len(failed) < failures:
            failed.append(step)
            raise OSError(28, "No space left on device")
        return write(folder, step, content)

    monkeypatch.setattr(checkpoint, "_write_manifest", full)
    if ends_well:
        loop.train(config_of(space.tokenizer_flags), tmp_path)
        assert_same_arrays(arrays(tmp_path, STEPS), arrays(space.tokenizer, STEPS))
    else:
        with pytest.raises(
            checkpoint.CheckpointError, match=f"step {STEPS} could not be saved.*No space.* 6;"
        ):
            loop.train(config_of(space.tokenizer_flags), tmp_path)
        assert checkpoint.latest(tmp_path) == 6
    assert failed


def test_shards_of_another_tokenizer_need_another_workdir(space, tmp_path):
    shards = tmp_path / "shards"
    shutil.copytree(space.shards, shards)
    manifest = json.loads((shards / "manifest.json").read_text())
    (shards / "manifest.json").write_text(json.dumps(manifest | {"tokenizer_hash": "other"}))
    workdir = tmp_path / "run"
    shutil.copytree(space.transformer, workdir)
    (workdir / "config.json").unlink()
    flags = [*space.transformer_flags, f"--config.data.shards={shards}"]
    with pytest.raises(ValueError, match="other shards .*tokenizer_hash"):
        loop.train(config_of(flags), workdir)


def poison(monkeypatch, when):
    """Makes the loss not a number in steps for which `when(step, batch)`."""
    setup = loop.setup

    def poisoned(config, workdir):
        stage = setup(config, workdir)

        def loss(model, batch, key):
            sums = stage.loss(model, batch, key)
            total, weight = sums["loss"]
            return sums | {"loss": (total + jax.numpy.where(batch["poison"].any(), np.nan, 0.0), weight)}

        class Poisoned:
            def prefetch(self, start, rows):
                for step, batch, bad in stage.data.prefetch(start, rows):
                    yield step, batch | {"poison": np.full((len(rows), 1), when(step))}, bad

        return stage._replace(loss=loss, data=Poisoned())

    monkeypatch.setattr(loop, "setup", poisoned)


def test_steps_that_are_not_finite_are_left_out(space, tmp_path, monkeypatch):
    """As if they had never been: but for the step's number, the run is one that stood still meanwhile."""
    poison(monkeypatch, lambda step: step in (2, 3))
    flags = [
        *space.tokenizer_flags,
        *SMALL,
        "--config.save_every=1",
        "--config.keep=9",
        "--config.log_every=1",
    ]
    loop.train(config_of([*flags, "--config.ema=0.9"]), tmp_path)
    at = lambda step: {name: x for name, x in arrays(tmp_path, step).items() if "['step']" not in name}
    same = lambda a, b: all(
        np.array_equal(a[name], b[name]) for name in a if "skipped" not in name and "in_row" not in name
    )
    assert same(at(2), at(3)) and same(at(3), at(4)) and not same(at(4), at(5))
    lines = {line["step"]: line for line in records(tmp_path)}
    assert [lines[step]["skipped"] for step in range(1, 7)] == [0, 0, 1, 2, 2, 2]
    assert [lines[step]["skipped_in_row"] for step in range(1, 7)] == [0, 0, 1, 2, 0, 0]
    assert np.isnan(lines[3]["loss"]) and np.isfinite(lines[5]["loss"])


@pytest.mark.parametrize("limit", [pytest.param(1, marks=pytest.mark.soak), 3])
def test_too_many_in_a_row_end_the_run_with_what_is_needed_to_see_it_again(
    space, tmp_path, monkeypatch, capsys, limit
):
    poison(monkeypatch, lambda step: step >= 2)
    flags = [*space.tokenizer_flags, *SMALL, f"--config.max_skipped={limit}", "--config.log_every=100"]
    flags += ["--config.ema=0.9"]  # as above: the same program
    assert mmgen("train", *flags, "--workdir", tmp_path) == 1
    error = capsys.readouterr().err
    assert f"{limit} steps in a row" in error and "loss nan" in error and "Traceback" not in error
    done = 2 + limit
    assert checkpoint.latest(tmp_path) == done  # of good parameters: the bad steps are not in it
    assert all(np.isfinite(x).all() for x in arrays(tmp_path, done).values())
    bundle = tmp_path / "bundles" / f"{done}-0"
    assert json.loads((bundle / "measured.json").read_text())["skipped_in_row"] == limit
    config = config_of(flags)
    batch = dict(np.load(bundle / "batch.npz"))
    assert batch.pop("rows").tolist() == list(range(config.data.batch_size))
    _, expected, _ = next(
        loop.setup(config, tmp_path / "other").data.prefetch(done - 1, np.arange(config.data.batch_size))
    )
    assert batch.keys() == expected.keys() and all(
        np.array_equal(batch[name], expected[name]) for name in batch
    )
    assert mmgen("tools", "replay", "--workdir", tmp_path, "--step", done) == 0
    out = capsys.readouterr().out
    assert "nan" in out and "0.00%" in out  # the loss, and gradients of which no element is finite
    assert mmgen("tools", "replay", "--workdir", tmp_path, "--step", 1) == 1
    assert f"{done}-0" in capsys.readouterr().err


def test_spikes_of_the_gradient_are_skipped(space, tmp_path, monkeypatch):
    """Once enough norms are known to say what a spike is."""
    monkeypatch.setattr(program, "_KNOWN", 3)
    flags = [flag for flag in space.tokenizer_flags if "log_every" not in flag]
    flags += [*SMALL, "--config.log_every=1", "--config.max_skipped=99"]
    loop.train(config_of([*flags, "--config.spike=1e-3"]), tmp_path / "low", stop_at=6)
    assert [line["skipped"] for line in records(tmp_path / "low")] == [0, 0, 0, 1, 2, 3]
    loop.train(config_of([*flags, "--config.spike=1e3"]), tmp_path / "high", stop_at=6)
    assert records(tmp_path / "high")[-1]["skipped"] == 0


def test_the_moving_average_is_kept_and_sampled_from(space, tmp_path):
    from mmgen.sampling import sampler

    config = config_of([*space.transformer_flags, "--config.ema=0.9"])
    loop.train(config, tmp_path, stop_at=4)
    loop.train(config, tmp_path, stop_at=6)
    found = arrays(tmp_path, 6)
    average = {name.removeprefix("ema"): value for name, value in found.items() if name.startswith("ema")}
    params = {
        name.removeprefix("params"): value for name, value in found.items() if name.startswith("params")
    }
    assert average.keys() == params.keys()
    assert any(not np.array_equal(average[name], params[name]) for name in params)
    # The average by hand, from the parameters of every step: one run with a checkpoint each.
    steps = tmp_path / "steps"
    loop.train(
        config_of([*space.transformer_flags, "--config.save_every=1", "--config.keep=9"]), steps, stop_at=6
    )
    name = "['place']['w']"
    expected = arrays(steps, 1)[f"params{name}"]  # the warmup's first rate is 0: these are the initial values
    for step in range(1, 7):
        decay = min(0.9, step / (9 + step))
        expected = decay * expected + (1 - decay) * arrays(steps, step)[f"params{name}"]
    np.testing.assert_allclose(average[name], expected, atol=1e-5)
    loaded = sampler.load(tmp_path)
    np.testing.assert_array_equal(loaded.params["place"]["w"], average[name])
    own = average["['head']"][: loaded.grammar.code_start]  # beyond, the digits are added
    np.testing.assert_array_equal(loaded.weights["head"].T[: len(own)], own)


def test_shards_may_move_but_not_change(space, tmp_path):
    shards = tmp_path / "elsewhere"
    shutil.copytree(space.shards, shards)
    loop.train(config_of(space.transformer_flags), tmp_path / "run", stop_at=4)
    moved = [flag for flag in space.transformer_flags if "data.shards" not in flag]
    loop.train(config_of([*moved, f"--config.data.shards={shards}"]), tmp_path / "run")
    assert_same_run(tmp_path / "run", space.transformer)
    manifest = json.loads((shards / "manifest.json").read_text())
    (shards / "manifest.json").write_text(json.dumps(manifest | {"job": "another seed"}))
    with pytest.raises(ValueError, match="other shards"):
        loop.train(config_of([*moved, f"--config.data.shards={shards}"]), tmp_path / "run")


def test_settings_that_make_no_sense_claim_nothing(space, tmp_path):
    for mistake, words in (
        ("--config.data.row_length=8", "longer than a row"), ("--config.data.batch_size=0", "at least one"),
        ("--config.seed=-1", "2\\*\\*32"), ("--config.data.text_drop=2.0", "from 0 to 1"),
        ("--config.data.mixture=(('x', 1),)", "not there"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            loop.train(config_of([*space.transformer_flags, mistake]), tmp_path)
        assert not list(tmp_path.iterdir())


def test_a_batch_that_the_devices_cannot_share(space, tmp_path):
    code = "import sys; from mmgen.__main__ import main; sys.exit(main(sys.argv[1:]))"
    command = ["train", *space.transformer_flags, "--config.mesh.data=3", "--workdir", tmp_path]
    done = run_python(code, *command, devices=3, check=False)
    assert done.returncode == 1 and "multiple of 3" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "config.json").exists() and not (tmp_path / "vocabulary.json").exists()


def test_flops_utilisation_and_a_trace(space, tmp_path, monkeypatch):
    monkeypatch.setattr(loop.hardware, "peak_flops", lambda device, dtype: 1e12)
    flags = [*space.transformer_flags, "--config.profile=(3,5)"]
    loop.train(config_of(flags), tmp_path)
    config = config_of(flags)
    m, T = config.model, config.data.row_length
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    params = {name: x for name, x in arrays(tmp_path, STEPS).items() if name.startswith("params")}
    multiplied = sum(x.size for name, x in params.items() if "embedding" not in name)
    token = 6 * multiplied + 12 * m.layers * T * m.heads * m.head_dim / 2
    assert line["tflops_per_device"] == pytest.approx(token * line["tokens_per_second"] / 1e12, rel=1e-6)
    assert line["mfu"] == pytest.approx(line["tflops_per_device"], rel=1e-6)  # of a peak of one TFLOP/s
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_weights_of_another_run_and_a_vocabulary_that_has_grown(space, tmp_path, capsys):
    """More pieces and larger images: pieces, controls, sizes and codes keep what was learned of each."""
    flags = [flag for flag in space.transformer_flags if "shards" not in flag]
    text, shards, run = tmp_path / "text.model", tmp_path / "shards", tmp_path / "run"
    world = ("--source", "world:train", "--documents", 200)
    assert mmgen("text", *world, "--pieces", 400, "--out", text) == 0
    assert (
        mmgen(
            "tokenize",
            *world,
            "--tokenizer",
            space.tokenizer,
            "--text",
            text,
            "--max-side",
            72,
            "--out",
            shards,
        )
        == 0
    )
    flags += [f"--config.data.shards={shards}", f"--config.init={space.transformer}"]
    flags += [
        "--config.optimizer.warmup=5"
    ]  # whose first rate is 0: the first step leaves the weights as they came
    loop.train(config_of(flags), run, stop_at=1)
    assert "left as initialised: none" in capsys.readouterr().out
    before, after = arrays(space.transformer, STEPS), arrays(run, 1)
    old, new = (
        json.loads((folder / "vocabulary.json").read_text())["grammar"] for folder in (space.transformer, run)
    )
    a, b = Grammar.from_dict(old), Grammar.from_dict(new)
    assert b.vocab_size > a.vocab_size and b.code_start > a.code_start
    for table in ("params['embedding']", "params['head']"):
        x, y = before[table], after[table]
        for mine, theirs, count in (
            (0, 0, a.pieces), (a.pieces, b.pieces, 64), (a.h(1), b.h(1), a.max_side), (a.w(1), b.w(1), a.max_side),
            (a.code_start, b.code_start, a.codes),
        ):  # fmt: skip
            np.testing.assert_array_equal(x[mine : mine + count], y[theirs : theirs + count])
    for name in before:
        if name.startswith("params") and "['embedding']" not in name and "['head']" not in name:
            np.testing.assert_array_equal(before[name], after[name])


def test_the_best_step_stays(space, tmp_path):
    flags = [flag for flag in space.tokenizer_flags if "every" not in flag and "keep" not in flag]
    flags += ["--config.save_every=1", "--config.evaluate_every=1", "--config.log_every=1", "--config.keep=1"]
    loop.train(config_of([*flags, "--config.best=psnr:max", "--config.keep_every=4"]), tmp_path)
    psnr = {line["step"]: line["psnr"] for line in records(tmp_path)}
    assert checkpoint.steps(tmp_path) == sorted({max(psnr, key=psnr.get), 4, STEPS})
    with pytest.raises(ConfigError, match="psnr:max"):
        loop.train(config_of([*flags, "--config.best=psnr"]), tmp_path)


@pytest.mark.soak
def test_logging_to_weights_and_biases(space, tmp_path, monkeypatch):
    logged = []

    class Run:
        def log(self, scalars, step):
            logged.append((step, scalars["loss"]))

        def finish(self):
            logged.append("finished")

    def init(**options):
        logged.append((options["project"], options["id"], options["config"]["stage"]))
        return Run()

    flags = [*space.tokenizer_flags, "--config.wandb=project"]
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="pip install wandb"):
        loop.train(config_of(flags), tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    loop.train(config_of(flags), tmp_path)
    project, name, stage = logged[0]
    assert (project, stage) == ("project", "tokenizer") and logged[-1] == "finished"
    assert name.startswith(tmp_path.name + "-") and name == (tmp_path / "wandb.id").read_text()
    assert [step for step, _ in logged[1:-1]] == [2, 4, 6, 8]
