"""The engine of the server: one thread that owns the model, a bounded queue before it, and jobs that tell how far they are.

All that computes is done in that thread, a few tokens at a time, so that whoever leaves or comes too late is let go between two dispatches.
"""

import asyncio
import collections
import dataclasses
import math
import threading
import time
import traceback
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import prometheus_client as prometheus

from mmgen.document import Document, Refusal, Text, Turn
from mmgen.sampling.sampler import Request
from mmgen.sampling.slots import Slots

BRANCHES = 2  # with the text, and without it for guidance


class Full(Exception):
    """No room in the queue; `retry` is in how many seconds there may be."""

    def __init__(self, retry):
        super().__init__(f"too many requests wait; try again in {retry} s")
        self.retry = retry


class Closed(Exception):
    """The server takes no more requests."""


class Late(Exception):
    """A request's deadline has passed."""


@dataclasses.dataclass(frozen=True)
class Step:
    """How far a job is: the text so far; `sketch`, uint8 [H, W, 3], of an image that is not finished, where one was due, and `drawn`, the
    same with white instead of the checkerboard, for those who judge what it shows (of squares they think all sorts of things); when it is
    done the whole `turn`, and how many tokens: {"image_tokens", "text_tokens"} of the prompt, "reused" of these, not read anew; "answer"."""

    text: str = ""
    sketch: np.ndarray | None = None
    drawn: np.ndarray | None = None
    turn: Turn | None = None
    tokens: dict | None = None


@dataclasses.dataclass(eq=False)
class Job:
    """What somebody waits for: `async for step in job`. prepare(sampler) -> the `Request`, in the engine's thread. partials: how many
    sketches are wanted of an image. Leaving the loop cancels it."""

    prepare: Callable[[Any], Request]
    client: str
    deadline: float  # by time.monotonic()
    partials: int
    loop: asyncio.AbstractEventLoop
    steps: asyncio.Queue
    came: float
    began: float = 0.0  # when it got its slot
    gone: bool = False
    request: Request | None = None
    words: str = ""
    sketched: int = 0
    prompt: dict | None = None

    async def __aiter__(self):
        try:
            while True:
                step = await self.steps.get()
                if isinstance(step, Exception):
                    raise step
                yield step
                if step.turn is not None:
                    return
        finally:
            self.gone = True

    def tell(self, step):
        """From the engine's thread."""
        try:
            self.loop.call_soon_threadsafe(self.steps.put_nowait, step)
        except RuntimeError:  # the loop has ended, and nobody waits
            self.gone = True


