"""The server, asked by OpenAI's own client."""

import base64
import io
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import openai
import pytest
from PIL import Image as Pillow

from mmgen import world
from mmgen.document import Document, Refusal, Text, Turn
from mmgen.runtime.released import model_folder
from mmgen.safety import provenance
from mmgen.safety.gate import Safety
from mmgen.safety.policy import Decision
from mmgen.sampling import sampler as samplers
from mmgen.sampling.sampler import Request, draw_seed
from mmgen.serving import api, dialogues
from mmgen.serving.engine import Engine
from mmgen.world.judge import judge
from tests.served import HARMFUL, Running, keys, model, picture, pixels, png, running, wait  # noqa: F401 (fixtures)


def test_the_client_draws_what_the_sampler_draws(running, model, keys, tmp_path):
    found = running.client.images.generate(prompt="a red circle", n=3, extra_body={"seed": 7})
    assert (
        found.size == f"{running.side}x{running.side}"
        and found.output_format == "png"
        and len(found.data) == 3
    )
    assert found.usage.total_tokens == found.usage.input_tokens + found.usage.output_tokens > 3 * 16
    document = Document([Turn("user", [Text("a red circle")])])
    options = api.default_options({"image": samplers.Strategy(1.0)})
    seeds = [7, draw_seed(7, 1), draw_seed(7, 2)]
    assert [each.seed for each in found.data] == seeds
    requests = [Request(document, size=(4, 4), seed=seed, **options) for seed in seeds]
    slots = samplers.Slots(model, 2, 2, model.longest)  # the same program
    turns = {i: turn for i, turn, *_ in model.answers(slots, requests, range(3))}
    for n, each in enumerate(found.data):
        assert (pixels(each.b64_json) == turns[n].parts[0].pixels).all()
        path = tmp_path / f"{n}.png"
        path.write_bytes(base64.b64decode(each.b64_json))
        known = provenance.verify(path, keys)
        assert (
            known["state"] == "valid"
            and known["recipe"]["seed"] == seeds[n]
            and known["recipe"]["gate"]["safety"] == "on"
        )
    for kind in ("webp", "jpeg"):
        found = running.client.images.generate(prompt="x", output_format=kind, output_compression=80)
        assert Pillow.open(io.BytesIO(base64.b64decode(found.data[0].b64_json))).format == kind.upper()


def test_partial_images_are_the_final_one_so_far(running):
    events = list(
        running.client.images.generate(
            prompt="a red circle", stream=True, partial_images=3, extra_body={"seed": 3}
        )
    )
    *partial, last = events
    assert [event.type for event in partial] == ["image_generation.partial_image"] * len(
        partial
    ) and 1 <= len(partial) <= 3
    assert [event.partial_image_index for event in partial] == list(range(len(partial)))
    assert last.type == "image_generation.completed" and last.usage.output_tokens >= 16
    whole = running.client.images.generate(prompt="a red circle", extra_body={"seed": 3})
    assert (pixels(last.b64_json) == pixels(whole.data[0].b64_json)).all()
    assert not any((pixels(event.b64_json) == pixels(last.b64_json)).all() for event in partial)


def test_of_a_partial_image_is_judged_what_is_drawn(running, monkeypatch):
    """Of the checkerboard that stands for the rest a classifier thinks all sorts of things."""
    judged, decide = [], Safety.drawn
    monkeypatch.setattr(
        Safety, "drawn", lambda self, images: judged.append(images[0]) or decide(self, images)
    )
    stream = running.client.images.generate(prompt="a red circle", stream=True, partial_images=3)
    shown = [pixels(event.b64_json) for event in stream]
    assert len(judged) == len(shown) and judged[-1].shape == shown[-1].shape
    for plain, board in zip(judged[:-1], shown):
        missing = (plain != board).any(-1)
        assert missing.any() and (plain[missing] == 255).all() and set(board[missing].ravel()) == {96, 160}


