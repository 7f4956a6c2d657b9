"""Curves of a run, from its metrics.jsonl, and the point at which a curve reaches a loss."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

POINTS = 100
"""Most points of a training curve that a record keeps."""


class CurvePoint(NamedTuple):
    """A held-out loss during training."""

    step: int
    images: int
    seconds: float
    """Time of the training steps so far; validation and checkpoints are not counted."""
    loss: float


class RunCurves(NamedTuple):
    """The losses of a run over its steps."""

    training: list[tuple[int, float]]
    """Step, and mean loss of the logged steps since the point before."""
    held_out: list[CurvePoint]
    """Held-out losses of the EMA weights."""
    seconds: float
    """Time of all training steps."""


class Reached(NamedTuple):
    """Images and time that a run took until its held-out loss was a given one."""

    images: float
    seconds: float


def read_curves(metrics: Path, batch_size: int, ema_decay: float) -> RunCurves:
    """Read the curves of a finished run.

    The seconds of the steps between two lines are their number times the mean seconds of a step that the later line
    logs, so interruptions do not count.
    """
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    return curves_of(rows, batch_size, ema_decay)


def curves_of(rows: Sequence[Mapping[str, Any]], batch_size: int, ema_decay: float) -> RunCurves:
    """The curves in lines of a metrics.jsonl, see `read_curves`."""
    name = f"val_loss_ema_{ema_decay}"
    training: list[tuple[int, float]] = []
    held_out: list[CurvePoint] = []
    seconds, last, speed = 0.0, 0, 0.0
    for row in rows:
        step = int(row["step"])
        if "images_per_second" in row:
            speed = batch_size / row["images_per_second"]
        seconds += (step - last) * speed
        last = step
        if "loss" in row:
            training.append((step, float(row["loss"])))
        if name in row:
            held_out.append(CurvePoint(step, step * batch_size, seconds, float(row[name])))
    return RunCurves(_thinned(training), held_out, seconds)


def _thinned(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most `POINTS` points: means of neighbours, at the last step of each."""
    size = -(-len(points) // POINTS) or 1
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    return [(part[-1][0], sum(loss for _, loss in part) / len(part)) for part in parts]


def reached(curve: Sequence[CurvePoint], loss: float) -> Reached | None:
    """Images and seconds until the curve is first at or below a loss, linear between its points; None: never."""
    for i, point in enumerate(curve):
        if point.loss > loss:
            continue
        if i == 0:
            return Reached(point.images, point.seconds)
        before = curve[i - 1]
        share = (before.loss - loss) / (before.loss - point.loss)
        images = before.images + share * (point.images - before.images)
        return Reached(images, before.seconds + share * (point.seconds - before.seconds))
    return None
