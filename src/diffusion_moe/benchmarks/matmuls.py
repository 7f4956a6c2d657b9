"""The experts' matmuls alone: one grouped matmul against a loop over experts and a batched matmul.

Every expert has the same number of rows here, so that all three compute the same; remaining rows are dropped. Shape
suffixes: A rows, E experts, C rows of one expert, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..config import ModelConfig
from ..moe.ops import gmm, gmm_wgrad
from .counting import work
from .measure import interleaved, utilisation

Matmul = Callable[[Tensor, Tensor], Tensor]


def matmuls(
    config: ModelConfig, images: int, tokens_an_image: int, seconds: float, device: torch.device, dtype: torch.dtype
) -> Iterator[dict[str, Any]]:
    """The grouped matmul against each of the others, for both projections, forward and the two gradients.

    Raises:
        ValueError: there are fewer rows than experts.
    """
    E, D, F = config.num_experts, config.hidden_size, config.expert_dim
    C = int(images * tokens_an_image * config.experts_per_token) // E
    if C < 1:
        raise ValueError(f"tokens is {images * tokens_an_image}, too few for {E} experts to have a row each; give more")
    torch.manual_seed(0)
    for name, inputs, outputs in (("w_in", D, 2 * F if config.expert_activation == "swiglu" else F), ("w_out", F, D)):
        x_AI = torch.randn(E * C, inputs, device=device).to(dtype)
        dy_AO = torch.randn(E * C, outputs, device=device).to(dtype)
        w_EIO = torch.randn(E, inputs, outputs, device=device).to(dtype)
        for part, ways in ways_of(E, C, device).items():
            a, b = {"forward": (x_AI, w_EIO), "dgrad": (dy_AO, w_EIO.transpose(1, 2)), "wgrad": (x_AI, dy_AO)}[part]
            runs = [lambda way=way, a=a, b=b: way(a, b) for way in ways.values()]  # type: ignore[misc]
            times = dict(zip(ways, interleaved(runs, seconds, device)))
            done = work(runs[0], device)
            shape = {"mode": f"{name} {part}", "experts": E, "rows_an_expert": C, "inputs": inputs, "outputs": outputs}
            speed = utilisation(done.flops, done.bytes, times["grouped"].median, device, dtype)
            for against in ("loop", "bmm"):
                ratio = times[against].median / times["grouped"].median
                others = {f"against_{name}": value for name, value in times[against].record().items()}
                yield shape | {"against": against, "ratio": ratio} | times["grouped"].record() | others | speed


def ways_of(num_experts: int, rows: int, device: torch.device) -> dict[str, dict[str, Matmul]]:
    """The three ways, `grouped`, `loop` and `bmm`, to compute each pass."""
    offsets_E = rows * torch.arange(1, num_experts + 1, dtype=torch.int32, device=device)

    def by_expert(x_A: Tensor) -> Tensor:
        return x_A.view(num_experts, rows, -1)

    def loop(x_AI: Tensor, w_EIO: Tensor) -> Tensor:
        out_AO = x_AI.new_empty(len(x_AI), w_EIO.shape[2])
        for x_CI, w_IO, out_CO in zip(by_expert(x_AI), w_EIO, by_expert(out_AO)):
            torch.mm(x_CI, w_IO, out=out_CO)
        return out_AO

    def loop_wgrad(x_AI: Tensor, dy_AO: Tensor) -> Tensor:
        out_EIO = x_AI.new_empty(num_experts, x_AI.shape[1], dy_AO.shape[1])
        for x_CI, dy_CO, out_IO in zip(by_expert(x_AI), by_expert(dy_AO), out_EIO):
            torch.mm(x_CI.T, dy_CO, out=out_IO)
        return out_EIO

    along: dict[str, Matmul] = {
        "grouped": lambda x_AI, w_EIO: gmm(x_AI, w_EIO, offsets_E),
        "loop": loop,
        "bmm": lambda x_AI, w_EIO: by_expert(x_AI).bmm(w_EIO).flatten(0, 1),
    }
    across: dict[str, Matmul] = {
        "grouped": lambda x_AI, dy_AO: gmm_wgrad(x_AI, dy_AO, offsets_E),
        "loop": loop_wgrad,
        "bmm": lambda x_AI, dy_AO: by_expert(x_AI).transpose(1, 2).bmm(by_expert(dy_AO)),
    }
    return {"forward": along, "dgrad": along, "wgrad": across}
