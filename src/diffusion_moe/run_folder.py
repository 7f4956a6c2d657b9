"""The folder of one run: what lies where, and whose it is. docs/run-folder.md describes it for users."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from .config import Recipe, difference, to_yaml
from .parsing import read_recipe

ORIGIN = "training.json"
"""In the model's folder: how many steps it was trained, and the decay of its average."""
DATA = "data.json"
"""In the model's folder: names of the classes, and which latents it draws."""

AVERAGE = "model-ema-"
"""How folders of further averages begin; their decay follows."""
EVALUATION = "evaluation.json"
"""In a run: its scores by its own data."""


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run."""

    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def skipped(self) -> Path:
        return self.path / "skipped.txt"

    @property
    def bad_batches(self) -> Path:
        return self.path / "bad-batches.json"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def figures(self) -> Path:
        return self.path / "figures"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def lora(self) -> Path:
        return self.path / "lora"

    def average(self, decay: float) -> Path:
        """Where a further average's model lies."""
        return self.path / f"{AVERAGE}{decay}"

    @property
    def previews(self) -> Path:
        return self.path / "previews"

    @property
    def evaluation(self) -> Path:
        return self.path / EVALUATION

    def claim(self, recipe: Recipe, resume: Literal["auto", "never"]) -> None:
        """Make the folder this recipe's: create it, or check that it already is; then write `recipe.yaml`.

        Raises:
            ValueError: the folder is another recipe's, holds something else, or must not be resumed.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{self.path} is a file; choose another --output_dir")
        occupied = self.path.is_dir() and any(self.path.iterdir())
        if occupied and resume == "never":
            raise ValueError(f"{self.path} is not empty and --resume is never; choose another --output_dir")
        if occupied and not self.recipe.is_file():
            raise ValueError(
                f"{self.path} holds files but no recipe.yaml, so it is no run; choose another --output_dir"
            )
        if occupied:
            changes = difference(read_recipe(self.recipe), recipe)
            if changes:
                raise ValueError(
                    f"{self.path} holds a run of another recipe ({'; '.join(changes)}); choose another --output_dir"
                )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomically(self.recipe, to_yaml(recipe))
        except OSError as error:
            raise ValueError(f"cannot write to {self.path}: {error.strerror}; choose another --output_dir") from error

    def read_recipe(self) -> Recipe:
        """The recipe of an existing run.

        Raises:
            ValueError: there is no run here.
        """
        if not self.path.is_dir():
            raise ValueError(f"there is no folder {self.path}; give the folder of a run")
        if not self.recipe.is_file():
            raise ValueError(f"{self.path} has no recipe.yaml, so it is no run; give the folder of a run")
        return read_recipe(self.recipe)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader finds the old one or the new one, whole."""
    with replace_atomically(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def replace_atomically(path: Path) -> Iterator[BinaryIO]:
    """A file to write to that takes the place of `path` once all of it is on the disk."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
