"""Metrics of a step, as scalars on the device, and their copy to the host.

Shape suffixes: B images, L MoE layers, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..distributed import all_reduce_sum
from ..moe import RoutingReport

TIME_BINS = 10
"""Number of equal bins of times in [0, 1] (with ddpm, of steps) for the loss by time."""


class HostCopy:
    """Scalars copied to the host in the background; reading them waits for the copy."""

    def __init__(self, numbers: Mapping[str, Tensor]) -> None:
        self.names = tuple(numbers)
        values = torch.stack([number.detach().float() for number in numbers.values()])
        self.arrived: torch.cuda.Event | None = None
        self.values = values
        if values.device.type != "cpu":
            self.values = torch.empty(values.shape, pin_memory=True).copy_(values, non_blocking=True)
        if values.device.type == "cuda":
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def read(self) -> dict[str, float]:
        """The values by name."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return dict(zip(self.names, self.values.tolist()))


def loss_by_time(parts: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Mean loss of the global batch in each bin of times; NaN if a bin is empty.

    Args:
        parts: times in [0, 1] and losses, both (B,), of each micro-batch.
    """
    time_B = torch.cat([time for time, _ in parts])
    loss_B = torch.cat([loss for _, loss in parts]).float()
    bin_B = (time_B * TIME_BINS).long().clamp(0, TIME_BINS - 1)
    sums = loss_B.new_zeros(2, TIME_BINS)
    sums[0].scatter_add_(0, bin_B, loss_B)
    sums[1].scatter_add_(0, bin_B, torch.ones_like(loss_B))
    total, count = all_reduce_sum(sums)
    return {f"loss_t{i / TIME_BINS:.1f}": mean for i, mean in enumerate(total / count)}


def routing_measures(reports: Sequence[RoutingReport]) -> dict[str, Tensor]:
    """Load balance and capacity of each MoE layer; docs/training.md defines the keys."""
    numbers: dict[str, Tensor] = {}
    for i, report in enumerate(reports):
        counts_E = report.counts_E.float()
        share_E = counts_E / counts_E.sum()
        entropy = torch.special.entr(share_E).sum() / math.log(max(2, len(share_E)))
        numbers |= {
            f"moe_{i}/load_max": counts_E.max() / counts_E.mean(),
            f"moe_{i}/load_entropy": entropy,
            f"moe_{i}/dead_experts": (counts_E == 0).sum(),
            f"moe_{i}/capacity": counts_E.sum() / max(1, report.num_tokens),
        }
        if report.threshold_E is not None:
            numbers[f"moe_{i}/threshold"] = report.threshold_E.mean()
    if reports:
        busiest = [numbers[f"moe_{i}/load_max"] for i in range(len(reports))]
        numbers["imbalance"] = torch.stack(busiest).mean()
    return numbers