def test_an_edit_keeps_what_the_mask_keeps(running):
    side, patch = running.side, running.side // 4
    shown = picture(side)
    mask = np.zeros((side, side, 4), np.uint8)
    mask[..., 3] = 255
    mask[patch : 2 * patch, : 2 * patch, 3] = 0
    mask[3 * patch, 3 * patch, 3] = 0  # one pixel frees its patch
    free = np.zeros((side, side), bool)
    free[patch : 2 * patch, : 2 * patch] = free[3 * patch :, 3 * patch :] = True
    found = running.client.images.edit(
        image=png(shown), mask=png(mask), prompt="a star", extra_body={"seed": 1}
    )
    made = pixels(found.data[0].b64_json)
    assert (
        made.shape == shown.shape
        and (made[~free] == shown[~free]).all()
        and (made[free] != shown[free]).any()
    )
    # Several pictures, as a stream, and of any size: it is drawn in the size that is asked for.
    events = list(
        running.client.images.edit(
            image=[png(picture(40)), png(picture(17))],
            prompt="both",
            stream=True,
            partial_images=1,
            size=f"{side}x{side}",
        )
    )
    assert events[-1].type == "image_edit.completed" and events[0].type == "image_edit.partial_image"
    assert events[-1].usage.input_tokens_details.image_tokens >= 2 * 16


