"""Output of training: metrics.jsonl, TensorBoard, Weights & Biases, and progress for people."""

from __future__ import annotations

import errno
import importlib.util
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from ..config import LoggingConfig, Recipe, TrainingConfig, to_dict
from ..distributed import is_main
from ..log import Log
from ..run_folder import RunFolder, write_atomically
from .step import StepResult


class MetricsLog:
    """One JSON line a logged step, and the same metrics for TensorBoard and, if asked for, Weights & Biases.

    Only the main process writes; on the others all methods do nothing.
    """

    def __init__(self, run: RunFolder, recipe: Recipe) -> None:
        self.run, self.recipe = run, recipe
        self.file: TextIO | None = None
        self.board: Any = None
        self.wandb: Any = None

    def open(self, step: int) -> None:
        """Open or reopen the files after `step`; lines of later steps, which are taken again, are removed."""
        if not is_main():
            return
        self._close_files()
        if self.recipe.logging.wandb is not None and self.wandb is None:
            self.wandb = _wandb_run(self.run, self.recipe)
        path = self.run.metrics
        if path.exists():
            rows = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
            write_atomically(path, "".join(f"{row}\n" for row in rows))
        self.file = path.open("a")
        if self.recipe.logging.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(self.run.tensorboard), purge_step=step + 1)

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """Write the metrics of a step.

        Raises:
            OSError: the disk is full; names the file.
        """
        if self.file is None:
            return
        with self._errors_name_the_file():
            self.file.write(json.dumps({"step": step, **metrics}) + "\n")
            self.file.flush()
            if self.board is not None:
                for name, value in metrics.items():
                    self.board.add_scalar(name, value, step)
        if self.wandb is not None:
            self.wandb.log(metrics, step=step)

    def close(self) -> None:
        """Close all files."""
        self._close_files()
        if self.wandb is not None:
            self.wandb.finish()

    def _close_files(self) -> None:
        with self._errors_name_the_file():
            if self.file is not None:
                self.file.close()
            if self.board is not None:
                self.board.close()
        self.file = self.board = None

    @contextmanager
    def _errors_name_the_file(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.board = None  # its thread would fail too, with a traceback
            reason = f"cannot write the metrics ({error.strerror or error})"
            raise OSError(error.errno or errno.EIO, reason, str(self.run.metrics)) from error


def check_trackers(config: LoggingConfig) -> None:
    """Check that the trackers are installed.

    Raises:
        ValueError: Weights & Biases is not installed.
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
        return float("inf")  # the last line of a killed run may be incomplete


class ProgressBar:
    """A bar on a terminal, plain lines elsewhere; both with step, loss, images per second and time left.

    Of several processes that share a terminal, the main one shows it.
    """

    def __init__(self, training: TrainingConfig, every: int, log: Log) -> None:
        self.steps, self.batch_size, self.every, self.log = training.steps, training.batch_size, every, log
        self.first = 0
        self.began = self.last_line = time.perf_counter()
        self.bar: Any = None
        self.task: Any = None

    def open(self, step: int) -> None:
        """Show progress from a step on."""
        self.first = step
        self.began = self.last_line = time.perf_counter()
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

    def close(self) -> None:
        """Remove the bar."""
        if self.bar is not None:
            self.bar.stop()

    def show(self, result: StepResult) -> None:
        """Move the bar, or log a line at the first and last logged step and every 10 s between."""
        step, now = result.step, time.perf_counter()
        speed = (step - self.first) * self.batch_size / max(now - self.began, 1e-9)
        if self.bar is not None:
            self.bar.update(self.task, completed=step, description=f"loss {result.loss:.4f}  {speed:.0f} images/s")
            return
        logged = step % self.every == 0
        if step == self.steps or step == self.every or (logged and now - self.last_line > 10):
            self.last_line = now
            left = (self.steps - step) * self.batch_size / speed
            self.log(f"step {step}/{self.steps}  loss {result.loss:.4f}  {speed:.0f} images/s  {_clock(left)} left")


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
