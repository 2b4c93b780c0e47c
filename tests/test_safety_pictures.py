"""Where pictures come from, and what the image layer sees in them."""

import hashlib
import io
import json
import socket
import struct
import zlib

import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Pillow
from PIL import PngImagePlugin

from mmgen.document import Image, Refusal, Text, Turn, caption_to_image
from mmgen.models.classifier import Group
from mmgen.safety import images as looks
from mmgen.safety import pdq, provenance, watermark
from mmgen.safety.gate import FAILED, Safety
from mmgen.safety.images import ImageLayer
from tests.conftest import mmgen


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    return provenance.make_keys(tmp_path_factory.mktemp("keys") / "own")


# ---- where a picture comes from ------------------------------------------------------------------------------------


def textured(side, seed=0):
    """A picture with things of all sizes, as photographs have them: uint8 [side, side, 3]."""
    rng, out = np.random.default_rng(seed), np.zeros((side, side, 3))
    for cells in (4, 8, 16, 32, 64):
        noise = rng.normal(size=(cells, cells, 3)) * 200 / cells
        noise = (noise - noise.min()) / np.ptp(noise) * 255
        large = Pillow.fromarray(noise.astype(np.uint8)).resize((side, side), Pillow.Resampling.BICUBIC)
        out += (np.asarray(large, float) - 128) * 4 / cells
    return np.clip(out + 128, 0, 255).astype(np.uint8)


def encoded(pixels, kind="PNG", **more):
    data = io.BytesIO()
    Pillow.fromarray(pixels).save(data, kind, **more)
    return data.getvalue()


def test_the_watermark_survives_jpeg_and_halving_and_no_other_key_finds_it():
    for seed in range(4):
        pixels = textured(256, seed)
        marked = watermark.embed(pixels, b"ours")
        assert 10 * np.log10(255**2 / np.mean(np.square(marked.astype(float) - pixels))) > 30
        image = Pillow.open(io.BytesIO(encoded(marked, "JPEG", quality=75)))
        for worn in (image, image.resize((128, 128), Pillow.Resampling.LANCZOS), image.resize((400, 300))):
            assert watermark.detect(np.asarray(worn), b"ours")
        assert not watermark.detect(pixels, b"ours") and not watermark.detect(marked, b"theirs")
    scores = [watermark.score(textured(64, seed), bytes([seed])) for seed in range(200)]
    assert abs(np.mean(scores)) < 0.3 and 0.7 < np.std(scores) < 1.3  # a standard normal number without it


def test_the_watermark_is_taken_off_with_its_key_and_no_other():
    flat = np.full((64, 64, 3), 255, np.uint8)
    flat[20:40, 10:44] = (200, 30, 30)
    psnr = lambda a, b: 10 * np.log10(255**2 / np.mean(np.square(a.astype(float) - b)))
    for pixels, least in ((textured(128), 8), (textured(64, 1), 6), (flat, 8)):
        marked = watermark.embed(pixels, b"ours")
        back = watermark.remove(marked, b"ours")
        assert psnr(back, pixels) > psnr(marked, pixels) + least
        assert abs(watermark.score(back, b"ours")) < 3 < watermark.FOUND <= watermark.score(marked, b"ours")
        for as_it_is, key in ((pixels, b"ours"), (marked, b"theirs"), (marked[:60], b"ours")):
            assert watermark.remove(as_it_is, key) is as_it_is
    see_through = np.dstack([textured(64), np.full((64, 64), 90, np.uint8)])
    assert (watermark.remove(watermark.embed(see_through, b"ours"), b"ours")[..., 3] == 90).all()


