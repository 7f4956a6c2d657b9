"""The folder of one run: its files, and the recipe it belongs to. docs/run-folder.md describes it for users."""

from __future__ import annotations

import fcntl
import os
import platform
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal, TextIO

from .config import SECTIONS, Recipe, TrainingConfig, difference, names_where, older_values, to_yaml
from .config.reading import Sections, build_recipe, merge, read_sections
from .log import Log

Resume = Literal["auto", "never", "changed"]
"""Handling of an existing run: resume it, refuse it, or resume it with another recipe."""
ORIGIN = "training.json"
"""File of a model's folder: the number of training steps, and the decay of its EMA."""
HANDOVER_SECONDS = 120.0
"""Time that a run waits for the lock of another one, which has not ended yet or whose machine is gone."""
DATA = "data.json"
"""File of a model's folder: names of the classes, and the space of its latents."""

EMA_MODEL = "model-ema-"
"""Beginning of the names of folders with further EMAs; their decay follows, or std and their width."""
EVALUATION = "evaluation.json"
"""File of a run: its scores against its own data."""


def ema_name(text: str) -> str:
    """Name of a further EMA as its folder has it: its decay as 0.999, or the width of a post-hoc one as std0.1.

    Raises:
        ValueError: it holds no number.
    """
    return f"std{float(text.removeprefix('std')):g}" if text.startswith("std") else str(float(text))


class RunFolder:
    """Paths of a run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe = path / "recipe.yaml"
        self.recipes = path / "recipes"
        """Recipes of a run that has had several: see `run_history`."""
        self.checkpoints = path / "checkpoints"
        self.snapshots = path / "snapshots"
        self.metrics = path / "metrics.jsonl"
        self.skipped = path / "skipped.txt"
        self.listing = path / "listing.sha256"
        """Hash of the images that the run is trained on; see `training.fit.check_same_images`."""
        self.nonfinite_steps = path / "nonfinite-steps.json"
        self.tensorboard = path / "tensorboard"
        self.samples = path / "samples"
        self.figures = path / "figures"
        self.model = path / "model"
        self.lora = path / "lora"
        self.previews = path / "previews"
        self.evaluation = path / EVALUATION

    def ema_model(self, name: float | str) -> Path:
        """Folder of a further EMA's model, by its decay, or by the name of a post-hoc EMA (see `ema_name`)."""
        return self.path / f"{EMA_MODEL}{name}"

    def claim(self, recipe: Recipe, resume: Resume) -> None:
        """Make the folder this recipe's: create it, or check that it already is; then write `recipe.yaml`.

        If the run resumes with another recipe, `recipe.yaml` is kept: `run_history.record` replaces it.

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
                f"{self.path} holds files but no recipe.yaml, so it is not a run; choose another --output_dir"
            )
        changes = difference(self.read_recipe(), recipe) if occupied else []
        if changes:
            self._check_changes(changes, resume)
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomically(self.recipe, to_yaml(recipe))
        except OSError as error:
            raise ValueError(f"cannot write to {self.path}: {error.strerror}; choose another --output_dir") from error

    def _check_changes(self, changes: list[str], resume: Resume) -> None:
        """Raise ValueError unless the run may resume with these changes of its recipe."""
        fixed = [
            f"{section}.{name}" for section, kind in SECTIONS.items() for name in names_where(kind, change="never")
        ]
        never = [line for line in changes if line.partition(":")[0] in fixed]
        if never and resume == "changed":
            raise ValueError(
                f"{self.path} holds a run that began otherwise ({'; '.join(never)}), which --resume changed cannot "
                "change; restore these values, or choose another --output_dir"
            )
        if resume != "changed":
            remedy = "" if never else ", or resume with the new recipe by --resume changed"
            raise ValueError(
                f"{self.path} holds a run of another recipe ({'; '.join(changes)}); choose another --output_dir{remedy}"
            )

    @contextmanager
    def reserved(self, log: Log, wait_seconds: float = HANDOVER_SECONDS) -> Iterator[None]:
        """Lock the folder while this run trains. The lock ends with the process, however that ends.

        Raises:
            ValueError: another run still trains here after the wait.
        """
        with (self.path / ".lock").open("a+") as file:
            end, waits = time.monotonic() + wait_seconds, False
            while not _locked(file):
                file.seek(0)
                holder = f"{file.read().strip() or 'another process'} trains in {self.path}"
                if time.monotonic() > end:
                    raise ValueError(f"{holder}; end it, wait for it, or choose another --output_dir")
                if not waits:
                    log(f"{holder}; waiting for its end")
                waits = True
                time.sleep(0.1)
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            yield

    def read_recipe(self) -> Recipe:
        """The recipe of an existing run.

        Raises:
            ValueError: there is no run here.
        """
        if not self.path.is_dir():
            raise ValueError(f"there is no folder {self.path}; give the folder of a run")
        if not self.recipe.is_file():
            raise ValueError(f"{self.path} has no recipe.yaml, so it is not a run; give the folder of a run")
        return read_run_recipe(self.recipe)

    def older_training(self) -> dict[str, Any]:
        """Fields of the training section that this run's recipe lacks, with the values it was trained with."""
        return _older_training(read_sections(self.recipe, old_names=True)) if self.recipe.is_file() else {}


def read_run_recipe(path: Path) -> Recipe:
    """The recipe of a run from its file; fields of a later version than the run's have the values it was trained with.

    Raises:
        ValueError: it cannot be read.
    """
    sections = read_sections(path, old_names=True)
    return build_recipe(merge({"training": _older_training(sections)}, sections))


def _older_training(sections: Sections) -> dict[str, Any]:
    known = sections.get("training", {})
    return {name: value for name, value in older_values(TrainingConfig).items() if name not in known}


@contextmanager
def lock_file(path: Path, wait: bool = True) -> Iterator[bool]:
    """Lock a file, which is created; the lock ends with the process, however that ends.

    Yields:
        False if another process has it, and True also where files cannot be locked.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        yield _locked(file, wait)


def _locked(file: TextIO, wait: bool = False) -> bool:
    try:
        # A POSIX lock belongs to the process: data workers, which may outlive it for seconds, do not inherit it.
        fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        return not isinstance(error, BlockingIOError | PermissionError)
    return True


def write_atomically(path: Path, content: str | bytes, shared: bool = False) -> None:
    """Write a file so that a reader finds either the whole old file or the whole new one; see `replace_atomically`."""
    with replace_atomically(path, shared) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def replace_atomically(path: Path, shared: bool = False) -> Iterator[BinaryIO]:
    """Open a file that replaces `path` once all of it is on the disk.

    Args:
        path: the file.
        shared: several processes may write it at a time.
    """
    writer = f"{platform.node()}-{os.getpid()}." if shared else ""
    partial = path.with_name(f".{path.name}.{writer}partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        error.filename = str(path)  # a failed write, as to a full disk, names no file
        raise
    finally:
        partial.unlink(missing_ok=True)
