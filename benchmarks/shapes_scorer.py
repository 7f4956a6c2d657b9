"""How far the scorer of coloured shapes can be trusted, as the table of docs/shapes.md; and its pictures.

python benchmarks/shapes_scorer.py --images docs/images
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path

import torch
from PIL import Image

from diffusion_moe.pixels import image_grid
from diffusion_moe.shapes.accuracy import read_back, spoiled, truth
from diffusion_moe.shapes.detector import parse
from diffusion_moe.shapes.gallery import picture
from diffusion_moe.shapes.prompts import CATEGORIES, SPLITS, evaluation_prompts, true_scenes
from diffusion_moe.shapes.rendering import render
from diffusion_moe.shapes.sampling import draw_scenes, place
from diffusion_moe.shapes.scene import contents
from diffusion_moe.shapes.scorer import complaints, judge_all

SIZES = (32, 64)
SPOILING = [(0.0, 0.0), (0.0, 0.1), (0.0, 0.2), (0.5, 0.0), (0.8, 0.0), (0.8, 0.1), (1.0, 0.2), (1.3, 0.0), (1.3, 0.2)]
"""Blur in pixels of an image of 32 x 32, and noise in [-1, 1]: standard deviations of both."""


def row(size: int, blur: float, noise: float, count: int, per_category: int) -> str:
    """One line of the table."""
    rows = torch.arange(count) * 7919 % len(contents())
    scenes = place(rows, 1, "scorer", torch.arange(count))
    whole = read_back(scenes, spoiled(render(scenes, size), blur / 32, noise, seed=1)).double().mean()
    right, accepted, pairs = [], 0, 0
    for split in SPLITS:
        prompts = evaluation_prompts(2, per_category, split)
        true = true_scenes(prompts, 2)
        images = spoiled(render(true, size), blur / 32, noise, seed=2)
        right += [verdict.correct for verdict in judge_all(prompts, images)]
        parsed, known = parse(images), [truth(true.scene(s)) for s in range(len(prompts))]
        for category in CATEGORIES:
            members = [i for i, prompt in enumerate(prompts) if prompt.category == category]
            for i, j in product(members, members):
                if complaints(prompts[i].requirement, known[j]):
                    pairs += 1
                    accepted += not complaints(prompts[i].requirement, parsed[j])
    shares = f"{whole:.2%} | {sum(right) / len(right):.2%} | {accepted} of {pairs:,}"
    return f"| {size} | {blur:g} | {noise:g} | {shares} |"


def pictures(folder: Path) -> None:
    """Scenes at both sizes, equally large; and a page of verdicts on true images, every other one of another prompt."""
    scenes = draw_scenes(0, "train", torch.arange(16))
    small, large = render(scenes, 32).repeat_interleave(4, 2).repeat_interleave(4, 3), render(scenes, 64)
    pixels = image_grid(torch.cat((small, large.repeat_interleave(2, 2).repeat_interleave(2, 3))), 8)
    Image.fromarray(pixels.numpy()).save(folder / "shapes.png", optimize=True)
    prompts = [prompt for split in SPLITS for prompt in evaluation_prompts(0, 1, split)]
    images = render(true_scenes(prompts, 1), 32)
    images[1::2] = images[1::2].roll(1, 0)
    verdicts = judge_all(prompts, images)
    picture(prompts, images, verdicts).save(folder / "shapes-verdicts.png", optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2520, help="scenes a line; all 840 contents come alike")
    parser.add_argument("--per_category", type=int, default=60, help="prompts of each category and split a line")
    parser.add_argument("--images", type=Path, help="folder for the pictures")
    options = parser.parse_args()
    print("| side | blur | noise | scenes read back whole | true images judged right | wrong ones accepted |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: |")
    for size, (blur, noise) in product(SIZES, SPOILING):
        print(row(size, blur, noise, options.count, options.per_category), flush=True)
    if options.images:
        pictures(options.images)


if __name__ == "__main__":
    main()
