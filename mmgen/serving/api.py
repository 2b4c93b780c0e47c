"""The HTTP API, in the shape of OpenAI's: images, edits, dialogues; with every request and every picture through the gate.

What is asked for and cannot be done is refused, never ignored. `requests.py` reads what clients send; the `Engine` draws.
"""

import asyncio
import base64
import contextlib
import hashlib
import hmac
import io
import secrets
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import prometheus_client as prometheus
import pydantic
from fastapi import Depends, FastAPI
from fastapi import Request as Asked
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from PIL import Image as Pillow
from starlette.exceptions import HTTPException

from mmgen.data import images
from mmgen.document import Document, Image, Refusal, Text, Turn
from mmgen.sampling.dialogue import recent
from mmgen.sampling.sampler import Request, draw_seed
from mmgen.sampling.strategies import Strategy
from mmgen.serving import dialogues, requests, responses, wire
from mmgen.serving.requests import Wrong

PAGE = Path(__file__).parent / "page"
FORMATS = {"png": ".png", "webp": ".webp", "jpeg": ".jpeg"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; form-action 'none'; "
    "frame-ancestors 'none'; base-uri 'none'"
)


@pydantic.dataclasses.dataclass(config=pydantic.ConfigDict(arbitrary_types_allowed=True))
class Settings:
    """What a server is started with. gates: {level: `safety.gate.Safety`}. signer: or None. keys: of the API; none needed where there
    are none. size: (width, height) in pixels of what is drawn where "auto" is asked for; None: the model chooses. options: of `Request`, beside
    those that are asked for. seconds: the deadline of a request. body: bytes of one."""

    name: str
    gates: dict
    signer: Any = None
    keys: tuple = ()
    size: tuple[int, int] | None = None
    options: dict = pydantic.Field(default_factory=dict)
    seconds: float = 120.0
    body: int = 64 << 20
    store: Any = None


