"""The model as sampling calls it: eagerly, compiled block by block, or replayed as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..config import EvaluationConfig, ModelConfig
from ..models import Backbone, DiTOutput
from ..models.token_drop import TokenDrop
from ..moe import routers_of
from ..moe.backend import choose_grouped_matmul, on_device
from ..moe.precision import choose_precision
from ..text import TextFeatures

Network = Callable[..., DiTOutput]
"""x (B, C, H, W), t (a scalar), labels (B,) or None, and of a model with text its `TextFeatures`, to the output; with
`skips_middle` that without the middle blocks."""
WARM_UP = 3
"""Calls before a capture, in which libraries choose their kernels and allocate their memory."""
MOST_GRAPHS = 8
"""Most graphs that are kept: four serve whole and last batches, each with and without guidance."""


def check_acceleration(config: ModelConfig, settings: EvaluationConfig, device: torch.device) -> None:
    """Refuse an acceleration that the model or device cannot have.

    Raises:
        ValueError: a graph without a GPU, a graph of matmuls that wait for it, or shapes that depend on what
            thresholds choose.
    """
    if settings.acceleration == "graph" and device.type != "cuda":
        raise ValueError(f"acceleration is graph, but the model is on {device.type}; use compile or none")
    if settings.acceleration == "graph" and config.rule is not None and not config.rule.has_equal_loads:
        precision = choose_precision(settings.precision, device).precision
        matmul = choose_grouped_matmul(device, torch.bfloat16 if precision == "bf16" else torch.float32)
        if matmul.kernel == "loop":
            raise ValueError(
                f"acceleration is graph, but the experts' matmuls in {precision} wait for this device ({matmul.why}); "
                "use acceleration compile or none, or a GPU of compute capability 8.0 or newer with triton"
            )
    if (
        settings.acceleration != "none"
        and config.rule is not None
        and config.rule.has_thresholds
        and settings.capacity_limit is None
    ):
        raise ValueError(
            f"acceleration is {settings.acceleration}, but the {config.router} router chooses any number of experts a "
            "token; give it a capacity_limit (2 is ample)"
        )


def accelerated(model: Backbone, settings: EvaluationConfig) -> Network:
    """The model's forward in the precision and with the acceleration that the settings name.

    The blocks of a compiled model stay compiled.
    """
    device = model.device
    check_acceleration(model.settings, settings, device)
    cast: Callable[[], AbstractContextManager[Any]] = nullcontext
    if choose_precision(settings.precision, device).precision == "bf16":
        # Without autocast's cache of casts: a captured graph must contain them.
        cast = partial(torch.autocast, device.type, torch.bfloat16, cache_enabled=False)

    def network(
        x: Tensor, t: Tensor, labels: Tensor | None, text: TextFeatures | None = None, skips_middle: bool = False
    ) -> DiTOutput:
        prompt = {} if text is None else text.arguments(model.settings.text_pooled_dim > 0)
        with cast():
            return model(x, t, labels, **prompt, token_drop=TokenDrop(path=skips_middle))

    if settings.acceleration == "compile":
        model.compile_blocks()
    if settings.acceleration != "graph":
        return network
    routers = [router for router in routers_of(model) if router.has_thresholds]
    return Replayed(network, lambda: tuple((router.threshold_scale, router.capacity_limit) for router in routers))


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    """Its memory is freed with it."""
    inputs: tuple[Tensor | None, ...]
    """Image, time, labels, and the three parts of the text."""
    output: DiTOutput


class Replayed:
    """A network captured once for each shape of its inputs, then replayed: the host launches one graph a call.

    The next call of that shape overwrites the routing reports of an output. Each graph holds the memory of one
    evaluation, so only the `MOST_GRAPHS` that were used last are kept.

    Args:
        network: what is captured.
        constants: numbers that the network reads and a graph would keep; others need another graph.
    """

    def __init__(self, network: Network, constants: Callable[[], Hashable] = tuple) -> None:
        self.network, self.constants = network, constants
        self.captured: dict[Hashable, _Captured] = {}
        """Graphs by shapes and constants, the last used at the end."""

    def __call__(
        self, x: Tensor, t: Tensor, labels: Tensor | None, text: TextFeatures | None = None, **options: Any
    ) -> DiTOutput:
        given = (x, t, labels, *(text or (None, None, None)))
        with on_device(x):
            captured = self._graph_for(given, options)
            for buffer, tensor in zip(captured.inputs, given):
                if buffer is not None and tensor is not None:
                    buffer.copy_(tensor)
            captured.graph.replay()
        return DiTOutput(captured.output.sample.clone(), captured.output.routing)

    def _graph_for(self, given: tuple[Tensor | None, ...], options: dict[str, Any]) -> _Captured:
        shapes = tuple(None if tensor is None else tensor.shape for tensor in given)
        key = (shapes, tuple(options.items()), self.constants())
        captured = self.captured.pop(key, None)
        if captured is None:
            while len(self.captured) >= MOST_GRAPHS:  # before the capture, which needs their memory
                del self.captured[next(iter(self.captured))]
            captured = self._capture(tuple(None if tensor is None else tensor.clone() for tensor in given), options)
        self.captured[key] = captured
        return captured

    def _capture(self, inputs: tuple[Tensor | None, ...], options: dict[str, Any]) -> _Captured:
        text = () if inputs[3] is None else (TextFeatures(*inputs[3:]),)  # type: ignore[arg-type]
        call = (*inputs[:3], *text)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self.network(*call, **options)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the GPU meanwhile: those that pin memory or write files.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            output = self.network(*call, **options)
        return _Captured(graph, inputs, output)