def test_what_a_user_shows_is_shown_to_the_model_without_our_mark(space, keys, tmp_path, monkeypatch, capsys):
    seen, unmarked = [], provenance.Signer.unmarked
    monkeypatch.setattr(
        provenance.Signer, "unmarked", lambda self, pixels: (seen.append(unmarked(self, pixels)), seen[-1])[1]
    )
    path, pixels = tmp_path / "shown.png", textured(64)
    Pillow.fromarray(provenance.Signer(keys).mark(pixels)).save(path)
    flags = ("--checkpoint", space.transformer, "--size", "64x64", "--out", tmp_path / "out", "--keys", keys)
    monkeypatch.setattr("sys.stdin", io.StringIO(f"/image {path}\n"))
    assert mmgen("chat", *flags) == 0
    said = ("--image", path, "--prompt", "what is this?", "--output", "text", "--max-tokens", 4)
    # The tiny model's rows have no room for a picture of 64 pixels, but then it has been read.
    assert mmgen("sample", *flags, *said) == 1 and "too long" in capsys.readouterr().err
    found, expected = seen[:], provenance.Signer(keys).unmarked(np.asarray(Pillow.open(path)))
    assert len(found) == 2 and (expected != np.asarray(Pillow.open(path))).any()
    for each in found:
        np.testing.assert_array_equal(each, expected)


def test_a_file_is_valid_tampered_marked_or_unsigned(keys, tmp_path):
    signer = provenance.Signer(keys)
    pixels = textured(128)
    marked = signer.mark(pixels)
    recipe = {"seed": 7, "gate": {"policy": "abc"}}
    signed = signer.sign(encoded(marked), ".png", recipe)
    state = lambda name, data: (
        (tmp_path / name).write_bytes(data) and provenance.verify(tmp_path / name, keys)
    )
    found = state("a.png", signed)
    assert found["state"] == "valid" and found["trusted"] and found["recipe"] == recipe
    assert np.array_equal(np.asarray(Pillow.open(tmp_path / "a.png")), marked)
    # Pixels of another picture under the same manifest.
    swapped = signed.replace(chunk(signed, b"IDAT"), chunk(encoded(255 - marked), b"IDAT"))
    assert swapped != signed and state("b.png", swapped)["state"] == "tampered"
    assert state("c.jpg", encoded(marked, "JPEG", quality=75))["state"] == "watermark only"
    assert state("d.png", encoded(pixels))["state"] == "unsigned"
    for kind, suffix in (("JPEG", ".jpg"), ("WEBP", ".webp")):
        assert state(f"e{suffix}", signer.sign(encoded(marked, kind), suffix, {}))["state"] == "valid"
    # By others' keys it is as it was signed, and nobody's that we know.
    other = provenance.verify(tmp_path / "a.png", provenance.make_keys(tmp_path / "other"))
    assert other["state"] == "valid" and not other["trusted"] and other["watermark"] < watermark.FOUND
    with pytest.raises(ValueError, match="gif"):
        signer.sign(b"", ".gif", {})


def test_a_picture_that_we_signed_has_the_codes_that_it_was_drawn_as(keys, tmp_path):
    signer, codes = provenance.Signer(keys), np.random.default_rng(0).integers(0, 27_000, (16, 24), np.int32)
    pixels, recipe = textured(64), {"tokenizer": "abc"}
    sign = lambda kind, suffix: signer.sign(encoded(pixels, kind), suffix, recipe, codes=codes)
    for kind, suffix in (("PNG", ".png"), ("JPEG", ".jpg"), ("WEBP", ".webp")):
        np.testing.assert_array_equal(signer.codes_in(sign(kind, suffix), "abc"), codes)
    signed = sign("PNG", ".png")
    changed = signed.replace(chunk(signed, b"IDAT"), chunk(encoded(255 - pixels), b"IDAT"))
    other = provenance.Signer(provenance.make_keys(tmp_path / "other"))
    without = signer.sign(encoded(pixels), ".png", recipe)
    for data in (changed, without, other.sign(encoded(pixels), ".png", recipe, codes=codes), encoded(pixels), encoded(pixels, "GIF")):
        assert signer.codes_in(data, "abc") is None
    assert signer.codes_in(signed, "another") is None and signer.codes_in(b"no picture", "abc") is None
    # One anchor may vouch for others too.
    anchor = ec.generate_private_key(ec.SECP256R1())
    above = provenance._certificate("anchor", "anchor", anchor, anchor, True)
    for each in (keys_of := [tmp_path / "one", tmp_path / "two"]):
        provenance.make_keys(each)
        key = serialization.load_pem_private_key((each / "key.pem").read_bytes(), None)
        (each / "chain.pem").write_bytes(provenance._certificate("leaf", "anchor", key, anchor, False) + above)
        (each / "anchor.pem").write_bytes(above)
    one, two = map(provenance.Signer, keys_of)
    data = one.sign(encoded(pixels), ".png", recipe, codes=codes)
    assert (one.codes_in(data, "abc") == codes).all() and two.codes_in(data, "abc") is None
    (tmp_path / "b.png").write_bytes(data)
    assert provenance.verify(tmp_path / "b.png", keys_of[1])["trusted"]
    (tmp_path / "a.png").write_bytes(signed)
    assert provenance.verify(tmp_path / "a.png", keys)["recipe"] == recipe


