"""The points of a sweep, from comma lists and a YAML file."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from ..config import EvaluationConfig, read_yaml, unknown_name
from ..run_folder import ema_name
from ..sampling.options import Weights
from .options import SweepOptions


def _weights(text: str) -> str:
    return text if text in ("ema", "model") else ema_name(text)


def _interval(text: str) -> tuple[float, float]:
    low, high = text.split(":")
    return float(low), float(high)


READERS: dict[str, tuple[Callable[[str], Any], str]] = {
    "weights": (_weights, "ema or model or the decay of a further EMA"),
    "solver": (str, "a solver"),
    "steps": (int, "a whole number"),
    "guidance_interval": (_interval, "two times with a colon, as 0.1:1"),
    "threshold_scale": (float, "a number"),
    "guidance_scale": (float, "a number"),
}
"""Function that reads a value of each setting, and what it expects."""
AXES = tuple(READERS)
"""Settings that a grid combines; the last one changes fastest."""


@dataclass(frozen=True)
class SweepPoint:
    """One combination of settings."""

    weights: Weights
    settings: EvaluationConfig

    def title(self) -> str:
        """The settings in one line."""
        s = self.settings
        low, high = s.guidance_interval
        steps = "" if s.solver == "dopri5" else f" {s.steps} steps"
        return (
            f"weights {self.weights}, {s.solver}{steps}, guidance {s.guidance_scale:g} on t {low:g} to {high:g}, "
            f"thresholds x {s.threshold_scale:g}"
        )


class Grid(NamedTuple):
    """Content of a grid file."""

    lists: dict[str, Any]
    """Values of each axis."""
    others: dict[str, Any]
    """Its other settings."""


def read_grid(path: Path) -> Grid:
    """A grid from a YAML file.

    Raises:
        ValueError: it cannot be read, or an entry is no setting.
    """
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a mapping; it may hold {', '.join(AXES)}, each a list")
    known = [*AXES, *EvaluationConfig.__dataclass_fields__, *SweepOptions.__dataclass_fields__]
    for key in content:
        if key not in known or key == "grid":
            raise ValueError(f"{path}: {unknown_name(str(key), known)}")
    return Grid(
        {key: value for key, value in content.items() if key in AXES},
        {key: value for key, value in content.items() if key not in AXES},
    )


def make_points(options: SweepOptions, from_file: dict[str, Any], usual: EvaluationConfig) -> list[SweepPoint]:
    """All combinations of the options' lists, else the file's, else the usual value; equal ones once."""
    lists, defaults = [], {"weights": "ema"} | vars(usual)
    for axis in AXES:
        given = getattr(options, axis)
        values = from_file.get(axis) if given is None else given.strip("[] ").split(",")
        lists.append([defaults[axis]] if values is None else [_value(axis, v) for v in _as_list(axis, values)])
    points = []
    for combination in itertools.product(*lists):
        chosen = dict(zip(AXES, combination))
        points.append(_normal(SweepPoint(chosen.pop("weights"), replace(usual, **chosen))))
    return list(dict.fromkeys(points))


def _as_list(axis: str, listed: Any) -> list[Any]:
    if not isinstance(listed, list):
        return [listed]
    pair = axis == "guidance_interval" and len(listed) == 2 and not any(isinstance(x, list | str) for x in listed)
    return [listed] if pair else listed


def _value(axis: str, value: Any) -> Any:
    """One setting from the text of an option or a value of the file."""
    text = ":".join(map(str, value)) if isinstance(value, list) else str(value).strip()
    read, expected = READERS[axis]
    try:
        return read(text)
    except ValueError as error:
        raise ValueError(f"{axis} holds {text!r}; expected {expected} at each position of the list") from error


def _normal(point: SweepPoint) -> SweepPoint:
    """The point with defaults for what its images do not depend on, so that points of equal images are equal."""
    default, settings = EvaluationConfig(), point.settings
    if settings.guidance_scale == 1:
        settings = replace(settings, guidance_interval=default.guidance_interval)
    if settings.solver == "dopri5":  # it chooses its steps
        settings = replace(settings, steps=default.steps)
    return replace(point, settings=settings)
