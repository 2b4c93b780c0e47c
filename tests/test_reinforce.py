"""GRPO: probabilities of what was drawn, the loss by hand, and runs that learn and resume exactly."""

import itertools
import signal
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from mmgen import world
from mmgen.document import Document, Image, Text, Turn
from mmgen.runtime import checkpoint
from mmgen.runtime.config import ConfigError
from mmgen.sampling import sampler as samplers
from mmgen.sampling.sampler import Request
from mmgen.sampling.strategies import Strategy
from mmgen.stages import loop, policy, reinforce
from mmgen.world import captions, tasks, wishes
from mmgen.world.render import render
from mmgen.world.scene import BACKGROUNDS
from tests.conftest import arrays, assert_same_arrays, config_of, mmgen, records, run_python
from tests.test_policy import WORDS

STEPS = 6

# Dies when the prompts of step `sys.argv[1]` are asked for.
KILLED = """
import os, signal, sys
from mmgen.__main__ import main
from mmgen.stages.reinforce import Prompts

def rows_of(self, step, rows, rows_of=Prompts.rows_of):
    if self.split == "train" and step == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    return rows_of(self, step, rows)
Prompts.rows_of = rows_of
main(sys.argv[2:])
"""


def bright(pixels, item):
    """A reward that every picture has some of."""
    return float(pixels.mean()) / 255


def short(text, item):
    """A reward of few letters."""
    return -len(text) / 10


nameless = lambda pixels, item: 0.0  # noqa: E731  no other process finds it by its name