def test_no_manifest_is_too_broken_and_none_is_fetched(keys, tmp_path):
    signer = provenance.Signer(keys)
    signed = signer.sign(encoded(textured(16)), ".png", {"tokenizer": "abc"}, codes=np.zeros((4, 4), np.int32))
    place, rng = signed.index(b"caBX") + 4, np.random.default_rng(0)
    length, states = struct.unpack(">I", signed[place - 8 : place - 4])[0], set()
    for at in rng.integers(0, length, 300):
        broken = bytearray(signed)
        broken[place + at] ^= int(rng.integers(1, 256))
        whole = bytes(broken[place - 4 : place + length])
        broken[place + length : place + length + 4] = struct.pack(">I", zlib.crc32(whole))
        found = signer.codes_in(bytes(broken), "abc")
        assert found is None or not found.any()  # what is changed is not always signed
        (tmp_path / "a.png").write_bytes(broken)
        states.add(provenance.verify(tmp_path / "a.png", keys)["state"])
    assert "tampered" in states
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        more = PngImagePlugin.PngInfo()
        more.add_itxt("XML:com.adobe.xmp", XMP % server.getsockname()[1])
        data = encoded(textured(16), pnginfo=more)
        (tmp_path / "b.png").write_bytes(data)
        assert signer.codes_in(data, "abc") is None
        assert provenance.verify(tmp_path / "b.png", keys)["state"] != "valid"
        with pytest.raises(TimeoutError):
            server.accept()


XMP = """<?xpacket begin="" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF
xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about="" xmlns:dcterms="http://purl.org/dc/terms/"
dcterms:provenance="http://127.0.0.1:%d/manifest.c2pa"/></rdf:RDF></x:xmpmeta><?xpacket end="w"?>"""


