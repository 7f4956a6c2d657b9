"""Whether an image shows what its prompt requires, with the reason where it does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .captions import NUMBERS, PLURALS
from .detector import Found, parse
from .prompts import Prompt, Requirement, Wanted
from .scene import SHAPES, stands


@dataclass(frozen=True)
class Verdict:
    """On one image."""

    reasons: tuple[str, ...]
    """What is wrong; empty: nothing."""
    found: tuple[Found, ...]

    @property
    def correct(self) -> bool:
        return not self.reasons

    @property
    def reason(self) -> str:
        return "; ".join(self.reasons)


def judge(prompt: Prompt, image: Tensor) -> Verdict:
    """The verdict on an image, (3, H, W), [-1, 1].

    Raises:
        ValueError: it is no colour image.
    """
    return judge_all([prompt], image[None])[0]


def judge_all(prompts: Sequence[Prompt], images: Tensor) -> list[Verdict]:
    """The verdicts on images, (B, 3, H, W), one for each prompt.

    Raises:
        ValueError: there are not as many images as prompts, or they are no colour images.
    """
    if len(prompts) != len(images):
        raise ValueError(f"there are {len(images)} images for {len(prompts)} prompts; give one for each")
    return [
        Verdict(tuple(complaints(prompt.requirement, found)), tuple(found))
        for prompt, found in zip(prompts, parse(images))
    ]


def complaints(requirement: Requirement, found: Sequence[Found]) -> list[str]:
    """What is wrong with the objects found: each must be a shape, asked for, and as it was asked for."""
    reasons = []
    strange = sum(thing.shape is None for thing in found)
    if strange:
        reasons.append(f"{strange} {'patch is' if strange == 1 else 'patches are'} no shape")
    wanted = {want.shape: want for want in requirement.wanted}
    for shape in SHAPES:
        things = [thing for thing in found if thing.shape == shape]
        if shape in wanted:
            reasons += _against(wanted[shape], things)
        elif things:
            reasons.append(f"{_counted(len(things), shape)} not asked for")
    if requirement.relation and not reasons:
        first, second = (next(f for f in found if f.shape == want.shape) for want in requirement.wanted)
        if not stands((first.x, first.y), requirement.relation, (second.x, second.y)):
            reasons.append(f"{first.shape} is not {requirement.relation} {second.shape}")
    return reasons


def _against(want: Wanted, things: Sequence[Found]) -> list[str]:
    """What is wrong with the things of one shape."""
    if len(things) != want.count:
        return [f"{_counted(len(things), want.shape)} instead of {NUMBERS[want.count]}"]
    reasons = []
    for thing in things:
        if want.colour not in (None, thing.colour):
            reasons.append(f"{want.shape} is {thing.colour} instead of {want.colour}")
        if want.size not in (None, thing.size):
            reasons.append(f"{want.shape} is {thing.size} instead of {want.size}")
    return reasons


def _counted(count: int, shape: str) -> str:
    return f"{NUMBERS.get(count, count if count else 'no')} {shape if count == 1 else PLURALS[shape]}"
