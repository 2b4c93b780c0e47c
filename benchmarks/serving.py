"""`mmgen serve` on loopback: times of a picture while it is quiet, pictures a second beside the bare sampler's, and a crowd.

python benchmarks/serving.py --minutes 10 --json serving.json

The crowd is so many of OpenAI's clients, a key each, that ask for pictures (plain and streamed), edits (with a mask and without),
dialogues of two turns and answers in words, one request after the other, and that now and then leave before the answer. Everything drawn is
compared with what the quiet server drew for the same request before: "mixed" counts pictures that differ, "lost" requests
that got no answer or an error. The bare sampler runs in this process, in slots like the server's, before and after the server is asked for the
same pictures. The model is the one that comes with mmgen unless --checkpoint names another.
"""

import argparse
import asyncio
import base64
import collections
import contextlib
import dataclasses
import hashlib
import io
import json
import os
import platform
import random
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import numpy as np
import openai
from PIL import Image as Pillow

from mmgen import world
from mmgen.document import Document, Text, Turn
from mmgen.runtime.released import model_folder
from mmgen.safety import provenance
from mmgen.sampling import sampler as samplers
from mmgen.sampling.sampler import Request, draw_seed
from mmgen.sampling.slots import Slots
from mmgen.serving import api
from mmgen.world.render import render

KINDS = ("single_object", "two_object", "counting", "colors", "position", "color_attribution")


def main():
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    flags.add_argument("--checkpoint", default="reference")
    flags.add_argument("--side", type=int, default=64, help="of the pictures, in pixels")
    flags.add_argument("--slots", type=int, default=4)
    flags.add_argument("--clients", type=int, default=32)
    flags.add_argument("--minutes", type=float, default=10.0, help="of the crowd")
    flags.add_argument(
        "--leave", type=float, default=0.1, help="share of requests that are left before their answer"
    )
    flags.add_argument("--pictures", type=int, default=96, help="of a round beside the bare sampler; 0: none")
    flags.add_argument("--json", help="write the results here too")
    args = flags.parse_args()
    keys = [f"key-{n}" for n in range(args.clients)]
    report = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count()} | vars(args)
    with serving(args, keys) as server:
        report["seconds_to_ready"] = server.seconds
        report |= asyncio.run(measured(server, args, keys))
    print(json.dumps(report, indent=1))
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=1))


async def measured(server, args, keys):
    found = {"quiet": await quiet(server, args, keys[0])}
    if args.pictures:
        found["throughput"] = await throughput(server, args, keys)
    return found | {"crowd": await crowd(server, args, keys)}


# ---- the server ------------------------------------------------------------------------------


@dataclasses.dataclass
class Server:
    url: str
    process: subprocess.Popen
    seconds: float  # from its start until it is ready

    def client(self, key):
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=600)

    def resident(self):
        """Its memory, in MiB."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def metric(self, name):
        with urllib.request.urlopen(f"{self.url}/metrics") as found:
            (value,) = re.findall(rf"^{re.escape(name)} (\S+)$", found.read().decode(), re.MULTILINE)
        return float(value)


@contextlib.contextmanager
def serving(args, keys):
    """A server in a process of its own, with keys of its own for its pictures."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        (Path(folder) / "keys").write_text("\n".join(keys))
        provenance.make_keys(Path(folder) / "signing")
        command = [
            sys.executable, "-m", "mmgen", "serve", "--checkpoint", args.checkpoint, "--size", f"{args.side}x{args.side}", "--port", str(port),
            "--slots", str(args.slots), "--queue", str(8 * args.clients), "--deadline", "600", "--api-keys", f"{folder}/keys",
            "--keys", f"{folder}/signing", "--name", "bench",
        ]  # fmt: skip
        start = time.monotonic()
        with open(f"{folder}/log", "w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            while True:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz").close()
                    break
                except OSError:
                    if process.poll() is not None or time.monotonic() > start + 600:
                        raise RuntimeError(Path(f"{folder}/log").read_text()[-3000:]) from None
                    time.sleep(0.1)
            yield Server(f"http://127.0.0.1:{port}", process, round(time.monotonic() - start, 2))
        finally:
            process.terminate()
            process.wait(200)


# ---- what is asked ---------------------------------------------------------------------------