def test_what_clients_show_is_shown_to_the_model_without_our_mark(running, monkeypatch):
    """The mark of pictures so small is looked at by no one, so another change stands for taking it off."""
    monkeypatch.setattr(provenance.Signer, "unmarked", lambda self, pixels: 255 - pixels)
    shown = picture(running.side)
    mask = np.full((running.side, running.side, 4), 255, np.uint8)
    mask[:4, :4, 3] = 0
    found = running.client.images.edit(image=png(shown), mask=png(mask), prompt="a star")
    made = pixels(found.data[0].b64_json)
    assert (made[running.side // 2 :] == 255 - shown[running.side // 2 :]).all()
    url = "data:image/png;base64," + base64.b64encode(png(shown)).decode()
    content = [{"type": "input_image", "image_url": url}]
    kept = []
    monkeypatch.setattr(dialogues.Store, "put", lambda self, name, who, document, **_: kept.append(document))
    said = running.client.responses.create(model="tiny", input=[{"role": "user", "content": content}])
    assert said.status == "completed" and (kept[0].images()[0].pixels == 255 - shown).all()


def test_what_was_drawn_here_is_edited_as_it_was_drawn(running, keys, monkeypatch):
    """By its codes; under a mask, and of lossy files, its pixels are others', and no codes are signed."""
    seen, make = [], api.Request
    monkeypatch.setattr(api, "Request", lambda document, *args, **more: seen.append(document) or make(document, *args, **more))
    signer, tokenizer = provenance.Signer(keys), running.engine.sampler.tokenizer.hash
    generate = lambda kind, **more: base64.b64decode(
        running.client.images.generate(prompt="a red circle", output_format=kind, extra_body={"seed": 3} | more).data[0].b64_json
    )
    for lossy in (generate("jpeg"), generate("webp", output_compression=90)):
        assert signer.codes_in(lossy, tokenizer) is None
    for kind in ("webp", "png"):
        data = generate(kind)
        codes = signer.codes_in(data, tokenizer)
        assert codes.shape == (4, 4)
        # Which the pixels alone are not always encoded as.
        again = running.engine.sampler.tokenizer.encode(np.asarray(Pillow.open(io.BytesIO(data)).convert("RGB"))[None])[0]
        assert (again != codes).any()
        edited = running.client.images.edit(image=data, prompt="make it blue")
        np.testing.assert_array_equal(seen[-1].images()[0].codes, codes)
        assert signer.codes_in(base64.b64decode(edited.data[0].b64_json), tokenizer).shape == (4, 4)
    mask = np.full((running.side, running.side, 4), 255, np.uint8)
    mask[:4, :4, 3] = 0
    pasted = running.client.images.edit(image=data, mask=png(mask), prompt="make it blue")
    np.testing.assert_array_equal(seen[-1].images()[0].codes, codes)
    assert signer.codes_in(base64.b64decode(pasted.data[0].b64_json), tokenizer) is None


def test_a_dialogue_goes_on_from_any_answer(running, model):
    ask = lambda text, **more: running.client.responses.create(
        model="tiny", input=text, tools=[{"type": "image_generation"}], tool_choice={"type": "image_generation"},
        extra_body={"tools": [{"type": "image_generation", "seed": 5}]}, **more,
    )  # fmt: skip
    first = ask("a red circle")
    (call,) = [each for each in first.output if each.type == "image_generation_call"]
    assert first.status == "completed" and pixels(call.result).shape == (running.side, running.side, 3)
    second = ask("make it blue", previous_response_id=first.id)
    assert (
        second.previous_response_id == first.id and second.usage.input_tokens > first.usage.input_tokens + 16
    )
    held = (
        second.usage.input_tokens_details.cached_tokens
    )  # whole chunks of what was read for the first answer
    assert held >= first.usage.input_tokens // model.chunk * model.chunk
    again = ask("make it blue", previous_response_id=first.id)  # undone, and asked again
    assert again.usage.input_tokens_details.cached_tokens == again.usage.input_tokens
    drawn = [
        next(each.result for each in r.output if each.type == "image_generation_call")
        for r in (second, again)
    ]
    assert (pixels(drawn[0]) == pixels(drawn[1])).all()
    with pytest.raises(openai.NotFoundError, match="no such response"):
        ask("more", previous_response_id="resp_nobody")


def test_a_dialogue_outgrows_the_models_rows(running, model):
    ask = lambda text, **more: running.client.responses.create(
        model="tiny", input=text, tools=[{"type": "image_generation"}], tool_choice="required", **more
    )
    said, most = ask("a red circle"), model.longest // 20  # answers, which no row has room for
    for n in range(most):
        said = ask(f"make it blue {n}", previous_response_id=said.id, truncation="auto")
        assert said.status == "completed" and said.truncation == "auto"
        assert "image_generation_call" in [each.type for each in said.output]
    with pytest.raises(openai.BadRequestError, match="too long"):  # all of it is kept
        ask("and now?", previous_response_id=said.id)


def test_a_streamed_response_has_pictures_and_words(running):
    data = base64.b64encode(png(picture(16))).decode()
    content = [
        {"type": "input_image", "image_url": f"data:image/png;base64,{data}"},
        {"type": "input_text", "text": "what is it?"},
    ]
    events = list(
        running.client.responses.create(
            model="tiny", input=[{"role": "user", "content": content}], stream=True
        )
    )
    assert events[0].type == "response.created" and events[-1].type == "response.completed"
    whole = events[-1].response
    words = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert words == whole.output_text
    events = list(
        running.client.responses.create(
            model="tiny", input="a star", stream=True, tool_choice="required",
            tools=[{"type": "image_generation", "partial_images": 2}],
        )
    )  # fmt: skip
    kinds = [event.type.removeprefix("response.") for event in events]
    assert "image_generation_call.partial_image" in kinds and kinds[-1] == "completed"
    # The client's own helper, which wants to hear of an item before what is in it.
    for more in (
        {},
        {"tool_choice": "required", "tools": [{"type": "image_generation", "partial_images": 1}]},
    ):
        with running.client.responses.stream(model="tiny", input="what is it?", **more) as stream:
            events = list(stream)
        final = stream.get_final_response()
        for item in final.output:
            told = [event for event in events if getattr(event, "item_id", item.id) == item.id]
            assert "response.output_item.added" in {event.type for event in told}
        assert bool(final.output_text) != bool(more)
        assert [event.item.id for event in events if event.type == "response.output_item.done"] == [
            item.id for item in final.output
        ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    (call,) = events[-1].response.output
    assert call.type == "image_generation_call" and call.result


@pytest.mark.parametrize("role", ["user", "developer"])
def test_a_picture_that_was_only_asked_about_is_judged_again_when_it_is_drawn_from(
    running, monkeypatch, role
):
    gate = running.gates["auto"]
    found, shown = Decision("refuse", ("child_edit",), reason="not changed"), gate.shown
    monkeypatch.setattr(gate, "shown", lambda images, edited: found if edited else shown(images, edited))
    url = f"data:image/png;base64,{base64.b64encode(png(picture(16))).decode()}"
    content = [{"type": "input_image", "image_url": url}]
    answer = running.client.responses.create(
        model="tiny",
        input=[{"role": role, "content": content}, {"role": "user", "content": "what is it?"}],
    )
    answer = running.client.responses.create(model="tiny", input="and now?", previous_response_id=answer.id)
    with pytest.raises(openai.BadRequestError, match="not changed"):
        running.client.responses.create(
            model="tiny", input="make it red", previous_response_id=answer.id,
            tools=[{"type": "image_generation"}],
        )  # fmt: skip


def test_what_the_gate_stops_is_not_drawn_and_not_logged_in_words(running):
    before = running.engine.counts.tokens._value.get()
    with pytest.raises(openai.BadRequestError) as stopped:
        running.client.images.generate(prompt=f"a lake {HARMFUL}")
    error = stopped.value.body
    assert error["code"] == "moderation_blocked" and error["type"] == "image_generation_user_error"
    assert error["moderation_details"] == {"moderation_stage": "input", "categories": ["artist"]}
    with pytest.raises(openai.BadRequestError, match="living artist"):
        running.client.responses.create(model="tiny", input=HARMFUL)
    with pytest.raises(openai.BadRequestError, match="living artist"):
        list(running.client.images.edit(image=png(picture(16)), prompt=HARMFUL, stream=True))
    assert running.engine.counts.tokens._value.get() == before
    logged = running.log.read_text("utf-8")
    assert "Miyazaki" not in logged and '"decision": "refuse"' in logged


def test_pictures_that_are_not_shown(running, monkeypatch):
    """Of what was drawn, whole or in part, nothing is shown that the image layer stops."""
    stopped = Decision("block", ("violence",), "eyes", "image", reason="It is not shown.")
    monkeypatch.setattr(Safety, "drawn", lambda self, images: stopped)
    with pytest.raises(openai.BadRequestError, match="not shown") as found:
        running.client.images.generate(prompt="a red circle")
    assert found.value.body["moderation_details"]["moderation_stage"] == "output"
    with pytest.raises(openai.APIError, match="not shown") as found:
        for event in running.client.images.generate(prompt="a red circle", stream=True, partial_images=2):
            raise AssertionError(event.type)
    assert found.value.code == "moderation_blocked"


def test_a_partial_image_that_is_stopped_is_left_out(running, monkeypatch):
    """The second of three, which lacks what is drawn last; the picture comes all the same, in an image call too."""
    stopped, asked = Decision("block", ("violence",), "eyes", "image", reason="It is not shown."), []
    decide = Safety.drawn

    def second(self, images):
        asked.append(images)
        return stopped if len(asked) == 2 else decide(self, images)

    monkeypatch.setattr(Safety, "drawn", second)
    how = dict(prompt="a red circle", partial_images=3, extra_body={"seed": 3})
    *partial, last = running.client.images.generate(stream=True, **how)
    assert len(asked) == len(partial) + 2 and [event.partial_image_index for event in partial] == [0, 1]
    assert last.type == "image_generation.completed"
    asked.clear()
    tool = {"type": "image_generation", "partial_images": 3}
    kinds = [event.type for event in running.client.responses.create(
        model="tiny", input="a red circle", tools=[tool], tool_choice="required", stream=True
    )]  # fmt: skip
    assert kinds.count("response.image_generation_call.partial_image") == len(asked) - 2 == 2
    assert kinds[-1] == "response.completed"


def test_a_models_refusal_is_a_refusal(running, monkeypatch):
    turn = Turn("assistant", [Refusal(2), Text("I can't draw that.")])
    monkeypatch.setattr(
        running.engine.sampler,
        "turn",
        lambda request, tokens, done=True: (turn if done else Turn("assistant", []), None, False),
    )
    found = running.client.responses.create(model="tiny", input="x", tools=[{"type": "image_generation"}])
    assert found.output[0].content[0].refusal == "I can't draw that."
    with pytest.raises(openai.BadRequestError, match="can't draw that"):
        running.client.images.generate(prompt="x")


@pytest.mark.parametrize(
    "path, body, param",
    [
        ("images/generations", {}, "prompt"),
        ("images/generations", {"prompt": ""}, "prompt"),
        ("images/generations", {"prompt": "x", "n": 11}, "n"),
        ("images/generations", {"prompt": "x", "style": "vivid"}, "style"),
        ("images/generations", {"prompt": "x", "quality": "high"}, "quality"),
        ("images/generations", {"prompt": "x", "size": "1024x1024"}, "size"),
        ("images/generations", {"prompt": "x", "size": "15x16"}, "size"),
        ("images/generations", {"prompt": "x", "size": "٤x4"}, "size"),
        ("images/generations", {"prompt": "x", "background": "transparent"}, "background"),
        ("images/generations", {"prompt": "x", "stream": True, "n": 2}, "n"),
        ("images/generations", {"prompt": "x", "partial_images": 1}, "partial_images"),
        ("images/generations", {"prompt": "x", "output_format": "gif"}, "output_format"),
        ("images/generations", {"prompt": "x", "seed": -1}, "seed"),
        ("images/generations", {"prompt": "x", "guidance": 1e9}, "guidance"),
        ("images/generations", {"prompt": "x " * 400}, None),  # longer than the model's rows
        ("responses", {"input": []}, "input"),
        ("responses", {"input": "x" * 32_001}, "input"),
        ("responses", {"input": [{"role": "user", "content": "x" * 32_001}]}, "input"),
        ("responses", {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "data:image/png;base64,"}] * 17}]}, "input"),
        ("responses", {"input": "x", "metadata": {"a": "x" * 513}}, "metadata"),
        ("responses", {"input": [{"role": "assistant", "content": "x"}]}, None),
        ("responses", {"input": "x", "temperature": 1}, "temperature"),
        ("responses", {"input": "x", "tools": [{"type": "web_search"}]}, None),
        ("responses", {"input": [{"role": "system", "content": "x"}]}, "input"),
        ("responses", {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "http://a/b.png"}]}]}, "input"),
        ("responses", {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "data:image/png;base64,!"}]}]}, "input"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_and_said(running, path, body, param):
    found = running.http.post(f"/v1/{path}", json=body)
    error = found.json()["error"]
    assert found.status_code == 400 and error["message"] and error["type"] == "invalid_request_error", (
        found.text
    )
    assert param is None or error["param"] == param, error


