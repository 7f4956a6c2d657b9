"""Time, speed and memory of training."""

from __future__ import annotations

import math
import resource
import sys
import time
from functools import cached_property

import torch

from ..config import Recipe
from ..counts import model_flops
from ..moe.precision import choose_precision
from .step import StepResult

PEAK_BF16_FLOPS = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}
"""Dense bfloat16 FLOP/s by a part of the device's name, from the makers' data sheets."""
UNLOGGED = ("finite", "stop", "skipped_images")
Mark = float | torch.cuda.Event


class Speedometer:
    """Timer of the parts of a step; on a GPU by CUDA events, without waiting for the device."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self.recipe, self.device = recipe, device
        self.laps: list[tuple[str, Mark, Mark]] = []
        self.last_speed: dict[str, float] = {}
        self.known_flops: dict[float, int] = {}
        self.last = self._mark()

    def lap(self, name: str) -> None:
        """Count the time since the last mark for a part: data, forward, backward or optimizer."""
        mark = self._mark()
        self.laps.append((name, self.last, mark))
        self.last = mark

    def restart(self) -> None:
        """Count the time since the last mark for none of the parts."""
        self.last = self._mark()

    def metrics(self, result: StepResult) -> dict[str, float]:
        """Metrics to log of a step: its own, and the speed since this was last called."""
        metrics = {
            name: value
            for name, value in result.numbers.read().items()
            if name not in UNLOGGED and math.isfinite(value)  # JSON has no others
        }
        metrics["learning_rate"] = result.learning_rate
        return metrics | self._speed(result.step) | {"memory_gb": self._memory_gb()}

    def _speed(self, step: int) -> dict[str, float]:
        spent = dict.fromkeys(("data", "forward", "backward", "optimizer"), 0.0)
        steps, open_laps = 0, []
        for lap in self.laps:
            name, begin, end = lap
            if isinstance(begin, torch.cuda.Event) and not end.query():  # type: ignore[union-attr]
                open_laps.append(lap)
                continue
            spent[name] += _seconds(begin, end)
            steps += name == "optimizer"
        self.laps = open_laps
        total = sum(spent.values())
        if not steps or not total:  # nothing was timed since the last call
            return self.last_speed
        images = steps * self.recipe.training.batch_size / total
        # The backward pass takes two matmuls for each of the forward pass.
        flops = 3 * self.flops_an_image(self.recipe.training.drop_rate_at(step)) * images
        numbers = {"images_per_second": images, "model_tflops": flops / 1e12}
        if (peak := self.peak_flops) is not None:
            world = self.recipe.parallel.replicate * self.recipe.parallel.shard * self.recipe.parallel.experts
            numbers["model_flops_utilisation"] = flops / (peak * world)
        self.last_speed = numbers | {f"seconds_{name}": seconds / steps for name, seconds in spent.items()}
        return self.last_speed

    def flops_an_image(self, drop_rate: float) -> int:
        """FLOPs of the forward pass."""
        if drop_rate not in self.known_flops:
            self.known_flops[drop_rate] = model_flops(self.recipe.model, drop_rate).total
        return self.known_flops[drop_rate]

    @cached_property
    def peak_flops(self) -> float | None:
        """Peak FLOP/s of the device in the precision, if known."""
        chosen = choose_precision(self.recipe.training.precision, self.device).precision
        if self.device.type != "cuda" or chosen != "bf16":
            return None
        name = torch.cuda.get_device_name(self.device)
        return next((peak for part, peak in PEAK_BF16_FLOPS.items() if part in name), None)

    def _memory_gb(self) -> float:
        """Peak memory so far of the device, or of this process on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e9
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9

    def _mark(self) -> Mark:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _seconds(begin: Mark, end: Mark) -> float:
    if isinstance(begin, torch.cuda.Event):
        return begin.elapsed_time(end) / 1e3  # type: ignore[arg-type]
    return end - begin  # type: ignore[operator]
