"""Helpers of the MoE tests. Shape suffixes as in diffusion_moe.moe.routing."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from diffusion_moe.moe import Routing
from diffusion_moe.moe.precision import VARIABLE


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["low_precision", "float32"])
def cpu_matmul(request, monkeypatch) -> str:
    """The dtype of matmuls that are asked for in bfloat16: both, whatever is faster on this processor."""
    monkeypatch.setenv(VARIABLE, request.param)
    return request.param


@pytest.fixture
def gates() -> Callable[[Routing, int], Tensor]:
    """A routing as one matrix of weights (T, E), zero where a token is not sent."""

    def dense(routing: Routing, num_tokens: int) -> Tensor:
        gate_TE = torch.zeros(num_tokens, len(routing.offsets_E), dtype=routing.weight_A.dtype)
        start = 0
        for e, end in enumerate(routing.offsets_E.tolist()):
            for row in range(start, end):
                token = int(routing.token_A[row])
                assert gate_TE[token, e] == 0, "a token goes to an expert at most once"
                gate_TE[token, e] = routing.weight_A[row].detach()
            start = end
        return gate_TE

    return dense
