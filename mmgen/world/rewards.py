"""What a picture of the world is worth, for stage `reinforce`: functions (pixels uint8 [H, W, C], Item) -> float."""

from mmgen.world.judge import judge as verdict
from mmgen.world.judge import parse


def judge(pixels, item) -> float:
    """1 where the picture shows exactly what the item's prompt claims, by the judge, else 0."""
    return float(verdict(pixels[..., :3], item.claim).ok)


def legible(pixels, item) -> float:
    """1 where all that is in the picture can be read, whatever the prompt asked for, else 0."""
    return float(not parse(pixels[..., :3]).faults)
