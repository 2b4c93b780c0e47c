"""What clients send: the fields of each request, forms with files, pictures as data; checked, decoded within limits, encoded anew.

What is not known here is refused, never ignored. Pictures come as data, never from paths or addresses.
"""

import base64
import io
from typing import Annotated, Literal

import numpy as np
import pydantic
from PIL import Image as Pillow
from starlette.exceptions import HTTPException

from mmgen.data import images
from mmgen.document import Text, Turn

MOST_IMAGES = 16  # of a request
MASK_BYTES = 4 << 20
PIXELS = images.Limits(max_pixels=32 << 20)  # of an upload


class Wrong(Exception):
    """An error as clients see it."""

    def __init__(
        self, status, message, code=None, param=None, kind="invalid_request_error", retry=None, details=None
    ):
        super().__init__(message)
        self.status, self.retry = status, retry
        self.error = {"message": message, "type": kind, "param": param, "code": code}
        if details:
            self.error["moderation_details"] = details


class Failure(pydantic.BaseModel):
    """The body of an answer that is an error."""

    class Error(pydantic.BaseModel):
        message: str
        type: str
        param: str | None
        code: str | None
        moderation_details: dict | None = None

    error: Error


class _Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True)


Prompt = Annotated[str, pydantic.StringConstraints(min_length=1, max_length=32_000)]
Words = Annotated[str, pydantic.StringConstraints(max_length=32_000)]


class Options(_Strict):
    """What pictures may be asked for with, in every endpoint. `seed` and `guidance` are ours."""

    model: str | None = None
    size: str = "auto"
    quality: Literal["auto"] = "auto"
    background: Literal["auto", "opaque", "transparent"] = "auto"
    output_format: Literal["png", "webp", "jpeg"] = "png"
    output_compression: Annotated[int, pydantic.Field(ge=0, le=100)] = 100
    moderation: Literal["auto", "low"] = "auto"
    partial_images: Annotated[int, pydantic.Field(ge=0, le=3)] = 0
    seed: Annotated[int, pydantic.Field(ge=0, lt=2**32)] | None = None
    guidance: Annotated[float, pydantic.Field(ge=1, le=20, strict=False)] | None = None


class Generation(Options):
    prompt: Prompt
    n: Annotated[int, pydantic.Field(ge=1, le=10)] = 1
    stream: bool = False
    response_format: Literal["b64_json"] | None = None
    safety_identifier: Annotated[str, pydantic.StringConstraints(max_length=512)] | None = None
    user: Annotated[str, pydantic.StringConstraints(max_length=512)] | None = None


