"""The server, asked by those who mean harm, or know no better."""

import collections
import gc
import io
import json
import logging
import resource
import socket
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pillow

from mmgen.safety.gate import Safety
from mmgen.serving import wire
from mmgen.serving.engine import Engine
from tests.served import Running, keys, model, picture, png, running, wait  # noqa: F401 (fixtures)


def edit(running, **files):
    more = {"prompt": (None, "x")} | files
    return running.http.post("/v1/images/edits", files=more)


def bomb():
    """A small PNG of 20,000 x 20,000 pixels."""
    data = io.BytesIO()
    Pillow.new("1", (20_000, 20_000)).save(data, "PNG")
    return data.getvalue()


def test_uploads_are_decoded_within_limits(running):
    good = png(picture(16))
    mask = np.zeros((8, 8, 4), np.uint8)
    for files, words in (
        ({}, "expected 1 to 16 files"),
        ({"image": b"no picture"}, "image"),
        ({"image": bomb()}, "pixels"),
        ({"image": good[: len(good) // 2]}, "image"),
        ({"image": good, "mask": b"no"}, "not a PNG"),
        ({"image": good, "mask": png(mask)}, "expected the size of the image"),
        ({"image": good, "mask": good}, "with alpha"),
        ({"image": good, "mask": png(np.full((16, 16, 4), 255, np.uint8))}, "nothing in it"),
        ({"image": good, "other": good}, "does not know such a file"),
        ({"image": good, "watermark": (None, "1")}, "does not know it"),
        ({"image": good, "seed": (None, "one")}, "seed"),
    ):
        found = edit(running, **files)
        assert found.status_code == 400 and words in found.json()["error"]["message"], (
            files.keys(),
            found.text,
        )
    found = running.http.post("/v1/images/edits", json={"prompt": "x"})
    assert found.status_code == 400 and "multipart" in found.json()["error"]["message"]
    found = running.http.post(
        "/v1/images/edits",
        content=b"--x\r\nbroken",
        headers={"content-type": "multipart/form-data; boundary=x"},
    )
    assert found.status_code == 400
    assert edit(running, image=b"0" * (2 << 20)).status_code == 413
    # ... and where it does not say how much will come.
    chunks = (b"0" * 65536 for _ in range(64))
    assert (
        running.http.post(
            "/v1/responses", content=chunks, headers={"content-type": "application/json"}
        ).status_code
        == 413
    )


@pytest.mark.parametrize("path", ["images/generations", "responses"])
def test_halves_of_characters(running, path):
    """Surrogates that JSON can write and UTF-8 cannot: refused where they come, and not where they would go."""
    for body in (r'{"%s": "\ud83d"}', r'{"%s": "x", "user": "\ud83d"}', r'{"%s": "x", "\ud83d": 1}'):
        body = body % ("input" if path == "responses" else "prompt")
        found = running.http.post(f"/v1/{path}", content=body, headers={"content-type": "application/json"})
        assert found.status_code == 400 and found.json()["error"]["message"], found.text
    if path == "responses":
        body = r'{"input": "x", "metadata": {"a": "\ud83d"}}'
        found = running.http.post(f"/v1/{path}", content=body, headers={"content-type": "application/json"})
        assert found.status_code == 400


def test_who_leaves_frees_his_slot(running):
    body = json.dumps({"prompt": "a", "stream": True, "partial_images": 3}).encode()
    head = f"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    gone = lambda: (
        running.engine.counts.jobs.labels("gone")._value.get()
        + running.engine.counts.jobs.labels("done")._value.get()
    )
    before = gone()
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", running.port)) as line:
            line.sendall(head.encode() + body)
            line.recv(1)
    wait(lambda: gone() == before + 5 and not running.engine._active and not running.engine.waiting)
    assert running.client.images.generate(prompt="still here").data


def line(running, *pieces, pause=0.0):
    """What a server answers to bytes that come piece by piece."""
    with socket.create_connection(("127.0.0.1", running.port), timeout=30) as connection:
        for piece in pieces:
            try:
                connection.sendall(piece)
            except OSError:  # it has closed the line
                break
            time.sleep(pause)
        found = b""
        while more := connection.recv(1 << 16):
            found += more
    return found


def test_all_bodies_together_are_bounded(running, monkeypatch):
    monkeypatch.setattr(wire, "MANY", 0.5)
    found = running.http.post(
        "/v1/responses", content=b" " * (700 << 10), headers={"content-type": "application/json"}
    )
    assert found.status_code == 429 and found.headers["retry-after"] == "5", found.text
    assert running.http.post("/v1/images/generations", json={"prompt": "x"}).status_code == 200


def test_slow_and_aborted_uploads(model, layer, monkeypatch):
    """A body that does not end, a head that does not, and lines on which nothing comes: told, closed, and nobody else waits for it."""
    monkeypatch.setattr(wire, "HEAD_SECONDS", 0.4)
    running = Running(
        Engine(model, slots=1, every=8), gates={"auto": Safety(prompts=lambda: layer)}, seconds=1.0
    )
    failed = []
    monkeypatch.setattr(logging.getLogger("uvicorn.error"), "error", lambda *said, **_: failed.append(said))
    head = b"POST /v1/images/edits HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=x\r\nContent-Length: 5000\r\n\r\n"
    try:
        found = line(running, head, *[b"--x"] * 9, pause=0.2)
        assert (
            b"408" in found.splitlines()[0]
            and b"request_too_slow" in found
            and b"connection: close" in found.lower()
        )
        assert line(running, *[b"G"] * 9, pause=0.2) == line(running) == b""
        kept = line(running, b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n", *[b"G"] * 9, pause=0.2)
        assert kept.startswith(b"HTTP/1.1 200")  # ... and then the line was closed
        for cut in range(0, len(head), 7):
            with socket.create_connection(("127.0.0.1", running.port)) as connection:
                connection.sendall(head[:cut])
        for n in range(20):
            with socket.create_connection(("127.0.0.1", running.port)) as connection:
                connection.sendall(head + b"--x" * n)
        state = running.server.server_state
        wait(lambda: not state.connections and not state.tasks)
        assert not failed
        assert running.http.get("/readyz").status_code == 200 and not running.engine.waiting
    finally:
        running.stop()


def hammer(running, examples):
    """Requests that the description allows, and some that it does not: no answer is a failure of the server."""
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings
    from schemathesis.checks import not_a_server_error

    schema = schemathesis.openapi.from_url(f"{running.url}/openapi.json")
    asked = 0
    for found in schema.get_all_operations():
        operation = found.ok()
        strategies = [operation.as_strategy(mode) for mode in schemathesis.GenerationMode]

        @given(case=strategies[0] | strategies[1])
        @settings(
            max_examples=examples, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        def send(case):
            nonlocal asked
            asked += 1
            case.call_and_validate(checks=[not_a_server_error], timeout=60)

        send()
    assert running.http.get("/readyz").status_code == 200 and running.engine._thread.is_alive()
    return asked


def mangle(running, examples):
    """Forms that are damaged anywhere, or end early: 400s, and no failure."""
    data = io.BytesIO()
    line = b"--x\r\nContent-Disposition: form-data; name="
    data.write(
        line
        + b'"prompt"\r\n\r\na star\r\n'
        + line
        + b'"image"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n'
    )
    data.write(png(picture(16)) + b"\r\n--x--\r\n")
    whole, rng = data.getvalue(), np.random.default_rng(0)
    found = collections.Counter()
    for n in range(examples):
        form = bytearray(whole)
        for place in rng.integers(0, len(form), rng.integers(1, 6)):
            form[place] = rng.integers(0, 256)
        if n % 3 == 0:
            del form[rng.integers(0, len(form)) :]
        asked = running.http.post(
            "/v1/images/edits",
            content=bytes(form),
            headers={"content-type": "multipart/form-data; boundary=x"},
        )
        found[asked.status_code] += 1
    assert set(found) <= {200, 400}, found
    return found.total()


def test_what_the_description_allows_never_fails(running):
    assert hammer(running, 25) >= 50 and mangle(running, 40) == 40


def test_without_a_key_nothing_is_read(model, layer):
    running = Running(
        Engine(model, slots=1, every=8), gates={"auto": Safety(prompts=lambda: layer)}, keys=("secret-1",)
    )
    try:
        head = "POST /v1/{} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {}\r\n{}\r\n"
        for path, key, status in (
            ("responses", "", b"401"),
            ("images/edits", "Authorization: Bearer secret-2\r\n", b"401"),
            ("images/generations", "Authorization: Bearer secret-1\r\n", b"413"),  # which is small
        ):
            assert status in line(running, head.format(path, 40 << 20, key).encode()).splitlines()[0]
    finally:
        running.stop()


def drop(running, examples):
    """Uploads that stop anywhere."""
    body = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n' + png(picture(16))
    head = b"POST /v1/images/edits HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=x\r\nContent-Length: 90000\r\n\r\n"
    rng = np.random.default_rng(1)
    for _ in range(examples):
        with socket.create_connection(("127.0.0.1", running.port), timeout=30) as connection:
            connection.sendall((head + body)[: rng.integers(0, len(head + body))])
    return examples


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.soak
def test_ten_thousand_requests(running):
    """... and memory stays where it is after the first two thousand."""
    rounds = []
    for _ in range(5):
        asked = hammer(running, 400) + mangle(running, 600) + drop(running, 200)
        gc.collect()
        rounds.append((asked, resident()))
    print([(asked, size >> 20) for asked, size in rounds])
    assert sum(asked for asked, _ in rounds) >= 10_000
    assert running.client.images.generate(prompt="still here").data
    assert rounds[-1][1] < 1.05 * rounds[0][1]
    assert not running.engine._active and not running.engine.waiting
