"""How the server speaks HTTP: bodies within limits, lines that are closed when nothing comes, events, errors in the API's form."""

import asyncio
import hmac
import json
import time
import traceback

import uvicorn
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.requests import ClientDisconnect
from uvicorn.protocols.http.h11_impl import H11Protocol

from mmgen.serving.engine import Closed, Full, Late
from mmgen.serving.requests import Wrong

SMALL = {"/v1/images/generations": 1 << 20}  # bytes of bodies that hold no pictures
MANY = 4  # times the largest body: what all that wait may hold
HEAD_SECONDS = 20  # in which a line that is open has to ask for something


class Keys:
    """Who asks for anything under /v1 has one of `keys`, if there are any, before anything else of a request is read. Who it was is in
    the request's state: `client`, None where nobody needs a key."""

    def __init__(self, app, keys):
        self.app, self.keys = app, [f"Bearer {key}".encode() for key in keys]

    async def __call__(self, scope, receive, send):
        if scope["type"] == "http":
            said = [value for name, value in scope["headers"] if name == b"authorization"]
            found = [key for key in self.keys if len(said) == 1 and hmac.compare_digest(said[0], key)]
            scope.setdefault("state", {})["client"] = found[0] if found else None
            if self.keys and not found and _path(scope).startswith("/v1"):
                words = "expected a key of this server: Authorization: Bearer KEY"
                wrong = Wrong(401, words, "invalid_api_key")
                close = {"Connection": "close"}
                return await JSONResponse({"error": wrong.error}, 401, headers=close)(scope, receive, send)
        await self.app(scope, receive, send)


def _path(scope):
    """The path within the application, wherever it is mounted."""
    return scope["path"].removeprefix(scope.get("root_path", ""))


class Limit:
    """Bodies over `most` bytes are not read on, by their header or as they come, nor those that take over `seconds` to come, nor where all
    that wait for their answers have MANY times `most`. Who sends them is told, and the line is closed, as the rest of the body is on it."""

    def __init__(self, app, most, seconds):
        self.app, self.most, self.seconds, self.held = app, most, seconds, 0

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        full = Wrong(
            429,
            "too much is being sent; try again in 5 s",
            "rate_limit_exceeded",
            kind="rate_limit_error",
            retry=5,
        )
        most = min(self.most, SMALL.get(_path(scope), self.most))
        large = Wrong(413, f"the body is over {most} bytes", "request_too_large")
        slow = Wrong(408, f"the body took over {self.seconds:g} s to come", "request_too_slow")
        close = {"Connection": "close"}
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or int(length) > most:
            return await JSONResponse({"error": large.error}, 413, headers=close)(scope, receive, send)
        end, seen, whole, wrong, said = time.monotonic() + self.seconds, 0, False, None, False

        async def counted():
            nonlocal seen, whole, wrong
            if whole:  # what comes now is that the client has left
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(end - time.monotonic(), 0.001))
            except TimeoutError:
                wrong = slow
                raise wrong from None
            seen += len(message.get("body", b""))
            self.held += len(message.get("body", b""))
            whole = not message.get("more_body")
            if seen > most:
                wrong = large
                raise wrong
            if self.held > MANY * self.most:
                wrong = full
                raise wrong
            return message

        async def answer(message):
            """What is said of a body that was not read to its end, whatever became of it above, is that."""
            nonlocal said
            if not wrong:
                await send(message)
            elif not said:
                said = True
                retry = {"Retry-After": str(wrong.retry)} if wrong.retry else {}
                response = JSONResponse({"error": wrong.error}, wrong.status, headers=close | retry)
                await response(scope, receive, send)

        try:
            await self.app(scope, counted, answer)
        except ClientDisconnect:  # before the body was whole: there is nobody to answer, and nothing for the log
            pass
        finally:
            self.held -= seen


class Line(H11Protocol):
    """A connection; one on which no whole request head comes is closed, though bytes may drip in."""

    idle = watch = None

    def connection_made(self, transport):
        super().connection_made(transport)
        self.watch = self.loop.call_later(HEAD_SECONDS, self.look)

    def connection_lost(self, exc):
        self.watch.cancel()
        super().connection_lost(exc)

    def look(self):
        answered = self.cycle is None or self.cycle.response_complete
        if answered and self.idle == (self.cycle,):  # as it was when it was looked at last
            return self.transport.close()
        self.idle = (self.cycle,) if answered else None
        self.watch = self.loop.call_later(HEAD_SECONDS, self.look)


def server(served, *, drain=30.0, **config):
    """The `uvicorn.Server` of an `app`. drain: seconds that running requests get when it is stopped. config: see `uvicorn.Config`."""
    return uvicorn.Server(
        uvicorn.Config(
            served,
            http=Line,
            ws="none",
            timeout_graceful_shutdown=int(drain) or 1,
            server_header=False,
            limit_concurrency=1000,
            h11_max_incomplete_event_size=1 << 16,
            **config,
        )  # fmt: skip
    )


class Stream(StreamingResponse):
    """Server-sent events of a job; an error is the last of them. However it ends, and if nobody is there when it begins, the job is let go."""

    def __init__(self, events, job):
        self._job = job
        super().__init__(
            _lines(events), media_type="text/event-stream", headers={"Cache-Control": "no-store"}
        )

    async def __call__(self, scope, receive, send):
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._job.gone = True


async def _lines(events):
    try:
        async for event in events:
            yield f"event: {event['type']}\ndata: {json.dumps(event, ensure_ascii=False)}\n\n"
    except Exception as error:  # noqa: BLE001 the status has been sent: this is how it is said
        if not isinstance(error, (Wrong, Closed, Full, Late, ValueError)):
            traceback.print_exc()
        error = error if isinstance(error, Wrong) else as_wrong(error)
        yield f"event: error\ndata: {json.dumps({'type': 'error', 'error': error.error})}\n\n"


def as_wrong(error):
    """An engine's error as clients see it."""
    if isinstance(error, Full):
        return Wrong(429, str(error), "rate_limit_exceeded", kind="rate_limit_error", retry=error.retry)
    if isinstance(error, Closed):
        return Wrong(503, str(error), "server_closed", kind="server_error", retry=30)
    if isinstance(error, Late):
        return Wrong(504, str(error), "deadline", kind="server_error")
    if isinstance(error, ValueError):
        return Wrong(400, str(error), "invalid_value")
    return Wrong(500, "the server failed; its log says why", "server_error", kind="server_error")
