"""Growth of the layer's cost with tokens, experts, width and experts a token: exponents of power laws.

Time (forward and backward) and kept memory are measured at points that double along one axis, everything else as in the
recipe, and fitted by least squares in logarithms.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..config import ModelConfig
from ..models.block import make_moe
from .candidates import layer_candidates
from .counting import saved_bytes, work
from .measure import interleaved, utilisation

LEAST_POINTS = 4
"""Least number of points of an axis; five where the recipe leaves room."""
UNIT = 8
"""Widths are multiples of this, as grouped matmuls need them."""


@dataclass(frozen=True)
class Point:
    """One layer on an axis."""

    value: int
    """Position on the axis."""
    config: ModelConfig
    images: int


@dataclass(frozen=True)
class Power:
    """cost ~ value ** exponent."""

    exponent: float
    standard_error: float


def fit_power(values: Sequence[float], costs: Sequence[float]) -> Power:
    """Least squares of log cost over log value; three points at least."""
    x, y = [math.log(value) for value in values], [math.log(cost) for cost in costs]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - mean_x) ** 2 for a in x)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y)) / spread
    residual = sum((b - mean_y - slope * (a - mean_x)) ** 2 for a, b in zip(x, y))
    return Power(slope, math.sqrt(residual / (len(x) - 2) / spread))


def scaling(
    config: ModelConfig, images: int, tokens_an_image: int, seconds: float, device: torch.device, dtype: torch.dtype
) -> Iterator[dict[str, Any]]:
    """A record for each point, and one for each axis with its exponents.

    Args:
        seconds: approximate time for each axis, its points in turn.

    Raises:
        ValueError: the recipe has too few experts.
    """
    for axis, points in axes(config, images, tokens_an_image).items():
        candidates = []
        for point in points:
            torch.manual_seed(0)
            layer = make_moe(point.config).train().to(device)
            shape = (point.images, tokens_an_image, point.config.hidden_size)
            candidates.append(layer_candidates(layer, shape, dtype)["forward+backward"])
        times = interleaved([candidate.run for candidate in candidates], seconds, device)
        saved = []
        for point, candidate, taken in zip(points, candidates, times):
            assert candidate.forward is not None
            done = work(candidate.run, device)
            saved.append(saved_bytes(candidate.forward, candidate.parameters))
            record = {"mode": "forward+backward", "axis": axis, "value": point.value, **taken.record()}
            speed = utilisation(done.flops, done.bytes, taken.median, device, dtype)
            yield record | {"saved_bytes": saved[-1]} | speed
        values = [point.value for point in points]
        time, memory = fit_power(values, [taken.median for taken in times]), fit_power(values, saved)
        yield {
            "mode": "exponent",
            "axis": axis,
            "values": values,
            "ms": [1e3 * taken.median for taken in times],
            "exponent": time.exponent,
            "standard_error": time.standard_error,
            "memory_exponent": memory.exponent,
            "memory_standard_error": memory.standard_error,
        }


def axes(config: ModelConfig, images: int, tokens_an_image: int) -> dict[str, list[Point]]:
    """The points of each axis: tokens, experts, width (of tokens and of experts together), experts a token.

    Raises:
        ValueError: there are too few experts for four points of experts a token.
    """
    # Only the MoE layer is made: heads and positions need not fit the width.
    config = replace(config, num_heads=1, num_kv_heads=None, head_dim=4, position="rope1d", layer_capacities=None)
    config = replace(config, time_boundaries=None)  # equal ranges, for any number of experts
    first = max(1, images // 4)
    tokens = [Point(n * tokens_an_image, config, n) for n in (first * 2**i for i in range(5))]
    start = config.num_experts
    while start % (2 * config.n_group) == 0 and start // 2 >= max(config.num_experts / 4, _least_experts(config)):
        start //= 2
    experts = [Point(n, replace(config, num_experts=n), images) for n in (start * 2**i for i in range(5))]
    width = [_scaled(config, factor, images) for factor in (0.25, 0.5, 1, 2)]
    found = {"tokens": tokens, "experts": experts, "width": width}
    if config.rule is None or not config.rule.reads & {"top_k", "capacity"}:
        return found  # a token has one number of experts
    name = _name_of_top_k(config)
    reachable = config.num_experts * config.topk_group // config.n_group if name == "top_k" else config.num_experts
    changes: list[dict[str, Any]] = [{name: n} for n in (1, 2, 4, 8, 16) if n <= reachable]
    top_k = [Point(change[name], replace(config, **change), images) for change in changes]
    if len(top_k) < LEAST_POINTS:
        raise ValueError(
            f"a token can reach {reachable} experts, too few for {LEAST_POINTS} points of experts a token; "
            f"choose a recipe with {2 ** (LEAST_POINTS - 1)} or more"
        )
    return found | {"top_k": top_k}


def _scaled(config: ModelConfig, factor: float, images: int) -> Point:
    """All widths times a factor, rounded to multiples of UNIT."""
    widths: dict[str, Any] = {name: getattr(config, name) for name in ("hidden_size", "expert_dim", "shared_dim")}
    if factor != 1:
        widths = {name: width and UNIT * max(1, round(factor * width / UNIT)) for name, width in widths.items()}
    return Point(widths["hidden_size"], replace(config, **widths), images)


def _name_of_top_k(config: ModelConfig) -> str:
    return "top_k" if config.rule is not None and "top_k" in config.rule.reads else "capacity"


def _least_experts(config: ModelConfig) -> float:
    """Fewest experts from which a token can still choose its number."""
    return getattr(config, _name_of_top_k(config)) * config.n_group / config.topk_group
