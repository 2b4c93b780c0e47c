"""A server in this process, for the tests that ask it."""

import base64
import io
import secrets
import threading
import time
import types

import httpx2 as httpx
import numpy as np
import openai
import pytest
from PIL import Image as Pillow

from mmgen.safety import provenance
from mmgen.safety.gate import Safety
from mmgen.sampling import sampler as samplers
from mmgen.serving import api, wire
from mmgen.serving.engine import Engine

HARMFUL = "in the style of Hayao Miyazaki"


class Running:
    """A server on a free port of this machine, in a thread of its own."""

    def __init__(self, engine, **settings):
        self.engine = engine
        settings = {
            "name": "tiny",
            "options": api.default_options({"image": samplers.Strategy(1.0), "max_tokens": 40}),
        } | settings
        served = api.app(engine, api.Settings(**settings))
        self.server = wire.server(served, port=0, log_level="warning", drain=5)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        wait(lambda: self.server.started and engine.ready)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.http = httpx.Client(base_url=self.url, timeout=60)
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="secret-1", max_retries=0)

    def stop(self):
        self.server.should_exit = True
        self.thread.join(60)


def wait(holds, seconds=120):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it does not come about"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def model(space):
    return samplers.load(space.transformer)


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    return provenance.make_keys(tmp_path_factory.mktemp("keys") / "own")


@pytest.fixture(scope="module")
def running(model, layer, keys, tmp_path_factory):
    """Requests without a seed have always the same: the words of a model that knows nothing are judged too, and by chance read
    like harm once in some hundred answers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "secrets", types.SimpleNamespace(**vars(secrets) | {"randbelow": lambda n: 7}))
        yield from _running(model, layer, keys, tmp_path_factory)


def _running(model, layer, keys, tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "safety.jsonl"
    gates = {level: Safety(level, log, prompts=lambda: layer) for level in ("auto", "low")}
    patch = model.tokenizer.patch
    found = Running(
        Engine(model, size=(4, 4), slots=2, waiting=6, every=4),
        gates=gates, signer=provenance.Signer(keys), size=(4 * patch, 4 * patch), body=1 << 20,
    )  # fmt: skip
    found.gates, found.log, found.side = gates, log, 4 * patch
    yield found
    found.stop()


def pixels(data):
    return np.asarray(Pillow.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))


def png(array):
    data = io.BytesIO()
    Pillow.fromarray(array).save(data, "PNG")
    return data.getvalue()


def picture(side, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
