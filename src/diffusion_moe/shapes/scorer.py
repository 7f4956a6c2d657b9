"""Scores of images: does each show what its prompt requires, and if not, why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .captions import NUMBERS, PLURALS
from .detector import Detection, detect
from .prompts import Prompt, RequiredObject, Requirement
from .scene import SHAPES, relation_holds


@dataclass(frozen=True)
class ImageScore:
    """Score of one image."""

    errors: tuple[str, ...]
    """Reasons why it is wrong; empty if it is right."""
    found: tuple[Detection, ...]

    @property
    def correct(self) -> bool:
        return not self.errors

    @property
    def reason(self) -> str:
        return "; ".join(self.errors)


def score_images(prompts: Sequence[Prompt], images: Tensor) -> list[ImageScore]:
    """Scores of images, (B, 3, H, W), [-1, 1], one for each prompt.

    Raises:
        ValueError: the numbers of images and prompts differ, or the images are not in colour.
    """
    if len(prompts) != len(images):
        raise ValueError(f"there are {len(images)} images for {len(prompts)} prompts; give one for each")
    return [
        ImageScore(tuple(find_errors(prompt.requirement, found)), tuple(found))
        for prompt, found in zip(prompts, detect(images))
    ]


def find_errors(requirement: Requirement, found: Sequence[Detection]) -> list[str]:
    """Errors of the detected objects: each must be a shape, be asked for, and look as it was asked for."""
    errors = []
    unknown = sum(one.shape is None for one in found)
    if unknown:
        errors.append(f"{unknown} {'patch is' if unknown == 1 else 'patches are'} no shape")
    wanted = {want.shape: want for want in requirement.wanted}
    for shape in SHAPES:
        same = [one for one in found if one.shape == shape]
        if shape in wanted:
            errors += _shape_errors(wanted[shape], same)
        elif same:
            errors.append(f"{_counted(len(same), shape)} not asked for")
    if requirement.relation and not errors:
        first, second = (next(f for f in found if f.shape == want.shape) for want in requirement.wanted)
        if not relation_holds((first.x, first.y), requirement.relation, (second.x, second.y)):
            errors.append(f"{first.shape} is not {requirement.relation} {second.shape}")
    return errors


def _shape_errors(want: RequiredObject, found: Sequence[Detection]) -> list[str]:
    """Errors of the detected objects of one shape."""
    if len(found) != want.count:
        return [f"{_counted(len(found), want.shape)} instead of {NUMBERS[want.count]}"]
    errors = []
    for one in found:
        if want.colour not in (None, one.colour):
            errors.append(f"{want.shape} is {one.colour} instead of {want.colour}")
        if want.size not in (None, one.size):
            errors.append(f"{want.shape} is {one.size} instead of {want.size}")
    return errors


def _counted(count: int, shape: str) -> str:
    return f"{NUMBERS.get(count, count if count else 'no')} {shape if count == 1 else PLURALS[shape]}"