def flags_of(space, *more):
    return [
        "--config", "reinforce:tiny", f"--config.init={space.transformer}", f"--config.steps={STEPS}",
        "--config.updates=2", "--config.rewards=(('tests.test_reinforce:bright',1.0),('legible',0.1))", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def run(space, tmp_path_factory):
    """A run of STEPS steps, never stopped."""
    workdir = tmp_path_factory.mktemp("reinforce") / "run"
    assert mmgen("train", *flags_of(space), "--workdir", workdir) == 0
    return workdir


def test_rewards_of_the_world():
    item = world.item(3, "test", 0, category="counting")
    picture, other = (
        render(each.scene, 32, 32) for each in (item, world.item(3, "test", 1, category="counting"))
    )
    judge, legible = (reinforce.reward(name) for name in ("judge", "legible"))
    noise = np.random.default_rng(0).integers(0, 256, picture.shape, dtype=np.uint8)
    assert [judge(x, item) for x in (picture, other, noise)] == [1, 0, 0]
    assert [legible(x, item) for x in (picture, other, noise)] == [1, 1, 0]


def test_rewards_of_wishes():
    """What is right is worth 1; what was shown, and the answer to another wish, nothing. (Of little people in pixels the judge reads
    a few wrongly.)"""
    size = 64, 64
    shown = lambda scene: tasks.picture(scene, *size)
    for category in ("draw", "edit", "style", "mix", "sign"):
        found = [wishes.wish(3, "valid", i, category, "en", size) for i in range(8)]
        found = [each for each in found if each is not None]
        assert len(found) == 8 or category == "sign" and 0 < len(found) < 8
        assert sum(reinforce.reward("judge")(shown(item.scene), item) for item in found) >= len(found) - 1
        for item, other in itertools.pairwise(found):
            judge = reinforce.reward("judge")
            assert item.category == category
            assert judge(shown(other.scene), item) == 0
            turns = wishes.document(item, size).turns
            images = [part for part in turns[0].parts if isinstance(part, Image)]
            assert len(images) == {"edit": 1, "style": 1, "mix": 2}.get(category, len(images))
            assert Document(turns).text() == item.prompt
            assert not any(judge(image.pixels, item) for image in images)
    assert wishes.wish(3, "valid", 0, "counting", "zh", size) == world.item(3, "valid", 0, "counting", "zh")


def test_edits_are_drawn_from_what_was_shown(sampler):
    """The prompt has the codes of the user's picture, once for a group, and is as long as was counted for the room."""
    data = config_of([
        "--config", "reinforce:tiny", "--config.data.categories=('edit','position')", "--config.data.longest=170",
    ]).data  # fmt: skip
    prompts = reinforce.Prompts(data, 5, "train", sampler.text, 103, 64, 2)
    items = prompts.rows_of(0, range(4))[0]["items"]
    assert [item.category for item in items] == ["edit"] * 2 + ["position"] * 2
    drawn, pixels = reinforce._draw(sampler, items, range(4), (8, 8), data)
    batch, at = policy.rows(drawn, sampler.grammar, 64, data.longest)
    for row, (item, (prompt, answer)) in enumerate(zip(items, drawn)):
        assert len(prompt) == prompts._length(item) and at[row, 0] == len(prompt) + 3
        assert ((prompt >= sampler.grammar.code_start).sum() == 64) == (item.category == "edit")
    back = sampler.grammar.decode(np.concatenate([*drawn[0], [sampler.grammar.eos]]), sampler.text)
    source = tasks.picture(items[0].turn.before, 32, 32)
    np.testing.assert_array_equal(back.turns[0].parts[0].codes, sampler.tokenizer.encode(source[None])[0])
    assert (batch["weights"].sum(1) == 64).all() and pixels[0].shape == (32, 32, 3)
    with pytest.raises(ConfigError, match="config.data.longest"):
        reinforce.Prompts(data, 5, "train", sampler.text, 72, 64, 2).rows_of(0, range(2))


def test_rewards_of_words():
    """The world's own words are worth 1, and others that are as true and say as much; less, or another's, nothing."""
    judge = reinforce.reward("judge")
    for category, language in itertools.product(wishes.TOLD, ("en", "zh")):
        found = [wishes.wish(3, "valid", i, category, language, (64, 64)) for i in range(20)]
        assert all(judge(item.turn.says[0], item) == 1 for item in found)
        wrong = [judge(other.turn.says[0], item) for item, other in itertools.pairwise(found)]
        assert sum(wrong) <= (len(wrong) - 1 if category in ("question", "compare") else 1)
    rng, less, instead = np.random.default_rng(0), Counter(), 0
    for item in (wishes.wish(3, "valid", i, "caption", "en", (64, 64)) for i in range(60)):
        claim, right = item.claim, captions.parse(item.turn.says[0])
        without = lambda **left: replace(claim, groups=tuple(replace(group, **left) for group in claim.groups))
        shorter = {
            "color": without(color=None), "size": without(size=None), "pattern": without(pattern=None),
            "relation": replace(claim, relation=None), "background": replace(claim, background=None),
            "style": replace(claim, style=None),
        }  # fmt: skip
        for kind, told in shorter.items():
            text = world.say(told, "en", rng, bare=True)
            if captions.parse(text) != right:
                less[kind] += 1
                assert not judge(text, item), (kind, item.prompt, told)
                # Something else instead, that is as true.
                ground = item.scene.background if item.scene.background in BACKGROUNDS else None
                if kind == "size" and not right.background and ground:
                    assert judge(world.say(replace(told, background=ground), "en", rng, bare=True), item)
                    instead += 1
    assert instead > 5
    assert len(less) == 6


@pytest.mark.parametrize(
    "more", [["loss.kl=0.0", "accumulate=4"], ["loss.kl=0.01", "updates=2", "accumulate=2", "data.keep_mode=True"]]
)
def test_a_run_learns_what_to_say(space, tmp_path, more):
    """Words of fewer letters are worth more: the run's become shorter; with a penalty and more updates too."""
    flags = [
        *WORDS, f"--config.init={space.transformer}", "--config.steps=6", "--config.data.batch_size=16", "--config.data.group=8",
        "--config.rewards=(('tests.test_reinforce:short',1.0),)", "--config.held_out.prompts=4",
        "--config.optimizer.learning_rate=0.02", *(f"--config.{each}" for each in more),
    ]  # fmt: skip
    loop.train(config_of(flags), tmp_path)
    found = records(tmp_path)
    rewards = [line["reward"] for line in found]
    assert np.mean(rewards[-2:]) > np.mean(rewards[:2]) and "held_out_reward" in found[-1]
    assert {"entropy", "flat"} <= found[-1].keys()
    if "updates=2" in more:
        assert found[-1]["kl"] > found[0]["kl"] >= 0 and found[-1]["clipped"] > 0


# ---- runs


def test_prompts_are_a_function_of_the_step_and_fit(sampler):
    data = config_of(["--config", "reinforce:tiny", "--config.data.categories=('counting','position')"]).data
    prompts = lambda room: reinforce.Prompts(data, 5, "train", sampler.text, room, 64, 2)
    everything, replaced = prompts(100).rows_of(7, range(4))
    kinds = [item.category for item in everything["items"]]
    assert kinds == ["counting"] * 2 + ["position"] * 2 and not replaced
    assert everything["items"][0] is everything["items"][1]  # a group has one prompt
    step, part, _ = next(prompts(100).prefetch(7, np.array([2, 3])))
    assert step == 7 and part["items"] == everything["items"][2:]
    lengths = [len(sampler.text.encode(item.prompt)) for item in everything["items"]]
    most = max(lengths) - 1
    short, replaced = prompts(4 + most).rows_of(7, range(4))
    assert replaced and all(len(sampler.text.encode(item.prompt)) <= most for item in short["items"])
    with pytest.raises(ConfigError, match="parts of groups"):
        next(prompts(100).prefetch(0, np.array([0, 1, 2])))
    with pytest.raises(ConfigError, match="config.data.longest"):
        prompts(4).rows_of(0, range(4))


def test_killed_and_resumed_is_bit_identical(space, run, tmp_path):
    """And rewarded by other processes, which end with the one that is killed."""
    apart = "--config.data.workers=2"
    command = ["train", *flags_of(space, apart), "--workdir", tmp_path]
    killed = run_python(KILLED, 5, *command, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert checkpoint.latest(tmp_path) in (2, 4)  # the last may not be whole yet
    assert (
        mmgen(
            "train", *flags_of(space)[:2], *flags_of(space, "--config.init=/gone", apart)[3:], "--workdir", tmp_path
        )
        == 0
    )
    assert records(tmp_path) == records(run)
    assert_same_arrays(arrays(tmp_path, STEPS), arrays(run, STEPS))


def test_what_a_run_leaves_is_opened_as_a_transformer_run(space, run, tmp_path):
    found = records(run)
    first, last = found[0], found[-1]
    assert {
        "reward",
        "reward_legible",
        "reward_tests.test_reinforce:bright",
        "flat",
        "entropy",
        "clipped",
    } <= set(last)
    assert first["kl"] < last["kl"] and "held_out_reward" in last
    before, after = arrays(space.transformer, 8), arrays(run, STEPS)
    assert any(not np.array_equal(before[name], after[name]) for name in before if name.startswith("params"))
    moved = run.rename(tmp_path / "moved")
    try:
        request = Request(
            Document((Turn("user", (Text("a red circle"),)),)), size=(8, 8), image=Strategy(0.5)
        )
        ours = samplers.load(moved)
        assert ours.step == STEPS and ours.generate([request])[0].parts[0].pixels.shape == (32, 32, 3)
        picture = tmp_path / "picture.png"
        assert (
            mmgen(
                "sample",
                "--checkpoint",
                moved,
                "--prompt",
                "a red circle",
                "--size",
                "32x32",
                "--out",
                picture,
            )
            == 0
        )
        assert picture.exists()
    finally:
        moved.rename(run)


def test_rewards_rise(space, tmp_path):
    flags = flags_of(space, "--config.data.batch_size=16", "--config.data.group=8", "--config.updates=1")
    flags += [
        "--config.rewards=(('tests.test_reinforce:bright',1.0),)",
        "--config.held_out.prompts=0",
        "--config.steps=8",
    ]
    flags += ["--config.optimizer.learning_rate=0.03", "--config.loss.kl=0.0", "--config.loss.normalise=True"]
    loop.train(config_of(flags), tmp_path)
    rewards = [line["reward"] for line in records(tmp_path)]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.05
    assert not (tmp_path / reinforce.REFERENCE).exists() and "kl" not in records(tmp_path)[-1]


@pytest.mark.soak
@pytest.mark.parametrize(
    "mesh", [["mesh.data=4"], ["mesh.data=1", "mesh.fsdp=2", "mesh.tensor=2", "sharding.kv_heads="]]
)
def test_four_devices_learn_what_one_does(space, tmp_path, mesh):
    code = "import sys; from mmgen.__main__ import main; sys.exit(main(sys.argv[1:]))"
    more = ["--config.data.batch_size=8", "--config.data.slots=8"]
    flags = flags_of(space, *more, *(f"--config.{setting}" for setting in mesh))
    run_python(code, "train", *flags, "--workdir", tmp_path / "four", devices=4)
    loop.train(config_of(flags_of(space, *more)), tmp_path / "one")
    for ours, alone in zip(records(tmp_path / "four"), records(tmp_path / "one"), strict=True):
        assert ours.keys() == alone.keys()
        for name in ("reward", "entropy", "kl", "grad_norm"):
            assert ours[name] == pytest.approx(alone[name], rel=1e-3, abs=1e-6)


@pytest.mark.parametrize(
    "mistake, words",
    [
        ("init=", "--config.init=DIR"), ("data.group=3", "divides"), ("data.group=1", "at least 2"),
        ("updates=3", "must divide"), ("data.size=(30,32)", "multiples of"), ("data.longest=60", "must hold"),
        ("data.categories=('style',)", "style needs a short side of 48"), ("data.temperature=0.0", "at least 0.001"), ("data.keep_mode=true --config.data.temperature=0.05", "at least 0.1"), ("loss.clip=(0.2,)", "clip"), ("data.categories=('count',)", "counting"), ("data.categories=('caption','edit')", "learns from one of both"), ("data.words=1", "at least 2"), ("data.categories=('caption',) --config.data.longest=110", "words=48 about it: 123"),
        ("data.categories=('caption',) --config.data.longest=140", "legible is of pictures"),
        ("data.languages=('fr',)", "language"), ("rewards=('judge',)", "NAME, WEIGHT"), ("rewards=(('jugde',1),)", "'judge'"),
        ("data.workers=1 --config.rewards=(('tests.test_reinforce:nameless',1.0),)", "other processes"), ("data.workers=-1", "at least 0"),
        ("rewards=(('nowhere:judge',1),)", "imported"), ("model.width=64", "config.model"),
    ],
)  # fmt: skip
def test_mistakes_are_named(space, tmp_path, mistake, words):
    with pytest.raises(ValueError if "model" not in mistake else checkpoint.CheckpointError, match=words):
        loop.train(config_of(flags_of(space, *f"--config.{mistake}".split(" "))), tmp_path)


def test_only_a_transformer_run_can_be_begun_with(space, tmp_path):
    with pytest.raises(checkpoint.CheckpointError, match="expected a transformer or a reinforce run"):
        loop.train(config_of(flags_of(space, f"--config.init={space.tokenizer}")), tmp_path)
