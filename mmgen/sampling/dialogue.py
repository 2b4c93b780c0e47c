"""A conversation with a model, which keeps its keys and values from turn to turn."""

import bisect
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
    that comes after. Where the model's rows have no room for all turns an answer sees what is `recent`, read anew, and `cut` says so.
    """

    def __init__(self, sampler, document=Document(), seed=0, **options):
        self.sampler, self.document, self.seed, self.options = (
            sampler,
            sampler.encoded(document),
            seed,
            options,
        )
        self._slots, self._ahead, self.cut = {}, None, False

    def warm(self):
        """Compiles what the first answer takes, in a thread, so that it is there when somebody has found words; who is
        faster waits for it. Nothing is said, and what is answered later is the same to the last bit. Not on a mesh, which threads
        would share."""
        if self.sampler.mesh:
            return
        request = dataclasses.replace(recent(self.sampler, self.request()), output="text", max_tokens=2)

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
        seen = recent(self.sampler, request)
        self.cut = seen is not request
        for _, turn, done, _ in self._answers(seen, every):
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

    def rewind(self, turns):
        """Back to where there were so many answers. ValueError where there were never."""
        ends = [n + 1 for n, turn in enumerate(self.document.turns) if turn.role == "assistant"]
        if not 0 <= turns <= len(ends):
            raise ValueError(f"expected 0 to {len(ends)} answers to go back to, found {turns}")
        begins = [n for n, turn in enumerate(self.document.turns) if turn.role != "system"]
        keep = ends[turns - 1] if turns else (begins + [len(self.document.turns)])[0]
        self.document, self.cut = Document(self.document.turns[:keep]), False


def recent(sampler, request):
    """The request, or where the model's rows have no room for its answer one without the oldest turns of its document, as few
    as it takes.

    What the system said last stays. The last picture that is forgotten comes back as one that the user shows, as for an
    edit (with image guidance it is then a branch more). Room is for a picture, if there may be one, of its size or that
    of the last one, or for an eighth of a row of words; where no cut makes so much, for any answer at all; the request
    itself where not even that. Images have codes.
    """
    users = [n for n, turn in enumerate(request.document.turns) if turn.role == "user"][1:]
    room = _room(sampler, request)
    # What `Sampler.room` asks for: of words an empty answer, of a picture whose size is open one of one code.
    least = 3 if request.output != "image" else room if request.size else 7
    for need in (room, least):
        # A document that begins later is never longer.
        fits = lambda cut: len(sampler.prompts(_since(request, cut))[0]) + need <= sampler.longest
        cuts = [0, *users]
        at = bisect.bisect_left(cuts, True, key=fits)
        if at < len(cuts):
            return _since(request, cuts[at])
    return request


def _since(request, cut):
    """The request without the turns before one of the user's."""
    turns = request.document.turns
    forgotten, first = turns[:cut], turns[cut : cut + 1]
    if not forgotten:
        return request
    told = [turn for turn in forgotten if turn.role == "system"][-1:]
    shown = Document(forgotten).images()[-1:] if not Document(first).images() else []
    document = Document((*told, Turn("user", (*shown, *first[0].parts)), *turns[cut + 1 :]))
    return dataclasses.replace(request, document=document)


def _room(sampler, request):
    """The tokens of an answer that there should be room for."""
    most = sampler.longest if request.max_tokens is None else request.max_tokens + 1
    words = min(most, sampler.longest // 8)
    if request.output == "text":
        return words
    seen = request.document.images()
    height, width = request.size or (seen[-1].codes.shape[:2] if seen else (1, 1))
    picture = height * width * sampler.grammar.depth + 6
    return words if request.output == "any" and most < picture else picture


def _clean(part):
    """A text without U+FFFD, as which bytes that are no UTF-8 are read: written again it takes three tokens, and a
    dialogue would outgrow the row that its answers fitted."""
    return Text(part.text.replace("\N{REPLACEMENT CHARACTER}", "")) if isinstance(part, Text) else part
