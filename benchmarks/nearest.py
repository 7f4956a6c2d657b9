"""Draw samples of a run beside the training images nearest to them: a figure that shows copies, if there are any.

    python benchmarks/nearest.py RUN FIGURE.png

Each row has samples of one class, each followed by its nearest training images by Euclidean distance of pixels,
mirrored ones included if the run mirrors images. The last line compares the distances with those of held-out images:
copies would be nearer than real images that were never seen.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from diffusion_moe.data import load_dataset
from diffusion_moe.pixels import to_uint8
from diffusion_moe.sampling.sampler import load_sampler
from diffusion_moe.sampling.source import read_source

SAMPLES, NEAREST = 3, 3
"""Samples of a class, and training images beside each."""
SCALE, GAP = 2, 6
"""Screen pixels of a pixel, and between groups."""


def nearest(images: Tensor, training: Tensor, count: int, mirrored: bool) -> tuple[Tensor, Tensor]:
    """Distances to the nearest training images and their indices, both (S, count), nearest first.

    Args:
        images: NCHW.
        training: NCHW of the same size.
        count: number of neighbours.
        mirrored: take the smaller of the distances to a training image and to its mirror image.
    """
    views = [training.flatten(1), *([training.flip(-1).flatten(1)] if mirrored else [])]
    found = []
    for part in images.split(64):
        distances = torch.stack([torch.cdist(part.flatten(1), view) for view in views]).amin(0)
        found.append(distances.topk(count, largest=False))
    return torch.cat([each.values for each in found]), torch.cat([each.indices for each in found])


def sheet(samples: Tensor, neighbours: Tensor, each: int) -> Image.Image:
    """Rows of `each` groups: a sample, then its neighbours.

    Args:
        samples: NCHW in [-1, 1]. neighbours: (S, count, C, H, W).
    """
    groups = torch.cat((samples[:, None], neighbours), 1)
    S, count, _, H, W = groups.shape
    width, height = (count * W * SCALE + GAP * 2, H * SCALE + GAP)
    canvas = Image.new("RGB", (each * width, -(-S // each) * height), "white")
    for i, group in enumerate(to_uint8(groups.flatten(0, 1)).unflatten(0, (S, count))):
        for k, pixels in enumerate(group.permute(0, 2, 3, 1).numpy()):
            tile = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)
            left = (i % each) * width + k * W * SCALE + (GAP if k else 0)
            canvas.paste(tile.resize((W * SCALE, H * SCALE), Image.Resampling.NEAREST), (left, i // each * height))
    return canvas


def main() -> None:
    """Sample, search, draw."""
    parser = argparse.ArgumentParser(description="Draw samples beside the nearest training images")
    parser.add_argument("run", type=Path, help="folder of a finished run of images with classes")
    parser.add_argument("figure", type=Path, help="the PNG to write")
    options = parser.parse_args()
    sampler = load_sampler(read_source(options.run))
    recipe = sampler.source.recipe
    if recipe is None or not recipe.model.num_classes:
        parser.exit(2, f"nearest.py: {options.run} is no run with classes\n")
    training, held_out = (load_dataset(recipe.data, split).read_all().images for split in ("train", "test"))
    labels = torch.arange(recipe.model.num_classes).repeat_interleave(SAMPLES)
    samples = sampler.images(len(labels), labels)
    distance, index = nearest(samples, training, NEAREST, recipe.data.flip)
    options.figure.parent.mkdir(parents=True, exist_ok=True)
    sheet(samples, training[index], SAMPLES).save(options.figure)
    print(f"wrote {options.figure}")
    if len(held_out):
        real = nearest(held_out, training, 1, recipe.data.flip)[0]
        print(f"median distance to the nearest training image: samples {distance[:, 0].median():.2f}, ", end="")
        print(f"held-out images {real.median():.2f}")


if __name__ == "__main__":
    main()
