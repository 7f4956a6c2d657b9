"""What is written while training: metrics.jsonl, TensorBoard, and progress for people."""

from __future__ import annotations

import errno
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from ..config import LoggingConfig, Recipe, TrainingConfig, to_dict
from ..distributed import is_main
from ..run_folder import RunFolder, write_atomically
from .step import StepResult


class MetricsLog:
    """One JSON line a logged step, and the same numbers for TensorBoard and, if asked for, Weights & Biases.

    On resuming from an earlier step the lines after it go: their steps are taken again, with the same numbers.
    """

    def __init__(self, run: RunFolder, recipe: Recipe, resumed_step: int) -> None:
        self.run, self.recipe = run, recipe
        self.wandb = _wandb_run(run, recipe) if recipe.logging.wandb is not None else None
        self._open(resumed_step)

    def _open(self, step: int) -> None:
        path = self.run.metrics
        if path.exists():
            rows = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
            write_atomically(path, "".join(f"{row}\n" for row in rows))
        self.file = path.open("a")
        self.board = None
        if self.recipe.logging.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(self.run.tensorboard), purge_step=step + 1)

    def go_back(self, step: int) -> None:
        """Forget what came after a step, for it is taken again."""
        self._close_files()
        self._open(step)

    def write(self, step: int, numbers: dict[str, Any]) -> None:
        """Raises OSError, which names the file, if the disk is full."""
        with self._named():
            self.file.write(json.dumps({"step": step, **numbers}) + "\n")
            self.file.flush()
            if self.board is not None:
                for name, value in numbers.items():
                    self.board.add_scalar(name, value, step)
        if self.wandb is not None:
            self.wandb.log(numbers, step=step)

    def close(self) -> None:
        self._close_files()
        if self.wandb is not None:
            self.wandb.finish()

    def _close_files(self) -> None:
        with self._named():
            self.file.close()
            if self.board is not None:
                self.board.close()

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Errors in writing do not know the file's name."""
        try:
            yield
        except OSError as error:
            self.board = None  # its thread would fail too, and show where
            reason = f"cannot write the metrics ({error.strerror or error})"
            raise OSError(error.errno or errno.EIO, reason, str(self.run.metrics)) from error


def check_trackers(config: LoggingConfig) -> None:
    """Whether what is asked for is installed.

    Raises:
        ValueError: Weights & Biases is not.
    """
    if config.wandb is not None and importlib.util.find_spec("wandb") is None:
        raise ValueError(f"logging.wandb is {config.wandb}, but the package wandb is not installed; pip install wandb")


def _wandb_run(run: RunFolder, recipe: Recipe) -> Any:
    import wandb

    name = run.path.resolve().name
    return wandb.init(
        project=recipe.logging.wandb, name=name, id=name, dir=str(run.path), resume="allow", config=to_dict(recipe)
    )


def _step_of(line: str) -> float:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # the last line of a killed run may be cut off


class Progress:
    """A bar on a terminal, plain lines elsewhere; both with step, loss, images per second and time left.

    Of several processes that share a terminal, the main one shows it.
    """

    def __init__(self, step: int, recipe: TrainingConfig, every: int, log: Callable[[str], None]) -> None:
        self.first, self.steps, self.batch_size = step, recipe.steps, recipe.batch_size
        self.every, self.log = every, log
        self.began = self.spoke = time.perf_counter()
        self.bar: Any = None

    def __enter__(self) -> Self:
        if is_main() and sys.stderr.isatty():
            from rich import progress
            from rich.console import Console

            self.bar = progress.Progress(
                progress.TextColumn("step {task.completed}/{task.total}"),
                progress.BarColumn(),
                progress.TextColumn("{task.description}"),
                progress.TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self.bar.start()
            self.task = self.bar.add_task("", total=self.steps, completed=self.first)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def show(self, result: StepResult) -> None:
        """Move the bar, or print a line if it is time for one: at the first and last logged step, else every 10 s."""
        step, now = result.step, time.perf_counter()
        speed = (step - self.first) * self.batch_size / max(now - self.began, 1e-9)
        if self.bar is not None:
            self.bar.update(self.task, completed=step, description=f"loss {result.loss:.4f}  {speed:.0f} images/s")
            return
        logged = step % self.every == 0
        if step == self.steps or step == self.every or (logged and now - self.spoke > 10):
            self.spoke = now
            left = (self.steps - step) * self.batch_size / speed
            self.log(f"step {step}/{self.steps}  loss {result.loss:.4f}  {speed:.0f} images/s  {_clock(left)} left")


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
