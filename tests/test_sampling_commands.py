"""`mmgen sample`, `mmgen chat` and `mmgen tools score` as their users meet them."""

import io
import json

import numpy as np
import pytest
from PIL import Image as Pillow

from mmgen.commands import chat
from mmgen.commands import sample as command
from mmgen.document import Document, Image, Text, Turn
from mmgen.sampling.best import best_of
from mmgen.sampling.dialogue import Dialogue
from mmgen.sampling.sampler import Request, Sampler, draw_seed
from mmgen.sampling.strategies import Strategy
from tests.conftest import mmgen


@pytest.fixture
def sample(space):
    """Always in slots of four, so that one program is compiled."""

    def sample(*arguments):
        return mmgen(
            "sample", "--checkpoint", space.transformer, "--batch-size", 4, "--no-provenance", *arguments
        )

    return sample


@pytest.fixture
def lines(tmp_path):
    """A file of prompts, three of them, four answers."""
    path = tmp_path / "prompts.jsonl"
    given = [
        {"prompt": "a red circle", "n": 2},
        {"prompt": "two stars", "seed": 5, "guidance": 2},
        {"prompt": "x", "size": "32x32"},
    ]
    path.write_text("\n".join(map(json.dumps, given)) + "\n\n")
    return path


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_what_is_beside_a_picture_draws_it_again(sample, lines, tmp_path):
    assert sample("--prompts", lines, "--size", "32x32", "--out", tmp_path / "all") == 0
    found = contents(tmp_path / "all")
    names = ["00000-0", "00000-1", "00001-0", "00002-0"]
    assert found.keys() == {f"{name}.{kind}" for name in names for kind in ("png", "json")}
    assert len({found[f"{name}.png"] for name in names}) == 4
    for name in ("00000-1", "00001-0"):
        note = json.loads(found[f"{name}.json"])
        assert note["answer"][0]["image"] == f"{name}.png" and np.shape(note["answer"][0]["codes"]) == (8, 8)
        again = tmp_path / name
        assert sample("--prompts", tmp_path / "all" / f"{name}.json", "--out", again, "--seed", 99) == 0
        (picture,) = again.glob("*.png")
        assert picture.read_bytes() == found[f"{name}.png"]
    # A sheet says the same, and is read back as well.
    assert sample("--prompts", lines, "--size", "32x32", "--out", tmp_path / "sheet.png") == 0
    assert sample("--prompts", tmp_path / "sheet.json", "--out", tmp_path / "four") == 0
    assert {p.read_bytes() for p in (tmp_path / "four").glob("*.png")} == {found[f"{n}.png"] for n in names}
    assert Pillow.open(tmp_path / "sheet.png").size == (64, 96)  # a row a line, as wide as the longest


def test_a_folder_is_gone_on_with(sample, lines, tmp_path, monkeypatch, capsys):
    flags = ("--prompts", lines, "--size", "32x32", "--out")
    assert sample(*flags, tmp_path / "whole") == 0
    whole = contents(tmp_path / "whole")
    written, write = [], command.write_answer

    def stopped(path, *rest):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path.name)
        write(path, *rest)

    monkeypatch.setattr(command, "write_answer", stopped)
    assert sample(*flags, tmp_path / "part") == 130
    assert "2 of 4 answers" in capsys.readouterr().out
    part = contents(tmp_path / "part")
    assert len(part) == 4 and part.items() <= whole.items()
    # A picture without its JSON was being written when all ended: it is drawn again, the others are left alone.
    (tmp_path / "part" / f"{written[0]}.json").unlink()
    again = []
    monkeypatch.setattr(
        command, "write_answer", lambda path, *rest: again.append(path.name) or write(path, *rest)
    )
    assert sample(*flags, tmp_path / "part") == 0
    assert written[1] not in again and len(again) == 3 and contents(tmp_path / "part") == whole
    # Another request never overwrites what is there.
    assert sample(*flags, tmp_path / "part", "--seed", 1) == 1
    assert "another request" in capsys.readouterr().err and contents(tmp_path / "part") == whole


def test_an_interrupted_sheet_has_what_was_finished(sample, tmp_path, monkeypatch, capsys):
    stream = Sampler.stream

    def two(self, *arguments):
        for n, each in enumerate(stream(self, *arguments)):
            if n == 2:
                raise KeyboardInterrupt
            yield each

    monkeypatch.setattr(Sampler, "stream", two)
    assert sample("--prompt", "x", "--n", 4, "--size", "32x32", "--out", tmp_path / "a.png") == 130
    assert "2 of 4" in capsys.readouterr().out
    sheet = np.asarray(Pillow.open(tmp_path / "a.png"))
    assert sheet.shape == (32, 128, 3) and len(json.loads((tmp_path / "a.json").read_text())) == 2


