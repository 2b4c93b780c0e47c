"""The server's engine and its dialogues, without HTTP."""

import asyncio
import threading

import numpy as np
import pytest

from mmgen.document import Document, Image, Text, Turn
from mmgen.sampling.sampler import Request
from mmgen.sampling.strategies import Strategy
from mmgen.serving import dialogues
from mmgen.serving.engine import Closed, Engine, Full, Late
from tests.served import model  # noqa: F401 (a fixture)


def ask(text="x", **options):
    return lambda _: Request(Document([Turn("user", [Text(text)])]), size=(2, 2), **options)


def test_clients_take_turns_and_nobody_is_lost(model):
    engine, order = Engine(model, slots=1, every=64), []

    async def one(job, name):
        async for step in job:
            if step.turn is not None:
                order.append(name)

    async def all_of_them():
        begun, hold = threading.Event(), threading.Event()

        def slow(sampler):
            begun.set()
            hold.wait(30)
            return ask()(sampler)

        first = engine.submit(slow, client="a")
        await asyncio.to_thread(begun.wait, 60)
        jobs = [(first, "a")] + [(engine.submit(ask(seed=n), client="a"), "a") for n in range(4)]
        jobs += [(engine.submit(ask(seed=n), client=name), name) for n in range(2) for name in "bc"]
        hold.set()
        await asyncio.gather(*(one(*job) for job in jobs))

    try:
        asyncio.run(all_of_them())
    finally:
        engine.close()
    assert "".join(order) == "aabcabcaa"  # whoever asked for much waits for himself


def test_who_waits_no_more_takes_no_place(model):
    engine, hold = Engine(model, slots=1, waiting=3, every=64), threading.Event()

    async def run():
        begun = threading.Event()

        def slow(sampler):
            begun.set()
            hold.wait(30)
            return ask()(sampler)

        engine.submit(slow)
        await asyncio.to_thread(begun.wait, 60)
        gone, late, there = (engine.submit(ask(), seconds=0.05 if n == 1 else 60) for n in range(3))
        with pytest.raises(Full):
            engine.submit(ask())
        gone.gone = True
        await asyncio.sleep(0.1)
        more = [engine.submit(ask(seed=n)) for n in range(2)]
        for left in (gone, late):
            with pytest.raises(Late):
                _ = [step async for step in left]  # ... and is told at once
        hold.set()
        for job in (there, *more):
            assert [step async for step in job][-1].turn is not None

    try:
        asyncio.run(run())
    finally:
        hold.set()
        engine.close()


def test_text_only_grows(model):
    """... by whole characters, though a token may be a byte of one."""
    engine = Engine(model, slots=1, every=1)

    async def words(seed):
        prepare = lambda _: Request(
            Document([Turn("user", [Text("x")])]), "text", seed=seed, max_tokens=40, text=Strategy(1.0)
        )
        return [step async for step in engine.submit(prepare)]

    try:
        found = [asyncio.run(words(seed)) for seed in range(6)]
    finally:
        engine.close()
    assert sum(len(steps) for steps in found) > 60
    for *before, last in found:
        assert all(last.text.startswith(step.text) for step in before)


def test_deadlines_failures_and_the_end(model, monkeypatch):
    engine = Engine(model, slots=1, waiting=2, every=4)

    async def outcome(job):
        try:
            async for step in job:
                pass
            return step.turn
        except Exception as error:
            return error

    async def run():
        late = await outcome(engine.submit(ask(), seconds=-1))
        assert isinstance(late, Late)
        wrong = await outcome(engine.submit(ask("x " * 1000)))
        assert isinstance(wrong, ValueError) and "too long" in str(wrong)
        real = engine._slots.run
        monkeypatch.setattr(
            engine._slots, "run", lambda *_, **__: (_ for _ in ()).throw(FloatingPointError("not finite"))
        )
        assert isinstance(await outcome(engine.submit(ask())), FloatingPointError)
        monkeypatch.setattr(engine._slots, "run", real)
        jobs = [engine.submit(ask(seed=n)) for n in range(2)]
        closing = asyncio.get_running_loop().run_in_executor(None, engine.close)
        found = await asyncio.gather(*map(outcome, jobs))  # what is there is finished
        assert all(isinstance(turn.parts[0], Image) for turn in found)
        await closing
        with pytest.raises(Closed):
            engine.submit(ask())

    asyncio.run(run())


def test_dialogues_are_forgotten_in_time_and_by_size():
    document = Document(
        [
            Turn(
                "user",
                [Text("x"), Image(pixels=np.zeros((8, 8, 3), np.uint8), codes=np.zeros((2, 2), np.int32))],
            )
        ]
    )
    store = dialogues.Store(seconds=1000, most=5 * 1420)
    for n in range(9):
        store.put(str(n), "a", document)
    assert 2 <= len(store) < 9 and store.get("0", "a") is None and store.get("8", "b") is None
    assert store.get("8", "a").images()[0].pixels is None
    for n in range(3):
        store.put(f"other {n}", "b", document)
    assert store.get("other 2", "b") and store.get("8", "a")  # who has most makes room
    store.seconds = -1
    assert store.get("8", "a") is None and len(store) == 0
