"""What is written while training: metrics.jsonl, TensorBoard, and progress for people."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ..run_folder import write_atomically


class MetricsLog:
    """One JSON line a logged step, and the same numbers for TensorBoard.

    On resuming from an earlier step the lines after it go: their steps are taken again, with the same numbers.
    """

    def __init__(self, path: Path, tensorboard: Path | None, resumed_step: int) -> None:
        if path.exists():
            rows = [line for line in path.read_text().splitlines() if _step_of(line) <= resumed_step]
            write_atomically(path, "".join(f"{row}\n" for row in rows))
        self.file = path.open("a")
        self.board = None
        if tensorboard is not None:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(tensorboard), purge_step=resumed_step + 1)

    def write(self, step: int, numbers: dict[str, Any]) -> None:
        self.file.write(json.dumps({"step": step, **numbers}) + "\n")
        self.file.flush()
        if self.board is not None:
            for name, value in numbers.items():
                self.board.add_scalar(name, value, step)

    def close(self) -> None:
        self.file.close()
        if self.board is not None:
            self.board.close()


def _step_of(line: str) -> float:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # the last line of a killed run may be cut off


class Progress:
    """A bar on a terminal, plain lines elsewhere; both with step, loss, images per second and time left."""

    def __init__(self, step: int, steps: int, batch_size: int, say: Callable[[str], None]) -> None:
        self.first, self.steps, self.batch_size, self.say = step, steps, batch_size, say
        self.began = time.perf_counter()
        self.bar: Any = None

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
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

    def images_per_second(self, step: int) -> float:
        """Since this process began training."""
        return (step - self.first) * self.batch_size / max(time.perf_counter() - self.began, 1e-9)

    def show(self, step: int, loss: float, line: bool) -> None:
        """Move the bar, or print a line if it is time for one."""
        speed = self.images_per_second(step)
        if self.bar is not None:
            self.bar.update(self.task, completed=step, description=f"loss {loss:.4f}  {speed:.0f} images/s")
        elif line:
            left = (self.steps - step) * self.batch_size / speed
            self.say(f"step {step}/{self.steps}  loss {loss:.4f}  {speed:.0f} images/s  {_clock(left)} left")


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
