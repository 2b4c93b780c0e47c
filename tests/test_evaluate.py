"""`mmgen evaluate`: how sure scores are, comparisons, reports, captions read back, and prompt files."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
from conftest import mmgen
from PIL import Image as Pillow

from mmgen.evals import compare, prompts, report, suites, talks
from mmgen.safety import watermark
from mmgen.world import captions, say
from mmgen.world.rich import RICH, random_rich
from mmgen.world.scene import (
    CATEGORIES,
    Claim,
    Group,
    alter,
    random_item,
)

# ---- intervals and tests ------------------------------------------------------------------------------


def test_intervals_are_the_published_ones():
    """Of Newcombe 1998 (Statistics in Medicine 17, 857-872, table I): the score method without correction."""
    published = {
        (81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605), (0, 20): (0, 0.1611), (1, 29): (0.0061, 0.1718),
    }  # fmt: skip
    for counts, interval in published.items():
        assert compare.wilson(*counts) == pytest.approx(interval, abs=5e-5)
    low, high = compare.wilson(29 - 1, 29)
    assert (1 - high, 1 - low) == pytest.approx(compare.wilson(1, 29))
    assert compare.wilson(0, 0) == (0, 1) and compare.wilson(5, 5)[1] == 1


def test_differences_of_the_same_cases_are_the_published_ones():
    """The airway data of Fagerland, Lydersen and Laake 2014 (Statistics in Medicine 33, 2850-2875): 1, 1, 7, 12."""
    assert compare.mcnemar(1, 7) == compare.mcnemar(7, 1) == pytest.approx(18 / 256)
    assert compare.mcnemar(0, 0) == compare.mcnemar(3, 3) == 1
    delta, interval = compare.difference(1, 1, 7, 12)
    assert delta == pytest.approx(-6 / 21) and interval == pytest.approx((-0.507, -0.026), abs=5e-4)
    back, turned = compare.difference(1, 7, 1, 12)
    assert back == pytest.approx(-delta) and turned == pytest.approx((-interval[1], -interval[0]))
    # The method's own paper, 36, 12, 2, 0.
    assert compare.difference(36, 12, 2, 0)[1] == pytest.approx((0.0569, 0.3404), abs=5e-5)


@dataclasses.dataclass(frozen=True)
class Asked:
    prompt: str


def some_cases(marks, suite="s:k", prompts="abcdefghij"):
    """Cases that are right where the text has 1, not counted where it has -, the last of them unseen."""
    return [
        suites.Case(
            suite, n == len(marks) - 1, Asked(prompts[n]), np.full((8, 8, 3), n, np.uint8),
            ok={"1": True, "0": False, "-": None}[mark], why=f"why {n}", ceiling=True,
            measured={"flag": n > 0, "number": n},
        )
        for n, mark in enumerate(marks)
    ]  # fmt: skip


def test_models_are_compared_on_the_same_cases_alone():
    table = compare.outcomes(some_cases("1101-1"))
    assert table["s:k"]["seen"] == "1101-" and table["s:k"]["unseen"] == "1"
    seen, unseen = compare.compare(table, compare.outcomes(some_cases("00-010")))
    # Of the first four one was not counted there, the fifth not here.
    assert (seen["cases"], seen["baseline"], seen["now"]) == (3, 0, 1) and seen["p"] == 0.25
    assert (unseen["cases"], unseen["difference"]) == (1, 1)
    better, _ = compare.compare(
        compare.outcomes(some_cases("1111111")), compare.outcomes(some_cases("0000001"))
    )
    assert compare.mark(better) == "+" and compare.mark(better | {"difference": -1}) == "-" != compare.mark(
        seen
    )
    assert "+1.000" in compare.show([better])
    with pytest.raises(ValueError, match="other cases in s:k"):
        compare.compare(table, compare.outcomes(some_cases("1101-1", prompts="xbcdefghij")))
    with pytest.raises(ValueError, match="no suite s:k"):
        compare.compare(table, compare.outcomes(some_cases("1", suite="other")))
    settings = dict.fromkeys(compare.SAME, 1) | {"size": (32, 32)}
    compare.check_settings(settings | {"guidance": 3}, settings | {"size": [32, 32], "guidance": 1})
    with pytest.raises(ValueError, match="seed is 1 here and 2 in the baseline"):
        compare.check_settings(settings, settings | {"seed": 2})


def test_a_report_shows_intervals_and_what_is_wrong_first(tmp_path):
    cases = some_cases("11-01") + some_cases("0", "s:other")
    scores = suites.scores(cases)
    assert scores["s:k"] == {"seen": [2, 3], "unseen": [1, 1], "ceiling": 1.0}
    assert list(scores) == ["s", "s:k", "s:other"] and scores["s"]["unseen"] == [1, 2]
    metrics, shares = suites.measures(cases)
    assert metrics == {"s_number": 10 / 6} and shares == {"s_flag": [4, 6]}
    how = dict(title="t", scores=scores, metrics=metrics, shares=shares, seconds={}, config={}, cases=cases)
    page = report.write(
        tmp_path, **how, comparison=compare.compare(*[compare.outcomes(cases)] * 2)
    ).read_text()
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["intervals"]["scores"]["s:k"]["seen"] == pytest.approx(compare.wilson(2, 3))
    assert found["intervals"]["metrics"]["s_flag"] == pytest.approx(compare.wilson(4, 6))
    assert found["metrics"]["s_flag"] == 4 / 6 and found["cases"]["s:k"]["seen"] == "11-0"
    assert compare.read(tmp_path) == compare.read(tmp_path / "report.json") == found
    assert (
        page.index("why 3") < page.index("right: 3 of 3") and "why 2" not in page and "0.208 to 0.939" in page
    )
    assert (
        "2 of 3"
        not in report.write(tmp_path, **how, examples=2)
        .read_text()
        .partition("Config")[0]
        .partition("3 of 3")[2]
    )
    assert "[0.208 0.939] (3)" in suites.show(scores)
    with pytest.raises(ValueError, match="found no"):
        compare.read(tmp_path / "nowhere")
    (tmp_path / "report.json").write_text(json.dumps({"scores": scores, "config": {}}))
    with pytest.raises(ValueError, match="keeps no outcomes"):
        compare.read(tmp_path)


# ---- captions -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("language", ["en", "zh"])
def test_captions_are_read_back_and_wrong_ones_found(language):
    rng = np.random.default_rng(4)
    for n in range(1500):
        kind, unseen = ("scene", *CATEGORIES, *RICH)[n % 13], n % 3 == 0
        claim, scene = (
            random_rich(rng, kind, unseen) if kind in RICH else random_item(rng, kind, unseen, n % 2 == 0)
        )
        text = say(claim, language, rng, bare=True)
        assert captions.parse(text, language) == claim, text
        found = captions.judge(text, scene, language)
        assert found["complete"] and found["true"] and found["colored"] == all(g.color for g in claim.groups)
        wrong = say(alter(rng, claim, scene), language, rng, bare=True)
        assert captions.judge(wrong, scene, language) | {"true": None} == found | {
            "complete": False,
            "true": None,
        }, wrong
        if len(claim.groups) > 1 and not claim.relation:  # less is true, and not all
            less = captions.judge(say(Claim(claim.groups[:-1]), language, rng, bare=True), scene, language)
            assert less["true"] and less["understood"] and not less["complete"]


def test_what_is_no_caption():
    _, scene = random_item(np.random.default_rng(0), "two_object", False)
    for text in (
        "",
        "a circle a star",
        "two circle",
        "one circles",
        "a red",
        "a red circle and",
        "red circle",
        "a circle?",
    ):
        assert captions.parse(text) is None, text
        assert not any(captions.judge(text, scene).values())
    for text in ("一颗圆形", "一个红色圆形", "圆形", "一个圆形和", "a circle"):
        assert captions.parse(text, "zh") is None, text
    assert captions.parse("a red circle ") == Claim((Group("circle", "red"),))


# ---- prompt files -------------------------------------------------------------------------------------

GENEVAL = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {"tag": "colors", "include": [{"class": "cup", "count": 1, "color": "red"}], "prompt": "a photo of\u2028a cup"},
]  # fmt: skip
PARTI = (
    "Prompt\tCategory\tChallenge\tNote\r\n"
    'A sign that says "Stop\tArtifacts\tWriting & Symbols\t\r\n"peace"\tAbstract\tBasic\tone word\r\n'
)


def test_prompt_files_are_read(tmp_path):
    lines = "\n".join(json.dumps(line, ensure_ascii=False) for line in GENEVAL)
    (tmp_path / "a.jsonl").write_text(lines + "\n")
    assert prompts.read(tmp_path / "a.jsonl") == GENEVAL
    (tmp_path / "b.tsv").write_text("\ufeff" + PARTI, newline="")
    sign, peace = prompts.read(tmp_path / "b.tsv")
    assert sign["prompt"] == sign["Prompt"] == 'A sign that says "Stop' and sign["Note"] == ""
    assert peace["prompt"] == '"peace"' and peace["Challenge"] == "Basic" and peace["Note"] == "one word"
    (tmp_path / "c.txt").write_text("a dog\na cat\n\n")
    assert prompts.read(tmp_path / "c.txt") == [{"prompt": "a dog"}, {"prompt": "a cat"}]


@pytest.mark.parametrize(
    "name, data, words",
    [
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": \n', "line 2: expected a JSON object"),
        ("a.jsonl", b'{"prompt": "a"}\n\n{"prompt": "b"}', "line 2"),
        ("a.jsonl", b'{"prompt": "a"}\n["b"]', "line 2: expected a prompt"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": 3}', "line 2: expected a prompt that is a text"),
        ("a.jsonl", b'{"prompt": "\\ud800"}', "line 1"),
        ("a.txt", b"a\n \nb", "line 2"),
        ("a.txt", b"a\n\xff", "line 2"),
        ("a.txt", b"\n\n", "line 1"),
        ("a.tsv", b"Prompt\tNote\na\tb\nc", "line 3: expected 2 columns, found 1"),
        ("a.tsv", b"Text\tNote\na\tb", "line 1: expected the names of columns"),
        ("a.tsv", b"Prompt\tNote\n", "at least one prompt"),
        ("a.csv", b"a", "ends in .jsonl, .tsv, .txt"),
    ],
)
def test_a_bad_line_is_named(tmp_path, name, data, words):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=re.escape(words)):
        prompts.read(tmp_path / name)


def test_pictures_for_other_judges(space, tmp_path, capsys):
    """GenEval's layout; what is there is not drawn again, and what is lost is drawn as it was."""
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps(line) for line in GENEVAL))
    out = tmp_path / "out"

    def draw(*flags, file="p.jsonl", out=out):
        given = ("--checkpoint", space.transformer, "--size", "32x32", "--batch-size", 4, "--temperature", 1)
        return mmgen("evaluate", *given, "--prompts", tmp_path / file, "--out", out, *flags)

    assert draw("--n", 1) == 0 and "2 new of 2" in capsys.readouterr().out
    pictures = lambda: {
        p.relative_to(out).as_posix(): (p.read_bytes(), p.stat().st_mtime_ns) for p in out.rglob("*.png")
    }
    before = pictures()
    assert draw("--n", 2) == 0 and "2 new of 4" in capsys.readouterr().out
    after = pictures()
    assert sorted(after) == [f"0000{i}/samples/000{k}.png" for i in range(2) for k in range(2)]
    assert before.items() <= after.items() and len({data for data, _ in after.values()}) == 4
    for i, record in enumerate(GENEVAL):
        assert json.loads((out / f"0000{i}" / "metadata.jsonl").read_text()) == record
    assert np.asarray(Pillow.open(out / "00000/samples/0000.png")).shape == (32, 32, 3)
    (out / "00001/samples/0000.png").unlink()
    shutil.rmtree(out / "00000")
    assert draw("--n", 2) == 0 and "3 new of 4" in capsys.readouterr().out
    assert {name: data for name, (data, _) in pictures().items()} == {
        name: data for name, (data, _) in after.items()
    }
    for flags, words in (
        (("--seed", 9), "another seed"),
        (("--temperature", 0.5), "another options"),
        (("--n", 0), "at least one picture"),
        (("--best-of", 2, "--towers", "x"), "--best-of is for the suites world and understanding"),
        (("--baseline", "x"), "--prompts has none"),
    ):
        assert draw(*flags) == 1 and words in capsys.readouterr().err
    (out / "settings.json").unlink()
    assert draw() == 1 and "no settings.json" in capsys.readouterr().err
    (tmp_path / "long.txt").write_text("a dog\n" + "x " * 300)
    assert draw(file="long.txt", out=tmp_path / "new") == 1 and "prompt 2" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