class Edit(Generation):
    """The fields of an edit beside its files; of a form, where everything is text."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=False)
    input_fidelity: Literal["low"] | None = None


_FILE = {"type": "string", "format": "binary"}
_FIELDS = Edit.model_json_schema()
FORM = {  # an edit, for the OpenAPI description
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": _FIELDS
                | {
                    "properties": _FIELDS["properties"]
                    | {
                        "image": {"type": "array", "items": _FILE, "minItems": 1, "maxItems": MOST_IMAGES},
                        "mask": _FILE | {"description": "a PNG of the first image's size, alpha 0 where it is to be changed"},
                    },
                    "required": [*_FIELDS["required"], "image"],
                }
            }
        },
    }
}  # fmt: skip


class InputText(_Strict):
    type: Literal["input_text"]
    text: Words


class InputImage(_Strict):
    type: Literal["input_image"]
    image_url: str
    detail: Literal["auto"] = "auto"


class Message(_Strict):
    type: Literal["message"] = "message"
    role: Literal["user", "system", "developer"]
    content: Words | Annotated[list[InputText | InputImage], pydantic.Field(min_length=1, max_length=64)]


class Tool(Options):
    type: Literal["image_generation"]
    action: Literal["auto"] = "auto"


class Choice(_Strict):
    type: Literal["image_generation"]


Key = Annotated[str, pydantic.StringConstraints(max_length=64)]
Value = Annotated[str, pydantic.StringConstraints(max_length=512)]


class Talk(_Strict):
    input: Words | Annotated[list[Message], pydantic.Field(min_length=1, max_length=64)]
    model: str | None = None
    instructions: Words | None = None
    previous_response_id: str | None = None
    tools: Annotated[list[Tool], pydantic.Field(max_length=1)] = []
    tool_choice: Literal["auto", "none", "required"] | Choice = "auto"
    stream: bool = False
    store: bool = True
    truncation: Literal["auto", "disabled"] = "disabled"
    metadata: Annotated[dict[Key, Value], pydantic.Field(max_length=16)] | None = None
    safety_identifier: Annotated[str, pydantic.StringConstraints(max_length=512)] | None = None
    user: Annotated[str, pydantic.StringConstraints(max_length=512)] | None = None


def text(words):
    try:
        return Text(words)
    except ValueError as error:
        raise Wrong(400, f"prompt: {error}", "invalid_value", "prompt") from None


def decode(data, sampler, param):
    """Pixels of an image file, within limits."""
    try:
        background = images.ALPHA if sampler.tokenizer.alpha else (255, 255, 255)
        return images.read(data, PIXELS, background=background)
    except images.BadImage as error:
        raise Wrong(400, f"{param}: {error}", "invalid_image", param) from None


def free_patches(data, first, size):
    """Which patches of a grid a mask leaves free, bool [h, w]: all of which a part is to be changed (alpha 0)."""
    if len(data) > MASK_BYTES:
        raise Wrong(400, f"mask: over {MASK_BYTES} bytes", "image_file_too_large", "mask")
    try:
        with Pillow.open(io.BytesIO(data), formats=["PNG"]) as image:
            if image.size != first.shape[1::-1]:
                raise Wrong(
                    400,
                    f"mask: expected the size of the image, {first.shape[1]}x{first.shape[0]}",
                    "invalid_image",
                    "mask",
                )
            if "A" not in image.getbands():
                raise Wrong(
                    400,
                    "mask: expected a PNG with alpha, 0 where the picture is to be changed",
                    "invalid_image",
                    "mask",
                )
            alpha = np.asarray(image.getchannel("A"))
    except (OSError, ValueError, SyntaxError, Pillow.DecompressionBombError) as error:
        raise Wrong(400, f"mask: not a PNG that can be read: {error}", "invalid_image", "mask") from None
    h, w = size
    rows, columns = (np.arange(n) * m // n for n, m in zip(alpha.shape, size))
    free = np.zeros(size, bool)
    ys, xs = np.nonzero(alpha == 0)
    free[rows[ys], columns[xs]] = True
    if not free.any():
        raise Wrong(400, "mask: nothing in it is to be changed (alpha 0)", "invalid_image", "mask")
    return free.reshape(h, w)


def edited(files, mask, sampler, size, scale, signer=None):
    """Files of an edit -> size (height, width) in patches, that of the first where it is None (`scale` times smaller, as a refiner enlarges what
    is drawn); the images, as `Sampler.shown` has them; which patches are free, or None."""
    first = decode(files[0], sampler, "image")
    shown = [sampler.shown(first, files[0], size, signer, scale)]
    size = tuple(side // sampler.tokenizer.patch for side in shown[0].pixels.shape[:2])
    free = None if mask is None else free_patches(mask, first, size)
    del first  # before the next is decoded
    shown += [sampler.shown(decode(data, sampler, "image"), data, size, signer) for data in files[1:]]
    return size, shown, free


async def read_form(asked):
    """-> fields {name: text}, image files [bytes], the mask's bytes or None."""
    kind = asked.headers.get("content-type", "")
    if not kind.lower().startswith("multipart/form-data"):
        raise Wrong(400, "expected multipart/form-data", "invalid_content_type")
    fields, files, mask = {}, [], None
    try:
        async with asked.form(max_files=MOST_IMAGES + 1, max_fields=32, max_part_size=1 << 20) as form:
            for name, value in form.multi_items():
                if isinstance(value, str):
                    if name in fields or name in ("image", "image[]", "mask"):
                        raise Wrong(
                            400,
                            f"{name}: expected {'a file' if name not in fields else 'it once'}",
                            "invalid_value",
                            name,
                        )
                    fields[name] = value
                elif name in ("image", "image[]"):
                    files.append(await value.read())
                elif name == "mask" and mask is None:
                    mask = await value.read()
                else:
                    raise Wrong(
                        400, f"{name}: this server does not know such a file", "unknown_parameter", name
                    )
    except HTTPException as error:  # of the parser
        raise Wrong(400, f"the form cannot be read: {error.detail}", "invalid_form") from None
    if not files or len(files) > MOST_IMAGES:
        raise Wrong(
            400, f"image: expected 1 to {MOST_IMAGES} files, found {len(files)}", "invalid_value", "image"
        )
    return fields, files, mask


def turns_of(talk, sampler, size, signer=None):
    """What is said in a request for a response, pictures as `Sampler.shown` has them: turns of a document, one of the user at the end."""
    messages = [Message(role="user", content=talk.input)] if isinstance(talk.input, str) else talk.input
    pictures = [part for each in messages if not isinstance(each.content, str) for part in each.content]
    if (found := sum(part.type == "input_image" for part in pictures)) > MOST_IMAGES:
        raise Wrong(
            400, f"input: expected at most {MOST_IMAGES} images, found {found}", "invalid_value", "input"
        )
    turns = [Turn("system", [text(talk.instructions)])] if talk.instructions else []
    for message in messages:
        parts = []
        for part in (
            [InputText(type="input_text", text=message.content)]
            if isinstance(message.content, str)
            else message.content
        ):
            parts.append(
                text(part.text)
                if part.type == "input_text"
                else inline(part.image_url, sampler, size, signer)
            )
        role = "user" if message.role == "user" else "system"
        if turns and turns[-1].role == role:
            turns[-1] = Turn(role, (*turns[-1].parts, *parts))
        else:
            turns.append(Turn(role, parts))
    if turns[-1].role != "user":
        raise Wrong(400, "input: expected the user's words or pictures at the end", "invalid_value", "input")
    return turns


def inline(url, sampler, size, signer):
    """The `Image` of a data URL."""
    head, _, data = url.partition(",")
    if not head.startswith("data:image/") or not head.endswith(";base64"):
        raise Wrong(
            400,
            "image_url: expected data:image/...;base64,...; nothing is fetched",
            "invalid_image_url",
            "input",
        )
    try:
        data = base64.b64decode(data, validate=True)
    except ValueError:
        raise Wrong(400, "image_url: not base64", "invalid_base64_image", "input") from None
    return sampler.shown(decode(data, sampler, "image_url"), data, size, signer)
