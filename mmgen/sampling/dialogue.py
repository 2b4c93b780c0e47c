"""A conversation with a model, which keeps its keys and values from turn to turn."""

import contextlib
import dataclasses
import threading

from mmgen.document import Document, Text, Turn
from mmgen.sampling.sampler import Request, draw_seed
from mmgen.sampling.slots import Slots


class Dialogue:
    """Turns so far, and the slot that holds what was read of them.

    Each turn reads only what is new, and the last answer once more (see `Slots`); what is answered is to the last
    bit what a fresh dialogue of the same turns and seeds answers. Rewinding costs nothing: the turns are dropped,
    what the slot holds of those before stays. `options` are those of `Request`, for all turns that do not say
    otherwise; turn n, counted from 0, is drawn with a seed made of `seed` and n, so that another seed changes all
    that comes after. Where the model's rows have no room for another picture it sees what is `recent`.
    """

    def __init__(self, sampler, document=Document(), seed=0, **options):
        self.sampler, self.document, self.seed, self.options = (
            sampler,
            sampler.encoded(document),
            seed,
            options,
        )
        self._slots, self._ahead = {}, None

    def warm(self):
        """Compiles what the first answer takes, in a thread, so that it is there when somebody has found words; who is
        faster waits for it. Nothing is said, and what is answered later is the same to the last bit. Not on a mesh, which threads
        would share."""
        if self.sampler.mesh:
            return
        request = dataclasses.replace(self.request(), output="text", max_tokens=2)

        def compiles():
            with contextlib.suppress(Exception):  # who asks is told
                list(self._answers(request))

        # No daemon: an interpreter that ends waits for the compiler.
        self._ahead = threading.Thread(target=compiles)
        self._ahead.start()

    @property
    def warming(self):
        """Whether it is still compiling, which an interpreter that ends would wait for."""
        return bool(self._ahead) and self._ahead.is_alive()

    def say(self, *parts, **options):
        """The user's parts (`Text`, `Image`) -> the assistant's turn; both are then part of the document."""
        *_, (turn, _) = self.stream(*parts, **options)
        return turn

    def stream(self, *parts, every=None, **options):
        """As `say`, but an iterator of (turn so far, done), one at each `every` tokens. A turn that is left
        before it is done leaves the dialogue as it was."""
        if self._ahead:
            self._ahead.join()
        request = self.request(*parts, **options)
        for _, turn, done, _ in self._answers(recent(self.sampler, request), every):
            if done:
                turn = Turn(turn.role, [_clean(part) for part in turn.parts]).normalised()
                self.document = Document((*request.document.turns, turn))
            yield turn, done

    def _answers(self, request, every=None):
        branches = len(self.sampler.prompts(request))
        if branches not in self._slots:  # its own for each number, as another program rounds otherwise
            self._slots[branches] = Slots(self.sampler, 1, branches, self.sampler.longest)
        return self.sampler.answers(self._slots[branches], [request], [0], every)

    def request(self, *parts, **options):
        """The `Request` that `say` makes."""
        document = Document((*self.document.turns, Turn("user", parts)))
        options = {"output": "any", "seed": draw_seed(self.seed, self.turns)} | self.options | options
        return Request(document=self.sampler.encoded(document), **options)

    @property
    def turns(self):
        """How many answers there are."""
        return sum(turn.role == "assistant" for turn in self.document.turns)

    @property
    def full(self):
        """Whether there is no room for another picture (of the size in `options`, or of the last one's) with all that was said: of what
        is asked for then the oldest turns are not seen."""
        return not _has_room(self.sampler, self.request())

    def rewind(self, turns):
        """Back to where there were so many answers. ValueError where there were never."""
        ends = [n + 1 for n, turn in enumerate(self.document.turns) if turn.role == "assistant"]
        if not 0 <= turns <= len(ends):
            raise ValueError(f"expected 0 to {len(ends)} answers to go back to, found {turns}")
        begins = [n for n, turn in enumerate(self.document.turns) if turn.role != "system"]
        keep = ends[turns - 1] if turns else (begins + [len(self.document.turns)])[0]
        self.document = Document(self.document.turns[:keep])


def recent(sampler, request):
    """The request, or where the model's rows have no room for a picture in answer to it one without the oldest turns of its document,
    as few as it takes; a `system` turn at its beginning stays. The last picture that is forgotten comes back as one that the user
    shows, as for an edit. The request itself where no turns are left to forget."""
    turns = request.document.turns
    begin = int(bool(turns) and turns[0].role == "system")
    for cut in range(begin, len(turns)):
        if turns[cut].role != "user":
            continue
        forgotten, kept = turns[begin:cut], turns[cut:]
        shown = Document(forgotten).images()[-1:] if not Document(kept[:1]).images() else []
        document = Document((*turns[:begin], Turn("user", (*shown, *kept[0].parts)), *kept[1:]))
        found = dataclasses.replace(request, document=document) if forgotten else request
        if _has_room(sampler, found):
            return found
    return request


def _has_room(sampler, request):
    """Whether an answer fits the model's rows, with a picture if it may have one: of its size, or that of the last one before."""
    if request.output == "any":
        request = dataclasses.replace(request, output="image")
    seen = request.document.images()
    if request.output == "image" and request.size is None and seen:
        request = dataclasses.replace(request, size=seen[-1].codes.shape[:2])
    try:
        sampler.room(request, sampler.prompts(request)[0])
    except ValueError:
        return False
    return True


def _clean(part):
    """A text without U+FFFD, as which bytes that are no UTF-8 are read: written again it takes three tokens, and a
    dialogue would outgrow the row that its answers fitted."""
    return Text(part.text.replace("\N{REPLACEMENT CHARACTER}", "")) if isinstance(part, Text) else part
