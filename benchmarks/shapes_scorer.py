"""Accuracy of the scorer of coloured shapes, as the table of docs/shapes.md; and its pictures.

python benchmarks/shapes_scorer.py --images docs/images
"""

from __future__ import annotations

import argparse
import math
from itertools import product
from pathlib import Path

import torch
from PIL import Image
from scipy import ndimage
from single_scenes import Item, Scene, sample_scenes, scene_at
from torch import Tensor

from diffusion_moe.pixels import image_grid
from diffusion_moe.shapes.detector import Detection, detect
from diffusion_moe.shapes.gallery import make_gallery
from diffusion_moe.shapes.prompts import CATEGORIES, SPLITS, evaluation_prompts, true_scenes
from diffusion_moe.shapes.rendering import AREAS, render
from diffusion_moe.shapes.sampling import Scenes, arrange
from diffusion_moe.shapes.scene import contents
from diffusion_moe.shapes.scorer import find_errors, score_images

SIZES = (32, 64)
SPOILING = [(0.0, 0.0), (0.0, 0.1), (0.0, 0.2), (0.5, 0.0), (0.8, 0.0), (0.8, 0.1), (1.0, 0.2), (1.3, 0.0), (1.3, 0.2)]
"""Blur in pixels of an image of 32 x 32, and noise in [-1, 1]: standard deviations of both."""
NEAR = 0.03
"""Greatest distance between an object and its detection, as a share of the image's side."""


def spoiled(images: Tensor, blur: float, noise: float, seed: int) -> Tensor:
    """Images as a weak model might generate them: blurred, then with normal noise.

    Args:
        images: NCHW, [-1, 1].
        blur: standard deviation as a share of the side.
        noise: standard deviation of each value.
    """
    width = blur * math.sqrt(images.shape[2] * images.shape[3])
    soft = torch.from_numpy(ndimage.gaussian_filter(images.numpy(), (0, 0, width, width), mode="nearest"))
    return soft + noise * torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))


def read_back(scenes: Scenes, images: Tensor) -> Tensor:
    """True for each scene of which exactly its objects are detected, with shape, colour, size and position; (S,)."""
    detected = detect(images)
    return torch.tensor([_same(scene_at(scenes, s).items, found) for s, found in enumerate(detected)])


def truth(scene: Scene) -> list[Detection]:
    """Detections of a detector without errors."""
    return [
        Detection(item.shape, item.colour, item.x, item.y, item.radius, AREAS[item.shape] * item.radius**2, 1.0)
        for item in scene.items
    ]


def _same(items: tuple[Item, ...], found: list[Detection]) -> bool:
    left = list(found)
    for item in items:
        match = next((one for one in left if _is(one, item)), None)
        if match is None:
            return False
        left.remove(match)
    return not left


def _is(one: Detection, item: Item) -> bool:
    same = (one.shape, one.colour, one.size) == (item.shape, item.colour, item.size)
    return same and math.hypot(one.x - item.x, one.y - item.y) < NEAR


def row(size: int, blur: float, noise: float, count: int, per_category: int) -> str:
    """One row of the table."""
    rows = torch.arange(count) * 7919 % len(contents())
    scenes = arrange(rows, 1, "scorer", torch.arange(count))
    whole = read_back(scenes, spoiled(render(scenes, size), blur / 32, noise, seed=1)).double().mean()
    right, accepted, pairs = [], 0, 0
    for split in SPLITS:
        prompts = evaluation_prompts(2, per_category, split)
        true = true_scenes(prompts, 2)
        images = spoiled(render(true, size), blur / 32, noise, seed=2)
        right += [score.correct for score in score_images(prompts, images)]
        detected, known = detect(images), [truth(scene_at(true, s)) for s in range(len(prompts))]
        for category in CATEGORIES:
            members = [i for i, prompt in enumerate(prompts) if prompt.category == category]
            for i, j in product(members, members):
                if find_errors(prompts[i].requirement, known[j]):
                    pairs += 1
                    accepted += not find_errors(prompts[i].requirement, detected[j])
    shares = f"{whole:.2%} | {sum(right) / len(right):.2%} | {accepted} of {pairs:,}"
    return f"| {size} | {blur:g} | {noise:g} | {shares} |"


def pictures(folder: Path) -> None:
    """Save scenes of both sizes, and a gallery of true images, every other one of another prompt."""
    scenes = sample_scenes(0, "train", torch.arange(16))
    small, large = render(scenes, 32).repeat_interleave(4, 2).repeat_interleave(4, 3), render(scenes, 64)
    pixels = image_grid(torch.cat((small, large.repeat_interleave(2, 2).repeat_interleave(2, 3))), 8)
    Image.fromarray(pixels.numpy()).save(folder / "shapes.png", optimize=True)
    prompts = [prompt for split in SPLITS for prompt in evaluation_prompts(0, 1, split)]
    images = render(true_scenes(prompts, 1), 32)
    images[1::2] = images[1::2].roll(1, 0)
    scores = score_images(prompts, images)
    make_gallery(prompts, images, scores).save(folder / "shapes-verdicts.png", optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2520, help="scenes a line; all 840 contents come alike")
    parser.add_argument("--per_category", type=int, default=60, help="prompts of each category and split a line")
    parser.add_argument("--images", type=Path, help="folder for the pictures")
    options = parser.parse_args()
    print("| side | blur | noise | scenes detected | true images scored right | wrong ones accepted |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: |")
    for size, (blur, noise) in product(SIZES, SPOILING):
        print(row(size, blur, noise, options.count, options.per_category), flush=True)
    if options.images:
        pictures(options.images)


if __name__ == "__main__":
    main()
