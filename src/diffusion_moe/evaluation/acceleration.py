"""The model as sampling calls it: as it is, compiled block by block, or replayed as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import EvaluationConfig, ModelConfig
from ..models import Backbone, DiTOutput

Network = Callable[[Tensor, Tensor, Tensor | None], DiTOutput]
"""x (B, C, H, W), t (a scalar) and labels (B,) or None to the model's output."""
WARM_UP = 3
"""Calls before a capture: libraries choose their kernels and take their memory."""


def check_acceleration(config: ModelConfig, settings: EvaluationConfig, device: torch.device) -> None:
    """Whether the model can be sped up in this way.

    Raises:
        ValueError: a graph without a GPU, or shapes that depend on what DiffMoE's thresholds choose.
    """
    if settings.acceleration == "graph" and device.type != "cuda":
        raise ValueError(f"acceleration is graph, but the model is on {device.type}; use compile or none")
    if settings.acceleration != "none" and config.router == "diffmoe" and settings.capacity_limit is None:
        raise ValueError(
            f"acceleration is {settings.acceleration}, but the diffmoe router chooses any number of experts a token; "
            "give it a capacity_limit (2 leaves ample room)"
        )


def accelerated(model: Backbone, settings: EvaluationConfig) -> Network:
    """The model's forward in the precision and with the acceleration that the settings name.

    The blocks of a compiled model stay compiled.
    """
    device = model.device
    check_acceleration(model.settings, settings, device)
    network: Network = model
    if settings.precision == "bf16":

        def network(x: Tensor, t: Tensor, labels: Tensor | None) -> DiTOutput:
            # Without autocast's cache of casts: a captured graph must make them itself.
            with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
                return model(x, t, labels)

    if settings.acceleration == "compile":
        model.compile_blocks()
    return Replayed(network) if settings.acceleration == "graph" else network


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    output: DiTOutput


class Replayed:
    """A network captured once for each shape of its inputs, then replayed: the host launches one graph a call.

    The routing reports of an answer are overwritten by the next call of that shape.
    """

    def __init__(self, network: Network) -> None:
        self.network = network
        self.captured: dict[tuple[torch.Size | None, ...], _Captured] = {}

    def __call__(self, x: Tensor, t: Tensor, labels: Tensor | None) -> DiTOutput:
        given = (x, t) if labels is None else (x, t, labels)
        shapes = tuple(tensor.shape for tensor in given)
        if shapes not in self.captured:
            self.captured[shapes] = self._capture(tuple(tensor.clone() for tensor in given))
        captured = self.captured[shapes]
        for place, tensor in zip(captured.inputs, given):
            place.copy_(tensor)
        captured.graph.replay()
        return DiTOutput(captured.output.sample.clone(), captured.output.routing)

    def _capture(self, inputs: tuple[Tensor, ...]) -> _Captured:
        call = (*inputs, None) if len(inputs) == 2 else inputs
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self.network(*call)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = self.network(*call)
        return _Captured(graph, inputs, output)