def test_other_models_pages_and_methods(running):
    found = running.http.post("/v1/images/generations", json={"prompt": "x", "model": "gpt-image-1"})
    assert found.status_code == 404 and found.json()["error"]["code"] == "model_not_found"
    assert running.http.get("/v1/nothing").json()["error"]["code"] == "not_found"
    assert running.http.get("/v1/images/generations").status_code == 405
    assert running.client.models.list().data[0].id == "tiny"
    assert running.http.get("/healthz").status_code == running.http.get("/readyz").status_code == 200
    assert "mmgen_jobs_total" in running.http.get("/metrics").text
    page = running.http.get("/")
    assert page.status_code == 200 and "default-src 'none'" in page.headers["content-security-policy"]
    assert running.http.get("/page/app.js").status_code == 200
    assert (
        running.http.get("/page/../api.py").status_code
        == running.http.get("/page/%2e%2e/api.py").status_code
        == 404
    )


def test_the_description_tells_of_all_requests(running):
    found = running.http.get("/openapi.json").json()
    paths = {path: set(each) for path, each in found["paths"].items()}
    assert paths == {
        "/v1/images/generations": {"post"}, "/v1/images/edits": {"post"}, "/v1/responses": {"post"}, "/v1/models": {"get"},
        "/healthz": {"get"}, "/readyz": {"get"}, "/metrics": {"get"},
    }  # fmt: skip
    (form,) = found["paths"]["/v1/images/edits"]["post"]["requestBody"]["content"].values()
    assert {"image", "mask", "prompt", "seed", "size"} < set(form["schema"]["properties"])
    assert (
        set(form["schema"]["required"]) == {"prompt", "image"} and not form["schema"]["additionalProperties"]
    )
    answers = found["paths"]["/v1/images/edits"]["post"]["responses"]
    assert set(answers) == {"200", "4XX", "5XX"}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_that_has_ended_is_told(model, layer, monkeypatch):
    """Nobody waits for what does not come, and whoever watches the server is told to start it anew."""
    running = Running(Engine(model, slots=1, every=8), gates={"auto": Safety(prompts=lambda: layer)})
    try:
        assert running.http.get("/healthz").status_code == 200
        monkeypatch.setattr(running.engine, "_let_go", lambda: 1 / 0)
        found = running.http.post("/v1/images/generations", json={"prompt": "x", "size": "16x16"})
        running.engine._thread.join(30)
        assert found.status_code == 503 and found.json()["error"]["code"] == "server_closed"
        for path in ("healthz", "readyz"):
            assert running.http.get(f"/{path}").status_code == 503
        assert running.http.post("/v1/images/generations", json={"prompt": "x"}).status_code == 503
    finally:
        running.stop()