def test_what_was_drawn_is_shown_again_as_it_was_drawn(space, sampler, keys, tmp_path, monkeypatch, capsys):
    """Enlarged and saved, it is still of its codes and their size: to `sample` and `chat`, where no other size is asked for."""
    draw = lambda out, *flags: mmgen(
        "sample", "--checkpoint", space.transformer, "--keys", keys, "--out", tmp_path / out, *flags
    )
    assert draw("first", "--prompt", "a red circle", "--size", "16x16", "--scale", 4) == 0
    path = tmp_path / "first" / "00000-0.png"
    data, (part,) = path.read_bytes(), json.loads((tmp_path / "first" / "00000-0.json").read_text())["answer"]
    codes, pixels, signer = np.array(part["codes"], np.int32), np.asarray(Pillow.open(path)), provenance.Signer(keys)
    assert pixels.shape == (64, 64, 3)
    image = sampler.shown(pixels, data, signer=signer)
    np.testing.assert_array_equal(image.codes, codes)
    assert image.pixels.shape == (16, 16, 3) and sampler.shown(pixels, data, (4, 4), signer) == image
    # A sheet of one picture is that picture.
    again = "--prompt", "a red circle", "--size", "16x16", "--scale", 4
    for name, more, same in (("one.png", (), True), ("one.webp", (), False), ("two.png", ("--n", 2), False)):
        assert draw(name, *again, *more) == 0
        found = signer.codes_in((tmp_path / name).read_bytes(), sampler.tokenizer.hash)
        assert (codes == found).all() if same else found is None
    asks = "--image", path, "--prompt", "what is this?", "--output", "text", "--max-tokens", 4
    assert draw("second", *asks) == 0
    note = json.loads((tmp_path / "second" / "00000-0.json").read_text())
    assert hashlib.sha256(codes.tobytes()).hexdigest()[:12] in json.dumps(note)
    monkeypatch.setattr("sys.stdin", io.StringIO(f"/image {path}\n"))
    assert mmgen("chat", "--checkpoint", space.transformer, "--out", tmp_path, "--keys", keys) == 0
    assert "an image of 16x16" in capsys.readouterr().out
    # Of another size, or of no signer or of another's, it is its pixels.
    for size, by, found in (((8, 8), signer, (32, 32, 3)), (None, None, (64, 64, 3)), ((4, 4), None, (16, 16, 3))):
        image = sampler.shown(pixels, data, size, by)
        assert image.codes is None and image.pixels.shape == found
    assert sampler.shown(pixels, data, scale=2).pixels.shape == (32, 32, 3)


def chunk(png, name):
    """The first chunk of that name, whole."""
    start = png.index(name) - 4
    return png[start : start + 12 + struct.unpack(">I", png[start : start + 4])[0]]


def test_keys_are_made_once_and_kept_secret(keys, tmp_path, monkeypatch):
    assert all((keys / name).stat().st_mode & 0o077 == 0 for name in provenance.FILES)
    with pytest.raises(FileExistsError):
        provenance.make_keys(keys)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    first = (provenance.Signer().folder / "key.pem").read_bytes()
    assert (provenance.Signer().folder / "key.pem").read_bytes() == first
    (provenance.keys_folder() / "chain.pem").unlink()
    with pytest.raises(FileNotFoundError, match="chain.pem"):
        provenance.Signer()


def test_verify_command(keys, tmp_path, capsys):
    signed = provenance.Signer(keys).sign(encoded(textured(64)), ".png", {"seed": 1})
    (tmp_path / "a.png").write_bytes(signed)
    (tmp_path / "b.png").write_bytes(
        signed.replace(chunk(signed, b"IDAT"), chunk(encoded(textured(64, 1)), b"IDAT"))
    )
    assert mmgen("tools", "verify", "--keys", keys, tmp_path / "a.png") == 0
    assert "valid, by our keys" in capsys.readouterr().out
    assert mmgen("tools", "verify", "--keys", keys, "--json", tmp_path / "a.png", tmp_path / "b.png") == 1
    assert [json.loads(line)["state"] for line in capsys.readouterr().out.splitlines()] == [
        "valid",
        "tampered",
    ]
    assert mmgen("tools", "verify") == 1