def app(engine, settings):
    """The FastAPI application over an `Engine`, which it closes when it ends."""
    sampler, store = engine.sampler, settings.store or dialogues.Store()
    scale = sampler.refining.refiner.scale if sampler.refining else 1
    patch, most = sampler.tokenizer.patch * scale, sampler.grammar.max_side * sampler.tokenizer.patch * scale
    secret = secrets.token_bytes(16)

    @contextlib.asynccontextmanager
    async def lifespan(_):
        yield
        await asyncio.to_thread(engine.close, 0)  # whoever still waited has been given up by the server

    said = {"model": requests.Failure, "description": "what is wrong, in words"}
    api = FastAPI(
        title="mmgen", version="1", lifespan=lifespan, docs_url=None, redoc_url=None, responses={"4XX": said, "5XX": said}
    )  # fmt: skip
    api.add_middleware(wire.Limit, most=settings.body, seconds=settings.seconds)
    api.add_middleware(wire.Keys, keys=settings.keys)  # before it, so that nobody's body is read

    # ---- who asks, and what cannot be ----

    def client(asked: Asked):
        """Who asks: by key, which `wire.Keys` has seen to, or by address."""
        if not settings.keys:
            return asked.client.host if asked.client else ""
        return hmac.new(secret, asked.state.client, hashlib.sha256).hexdigest()

    Client = Annotated[str, Depends(client)]

    @api.exception_handler(Wrong)
    async def wrong(_, error):
        headers = {"Retry-After": str(error.retry)} if error.retry else None
        return JSONResponse({"error": error.error}, error.status, headers=headers)

    @api.exception_handler(RequestValidationError)
    async def invalid(_, error):
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        unknown = first["type"] == "extra_forbidden"
        words = f"{where}: this server does not know it" if unknown else f"{where or 'body'}: {first['msg']}"
        found = Wrong(
            400, words, "unknown_parameter" if unknown else "invalid_value", where.split(".")[0] or None
        )
        return JSONResponse({"error": found.error}, 400)

    @api.exception_handler(HTTPException)
    async def elsewhere(_, error):
        found = Wrong(error.status_code, str(error.detail), "not_found" if error.status_code == 404 else None)
        return JSONResponse({"error": found.error}, error.status_code, headers=error.headers)

    @api.exception_handler(Exception)
    async def broken(_, error):
        found = Wrong(500, "the server failed; its log says why", "server_error", kind="server_error")
        return JSONResponse({"error": found.error}, 500)

    # ---- what is asked, checked ----

    def check(options):
        if options.model not in (None, settings.name):
            raise Wrong(
                404, f"model: expected {settings.name!r}, found {options.model!r}", "model_not_found", "model"
            )
        if getattr(options, "background", None) == "transparent" and not sampler.tokenizer.alpha:
            raise Wrong(
                400, "background: this model draws no transparent pictures", "invalid_value", "background"
            )
        if getattr(options, "background", None) == "transparent" and options.output_format == "jpeg":
            raise Wrong(
                400,
                "background: a jpeg is never transparent; ask for png or webp",
                "invalid_value",
                "background",
            )

    def grid(text):
        """ "WIDTHxHEIGHT", "auto" -> (height, width) in patches, or None where the model chooses."""
        if text == "auto":
            pair = settings.size
        else:
            sides = text.split("x")
            if len(sides) != 2 or not all(
                side.isascii() and side.isdigit() and len(side) < 6 for side in sides
            ):
                raise Wrong(
                    400, f"size: expected 'auto' or WIDTHxHEIGHT, found {text[:40]!r}", "invalid_size", "size"
                )
            pair = tuple(map(int, sides))
        if pair and any(side % patch or not 0 < side <= most for side in pair):
            raise Wrong(
                400,
                f"size: expected sides that are multiples of {patch}, up to {most}",
                "invalid_size",
                "size",
            )
        return pair and (pair[1] // patch, pair[0] // patch)

    def gate_of(level):
        return settings.gates.get(level) or next(iter(settings.gates.values()))

    def stop(decision, stage):
        """Wrong where the gate lets nothing through."""
        if not decision.allowed:
            words = decision.reason + (f" {decision.offer}" if decision.offer else "")
            raise Wrong(
                400, words, "moderation_blocked", kind="image_generation_user_error",
                details={"moderation_stage": stage, "categories": list(decision.categories)},
            )  # fmt: skip

    async def checked(gate, document, edited):
        """The document has passed layers 1 and 2."""
        stop(await asyncio.to_thread(gate.prompt, document), "input")
        if shown := [image.pixels for image in document.images() if image.pixels is not None]:
            stop(await asyncio.to_thread(gate.shown, shown, edited), "input")

    def options_of(options, gate, seed):
        more = dict(settings.options)
        if options.guidance is not None:
            more["guidance"] = options.guidance
        return more | {"seed": seed, "refusals": gate.refusal_bias if sampler.refuses else None}

    decoding = asyncio.Semaphore(1)  # a small file may have many pixels

    async def decoded(read, *given):
        """read(*given), beside the event loop."""
        async with decoding:
            return await asyncio.to_thread(read, *given)

    # ---- what is answered ----

    async def drawn(pixels, options, gate, seed, codes=None):
        """The bytes of a picture: marked, encoded and signed, with the codes that it was made of."""

        def make():
            image = images.straight(pixels)
            if options.background == "opaque" and image.shape[-1] == 4:
                image = np.asarray(Pillow.fromarray(image).convert("RGB"))
            signer = settings.signer
            image, data = (signer.mark(image) if signer else image), io.BytesIO()
            picture = Pillow.fromarray(image)
            if options.output_format == "jpeg":
                picture = picture.convert("RGB")
            how = {} if options.output_format == "png" else {"quality": options.output_compression}
            if options.output_format == "webp" and options.output_compression == 100:
                how = {"lossless": True}
            picture.save(data, options.output_format.upper(), **how)
            if not signer:
                return data.getvalue()
            recipe = {
                "seed": seed,
                "step": sampler.step,
                "tokenizer": sampler.tokenizer.hash,
                "gate": gate.about,
            }
            # Pixels are what is judged when it is shown again, so that they must be those of the codes.
            exact = len(picture.getbands()) == pixels.shape[-1] and (
                options.output_format == "png" or how.get("lossless")
            )
            return signer.sign(
                data.getvalue(), FORMATS[options.output_format], recipe, codes=codes if exact else None
            )

        return base64.b64encode(await asyncio.to_thread(make)).decode()

    async def submitted(jobs, who, partials=0):
        """Jobs of [prepare]; Wrong where the queue has no room for all."""
        found = []
        try:
            for prepare in jobs:
                found.append(engine.submit(prepare, client=who, seconds=settings.seconds, partials=partials))
        except Exception as error:
            for job in found:
                job.gone = True
            raise wire.as_wrong(error) from None
        return found

    async def finished(job, asked):
        """The last step of a job, unless who asked has gone."""
        steps = aiter(job)
        while True:
            waiting = asyncio.ensure_future(anext(steps))
            while not (await asyncio.wait({waiting}, timeout=0.25))[0]:
                if await asked.is_disconnected():
                    job.gone = True
                    waiting.cancel()
                    raise Wrong(499, "the client has gone", "client_gone")
            try:
                step = waiting.result()
            except Exception as error:
                raise wire.as_wrong(error) from None
            if step.turn is not None:
                return step

    async def passed(step, gate):
        """The turn of a last step, which layers 2 and 3 let through."""
        stop(await asyncio.to_thread(gate.answered, step.turn), "output")
        return step.turn

    async def sketched(step, gate):
        """Whether a step has a sketch that is shown. One that layer 3 stops is left out, and the answer goes on: half a
        picture may look like what the whole one is not, and that is judged anyway."""
        return step.sketch is not None and (await asyncio.to_thread(gate.drawn, [step.drawn])).allowed

    def about(options, pixels):
        size = f"{pixels.shape[1]}x{pixels.shape[0]}"
        alpha = pixels.shape[-1] == 4 and options.background != "opaque"
        return {
            "size": size, "output_format": options.output_format, "quality": "medium",
            "background": "transparent" if alpha else "opaque",
        }  # fmt: skip

    async def pictures(asked, options, who, document, kind, prepare, paste):
        """Answers a generation or an edit. prepare(seed) -> a job's function; paste(image) -> that which is shown."""
        gate = gate_of(options.moderation)
        seed = secrets.randbelow(2**31) if options.seed is None else options.seed
        if options.stream and options.n > 1:
            raise Wrong(400, "n: one picture is streamed at a time", "invalid_value", "n")
        if options.partial_images and not options.stream:
            raise Wrong(
                400, "partial_images: are streamed; say stream too", "invalid_value", "partial_images"
            )
        await checked(gate, document, kind == "image_edit")
        seeds = [seed, *(draw_seed(seed, n) for n in range(1, options.n))]
        jobs = await submitted([prepare(each, gate) for each in seeds], who, options.partial_images)
        identifier = options.safety_identifier or options.user
        more = {"safety_identifier": identifier} if identifier else {}
        if options.stream:
            return wire.Stream(streamed(jobs[0], options, gate, seed, kind, paste, more), jobs[0])
        try:
            steps = await asyncio.gather(*(finished(job, asked) for job in jobs))
            turns = [await passed(step, gate) for step in steps]
        finally:
            for job in jobs:
                job.gone = True
        shown = [paste(turn.parts[0]) for turn in turns]
        data = [
            {"b64_json": await drawn(image.pixels, options, gate, each, image.codes), "seed": each}
            for image, each in zip(shown, seeds)
        ]
        return {
            "created": int(time.time()),
            "data": data,
            "usage": _usage(steps),
            **about(options, shown[0].pixels),
            **more,
        }

    async def streamed(job, options, gate, seed, kind, paste, more):
        index = 0
        async for step in job:
            if await sketched(step, gate):
                yield {
                    "type": f"{kind}.partial_image", "partial_image_index": index, "created_at": int(time.time()),
                    "b64_json": await drawn(step.sketch, options, gate, seed), **about(options, step.sketch), **more,
                }  # fmt: skip
                index += 1
            if step.turn is not None:
                turn = await passed(step, gate)
                image = paste(turn.parts[0])
                yield {
                    "type": f"{kind}.completed", "created_at": int(time.time()), "seed": seed, "usage": _usage([step]),
                    "b64_json": await drawn(image.pixels, options, gate, seed, image.codes), **about(options, image.pixels), **more,
                }  # fmt: skip

    @api.post("/v1/images/generations")
    async def generate(asked: Asked, options: requests.Generation, who: Client):
        check(options)
        size = grid(options.size)
        document = Document([Turn("user", [requests.text(options.prompt)])])

        def prepare(seed, gate):
            return lambda _: Request(document, "image", size, **options_of(options, gate, seed))

        return await pictures(asked, options, who, document, "image_generation", prepare, lambda x: x)

    @api.post("/v1/images/edits", openapi_extra=requests.FORM)
    async def edit(asked: Asked, who: Client):
        fields, files, mask = await requests.read_form(asked)
        try:
            options = requests.Edit(**fields)
        except pydantic.ValidationError as error:
            raise RequestValidationError(error.errors()) from None
        check(options)
        size = grid(options.size) if options.size != "auto" else None
        size, shown, free = await decoded(requests.edited, files, mask, sampler, size, scale, settings.signer)
        del files, mask  # which may be large, and wait no longer with the request
        unit = sampler.tokenizer.patch
        document = Document([Turn("user", [*shown, requests.text(options.prompt)])])

        def prepare(seed, gate):
            def make(sampler):
                given, kept = sampler.encoded(document), None
                if free is not None:
                    codes = given.images()[0].codes
                    kept = np.where(free.reshape(free.shape + (1,) * (codes.ndim - 2)), -1, codes).astype(
                        np.int32
                    )
                return Request(given, "image", size, kept=kept, **options_of(options, gate, seed))

            return make

        def paste(image):
            """What the mask keeps is kept to the pixel, where the picture is of its own size; no codes say that."""
            if free is None or image.pixels.shape != shown[0].pixels.shape:
                return image
            changed = free.repeat(unit, 0).repeat(unit, 1)
            return Image(np.where(changed[..., None], image.pixels, shown[0].pixels))

        return await pictures(asked, options, who, document, "image_edit", prepare, paste)

    @api.post("/v1/responses")
    async def respond(asked: Asked, talk: requests.Talk, who: Client):
        tool = talk.tools[0] if talk.tools else None
        check(talk)
        if tool:
            check(tool)
        options = tool or requests.Tool(type="image_generation")
        gate, size = gate_of(options.moderation), grid(options.size)
        before = store.get(talk.previous_response_id, who) if talk.previous_response_id else Document()
        if before is None:
            raise Wrong(
                404,
                "previous_response_id: there is no such response (any more)",
                "previous_response_not_found",
                "previous_response_id",
            )
        turns = await decoded(requests.turns_of, talk, sampler, size, settings.signer)
        document = Document((*before.turns, *turns))
        draws = tool is not None and talk.tool_choice != "none"
        must = draws and (talk.tool_choice == "required" or isinstance(talk.tool_choice, requests.Choice))
        output = "image" if must else "any" if draws else "text"
        await checked(gate, document, draws)
        seed = secrets.randbelow(2**31) if options.seed is None else options.seed

        whole = []  # the document with the codes of its images

        def prepare(sampler):
            grid = size if draws else None
            request = Request(sampler.encoded(document), output, grid, **options_of(options, gate, seed))
            whole.append(request.document)
            return recent(sampler, request) if talk.truncation == "auto" else request

        (job,) = await submitted([prepare], who, options.partial_images)
        said = responses.Response(talk, settings.name, seed)
        if talk.stream:
            return wire.Stream(spoken(job, said, options, gate, who, draws, whole), job)
        step = await finished(job, asked)
        await ended(said, step, options, gate, who, draws, whole)
        return said.whole

    async def ended(said, step, options, gate, who, draws, whole):
        """Notes the answer in `said`, and keeps the dialogue, of which the gate judges all turns whatever the model has seen."""
        turn = step.turn
        if not (turn.parts and isinstance(turn.parts[0], Refusal)):
            turn = await passed(step, gate)
        else:
            await asyncio.to_thread(gate.answered, turn)  # for its log
        said.whole["usage"] = _usage([step])
        for part in turn.parts:
            if isinstance(part, Image):
                data = await drawn(part.pixels, options, gate, said.seed, part.codes)
                said.image(data, about(options, part.pixels))
        said.text(turn)
        said.whole["status"] = "completed"
        if said.store:
            # Pictures that were only asked about are judged again should something be drawn of them.
            store.put(said.whole["id"], who, Document((*whole[-1].turns, turn)), pixels=not draws)

    async def spoken(job, said, options, gate, who, draws, whole):
        """The events of a response, as it comes."""
        yield said.event("created", response=said.whole)
        yield said.event("in_progress", response=said.whole)
        index = 0
        async for step in job:
            if step.turn is None and len(step.text) > len(said.words):
                stop(await asyncio.to_thread(gate.answered, Turn("assistant", [Text(step.text)])), "output")
                for event in said.said(step.text):
                    yield event
            if await sketched(step, gate):
                data = await drawn(step.sketch, options, gate, said.seed)
                for event in said.sketched(data, index, about(options, step.sketch)):
                    yield event
                index += 1
            if step.turn is not None:
                await ended(said, step, options, gate, who, draws, whole)
                for event in said.ended():
                    yield event

    # ---- what the server says of itself ----

    @api.get("/v1/models")
    async def models(_: Client):
        size = "x".join(map(str, settings.size)) if settings.size else "auto"
        return {
            "object": "list",
            "data": [
                {
                    "id": settings.name, "object": "model", "created": 0, "owned_by": "mmgen", "sizes": [size],
                    "default_size": size, "edits": True, "step": sampler.step, "refuses": sampler.refuses,
                }
            ],
        }  # fmt: skip

    @api.get("/healthz")
    async def healthy():
        if not engine.alive:
            raise Wrong(503, "the engine has ended; its log says why", "engine_ended", kind="server_error")
        return {"status": "ok"}

    @api.get("/readyz")
    async def ready():
        if not engine.ready:
            raise Wrong(503, "the model is being compiled", "not_ready", kind="server_error", retry=5)
        return {"status": "ok"}

    @api.get("/metrics")
    async def metrics():
        return Response(prometheus.generate_latest(engine.registry), media_type="text/plain; version=0.0.4")

    @api.get("/", include_in_schema=False)
    async def page():
        return FileResponse(PAGE / "index.html", headers={"Content-Security-Policy": POLICY})

    api.mount("/page", StaticFiles(directory=PAGE), name="page")
    return api


def _usage(steps):
    """Tokens of the steps that ended answers."""
    of = lambda name: sum(step.tokens[name] for step in steps)
    images_in, text_in, out = of("image_tokens"), of("text_tokens"), of("answer")
    return {
        "input_tokens": images_in + text_in,
        "input_tokens_details": {
            "image_tokens": images_in,
            "text_tokens": text_in,
            "cached_tokens": of("reused"),
        },
        "output_tokens": out,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": images_in + text_in + out,
    }


def default_options(options):
    """Those of `Request` where a client says nothing: as the commands have them for a model that says nothing else."""
    return {"guidance": 1.5, "image": Strategy(0.1, keep_mode=True), "text": Strategy(0.7)} | options