def test_a_full_queue_says_when_to_come_again(running, monkeypatch):
    hold, real = threading.Event(), running.engine._slots.run
    monkeypatch.setattr(running.engine._slots, "run", lambda *a, **k: hold.wait(30) and real(*a, **k))
    found, lines = [], []

    def ask():
        found.append(running.http.post("/v1/images/generations", json={"prompt": "x", "n": 1}))

    while running.engine.waiting < 6:  # one or two are in slots, whose dispatch does not end
        there = len(running.engine._active) + running.engine.waiting
        lines.append(threading.Thread(target=ask))
        lines[-1].start()
        wait(lambda: len(running.engine._active) + running.engine.waiting > there)
    full = running.http.post("/v1/images/generations", json={"prompt": "x"})
    assert full.status_code == 429 and int(full.headers["retry-after"]) >= 1
    assert full.json()["error"]["code"] == "rate_limit_exceeded"
    hold.set()
    for line in lines:
        line.join()
    assert [each.status_code for each in found] == [200] * len(lines)


def test_keys(model, layer):
    engine = Engine(model, slots=1, every=8)
    running = Running(engine, gates={"auto": Safety(prompts=lambda: layer)}, keys=("secret-1", "secret-2"))
    try:
        assert running.client.images.generate(prompt="x", size="16x16").data
        first = running.client.responses.create(model="tiny", input="x")
        other = openai.OpenAI(base_url=f"{running.url}/v1", api_key="secret-2", max_retries=0)
        with pytest.raises(openai.NotFoundError):  # another's dialogue
            other.responses.create(model="tiny", input="y", previous_response_id=first.id)
        for key in ("no", "secret-", "secret-11", "s\xe9cret"):
            found = running.http.get(
                "/v1/models", headers={"authorization": f"Bearer {key}".encode("latin-1")}
            )
            assert found.status_code == 401 and found.json()["error"]["code"] == "invalid_api_key"
        twice = [("authorization", "Bearer secret-1"), ("authorization", "Bearer secret-2")]
        assert running.http.get("/v1/models", headers=twice).status_code == 401  # who is it?
        assert running.http.get("/healthz").status_code == 200
    finally:
        running.stop()


