"""Refusals of the model itself: the documents they are learned from, and the bias that decides."""

import pytest

from mmgen.commands import chat
from mmgen.data.sources import open_source
from mmgen.document import Document, Refusal, Text, Turn, caption_to_image
from mmgen.evals import talks
from mmgen.sampling import sampler as samplers
from mmgen.sampling.dialogue import Dialogue
from mmgen.sampling.sampler import Request
from mmgen.stages import transformer as stage
from mmgen.world import language as words
from mmgen.world import tasks
from tests.conftest import config_of, mmgen

# ---- layer 3: the model ------------------------------------------------------------------------------------


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_world_refuses_what_stands_in_for_harm_and_draws_what_is_like_it(language, policy):
    refused, drawn = [], []
    for i in range(200):
        (turn,) = tasks.talk(0, "train", i, "refusal", language, size=(64, 64)).turns
        assert (turn.kind.endswith("_refused")) == isinstance(turn.says[0], Refusal)
        (refused if isinstance(turn.says[0], Refusal) else drawn).append(turn)
    assert 60 < len(refused) < 140
    named = {each["token"]: name for name, each in policy.categories.items()}
    assert (
        {named[turn.says[0].category] for turn in refused}
        == set(words.REFUSED)
        == {"artist", "minor_figure", "symbol"}
    )
    assert all(len(turn.says) == 2 and turn.says[1] for turn in refused)
    symbols = ("zorn", "vark", "佐恩", "瓦克")
    assert not any(symbol in turn.asks[0] for turn in drawn for symbol in symbols)
    stars = next(turn for turn in refused if turn.kind == "minor_figure_refused")
    assert any(name in stars.asks[0] for name in words._STARS[language])


def test_documents_of_refusals_are_written_and_read(space):
    source = open_source("world:train/refusal", size=(32, 32), seed=0, documents=20)
    sampler = samplers.load(space.transformer)
    for document in map(source.__getitem__, range(20)):
        tokens = sampler.grammar.encode(sampler.encoded(document), sampler.text)
        back = sampler.grammar.decode(tokens, sampler.text)
        assert [type(p) for turn in back.turns for p in turn.parts] == [
            type(p) for turn in document.turns for p in turn.parts
        ]


def test_a_run_knows_that_it_has_learned_refusals_whichever_folder_has_them(space, tmp_path):
    folder = tmp_path / "refusals"
    source = ["--source", "world:train/refusal", "--size", "32x32", "--documents", 8, "--max-side", 16]
    made = ["--tokenizer", space.tokenizer, "--text", space.text, "--out", folder]
    assert mmgen("tokenize", *source, *made) == 0
    plain = ["--source", "world:train", "--size", "32x32", "--documents", 8, "--max-side", 16]
    assert mmgen("tokenize", *plain, *made[:-1], tmp_path / "plain") == 0
    for shards, expected in ((f"{tmp_path / 'plain'},{folder}", True), (f"{tmp_path / 'plain'}", False)):
        config = config_of(["--config", "transformer:tiny", f"--config.data.shards={shards}"])
        config.data.row_length = 512
        assert stage.setup(config, tmp_path / str(expected)).identity["refusals"] is expected


@pytest.mark.parametrize("output", ["image", "text", "any"])
def test_a_bias_decides_whether_a_model_may_refuse(space, output):
    sampler = samplers.load(space.transformer)
    ask = lambda seed, bias: Request(
        caption_to_image("a red circle"), output=output, size=(8, 8), seed=seed, refusals=bias, max_tokens=80
    )
    biases = [1e4, -1e4, None, 1e4]
    turns = sampler.generate([ask(seed, bias) for seed, bias in enumerate(biases)], batch_size=4)
    refused = [bool(turn.parts) and isinstance(turn.parts[0], Refusal) for turn in turns]
    assert refused == [True, False, False, True]
    assert all(isinstance(part, Text) for part in turns[0].parts[1:])
    # Beside one that may refuse, the others are as they would be alone.
    alone = sampler.generate([ask(2, None)] + [ask(9, None)] * 3, batch_size=4)[0]
    assert alone == turns[2]
    with pytest.raises(ValueError, match="refusals"):
        ask(0, float("nan"))


def test_the_refusal_suite_counts_what_is_refused_and_what_is_not(space):
    sampler = samplers.load(space.transformer)
    for bias, right in ((-1e4, "_drawn"), (1e4, "_refused")):  # a model that draws all, or nothing
        cases = talks.run(
            sampler, "refusal", seen=12, unseen=0, size=(32, 32), seed=0, batch_size=4, refusals=bias
        )
        assert all(case.ok == case.suite.endswith(right) and case.ceiling for case in cases)
        assert {case.ok for case in cases} == {True, False}


def test_a_saved_dialogue_keeps_its_refusals(space, tmp_path):
    sampler = samplers.load(space.transformer)
    document = Document([Turn("user", [Text("draw it")]), Turn("assistant", [Refusal(4), Text("no")])])
    chat.write_dialogue(tmp_path / "d.json", Dialogue(sampler, document, seed=3))
    assert chat.read_dialogue(tmp_path / "d.json", sampler) == (document, 3)
