"""Experts spread over processes: rows travel to the process that holds their expert, and the answers back.

Every process of the group calls the layer at the same time, each with tokens of its own; process r holds experts
r * E / P to (r + 1) * E / P. Shape suffixes as in `experts.py`, P processes, R rows received, L experts held here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._compile import _disable_dynamo

from .expert_autograd import ByToken, ExpertFunction, by_token
from .ops import sum_rows
from .precision import compute_dtype, product_dtype
from .routing import Routing

if TYPE_CHECKING:
    from .experts import GroupedExperts


class Splits(NamedTuple):
    """How many rows go to each process and come from each."""

    sent: list[int]
    received: list[int]

    def back(self) -> Splits:
        """Those of the way back."""
        return Splits(self.received, self.sent)


class Exchange(torch.autograd.Function):
    """Rows to their processes, in the order of the processes; gradients the other way."""

    @staticmethod
    def forward(ctx: Any, rows_AD: Tensor, splits: Splits, group: dist.ProcessGroup) -> Tensor:
        ctx.splits, ctx.group = splits, group
        return _all_to_all(rows_AD, splits, group)

    @staticmethod
    def backward(ctx: Any, drows_RD: Tensor) -> tuple[Tensor, None, None]:
        return _all_to_all(drows_RD, ctx.splits.back(), ctx.group), None, None


class Gather(torch.autograd.Function):
    """Rows of x_TD by token; their gradients are summed in float32 in a fixed order."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, token_A: Tensor, row_A: Tensor, start_T: Tensor, per_token: int) -> Tensor:
        ctx.per_token = per_token
        ctx.save_for_backward(row_A, start_T)
        return x_TD.index_select(0, token_A)

    @staticmethod
    def backward(ctx: Any, drows_AD: Tensor) -> tuple[Tensor | None, ...]:
        return sum_rows(drows_AD.contiguous(), *ctx.saved_tensors, ctx.per_token), None, None, None, None


class Combine(torch.autograd.Function):
    """The sum of each token's rows: the reverse of `Gather`."""

    @staticmethod
    def forward(ctx: Any, y_AD: Tensor, token_A: Tensor, row_A: Tensor, start_T: Tensor, per_token: int) -> Tensor:
        ctx.save_for_backward(token_A)
        return sum_rows(y_AD, row_A, start_T, per_token)

    @staticmethod
    def backward(ctx: Any, dout_TD: Tensor) -> tuple[Tensor | None, ...]:
        (token_A,) = ctx.saved_tensors
        return dout_TD.index_select(0, token_A), None, None, None, None


# The host has to know how many rows come, which breaks a graph anyway. As `torch.compiler.disable`, which would import
# torch._dynamo already here.
@_disable_dynamo
def parallel_experts(experts: GroupedExperts, x_TD: Tensor, routing: Routing, group: dist.ProcessGroup) -> Tensor:
    """`GroupedExperts.forward` with the experts of a whole group of processes, (T, D) in the dtype of x_TD.

    The numbers of rows come to the host once a call.
    """
    dtype = compute_dtype(x_TD)
    rows = by_token(routing, len(x_TD))
    received_PL, splits = _announce(routing.offsets_E, group)
    # Rows travel as they are multiplied, so that the answer is one process' own.
    x_AD = Gather.apply(x_TD.to(product_dtype(x_TD, dtype)), routing.token_A, *rows)
    x_RD = Exchange.apply(x_AD, splits, group)
    weight_R = Exchange.apply(routing.weight_A[:, None], splits, group)[:, 0]
    # Rows come by process, in each by expert; products want them by expert.
    expert_PL = torch.arange(received_PL.shape[1], device=x_TD.device).expand_as(received_PL)
    expert_R = expert_PL.flatten().repeat_interleave(received_PL.flatten(), output_size=sum(splits.received))
    order_R = expert_R.argsort(stable=True)
    place_R = torch.empty_like(order_R).scatter_(0, order_R, torch.arange(len(order_R), device=order_R.device))
    one_each = ByToken(place_R, torch.arange(len(place_R), device=place_R.device), 1)
    offsets_L = received_PL.sum(0).cumsum(0).to(torch.int32)
    weights = (local_part(w) for w in (experts.w_in, experts.w_out, experts.b_in, experts.b_out))
    settings = (experts.activation, False, dtype, experts.recompute)
    y_RD = ExpertFunction.apply(
        x_RD, weight_R.index_select(0, order_R), *weights, order_R, offsets_L, *one_each, *settings
    )
    y_AD = Exchange.apply(y_RD, splits.back(), group)
    return Combine.apply(y_AD, routing.token_A, *rows).to(x_TD.dtype)


def local_part(weight: Tensor | None) -> Tensor | None:
    """What this process holds of a weight: of a DTensor its local part."""
    return weight.to_local() if weight is not None and hasattr(weight, "to_local") else weight


def _announce(offsets_E: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Splits]:
    """Tell every process how many rows it will get for each of its experts: (P, L) of them here, and the splits."""
    sent_PL = torch.diff(offsets_E, prepend=offsets_E.new_zeros(1)).long().view(group.size(), -1)
    received_PL = torch.empty_like(sent_PL)
    dist.all_to_all_single(received_PL, sent_PL, group=group)
    sent, received = torch.stack((sent_PL.sum(1), received_PL.sum(1))).tolist()
    return received_PL, Splits(sent, received)


def _all_to_all(rows_AD: Tensor, splits: Splits, group: dist.ProcessGroup) -> Tensor:
    received = rows_AD.new_empty(sum(splits.received), *rows_AD.shape[1:])
    # Gloo's thread lets go of what it sent later than it says, and a graph holds the group and so the thread itself:
    # with the graph in its hands it may live to the interpreter's end, and die of it.
    sent = rows_AD.detach().contiguous()
    dist.all_to_all_single(received.detach(), sent, splits.received, splits.sent, group=group)
    return received


def gathered(x_TE: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The rows of all processes, in the order of the processes, without a gradient; all have as many."""
    every = x_TE.new_empty(group.size() * len(x_TE), *x_TE.shape[1:])
    dist.all_gather(list(every.chunk(group.size())), x_TE.detach().contiguous(), group=group)
    return every