# ---- the command --------------------------------------------------------------------------------------


def flags_of(run, suite, out):
    few = ["--seen", 2, "--unseen", 1, "--batch-size", 6, "--probe", 0, "--guidance", 1, "--documents", 8]
    return ["evaluate", "--checkpoint", run, "--suite", suite, "--out", out, *few]


def read_report(folder):
    return json.loads((folder / "report.json").read_text())


@pytest.mark.soak
def test_all_suites(space, tmp_path, capsys):
    """A model that knows nothing, asked all that there is, as nothing is known of its shards any more."""
    run, out = tmp_path / "run", tmp_path / "all"
    shutil.copytree(space.transformer, run)
    config = json.loads((run / "config.json").read_text())
    config["data"]["shards"] = str(tmp_path / "gone")
    (run / "config.json").write_text(json.dumps(config))
    assert mmgen(*flags_of(run, "all", out)) == 0
    said, found = capsys.readouterr().out, read_report(out)
    expected = {*CATEGORIES, "edit", "dialogue", "dialogue:turn 1", "dialogue:draw", "caption", "question"}
    assert expected <= set(found["scores"]) == set(found["intervals"]["scores"])
    assert set(found["cases"]) == set(found["scores"]) - {"edit", "caption", "question"}
    assert found["scores"]["dialogue"]["seen"][1] == 2 and found["scores"]["dialogue"]["unseen"][1] == 1
    assert {"edit_copied", "edit_psnr_outside", "dialogue_no_room", "caption_true"} <= set(found["metrics"])
    assert {"edit_kept", "caption_understood"} <= set(found["intervals"]["metrics"])
    assert all(word in said for word in ("counting", "dialogue:turn 1", "psnr", "suite understanding"))
    parts = {
        name: read_report(out / name) for name in ("world", "edit", "dialogue", "understanding", "tokenizer")
    }
    assert parts["edit"]["cases"].items() <= found["cases"].items()
    assert mmgen(*flags_of(run, "edit", tmp_path / "edit"), "--baseline", out) == 0


