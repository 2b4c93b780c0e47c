"""What a picture of the world is worth, for stage `reinforce`: functions (pixels uint8 [H, W, C], Item) -> float."""

from mmgen.world import tasks, tasks_judge
from mmgen.world.judge import judge as verdict
from mmgen.world.judge import parse
from mmgen.world.wishes import Wish


def judge(pixels, item) -> float:
    """1 where the picture shows exactly what is asked for, by the judge, else 0: what an item's prompt claims, a change
    and nothing else changed, the same scene in another style."""
    pixels = pixels[..., :3]
    if not isinstance(item, Wish):
        return float(verdict(pixels, item.claim).ok)
    source = true = None
    if isinstance(item.turn.task, tasks.Edit):
        source, true = (tasks.picture(each, *pixels.shape[1::-1]) for each in (item.turn.before, item.scene))
    return float(tasks_judge.judge_answer(item.turn, pixels, source, true).ok)


def legible(pixels, item) -> float:
    """1 where all that is in the picture can be read, whatever the prompt asked for, else 0."""
    return float(not parse(pixels[..., :3]).faults)