@pytest.mark.parametrize(
    "line, words",
    [
        ("{", "line 1: expected JSON"),
        ('{"promt": "x"}', "found ['promt']"),
        ('"x"', "expected an object"),
        ('{"prompt": "x", "n": "2"}', "n cannot be '2'"),
        ('{"prompt": "x", "n": true}', "n cannot be 'True'"),
        ('{"prompt": "x", "size": "32"}', "prompt 1, 'x': a size is written"),
        ('{"prompt": "x", "images": ["none.png"]}', "none.png"),
        ('{"prompt": "x", "top_p": 0}', "prompt 1, 'x': expected temperature"),
        ('{"prompt": "ok"}\n{"prompt": "%s"}' % ("x " * 300), "prompt 2, 'x x"),
        ('{"prompt": "x", "output": "film"}', "'image', 'text' or 'any'"),
        ('{"prompt": "x", "images": [3]}', "images cannot be '[3]'"),
        ('{"prompt": "x", "guidance_interval": [0.5]}', "guidance_interval cannot be"),
        ('{"prompt": "x", "guidance_interval": [false, 1]}', "guidance_interval cannot be"),
        ('{"prompt": "x", "stop": [1]}', "stop cannot be"),
        ('{"prompt": "x", "guidance": 1e39}', "guidance cannot be"),
        ('{"prompt": "x", "temperature": Infinity}', "temperature cannot be"),
        ('{"prompt": "x", "top_k": 3000000000}', "expected temperature"),
        ('{"prompt": "x", "n": 1000000000}', "n cannot be"),
        ('{"prompt": "x", "stop": ["\\ud800"]}', "surrogates not allowed"),
        ('{"prompt": "x", "size": "4000000x4000000", "images": ["a.png"]}', "multiple of the patch"),
        ("[" * 200_000, "line 1: expected JSON"),
    ],
)
def test_wrong_lines(sample, tmp_path, capsys, line, words):
    (tmp_path / "p.jsonl").write_text(line)
    assert sample("--prompts", tmp_path / "p.jsonl", "--out", tmp_path / "out") == 1
    assert words in capsys.readouterr().err and not list((tmp_path / "out").glob("*"))


def test_images_in_and_words_out(sample, tmp_path, capsys):
    Pillow.fromarray(np.full((19, 30, 3), 90, np.uint8)).save(tmp_path / "in.png")
    flags = (
        "--image",
        tmp_path / "in.png",
        "--output",
        "text",
        "--max-tokens",
        8,
        "--out",
        tmp_path / "said",
    )
    assert sample("--prompt", "what is this?", *flags) == 0
    note = json.loads((tmp_path / "said" / "00000-0.json").read_text())
    words = "".join(part["text"] for part in note["answer"])
    assert note["request"]["images"] == [str(tmp_path / "in.png")]
    assert not words or words in capsys.readouterr().out
    assert sample("--prompt", "what?", *flags[:-1], tmp_path / "said.png") == 1
    assert "give --out a folder" in capsys.readouterr().err


def test_the_best_of_several(sample, sampler, tmp_path):
    wild = Strategy(1.5, keep_mode=True)
    flags = ("--prompt", "x", "--size", "32x32", "--temperature", 1.5, "--n", 2)
    assert sample(*flags, "--best-of", 4, "--out", tmp_path / "best") == 0
    for k in range(2):
        note = json.loads((tmp_path / "best" / f"00000-{k}.json").read_text())
        document = Document([Turn("user", [Text("x")])])
        request = Request(document, size=(8, 8), seed=draw_seed(0, k), guidance=1.5, image=wild)
        (turn,), _ = best_of(sampler, [request], 4, batch_size=4)
        assert note["answer"][0]["codes"] == turn.parts[0].codes.tolist()
    with pytest.raises(SystemExit):
        sample(*flags, "--best-of", "many")


def test_the_best_description_of_several(sample, sampler, tmp_path, capsys):
    rng = np.random.default_rng(0)
    Pillow.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(tmp_path / "in.png")
    flags = ("--image", tmp_path / "in.png", "--prompt", "what?", "--output", "text", "--max-tokens", 6)
    assert sample(*flags, "--best-of", 3, "--by-drawing", "--out", tmp_path / "said") == 0
    note = json.loads((tmp_path / "said" / "00000-0.json").read_text())
    shown = Image(pixels=np.asarray(Pillow.open(tmp_path / "in.png")))
    request = Request(
        Document([Turn("user", [shown, Text("what?")])]), "text", seed=draw_seed(0, 0), guidance=1.5,
        text=Strategy(0.7), image=Strategy(0.1, keep_mode=True), max_tokens=6,
    )  # fmt: skip
    (turn,), _ = best_of(sampler, [request], 3, "drawing", batch_size=3)
    assert "".join(part["text"] for part in note["answer"]) == turn.parts[0].text
    assert note["towers"] == "drawing" and note["best_of"] == 3
    capsys.readouterr()
    assert sample(*flags, "--by-drawing", "--out", tmp_path / "other") == 1
    assert "give --best-of N" in capsys.readouterr().err