def test_what_sample_draws_has_passed_the_gate_and_is_signed(space, keys, tmp_path, capsys):
    draw = lambda *more: mmgen(
        "sample",
        "--checkpoint",
        space.transformer,
        "--batch-size",
        4,
        "--size",
        "32x32",
        "--scale",
        2,
        "--keys",
        keys,
        *more,
    )
    asked = ["--prompt", "a red circle", "--prompt", "in the style of Hayao Miyazaki"]
    assert draw(*asked, "--out", tmp_path / "folder", "--safety-log", tmp_path / "log.jsonl") == 3
    assert "not shown, prompt 2" in capsys.readouterr().out
    assert not (tmp_path / "folder" / "00001-0.png").exists()
    note = json.loads((tmp_path / "folder" / "00001-0.json").read_text())
    assert (
        note["answer"] == []
        and note["refused"]["categories"] == ["artist"]
        and note["gate"]["safety"] == "on"
    )
    found = provenance.verify(tmp_path / "folder" / "00000-0.png", keys)
    assert (
        found["state"] == "valid"
        and found["trusted"]
        and found["recipe"]["gate"]["policy"] == note["gate"]["policy"]
    )
    assert found["watermark"] > watermark.FOUND
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2
    # Gone on with, nothing is asked or drawn anew; a sheet shows what may be shown.
    before = (tmp_path / "folder" / "00000-0.png").read_bytes()
    assert draw(*asked, "--out", tmp_path / "folder") == 3
    assert (tmp_path / "folder" / "00000-0.png").read_bytes() == before
    assert draw(*asked, "--out", tmp_path / "sheet.png") == 3
    assert draw("--prompt", "in the style of Hayao Miyazaki", "--out", tmp_path / "none.png") == 3
    assert not (tmp_path / "none.png").exists()
    capsys.readouterr()
    assert draw(*asked, "--safety", "off", "--no-provenance", "--out", tmp_path / "off") == 0
    assert "SAFETY IS OFF" in capsys.readouterr().err
    assert json.loads((tmp_path / "off" / "00001-0.json").read_text())["gate"] == {"safety": "off"}
    assert provenance.verify(tmp_path / "off" / "00001-0.png", keys)["state"] == "unsigned"


def test_chat_does_not_ask_what_the_gate_stops(space, keys, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("in the style of Hayao Miyazaki\na red circle\n"))
    flags = ["--size", "32x32", "--output", "image", "--out", tmp_path, "--keys", keys, "--show", "none"]
    assert mmgen("chat", "--checkpoint", space.transformer, *flags) == 0
    out = capsys.readouterr().out
    assert "! A living artist" in out and len([*tmp_path.glob("*.png")]) == 1
    assert provenance.verify(next(tmp_path.glob("*.png")), keys)["state"] == "valid"


# ---- layer 2: what pictures show ------------------------------------------------------------------------------------


def test_a_hash_knows_a_picture_again_and_no_other():
    hashes = np.array([pdq.pdq(textured(256, seed))[0] for seed in range(30)])
    apart = (hashes[:, None] != hashes[None]).sum(-1)
    assert apart[~np.eye(30, dtype=bool)].min() > 2 * pdq.CLOSE
    pixels = textured(256)
    known = pdq.variants(pixels)
    distance = lambda image: (known != pdq.pdq(np.asarray(image))[0]).sum(1).min()
    image = Pillow.fromarray(pixels)
    assert distance(image.resize((128, 128))) <= pdq.CLOSE
    assert distance(Pillow.open(io.BytesIO(encoded(pixels, "JPEG", quality=30)))) <= pdq.CLOSE
    for turned in (pixels[:, ::-1], np.rot90(pixels), np.rot90(pixels[::-1], 3), pixels[13:-13, 13:-13]):
        assert distance(np.ascontiguousarray(turned)) <= pdq.CLOSE
    assert pdq.pdq(np.full((64, 64, 3), 200, np.uint8))[1] < 20 < pdq.pdq(pixels)[1]


@pytest.fixture(scope="module")
def blocked(tmp_path_factory):
    """A blocklist of one picture."""
    folder = tmp_path_factory.mktemp("blocklist")
    (folder / "bad.png").write_bytes(encoded(textured(128)))
    pdq.add(folder / "list.jsonl", [folder / "bad.png"], "violence", "as reported")
    return folder / "list.jsonl"


