"""Single scenes of coloured shapes as values, for the benchmark of their scorer and for tests."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from diffusion_moe.config import ShapesLayout
from diffusion_moe.shapes.sampling import Scenes, arrange, sample_contents
from diffusion_moe.shapes.scene import COLOURS, SHAPES, Colour, Shape, Size, size_of


@dataclass(frozen=True)
class Item:
    """One object of a scene; lengths are shares of the image's side, y runs downwards."""

    shape: Shape
    colour: Colour
    x: float
    """Position of the centroid."""
    y: float
    radius: float

    @property
    def size(self) -> Size:
        return size_of(self.radius)


@dataclass(frozen=True)
class Scene:
    """Objects on the plain background; they do not touch."""

    items: tuple[Item, ...]


def scene_at(scenes: Scenes, index: int) -> Scene:
    """One of many scenes as a value."""
    colours = list(COLOURS)
    rows = zip(*(getattr(scenes, name)[index].tolist() for name in ("shape", "colour", "x", "y", "radius")))
    return Scene(tuple(Item(SHAPES[shape], colours[colour], x, y, r) for shape, colour, x, y, r in rows if r > 0))


def sample_scenes(seed: int, split: str, numbers: Tensor, layout: ShapesLayout = "free") -> Scenes:
    """Scenes of a split by number, int64, (S,), as `data.shapes.Shapes` has them for its seed."""
    stream = f"shapes/{split}"
    return arrange(sample_contents(seed, stream, numbers), seed, stream, numbers, layout)