def test_what_json_allows_and_damage_to_what_is_there(sample, tmp_path):
    (tmp_path / "p.jsonl").write_bytes(b"\xef\xbb\xbf" + '{"prompt":"a\u2028b\x85"}\n'.encode())
    flags = ("--prompts", tmp_path / "p.jsonl", "--size", "32x32", "--out", tmp_path / "out")
    assert sample(*flags) == 0
    whole = contents(tmp_path / "out")
    for damage in (b"", b"[]", b'{"answer"', b"\xff", b"{}"):
        (tmp_path / "out" / "00000-0.json").write_bytes(damage)
        assert sample(*flags) == 0 and contents(tmp_path / "out") == whole
    (tmp_path / "out" / "00000-0.png").unlink()
    assert sample(*flags) == 0 and contents(tmp_path / "out") == whole


def test_nothing_is_replaced_or_drawn_in_vain(sample, tmp_path, capsys):
    (tmp_path / "c.json").write_text('[{"prompt": "x", "size": "32x32"}]')
    (tmp_path / "d.json").mkdir()
    for out, words in (
        ("c.png", "would be replaced"),
        ("a.psd", "no image format"),
        ("a.xbm", "no image format"),
        ("d.png", "a folder has"),
    ):
        assert sample("--prompts", tmp_path / "c.json", "--out", tmp_path / out) == 1
        assert words in capsys.readouterr().err
    pixels = np.full((8, 8, 3), 90, np.uint8)
    Pillow.fromarray(pixels).save(tmp_path / "in.png")
    flags = ("--prompt", "x", "--image", tmp_path / "in.png", "--size", "8x8", "--out", tmp_path / "out")
    assert sample(*flags) == 0 and sample(*flags) == 0
    assert sample(*flags, "--scale", 2) == 1 and "another scale" in capsys.readouterr().err
    noise = np.random.default_rng(0).integers(0, 256, pixels.shape).astype(np.uint8)
    Pillow.fromarray(noise).save(tmp_path / "in.png")  # the codes are others
    assert sample(*flags) == 1 and "another shown" in capsys.readouterr().err


# ---- chat -----------------------------------------------------------------------------------------


def talk(space, monkeypatch, tmp_path, *lines, flags=(), stdin=io.StringIO):
    """The exit status of a chat with these lines typed."""
    monkeypatch.setattr("sys.stdin", stdin("".join(f"{line}\n" for line in lines)))
    flags = ("--out", tmp_path / "chat", "--size", "16x16", "--output", "image", *flags)
    return mmgen("chat", "--checkpoint", space.transformer, "--temperature", 1.0, *flags)


def test_a_chat(space, monkeypatch, tmp_path, capsys):
    Pillow.fromarray(np.full((8, 8, 3), 200, np.uint8)).save(tmp_path / "in.png")
    talked = [
        "a star", f"/image {tmp_path / 'in.png'}", "on it", f"/save {tmp_path / 'first.json'}", "/undo", "/seed 7", "again",
        "/save", "/size 15x16", "/size x", "/image none.png", "/output film", "/seed x", "/what", f"/image {tmp_path / 'in.png'}", "/image", "/undo", "/undo", "/undo", "/quit", "no",
    ]  # fmt: skip
    assert talk(space, monkeypatch, tmp_path, *talked) == 0
    said = capsys.readouterr().out
    for words in ("goes with what is said next", "back to 1 answers", "seed 7", "multiple of the patch", "WIDTHxHEIGHT",
                  "none.png", "found 'film'", "/image FILE", "nothing to undo"):  # fmt: skip
        assert words in said
    first = json.loads((tmp_path / "first.json").read_text())
    other = json.loads((tmp_path / "chat" / "dialogue.json").read_text())
    assert [len(t["parts"]) for t in first["turns"]] == [1, 1, 2, 1] and first["turns"][:2] == other["turns"][
        :2
    ]
    assert first["seed"] == 0 and other["seed"] == 7 and first["turns"][3] != other["turns"][3]
    assert Pillow.open(tmp_path / "chat" / "turn-001.png").size == (16, 16)

    # Gone on with, it answers as if it had never stopped.
    go_on = lambda: json.loads((tmp_path / "third.json").read_text())
    save = f"/save {tmp_path / 'third.json'}"
    assert talk(space, monkeypatch, tmp_path, "more", save, flags=("--resume", tmp_path / "first.json")) == 0
    resumed = go_on()
    assert talk(space, monkeypatch, tmp_path, *talked[:3], "more", save) == 0
    assert resumed == go_on() and len(resumed["turns"]) == 6


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_chat_with_a_terminal_compiles_while_its_user_types(space, monkeypatch, tmp_path):
    began, warm = [], Dialogue.warm
    monkeypatch.setattr(Dialogue, "warm", lambda self: (began.append(self.turns), warm(self)))
    for stdin in (Terminal, io.StringIO):  # from a pipe the words are there already
        flags = ("--no-provenance", "--show", "none")
        assert talk(space, monkeypatch, tmp_path, "a star", flags=flags, stdin=stdin) == 0
    assert began == [0]
    first, second = (np.asarray(Pillow.open(path)) for path in sorted((tmp_path / "chat").glob("*.png")))
    np.testing.assert_array_equal(first, second)


