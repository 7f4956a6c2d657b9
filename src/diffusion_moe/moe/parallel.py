"""Expert parallelism: each process holds a part of the experts, and rows are exchanged by all-to-all.

Every process of the group calls the layer at the same time with its own tokens. A row is sent to the process that holds
its expert, and the expert's output is sent back. Process r holds experts r * E / P to (r + 1) * E / P. Shape suffixes
as in `expert_autograd.py`, P processes, R rows received, L experts held here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._compile import _disable_dynamo

from .expert_autograd import ExpertSettings, ExpertWeights, apply_experts, rows_by_token
from .operators import run
from .ops import combine
from .precision import matmul_dtype
from .routing import Routing, RoutingReport


class Splits(NamedTuple):
    """Numbers of rows, by process."""

    sent: list[int]
    received: list[int]

    def reverse(self) -> Splits:
        """The splits of the way back."""
        return Splits(self.received, self.sent)


class Exchange(torch.autograd.Function):
    """Rows sent to their processes, in the order of the processes. Gradients are sent back."""

    @staticmethod
    def forward(ctx: Any, rows_AD: Tensor, splits: Splits, group: dist.ProcessGroup) -> Tensor:
        ctx.splits, ctx.group = splits, group
        return _all_to_all(rows_AD, splits, group)

    @staticmethod
    def backward(ctx: Any, drows_RD: Tensor) -> tuple[Tensor, None, None]:
        return _all_to_all(drows_RD, ctx.splits.reverse(), ctx.group), None, None


class Dispatch(torch.autograd.Function):
    """The token of each row, (A, D). Gradients of a token are summed in float32 in a fixed order."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, token_A: Tensor, row_A: Tensor, start_T: Tensor, per_token: int) -> Tensor:
        ctx.per_token = per_token
        ctx.save_for_backward(row_A, start_T)
        return x_TD.index_select(0, token_A)

    @staticmethod
    def backward(ctx: Any, drows_AD: Tensor) -> tuple[Tensor | None, ...]:
        return run(combine, drows_AD.contiguous(), *ctx.saved_tensors, ctx.per_token), None, None, None, None


class Combine(torch.autograd.Function):
    """The sum of each token's rows, (T, D): the reverse of `Dispatch`."""

    @staticmethod
    def forward(ctx: Any, y_AD: Tensor, token_A: Tensor, row_A: Tensor, start_T: Tensor, per_token: int) -> Tensor:
        ctx.save_for_backward(token_A)
        return run(combine, y_AD, row_A, start_T, per_token)

    @staticmethod
    def backward(ctx: Any, dout_TD: Tensor) -> tuple[Tensor | None, ...]:
        (token_A,) = ctx.saved_tensors
        return dout_TD.index_select(0, token_A), None, None, None, None


# The host must know the numbers of rows, which breaks a graph anyway. The decorator is `torch.compiler.disable` without
# its import of torch._dynamo.
@_disable_dynamo
def parallel_experts(
    x_TD: Tensor, routing: Routing, weights: ExpertWeights, settings: ExpertSettings, group: dist.ProcessGroup
) -> Tensor:
    """`apply_experts` with the experts of all processes of the group.

    The host waits once a call, for the numbers of rows.

    Args:
        weights: those of the experts held here, or DTensors sharded by expert.
    """
    rows = rows_by_token(routing, len(x_TD))
    received_PL, splits = _exchange_counts(routing.offsets_E, group)
    # Rows are sent in the dtype of the matmuls, so that the result equals that of one process.
    x_AD = Dispatch.apply(x_TD.to(matmul_dtype(x_TD, settings.dtype)), routing.token_A, *rows)
    x_RD = Exchange.apply(x_AD, splits, group)
    weight_R = Exchange.apply(routing.weight_A[:, None], splits, group)[:, 0]
    local_weights = ExpertWeights._make(local_part(weight) for weight in weights)
    y_RD = apply_experts(x_RD, _local_routing(received_PL, weight_R), local_weights, settings)
    y_AD = Exchange.apply(y_RD, splits.reverse(), group)
    return Combine.apply(y_AD, routing.token_A, *rows)


def _local_routing(received_PL: Tensor, weight_R: Tensor) -> Routing:
    """Received rows, each a token with one expert. They come by process and in each by expert; matmuls want them by
    expert."""
    expert_PL = torch.arange(received_PL.shape[1], device=received_PL.device).expand_as(received_PL)
    expert_R = expert_PL.flatten().repeat_interleave(received_PL.flatten(), output_size=len(weight_R))
    order_R = expert_R.argsort(stable=True)
    row_R = torch.empty_like(order_R).scatter_(0, order_R, torch.arange(len(order_R), device=order_R.device))
    counts_L = received_PL.sum(0)
    return Routing(
        token_A=order_R,
        weight_A=weight_R.index_select(0, order_R),
        offsets_E=counts_L.cumsum(0).to(torch.int32),
        report=RoutingReport(counts_L, {}),
        row_TK=row_R[:, None],
    )


def local_part(weight: Tensor | None) -> Tensor | None:
    """The part of a DTensor that this process holds; other tensors unchanged."""
    return weight.to_local() if weight is not None and hasattr(weight, "to_local") else weight


def _exchange_counts(offsets_E: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Splits]:
    """The number of rows that each process sends to each expert held here, (P, L), and the splits."""
    sent_PL = torch.diff(offsets_E, prepend=offsets_E.new_zeros(1)).long().view(group.size(), -1)
    received_PL = torch.empty_like(sent_PL)
    dist.all_to_all_single(received_PL, sent_PL, group=group)
    sent, received = torch.stack((sent_PL.sum(1), received_PL.sum(1))).tolist()
    return received_PL, Splits(sent, received)


def _all_to_all(rows_AD: Tensor, splits: Splits, group: dist.ProcessGroup) -> Tensor:
    received = rows_AD.new_empty(sum(splits.received), *rows_AD.shape[1:])
    # Gloo's thread keeps what it sent longer than it says. A graph holds the group and so the thread itself: if the
    # thread kept the graph, it could live until the interpreter's end and crash it. So no tensor with a graph is sent.
    sent = rows_AD.detach().contiguous()
    dist.all_to_all_single(received.detach(), sent, splits.received, splits.sent, group=group)
    return received


def all_reduce_sum(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over all processes, without a gradient."""
    total = x.detach().clone()
    dist.all_reduce(total, group=group)
    return total


def all_gather_rows(x_TE: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The rows of all processes, in the order of the processes, without a gradient. All have the same number."""
    gathered = x_TE.new_empty(group.size() * len(x_TE), *x_TE.shape[1:])
    dist.all_gather_into_tensor(gathered, x_TE.detach().contiguous(), group=group)
    return gathered
