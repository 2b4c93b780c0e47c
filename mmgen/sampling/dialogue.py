"""A conversation with a model, which keeps its keys and values from turn to turn."""

import numpy as np

from mmgen.document import Document, Turn
from mmgen.sampling.sampler import Request
from mmgen.sampling.slots import Slots


class Dialogue:
    """Turns so far, and the slot that holds what was read of them.

    Each turn reads only what is new, and the last answer once more (see `Slots`); what is answered is to the last
    bit what a fresh dialogue of the same turns and seeds answers. Rewinding costs nothing: the turns are dropped,
    what the slot holds of those before stays. `options` are those of `Request`, for all turns that do not say
    otherwise; turn n, counted from 0, is drawn with a seed made of `seed` and n, so that another seed changes all
    that comes after.
    """

    def __init__(self, sampler, document=Document(), seed=0, **options):
        self.sampler, self.document, self.seed, self.options = (
            sampler,
            sampler.encoded(document),
            seed,
            options,
        )
        self._slots = None

    def say(self, *parts, **options):
        """The user's parts (`Text`, `Image`) -> the assistant's turn; both are then part of the document."""
        *_, (turn, _) = self.stream(*parts, **options)
        return turn

    def stream(self, *parts, every=None, **options):
        """As `say`, but an iterator of (turn so far, done), one at each `every` tokens. A turn that is left
        before it is done leaves the dialogue as it was."""
        request = self.request(*parts, **options)
        branches = len(self.sampler.prompts(request))
        if self._slots is None or self._slots.branches < branches:
            self._slots = Slots(self.sampler, 1, branches, self.sampler.longest)
        slots, self._slots = (
            self._slots,
            None,
        )  # an exception in the middle of a dispatch leaves slots without state
        for _, turn, done in self.sampler.answers(slots, [request], [0], every):
            if done:
                self._slots, self.document = slots, Document((*request.document.turns, turn))
            yield turn, done

    def request(self, *parts, **options):
        """The `Request` that `say` makes."""
        document = Document((*self.document.turns, Turn("user", parts)))
        seed = int(np.random.SeedSequence([self.seed, self.turns]).generate_state(1)[0])
        options = {"output": "any", "seed": seed} | self.options | options
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
        keep = ends[turns - 1] if turns else next(
            (n for n, turn in enumerate(self.document.turns) if turn.role == "user"), 0
        )  # fmt: skip
        self.document = Document(self.document.turns[:keep])