def test_a_chat_goes_on_where_its_rows_end(space, monkeypatch, tmp_path, capsys):
    assert talk(space, monkeypatch, tmp_path, *["a star"] * 8, "/undo", "a star") == 0
    lines = capsys.readouterr().out.splitlines()
    cut = [n for n, line in enumerate(lines) if "does not see the oldest of this dialogue" in line]
    drawn = [n for n, line in enumerate(lines) if line.endswith(".png")]
    # Said with the first answer that saw less, and once more after /undo.
    assert len(drawn) == 9 and len(cut) == 2 and drawn[1] < cut[0] < drawn[-2] and cut[1] > drawn[-1]
    assert not any(line.startswith("!") for line in lines)


def test_a_chat_that_is_no_chat(space, sampler, monkeypatch, tmp_path, capsys):
    for text, words in (
        ("{}", "no dialogue"),
        ('{"turns": [], "tokenizer": "other", "seed": 0}', "this model's"),
    ):
        (tmp_path / "a.json").write_text(text)
        assert talk(space, monkeypatch, tmp_path, flags=("--resume", tmp_path / "a.json")) == 1
        assert words in capsys.readouterr().err


def test_images_for_terminals():
    pixels = np.random.default_rng(0).integers(0, 256, (63, 80, 3)).astype(np.uint8)
    data = chat.png(pixels)
    kitty = chat.drawn(pixels, data, "kitty")
    assert (
        kitty.count("\033_G") == -(-len(data) * 4 // 3 // 4096)
        and "m=0;" in kitty
        and kitty.count("a=T") == 1
    )
    assert f"size={len(data)}" in chat.drawn(pixels, data, "iterm") and chat.drawn(pixels, data, "none") == ""
    blocks = chat.drawn(pixels, data, "blocks").splitlines()
    assert len(blocks) == 25 and all(line.count("\u2580") == 64 for line in blocks)


# ---- score ----------------------------------------------------------------------------------------


def test_score(space, sampler, tmp_path, capsys):
    flags = ("--checkpoint", space.transformer, "--batch-size", 4)
    assert (
        mmgen(
            "tools",
            "score",
            *flags,
            "--source",
            "world:test",
            "--documents",
            5,
            "--out",
            tmp_path / "s.jsonl",
        )
        == 0
    )
    lines = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    assert [line["document"] for line in lines] == list(range(5)) and "5 documents" in capsys.readouterr().err
    assert all(line["image_tokens"] == 67 and line["image"] < -100 for line in lines)

    pixels = np.full((32, 32, 3), 60, np.uint8)
    Pillow.fromarray(pixels).save(tmp_path / "in.png")
    one = ("--image", tmp_path / "in.png", "--text", "a red star")
    found = {}
    for caption in ((), ("--caption",)):
        assert mmgen("tools", "score", *flags, *one, *caption) == 0
        found[bool(caption)] = json.loads(capsys.readouterr().out.splitlines()[0])
    shown, words = (
        sampler.encoded(Document([Turn("user", [Image(pixels), Text("a red star")])])).turns[0].parts
    )
    for caption, asks, says in ((False, words, shown), (True, shown, words)):
        document = Document([Turn("user", [asks]), Turn("assistant", [says])])
        nats = sampler.nats([document])[0][
            -1 - found[caption]["text_tokens"] - found[caption]["image_tokens"] - (not caption) :
        ]
        total = found[caption]["text"] + found[caption]["image"]
        # All after the prompt but <eoi> and <eos>, which nobody chooses.
        grammar = sampler.grammar
        tokens = grammar.encode(document, sampler.text)[-len(nats) :]
        assert -nats[(tokens != grammar.eoi) & (tokens != grammar.eos)].sum() == pytest.approx(
            total, abs=1e-3
        )
    for wrong in ((), ("--text", "x"), ("--source", "world:test", *one)):
        assert mmgen("tools", "score", *flags, *wrong) == 1
        assert "expected either" in capsys.readouterr().err