class Engine:
    """Answers jobs, `slots` at a time, through the slots of a sampler.

    size: (height, width) in patches of what is mostly asked for, for which programs are compiled first. waiting: how many more may wait. every: tokens between two looks at who came and who left. Clients take turns: who asks for much
    waits for himself. The same request comes out the same to the last bit, whoever else is there (see `Slots`).
    """

    def __init__(self, sampler, *, size=None, slots=4, waiting=64, every=32):
        if min(slots, every) < 1 or waiting < 0:
            raise ValueError(
                f"expected at least 1 slot, 1 token and 0 that wait; found {slots}, {every}, {waiting}"
            )
        self.sampler, self.size, self.every, self.most = sampler, size or (1, 1), every, waiting
        self._slots = Slots(sampler, slots, BRANCHES, sampler.longest)
        self._queues = collections.OrderedDict()  # client -> deque of jobs, the next client first
        self._active = {}  # ticket -> job
        self._lock = threading.Condition()
        self._closed, self._seconds = False, 1.0  # what a job takes in its slot, a moving mean
        self.ready = False
        self.registry = prometheus.CollectorRegistry()
        metric = lambda kind, name, *more: kind(f"mmgen_{name}", *more, registry=self.registry)
        self.counts = types.SimpleNamespace(
            jobs=metric(prometheus.Counter, "jobs", "Answers, by how they ended.", ["outcome"]),
            tokens=metric(prometheus.Counter, "tokens", "Tokens of finished answers."),
            seconds=metric(prometheus.Histogram, "job_seconds", "From asking to the whole answer."),
            waiting=metric(prometheus.Gauge, "waiting", "Jobs that wait for a slot."),
            active=metric(prometheus.Gauge, "active", "Jobs in slots."),
        )
        self.counts.waiting.set_function(lambda: self.waiting)
        self.counts.active.set_function(lambda: len(self._active))
        self._thread = threading.Thread(target=self._run, name="mmgen engine", daemon=True)
        self._thread.start()

    @property
    def waiting(self):
        return sum(map(len, self._queues.values()))

    def submit(self, prepare, *, client="", seconds=120.0, partials=0):
        """A `Job`, to be called in an event loop. Full where the queue is; Closed after `close`."""
        with self._lock:
            if self._closed:
                raise Closed("the server is shutting down")
            self._forget()
            if self.waiting >= self.most and (self.waiting or len(self._active) >= self._slots.count):
                raise Full(max(1, math.ceil(self._seconds * (self.waiting + 1) / self._slots.count)))
            now = time.monotonic()
            job = Job(
                prepare, client, now + seconds, partials, asyncio.get_running_loop(), asyncio.Queue(), now
            )
            self._queues.setdefault(client, collections.deque()).append(job)
            self._lock.notify()
        return job

    @property
    def alive(self):
        """Whether it answers at all: False once it was closed, or has broken."""
        return self._thread.is_alive()

    def close(self, seconds=30.0):
        """Takes no more, lets those that are there finish for so long, and ends."""
        with self._lock:
            self._closed = True
            self._deadline = time.monotonic() + seconds
            self._lock.notify()
        self._thread.join(seconds + 60)

    # ---- the engine's thread -----------------------------------------------------------------

    def _run(self):
        try:
            self._answer()
        finally:  # closed, or broken, which the log says: nobody is left to wait
            with self._lock:
                self._closed, self.ready = True, False
            for job in [*self._active.values(), *(job for queue in self._queues.values() for job in queue)]:
                self._end(job, Closed("the server was shut down before this was done"), "closed")

    def _answer(self):
        self._warm()
        while True:
            with self._lock:
                while not self._queues and not self._active and not self._closed:
                    self._lock.wait()
                if self._closed and (not (self._queues or self._active) or time.monotonic() > self._deadline):
                    break
                self._forget()
                taken = self._take()
            for job in taken:
                self._begin(job)
            self._let_go()
            if self._active:
                self._dispatch()

    def _warm(self):
        """Compiles what every request needs, so that the first does not wait for it."""
        request = Request(Document([Turn("user", [Text("x")])]), size=self.size, guidance=2.0)
        try:
            list(self.sampler.answers(self._slots, [request], [0], self.every))
            self.ready = True
        except Exception:  # noqa: BLE001 it is never ready, and the log says why
            traceback.print_exc()

    def _forget(self):
        """Those who wait no more, or too long, leave the queue, under the lock: they take nobody's place."""
        now = time.monotonic()
        for client, queue in list(self._queues.items()):
            there = collections.deque()
            for job in queue:
                outcome = "gone" if job.gone else "late" if now > job.deadline else None
                if outcome:
                    self._end(job, Late("the deadline passed while the request waited"), outcome)
                else:
                    there.append(job)
            if there:
                self._queues[client] = there
            else:
                del self._queues[client]

    def _take(self):
        """The jobs that get a slot now, a client after the other."""
        taken = []
        while self._queues and len(self._active) + len(taken) < self._slots.count:
            client, queue = next(iter(self._queues.items()))
            taken.append(queue.popleft())
            del self._queues[client]
            if queue:
                self._queues[client] = queue  # at the end
        return taken

    def _begin(self, job):
        job.began = time.monotonic()
        try:
            request = job.prepare(self.sampler)
            job.request = dataclasses.replace(request, document=self.sampler.encoded(request.document))
            prompt = self.sampler.prompts(job.request)[0]
            codes = int((prompt >= self.sampler.grammar.code_start).sum())
            job.prompt = {"image_tokens": codes, "text_tokens": len(prompt) - codes}
            self._active[self._slots.add(job.request)] = job
        except Exception as error:  # noqa: BLE001 whatever it is, it is this request's
            if not isinstance(error, ValueError):
                traceback.print_exc()
            self._end(job, error, "refused" if isinstance(error, ValueError) else "failed")

    def _let_go(self):
        for ticket, job in list(self._active.items()):
            late = time.monotonic() > job.deadline
            if job.gone or late:
                self._slots.cancel(ticket)
                del self._active[ticket]
                self._end(job, Late("the deadline passed"), "late" if late and not job.gone else "gone")

    def _dispatch(self):
        finished = []
        try:
            for progress in self._slots.run(self.every, first=self.waiting > 0):
                job = self._active[progress.ticket]
                turn, codes, stopped = self.sampler.turn(progress.request, progress.tokens, progress.done)
                if progress.done or stopped:
                    self._slots.cancel(progress.ticket)
                    del self._active[progress.ticket]
                    told = job.prompt | {"reused": progress.reused, "answer": len(progress.tokens)}
                    finished.append((job, turn, told))
                else:
                    self._tell(job, turn, codes)
            turns = self.sampler.with_pixels(
                [turn for _, turn, _ in finished],
                self._slots.count,
                [job.request.seed for job, *_ in finished],
            )
            for (job, _, told), turn in zip(finished, turns):
                now = time.monotonic()
                self._seconds += 0.1 * (now - job.began - self._seconds)
                self.counts.seconds.observe(now - job.came)
                self.counts.tokens.inc(told["answer"])
                job.tell(Step(_words(turn), turn=turn, tokens=told))
                self.counts.jobs.labels("done").inc()
        except Exception as error:  # noqa: BLE001 the slots are empty after it; whoever was there is told
            traceback.print_exc()
            failed, self._active = self._active, {}
            for ticket in failed:
                self._slots.cancel(ticket)
            for job in [*failed.values(), *(job for job, *_ in finished)]:
                self._end(job, error, "failed")

    def _tell(self, job, turn, codes):
        words, sketch, drawn = _words(turn), None, None
        words = words.rstrip("\ufffd")  # a character whose bytes have not all come
        if turn.parts and isinstance(turn.parts[0], Refusal):
            words = ""  # what a model says in refusing is no answer
        if codes is not None and job.partials:
            due = int((codes >= 0).mean() * (job.partials + 1))  # of 3, after each quarter
            if due > job.sketched:
                job.sketched = due
                (sketch,) = self.sampler.sketches([codes], self._slots.count)
                missing = (codes < 0).reshape(*codes.shape[:2], -1).any(-1)
                missing = missing.repeat(len(sketch) // len(codes), 0).repeat(len(sketch) // len(codes), 1)
                drawn = np.where(missing[..., None], np.uint8(255), sketch)
        if sketch is not None or words != job.words:
            job.words = words
            job.tell(Step(words, sketch, drawn))

    def _end(self, job, error, outcome):
        self.counts.jobs.labels(outcome).inc()
        job.tell(error)


def _words(turn):
    return "".join(part.text for part in turn.parts if isinstance(part, Text))
