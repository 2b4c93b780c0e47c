"""What is asked for, for stage `reinforce`: pictures, by prompts of the world and by edits, styles and pages of tasks.py, and words about pictures."""

from dataclasses import dataclass

from mmgen import world
from mmgen.document import Document, Image, Text, Turn
from mmgen.world import pages, tasks
from mmgen.world.scene import CATEGORIES, Claim

TASKS = ("draw", "edit", "style", "mix", *pages.KINDS)  # which a picture answers, or may
TOLD = ("caption", "detail", "question", "compare")  # which words answer
KINDS = (*CATEGORIES, "scene", "mixed_counting", *TASKS, *TOLD)


@dataclass(frozen=True)
class Wish(world.Item):
    """A wish of tasks.py. `prompt` is its words, `scene` the scene or page that is right, `claim` None but where the
    judge goes by one; `turn` has the pictures that come with the words, and all else."""

    turn: tasks.Exchange
    language: str


def wish(seed, split, i, category, language, size):
    """A `world.Item`, or a `Wish` for a category of TASKS and TOLD; None where talk i of TASKS is not answered by a picture."""
    if category not in (*TASKS, *TOLD):
        return world.item(seed, split, i, category=category, language=language)
    turn = tasks.talk(seed, split, i, category, language, size=size).turns[0]
    if len(turn.says) > 1 or isinstance(turn.says[0], str) != (category in TOLD):
        return None
    prompt = " ".join(part for part in turn.asks if isinstance(part, str))
    claim = turn.task if isinstance(turn.task, Claim) else None
    return Wish(prompt, claim, turn.after, category, turn, language)


def asks(item):
    """What is said, as texts, and shown, as scenes and pages."""
    return item.turn.asks if isinstance(item, Wish) else (item.prompt,)


def document(item, size):
    """What the user says and shows, with pictures of size (width, height) in pixels."""
    parts = (Text(part) if isinstance(part, str) else Image(tasks.picture(part, *size)) for part in asks(item))
    return Document((Turn("user", tuple(parts)),))
