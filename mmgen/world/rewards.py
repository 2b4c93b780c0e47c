"""What an answer is worth, for stage `reinforce`: functions (pixels uint8 [H, W, C] or a text, Item) -> float."""

from mmgen.world import captions, tasks, tasks_judge
from mmgen.world.judge import judge as verdict
from mmgen.world.judge import parse
from mmgen.world.wishes import Wish


def judge(answer, item) -> float:
    """1 where the answer is right, by the judge, else 0. A picture: it shows exactly what is asked for, what an item's prompt
    claims, a change and nothing else changed, the same scene in another style. A caption: it is true of the picture, names
    all that is in it, and tells as many of `captions.TELLS` (colours, sizes, a relation ...) as the world's own, or else saying
    less would pay; which of them is left to it. Other words: they are the very ones."""
    if isinstance(answer, str):
        if item.claim is None:
            return float(tasks_judge.judge_answer(item.turn, answer).ok)
        found, right = (captions.judge(text, item.scene, item.language) for text in (answer, item.turn.says[0]))
        found["told"], right["told"] = (sum(each[kind] for kind in captions.TELLS) for each in (found, right))
        return float(found["complete"] and found["told"] >= right["told"])
    pixels = answer[..., :3]
    if not isinstance(item, Wish):
        return float(verdict(pixels, item.claim).ok)
    source = true = None
    if isinstance(item.turn.task, tasks.Edit):
        source, true = (tasks.picture(each, *pixels.shape[1::-1]) for each in (item.turn.before, item.scene))
    return float(tasks_judge.judge_answer(item.turn, pixels, source, true).ok)


def legible(pixels, item) -> float:
    """1 where all that is in the picture can be read, whatever the prompt asked for, else 0."""
    return float(not parse(pixels[..., :3]).faults)