def test_all_is_what_was_trained_for(space, tmp_path, capsys):
    """Of the tiny run: prompts and their pictures, and the tokenizer."""
    out = tmp_path / "all"
    assert suites.trained_on(json.loads((space.transformer / "config.json").read_text())) == {"world"}
    assert suites.trained_on({"data": {"shards": f"{space.shards},{tmp_path}"}}) is None
    few = ("--seen", 1, "--unseen", 0, "--best-of", 2)  # the likelier of two: there are no towers
    assert mmgen(*flags_of(space.transformer, "all", out), *few) == 0
    said = capsys.readouterr().out
    assert "left out: edit, dialogue, understanding" in said and "sign" not in said  # which is of "text"
    found, drawn, images = (read_report(folder) for folder in (out, out / "world", out / "tokenizer"))
    assert set(found["scores"]) == set(CATEGORIES) and found["cases"] == drawn["cases"]
    assert set(found["metrics"]) == set(images["metrics"]) > {"psnr"} and not drawn["metrics"]
    assert found["config"]["data"]["documents"] == 8 and (out / "report.html").exists()


def test_a_baseline(space, tmp_path, capsys):
    """A model compared with itself, by an earlier report and by a run that is asked now."""
    first, run = tmp_path / "first", space.transformer
    assert mmgen(*flags_of(run, "edit", first)) == 0 and "edit_copied" in capsys.readouterr().out
    again = flags_of(run, "edit", tmp_path / "edit")
    assert mmgen(*again, "--baseline", first) == 0
    rows = read_report(tmp_path / "edit")["comparison"]
    assert sum(row["cases"] for row in rows) == 3 and all(
        row["difference"] == 0 and row["p"] == 1 for row in rows
    )
    assert "against the baseline" in capsys.readouterr().out
    assert mmgen(*again, "--baseline", run) == 0
    assert read_report(tmp_path / "edit")["comparison"] == rows
    assert read_report(tmp_path / "edit" / "baseline")["cases"] == read_report(first)["cases"]
    capsys.readouterr()
    for flags, words in (
        (("--baseline", first, "--seed", 2), "seed is 2 here and 1"),
        (("--baseline", first, "--split", "valid"), "split is 'valid' here"),
        (("--baseline", tmp_path), "found no"),
        (("--baseline", first, "--suite", "tokenizer"), "suite tokenizer has none"),
    ):
        assert mmgen(*again, *flags) == 1
        assert words in capsys.readouterr().err
    assert (
        mmgen(*flags_of(run, "world", tmp_path / "world"), "--baseline", first, "--unseen", 0, "--seen", 1)
        == 1
    )
    assert "seen is 1 here and 2" in capsys.readouterr().err


