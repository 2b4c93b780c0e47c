"""What the server says in a dialogue: the object of a response, and the events of it as it comes."""

import time
import uuid

from mmgen.document import Refusal, Text


class Response:
    """The object of a response, `whole`, as it grows. Of one that is streamed each item is told of before what is in it, and items are
    in the order in which they were first told of."""

    def __init__(self, talk, model, seed):
        name = lambda kind: f"{kind}_{uuid.uuid4().hex}"
        self.message_id, self.image_id, self.seed, self.store = name("msg"), name("ig"), seed, talk.store
        self.words = ""  # that were streamed so far
        self._told, self._events = [], 0  # ids of items; how many events there were
        self.whole = {
            "id": name("resp"), "object": "response", "created_at": int(time.time()), "status": "in_progress", "model": model,
            "output": [], "previous_response_id": talk.previous_response_id, "instructions": talk.instructions,
            "parallel_tool_calls": False, "tool_choice": talk.model_dump()["tool_choice"],
            "tools": [tool.model_dump(exclude_none=True) for tool in talk.tools], "metadata": talk.metadata or {},
            "error": None, "incomplete_details": None, "store": talk.store, "truncation": talk.truncation, "usage": None,
        }  # fmt: skip
        if talk.safety_identifier or talk.user:
            self.whole["safety_identifier"] = talk.safety_identifier or talk.user

    # ---- what it is ----

    def image(self, data, about):
        images = sum(each["type"] == "image_generation_call" for each in self.whole["output"])
        name = f"{self.image_id}{f'_{images}' if images else ''}"
        self.whole["output"].append(_call(name, "completed", result=data, seed=self.seed, **about))

    def text(self, turn):
        """The words of a turn, which are a message, or a refusal."""
        refused = bool(turn.parts) and isinstance(turn.parts[0], Refusal)
        words = "".join(part.text for part in turn.parts if isinstance(part, Text))
        if not words and not refused:
            return
        content = {"type": "refusal", "refusal": words or "The model refused."} if refused else _text(words)
        first = bool(turn.parts) and isinstance(turn.parts[0], (Text, Refusal))
        place = 0 if first else len(self.whole["output"])
        self.whole["output"].insert(place, _message(self.message_id, "completed", [content]))

    # ---- its events, each a list ----

    def event(self, kind, **more):
        self._events += 1
        return {"type": f"response.{kind}", "sequence_number": self._events - 1, **more}

    def said(self, words):
        """Of the words so far, which those before begin."""
        events = self._opened(_message(self.message_id, "in_progress", []), _text(""))
        new, self.words = words[len(self.words) :], words
        return [
            *events,
            self._of(self.message_id, "output_text.delta", delta=new, content_index=0, logprobs=[]),
        ]

    def sketched(self, data, index, about):
        """Of a partial image."""
        events = self._opened(_call(self.image_id, "in_progress", result=None))
        partial = {"partial_image_index": index, "partial_image_b64": data, **about}
        return [*events, self._of(self.image_id, "image_generation_call.partial_image", **partial)]

    def ended(self):
        """Of all that was not told before."""
        place = {name: n for n, name in enumerate(self._told)}
        self.whole["output"].sort(key=lambda item: place.get(item["id"], len(place)))
        return [event for item in self.whole["output"] for event in self._closed(item)] + [
            self.event("completed", response=self.whole)
        ]

    def _closed(self, item):
        of = lambda kind, **more: self._of(item["id"], kind, **more)
        if item["type"] == "image_generation_call":
            events = self._opened(_call(item["id"], "in_progress", result=None))
            events.append(of("image_generation_call.completed"))
        else:
            (part,) = item["content"]
            refused = part["type"] == "refusal"
            empty = part | {"refusal": ""} if refused else _text("")
            events = self._opened(_message(item["id"], "in_progress", []), empty)
            if refused:
                events.append(of("refusal.delta", delta=part["refusal"], content_index=0))
                events.append(of("refusal.done", refusal=part["refusal"], content_index=0))
            else:
                if len(part["text"]) > len(self.words):
                    events += self.said(part["text"])
                events.append(of("output_text.done", text=part["text"], content_index=0, logprobs=[]))
            events.append(of("content_part.done", part=part, content_index=0))
        place = self._told.index(item["id"])
        return [*events, self.event("output_item.done", item=item, output_index=place)]

    def _opened(self, item, part=None):
        """What is told before the first event of an item, and of the part of a message."""
        if (name := item["id"]) in self._told:
            return []
        self._told.append(name)
        events = [self.event("output_item.added", item=item, output_index=len(self._told) - 1)]
        if part is not None:
            return [*events, self._of(name, "content_part.added", content_index=0, part=part)]
        kinds = ("in_progress", "generating")
        return events + [self._of(name, f"image_generation_call.{kind}") for kind in kinds]

    def _of(self, name, kind, **more):
        return self.event(kind, item_id=name, output_index=self._told.index(name), **more)


def _text(words):
    return {"type": "output_text", "text": words, "annotations": [], "logprobs": []}


def _message(name, status, content):
    return {"type": "message", "id": name, "role": "assistant", "status": status, "content": content}


def _call(name, status, **more):
    return {"type": "image_generation_call", "id": name, "status": status, **more}