@dataclasses.dataclass
class Task:
    """ask(client) -> what it drew, as digests."""

    name: str
    kind: str
    ask: Callable

    async def answer(self, client):
        """... or that the server does not show it, which is an answer too."""
        try:
            return await self.ask(client)
        except openai.APIError as error:
            if error.code == "moderation_blocked":
                return ["stopped"]
            raise


def digest(data):
    pixels = np.asarray(Pillow.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))
    return hashlib.blake2b(pixels.tobytes(), digest_size=8).hexdigest() + str(pixels.shape)


def png(pixels):
    data = io.BytesIO()
    Pillow.fromarray(pixels).save(data, "PNG")
    return data.getvalue()


def tasks(args):
    side, found = args.side, []

    def add(kind, n, ask):
        found.append(Task(f"{kind} {n}", kind, ask))

    def draws(prompt, seed):
        async def ask(client):
            made = await client.images.generate(prompt=prompt, extra_body={"seed": seed})
            return [digest(made.data[0].b64_json)]

        return ask

    def streams(prompt, seed):
        async def ask(client):
            events = await client.images.generate(
                prompt=prompt, stream=True, partial_images=2, extra_body={"seed": seed}
            )
            return [digest(event.b64_json) async for event in events][-1:]

        return ask

    def edits(image, prompt, mask, seed):
        async def ask(client):
            more = {"mask": mask} if mask else {}
            made = await client.images.edit(image=image, prompt=prompt, extra_body={"seed": seed}, **more)
            return [digest(made.data[0].b64_json)]

        return ask

    def talks(prompt, seed):
        tool = [{"type": "image_generation", "seed": seed}]

        async def ask(client):
            drawn, before = [], {}
            for text in (prompt, "make it blue"):
                said = await client.responses.create(
                    model="bench", input=text, tool_choice="required", extra_body={"tools": tool}, **before
                )
                drawn += [digest(each.result) for each in said.output if each.type == "image_generation_call"]
                before = {"previous_response_id": said.id}
            assert len(drawn) == 2
            return drawn

        return ask

    def questions(image):
        url = f"data:image/png;base64,{base64.b64encode(image).decode()}"
        content = [{"type": "input_image", "image_url": url}, {"type": "input_text", "text": "what is it?"}]

        async def ask(client):
            said = await client.responses.create(model="bench", input=[{"role": "user", "content": content}])
            assert said.status == "completed"
            return []  # words have a seed of their own

        return ask

    for n in range(24):
        prompt = world.item(0, "train", n, category=KINDS[n % len(KINDS)]).prompt
        add("picture", n, draws(prompt, n)) if n % 2 else add("stream", n, streams(prompt, n))
    half = np.zeros((side, side, 4), np.uint8)
    half[:, : side // 2, 3] = 255
    for n in range(12):
        item = world.item(1, "train", n, category=KINDS[n % len(KINDS)])
        image = png(render(item.scene, side, side))
        if n < 8:
            mask = png(half) if n % 2 else None
            add("masked" if mask else "edit", n, edits(image, "add a small red star", mask, n))
        add("talk", n, talks(item.prompt, n)) if n < 6 else add("question", n, questions(image))
    return found


async def quiet(server, args, key):
    """Seconds until the first partial and the whole picture, of the first request of all and of later ones."""
    client, rows = server.client(key), []
    for n in range(6):
        start, partial = time.monotonic(), None
        events = await client.images.generate(
            prompt="a blue square left of a yellow star",
            stream=True,
            partial_images=3,
            extra_body={"seed": n},
        )
        async for event in events:
            if event.type.endswith("partial_image") and partial is None:
                partial = time.monotonic() - start
        rows.append((partial, time.monotonic() - start))
    first, later = rows[0], [round(statistics.median(each), 2) for each in zip(*rows[1:])]
    start = time.monotonic()
    await client.images.generate(prompt="a blue square left of a yellow star", extra_body={"seed": 0})
    return {
        "first_request": {"partial": round(first[0], 2), "whole": round(first[1], 2)},
        "later": {"partial": later[0], "whole": later[1], "whole_without_stream": round(time.monotonic() - start, 2)},
    }  # fmt: skip


async def throughput(server, args, keys):
    """Pictures a second: the bare sampler, the server asked by all clients at once, the bare sampler again."""
    sampler = samplers.load(model_folder(args.checkpoint))
    grid = (args.side // sampler.tokenizer.patch,) * 2
    prompts = [world.item(2, "train", n, category=KINDS[n % len(KINDS)]).prompt for n in range(48)]
    options = api.default_options({})
    requests = [
        Request(Document([Turn("user", [Text(prompt)])]), "image", grid, seed=draw_seed(n, 0), **options)
        for n, prompt in enumerate(prompts)
    ]
    slots = Slots(sampler, args.slots, 2, sampler.longest)

    def bare(count):
        start = time.monotonic()
        for _ in sampler.answers(slots, [requests[n % len(requests)] for n in range(count)], range(count)):
            pass
        return count / (time.monotonic() - start)

    async def served(count):
        left, start = iter(range(count)), time.monotonic()

        async def one(key):
            client = server.client(key)
            for n in left:
                seed = n % len(prompts)
                await client.images.generate(prompt=prompts[seed], extra_body={"seed": seed})

        await asyncio.gather(*map(one, keys))
        return count / (time.monotonic() - start)

    bare(1)
    found = [bare(args.pictures)]
    for _ in range(2):
        found += [await served(args.pictures), bare(args.pictures)]
    ratios = [found[n] / ((found[n - 1] + found[n + 1]) / 2) for n in (1, 3)]
    return {
        "bare_pictures_a_second": [round(each, 3) for each in found[::2]],
        "served_pictures_a_second": [round(each, 3) for each in found[1::2]],
        "ratios": [round(each, 3) for each in ratios],
    }  # fmt: skip


async def crowd(server, args, keys):
    asked = tasks(args)
    calm = server.client(keys[0])
    expected = {task.name: await task.answer(calm) for task in asked}
    outcomes, seconds, faults, memory = collections.Counter(), collections.defaultdict(list), [], []
    end = time.monotonic() + 60 * args.minutes

    async def one(n):
        client, rng = server.client(keys[n]), random.Random(n)
        while time.monotonic() < end:
            task, start = rng.choice(asked), time.monotonic()
            # Some leave while they wait, some while they are drawn for, and some come too late for that.
            patience = (
                rng.choice((0.1, 1.0, 10.0, 20.0)) * rng.random() if rng.random() < args.leave else None
            )
            try:
                drawn = await asyncio.wait_for(task.answer(client), patience)
            except TimeoutError:
                outcomes["left"] += 1
                continue
            except Exception as error:  # noqa: BLE001 whatever it is: a request without its answer
                outcomes["lost"] += 1
                faults.append(f"{task.name}: {error!r}"[:300])
                continue
            outcomes["answered"] += 1
            outcomes["pictures"] += len(drawn)
            seconds[task.kind].append(time.monotonic() - start)
            if drawn != expected[task.name]:
                outcomes["mixed"] += 1
                faults.append(f"{task.name}: another picture than before")

    async def watch():
        while True:
            memory.append(server.resident())
            await asyncio.sleep(1)

    watching = asyncio.create_task(watch())
    start = time.monotonic()
    await asyncio.gather(*map(one, range(len(keys))))
    took = time.monotonic() - start
    watching.cancel()
    for _ in range(100):
        idle = server.metric("mmgen_active") + server.metric("mmgen_waiting") == 0
        if idle:
            break
        await asyncio.sleep(0.2)
    again = {task.name: await task.answer(calm) for task in asked}
    early = memory[len(memory) // 5]
    quantile = lambda values, q: round(float(np.quantile(values, q)), 2)
    return {
        "minutes": round(took / 60, 2),
        **{name: outcomes[name] for name in ("answered", "left", "lost", "mixed")},
        "pictures_a_second": round(outcomes["pictures"] / took, 3),
        "stopped_requests": [name for name, drawn in expected.items() if drawn == ["stopped"]],
        "idle_after": idle,
        "same_after": again == expected,
        "seconds": {
            kind: {"n": len(each), "p50": quantile(each, 0.5), "p95": quantile(each, 0.95)}
            for kind, each in sorted(seconds.items())
        },
        "memory_mib": {"after_a_fifth": round(early), "end": round(memory[-1]), "ratio": round(memory[-1] / early, 4)},
        "faults": faults[:20],
    }  # fmt: skip


if __name__ == "__main__":
    main()