def test_users_pictures_with_a_watermark(space, tmp_path, monkeypatch, capsys):
    """What the talks are given: the tiny model's rows have no room for pictures that are large enough for one."""
    passed = []
    monkeypatch.setattr(talks, "run", lambda *_, watermark, **more: (passed.append(watermark), 1 / 0)[0])
    flags, pixels = flags_of(space.transformer, "edit", tmp_path / "edit"), np.full((64, 64, 3), 90, np.uint8)
    for more in (("--marked", "--size", "64x64"), (), ("--marked", "removed", "--size", "64x64")):
        with pytest.raises(ZeroDivisionError):
            mmgen(*flags, *more)
    marked = passed[0](pixels)
    assert passed[1] is None and watermark.detect(marked, b"evaluate")
    assert (passed[2](pixels) == watermark.remove(marked, b"evaluate")).all()
    assert mmgen(*flags, "--marked") == 1
    assert "--size of 64x64 on" in capsys.readouterr().err


def test_of_what_is_described_the_best_of_several(space, tmp_path, monkeypatch):
    asked, choose = [], talks.choose
    monkeypatch.setattr(
        talks,
        "choose",
        lambda model, requests, *how: (asked.append((requests, how)), choose(model, requests, *how))[1],
    )
    flags = flags_of(space.transformer, "understanding", tmp_path / "described")
    assert mmgen(*flags, "--best-of", 2, "--seen", 2, "--unseen", 0) == 0
    # Captions and details; questions and comparisons are answered once.
    assert [(len(requests), *how[:2]) for requests, how in asked] == [(2, 2, "drawing")] * 2
    assert read_report(tmp_path / "described")["config"]["best_of"] == 2


def test_some_suites_of_the_world_in_eight_bits(space, tmp_path, capsys):
    flags = flags_of(space.transformer, "world", tmp_path / "some")
    some = ("--category", "counting,mixed_counting")
    assert mmgen(*flags, *some, "--int8", "--int8-cache", "--probe", 4) == 0
    found = read_report(tmp_path / "some")
    assert list(found["scores"]) == ["counting", "mixed_counting"] and found["config"]["int8"] is True
    assert not [name for name in found["metrics"] if name.startswith("probe")]
    capsys.readouterr()
    for more, words in (
        (("--category", "counting,poetry"), "single_object"), ((*some, "--suite", "edit"), "is for suite world"),
        (("--marked",), "in which pictures are shown, not for world"),
        (("--suite", "tokenizer", "--int8"), "for transformers, not for suite tokenizer"),
        (("--category", "counting,scene", "--baseline", tmp_path / "some"), "has no suite scene"),
    ):  # fmt: skip
        assert mmgen(*flags, *more) == 1
        assert words in capsys.readouterr().err