@pytest.mark.soak
def test_a_crowd_loses_nothing(tmp_path):
    """Ten minutes of 32 clients, of whom some leave, and the model that comes with mmgen: benchmarks/serving.py."""
    root, found = Path(__file__).parents[1], tmp_path / "found.json"
    subprocess.run(
        [sys.executable, root / "benchmarks/serving.py", "--pictures", "0", "--json", found],
        check=True,
        cwd=root,
        env={name: value for name, value in os.environ.items() if name != "XLA_FLAGS"},  # as users run it
    )
    crowd = json.loads(found.read_text())["crowd"]
    print(crowd)
    assert crowd["lost"] == crowd["mixed"] == 0 and crowd["idle_after"] and crowd["same_after"], crowd[
        "faults"
    ]
    assert (
        crowd["minutes"] >= 10
        and crowd["left"] >= 0.05 * crowd["answered"]
        and crowd["memory_mib"]["ratio"] < 1.05
    )


# ---- the model that comes with mmgen ---------------------------------------------------------------


@pytest.fixture(scope="module")
def reference(layer, keys):
    found = Running(
        Engine(samplers.load(model_folder("reference")), size=(16, 16)),
        name="reference", gates={"auto": Safety(prompts=lambda: layer)}, signer=provenance.Signer(keys), size=(64, 64),
        options=api.default_options({}), seconds=600.0,
    )  # fmt: skip
    yield found
    found.stop()


@pytest.mark.soak
def test_openais_client_and_the_model_that_comes_with_mmgen(reference):
    """Its four calls; what is drawn is judged."""
    client, item = reference.client, world.item(0, "valid", 0, category="colors")
    drawn = client.images.generate(prompt=item.prompt, n=4, extra_body={"seed": 1}).data
    assert sum(judge(pixels(each.b64_json), item.claim).ok for each in drawn) >= 3
    events = list(
        client.images.generate(prompt=item.prompt, stream=True, partial_images=3, extra_body={"seed": 1})
    )
    assert [event.type for event in events] == ["image_generation.partial_image"] * 3 + [
        "image_generation.completed"
    ]
    image = base64.b64decode(drawn[0].b64_json)
    mask = np.zeros((64, 64, 4), np.uint8)
    mask[:, :32, 3] = 255
    made = pixels(
        client.images.edit(image=image, mask=png(mask), prompt="a blue star", extra_body={"seed": 2})
        .data[0]
        .b64_json
    )
    left = made[:, :32].astype(int) - pixels(drawn[0].b64_json)[:, :32]
    assert np.abs(left).mean() < 8  # marked anew, and no more
    ask = lambda text, **more: client.responses.create(
        model="reference", input=text, tools=[{"type": "image_generation"}], tool_choice="required", **more
    )
    first = ask("a red circle")
    second = ask("make it blue", previous_response_id=first.id)
    again = ask("make it blue", previous_response_id=first.id)
    assert [each.type for each in second.output] == ["image_generation_call"]
    assert again.usage.input_tokens_details.cached_tokens == again.usage.input_tokens > 256
    url = f"data:image/png;base64,{drawn[0].b64_json}"
    content = [{"type": "input_image", "image_url": url}, {"type": "input_text", "text": "What shape is it?"}]
    assert client.responses.create(
        model="reference", input=[{"role": "user", "content": content}]
    ).output_text