def test_a_listed_picture_is_blocked_by_the_command_that_lists_it(policy, tmp_path, capsys):
    (tmp_path / "bad.png").write_bytes(encoded(textured(128)))
    path = tmp_path / "blocked.jsonl"
    flags = ["--out", path, "--category", "violence", "--why", "as reported"]
    assert mmgen("tools", "policy", "blocklist", tmp_path / "bad.png", *flags) == 0
    assert (
        mmgen(
            "tools",
            "policy",
            "blocklist",
            tmp_path / "bad.png",
            "--out",
            path,
            "--category",
            "none",
            "--why",
            "x",
        )
        == 1
    )
    layer = ImageLayer(policy, blocklist=path)
    found = layer.decide([textured(128)[:, ::-1]])
    assert (found.decision, found.categories, found.rule) == (
        "block",
        ("violence",),
        "blocklist",
    ) and "as reported" in found.reason
    assert layer.decide([textured(128, 1), np.zeros((32, 32, 3), np.uint8)]).allowed
    path.write_text(json.dumps({"hash": "00" * 32, "category": "nothing", "why": ""}))
    with pytest.raises(ValueError, match="nothing"):
        ImageLayer(policy, blocklist=path)


class Eyes:
    """A classifier that says what it is told to say."""

    groups = (
        Group("person", "person", ("none", "adult", "child"), False, 0),
        Group("symbol", "symbol", ("no", "yes"), False, 3),
    )

    def __init__(self, person, symbol=False):
        self.person, self.symbol = person, symbol

    def probabilities(self, images):
        return {
            "person": np.array([self.person] * len(images)),
            "symbol": np.array([[1 - self.symbol, self.symbol]] * len(images), float),
        }

    def flagged(self, found):
        return [{"symbol": ["yes"] if p[1] else ["no"], "person": []} for p in found["symbol"]]


@pytest.mark.parametrize(
    "eyes, edited, rule",
    [
        (Eyes((0.9, 0.07, 0.03)), True, None),
        (Eyes((0.9, 0.04, 0.06)), True, "person-classifier"),  # doubtful counts as a child
        (Eyes((0.0, 0.0, 1.0)), False, None),  # who is drawn, or asked about, may be one
        (Eyes((0.0, 1.0, 0.0)), True, None),
        (Eyes((1.0, 0.0, 0.0), True), False, "symbol-classifier"),
    ],
)
def test_what_is_seen_decides(policy, monkeypatch, eyes, edited, rule):
    monkeypatch.setattr(looks, "load_classifier", lambda _: eyes)
    found = ImageLayer(policy, classifier="there").decide([textured(64)], edited)
    assert found.rule == rule and found.allowed == (rule is None)


def test_the_gate_looks_at_what_is_shown_and_drawn_and_blocks_if_it_cannot(
    layer, policy, monkeypatch, tmp_path
):
    monkeypatch.setattr(looks, "load_classifier", lambda _: Eyes((0.0, 0.0, 1.0)))
    log = tmp_path / "log.jsonl"
    gate = Safety(log=log, prompts=lambda: layer, images=lambda: ImageLayer(policy, classifier="there"))
    image = textured(64)
    assert not gate.shown([image], edited=True).allowed and gate.shown([image], edited=False).allowed
    assert gate.answered(Turn("assistant", [Image(pixels=image)])).allowed
    refused = gate.answered(Turn("assistant", [Refusal(11), Text("I can't.")]))
    assert (refused.decision, refused.categories, refused.layer, refused.reason) == (
        "refuse",
        ("artist",),
        "model",
        "I can't.",
    )
    assert [json.loads(line)["layer"] for line in log.read_text().splitlines()] == [
        "image",
        "image",
        "image",
        "model",
    ]
    monkeypatch.undo()
    broken = Safety(prompts=lambda: layer, images=lambda: ImageLayer(policy, classifier=tmp_path / "nowhere"))
    assert (
        broken.answered(Turn("assistant", [Image(pixels=image)])).rule == FAILED
        and broken.about["safety"] == "broken"
    )
    assert broken.prompt(caption_to_image("a red circle")).allowed  # which shows nothing yet


@given(
    st.integers(1, 70),
    st.integers(1, 70),
    st.sampled_from((3, 4)),
    st.sampled_from(("noise", "plain", "rows")),
    st.integers(0, 2**32 - 1),
)
@settings(deadline=None, max_examples=50)
def test_the_gate_decides_on_any_picture(layer, policy, blocked, height, width, channels, kind, seed):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (height, width, channels), np.uint8)
    pixels = {
        "noise": pixels,
        "plain": pixels[:1, :1].repeat(height, 0).repeat(width, 1),
        "rows": pixels[:, :1].repeat(width, 1),
    }[kind]
    gate = Safety(prompts=lambda: layer, images=lambda: ImageLayer(policy, blocklist=blocked))
    for found in (gate.shown([pixels], edited=True), gate.drawn([pixels])):
        assert found.decision in ("allow", "block", "refuse") and found.rule != FAILED, found
    # What is not a picture is not let through.
    assert gate.drawn([pixels[..., :2]]).rule == FAILED and gate.drawn([None]).rule == FAILED


def test_a_classifier_of_other_things_is_an_error(policy, monkeypatch):
    eyes = Eyes((1.0, 0.0, 0.0))
    eyes.groups = eyes.groups[:1]
    monkeypatch.setattr(looks, "load_classifier", lambda _: eyes)
    with pytest.raises(ValueError, match="symbol"):
        ImageLayer(policy, classifier="there")


def test_anybodys_classifier_by_onnx(policy, tmp_path):
    """Of the mean colour: red is for the category, blue for nothing."""
    path = tmp_path / "red.onnx"
    path.write_bytes(onnx_of_mean_color([[20, 0, -20], [-20, 0, 20]]))
    about = {
        "size": [8, 8],
        "mean": [0, 0, 0],
        "std": [1, 1, 1],
        "labels": ["violence", None],
        "softmax": True,
        "threshold": 0.9,
    }
    (tmp_path / "red.onnx.json").write_text(json.dumps(about))
    layer = ImageLayer(policy, others=[looks.Onnx(path)])
    plain = lambda color: np.full((16, 12, 3), color, np.uint8)
    assert layer.decide([plain((0, 0, 255))]).allowed
    found = layer.decide([plain((255, 0, 0))])
    assert (found.rule, found.categories) == ("red", ("violence",)) and found.harm > 0.99
    (tmp_path / "red.onnx.json").write_text(json.dumps(about | {"labels": ["violence"]}))
    with pytest.raises(ValueError, match="2 numbers"):
        looks.Onnx(path).decide(plain(0))
    (tmp_path / "red.onnx.json").write_text("{}")
    with pytest.raises(ValueError, match="lacks labels"):
        looks.Onnx(path)


def onnx_of_mean_color(weights):
    """The bytes of an ONNX model: mean of the pixels, then a matrix (its protocol buffers, field by field)."""

    def number(value):
        return bytes([value & 127 | 128]) + number(value >> 7) if value > 127 else bytes([value])

    def field(at, value):
        if isinstance(value, int):
            return number(at << 3) + number(value)
        value = value.encode() if isinstance(value, str) else value
        return number(at << 3 | 2) + number(len(value)) + value

    def value_info(name, shape):
        dims = b"".join(field(1, field(1, side)) for side in shape)
        return field(1, name) + field(2, field(1, field(1, 1) + field(2, dims)))

    def node(kind, inputs, output):
        return field(1, b"".join(field(1, name) for name in inputs) + field(2, output) + field(4, kind))

    matrix = np.array(weights, np.float32).T
    tensor = (
        b"".join(field(1, side) for side in matrix.shape)
        + field(2, 1)
        + field(8, "w")
        + field(9, matrix.tobytes())
    )
    nodes = (
        node("GlobalAveragePool", ["x"], "p") + node("Flatten", ["p"], "f") + node("MatMul", ["f", "w"], "y")
    )
    graph = nodes + field(2, "g") + field(5, tensor)
    graph += field(11, value_info("x", (1, 3, 8, 8))) + field(12, value_info("y", (1, 2)))
    return field(1, 8) + field(7, graph) + field(8, field(2, 13))
