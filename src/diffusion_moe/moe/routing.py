"""The value between routers and experts: which token goes to which expert, with which weight.

Shape suffixes: B images, N tokens of one image, T tokens of the batch (B * N), E experts, K experts a token,
A assignments (pairs of token and expert), C tokens an expert takes, D width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .backend import takes_triton
from .operators import operator, run


class RoutingReport(NamedTuple):
    """Results of one forward pass of a router, for its state and for logs. The router itself has not changed yet."""

    counts_E: Tensor
    """Tokens served by each expert, int64."""
    losses: dict[str, Tensor]
    """Scalars to add to the training loss, already weighted; empty at inference."""
    threshold_E: Tensor | None = None
    """What thresholds follow, in training: the lowest predicted probability among each expert's C most probable tokens
    (DiffMoE), or the lowest score that won, of all experts together, (1,) (Expert Race). Of the rule threshold those
    in force, for logs."""
    num_tokens: int = 0
    """Tokens of the batch; set by `MoEFeedForward`."""
    dropped: Tensor | None = None
    """Choices dropped by a capacity limit, int64 scalar (rules with thresholds, at inference)."""
    predicted_BNP: Tensor | None = None
    """Prediction of what each token's patch is trained to become, of P values, for a loss (Expert Race in training)."""
    scores_TE: Tensor | None = None
    """Scores whose quantiles over the whole step the thresholds follow (rule threshold in training)."""

    def without_first(self, tokens: int) -> RoutingReport:
        """The report without the predictions of an image's first tokens, which are no patches."""
        if self.predicted_BNP is None:
            return self
        return self._replace(predicted_BNP=self.predicted_BNP[:, tokens:])


class RoutingContext(NamedTuple):
    """What a router may look at beside the tokens. A rule names the fields that it needs (`RoutingRule.sees`)."""

    time_B: Tensor | None = None
    """Time of each image from 0 (noise) to 1 (data), float32."""
    time_embedding_BD: Tensor | None = None
    """Embedding of each image's time over its root mean square, float32."""
    unconditional_B: Tensor | None = None
    """True for images without class and prompt, bool; None: there are none."""


class Routing(NamedTuple):
    """Assignments of tokens to experts, grouped by expert; a dropped token has none."""

    token_A: Tensor
    """Token of each assignment in [0, T), int64; expert e owns rows offsets_E[e - 1] to offsets_E[e]."""
    weight_A: Tensor
    """Weight of the expert's output for that token, with the router's gradient."""
    offsets_E: Tensor
    """End of each expert's rows, int32, on the tokens' device."""
    report: RoutingReport
    row_TK: Tensor | None = None
    """Rows of each token, int64, if every token has K of them."""
    equal: bool = False
    """True if every expert has the same number of rows."""
    padded: bool = False
    """True if rows of weight 0 are no assignments: they only pad a fixed shape."""

    def expert_A(self) -> Tensor:
        """Expert of each assignment in [0, E), int64."""
        return expert_of_rows(self.token_A, self.offsets_E)


def expert_of_rows(rows: Tensor, offsets_E: Tensor) -> Tensor:
    """Expert of each row, in [0, E), int64, (A,); of `rows` only the length is read."""
    index_A = torch.arange(len(rows), device=rows.device, dtype=offsets_E.dtype)
    return torch.searchsorted(offsets_E, index_A, right=True)


@operator("sort_by_expert")
def sort_by_expert(expert_A: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Group assignments by expert, keeping their order within one. No host synchronisation.

    Args:
        expert_A: experts in [0, num_experts), int64.

    Returns:
        order_A, the assignment in each row, and row_A, the row of each assignment, int64; offsets_E, the end of each
        expert's rows, int32; counts_E, the number of each expert's rows, int64.
    """
    if takes_triton(expert_A, experts=num_experts):
        from .kernels import sort as kernel

        return kernel.sort_by_expert(expert_A, num_experts)
    # For up to 256 experts a radix sort of bytes takes one pass instead of eight.
    sorted_A, order_A = torch.sort(expert_A.to(torch.uint8) if num_experts <= 256 else expert_A, stable=True)
    bounds_E = torch.arange(num_experts, device=expert_A.device, dtype=sorted_A.dtype)
    offsets_E = torch.searchsorted(sorted_A, bounds_E, right=True, out_int32=True)
    counts_E = torch.diff(offsets_E, prepend=offsets_E.new_zeros(1)).long()
    row_A = torch.empty_like(order_A).scatter_(0, order_A, torch.arange(len(order_A), device=order_A.device))
    return order_A, row_A, offsets_E, counts_E


@sort_by_expert.register_fake
def _(expert_A: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    order_A, counts_E = expert_A.new_empty(expert_A.shape), expert_A.new_empty(num_experts)
    return order_A, torch.empty_like(order_A), counts_E.to(torch.int32), counts_E


class Permute(torch.autograd.Function):
    """Values in another order. The gradient is a gather by the inverse permutation, so nothing is summed."""

    @staticmethod
    def forward(ctx: Any, values_A: Tensor, order_A: Tensor, inverse_A: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_A)
        return values_A.index_select(0, order_A)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_A: Tensor) -> tuple[Tensor | None, ...]:
        (inverse_A,) = ctx.saved_tensors
        return grad_A.index_select(0, inverse_A), None, None


def route_by_token(
    expert_TK: Tensor, weight_TK: Tensor, num_experts: int, losses: dict[str, Tensor] | None = None
) -> Routing:
    """Routing in which every token chose K experts. No host synchronisation.

    Args:
        expert_TK: chosen experts, int64.
        weight_TK: weights of these experts' outputs.
        num_experts: E.
        losses: scalars to add to the training loss, already weighted.
    """
    order_A, row_A, offsets_E, counts_E = run(sort_by_expert, expert_TK.flatten(), num_experts)
    return Routing(
        token_A=order_A // expert_TK.shape[1],
        weight_A=Permute.apply(weight_TK.flatten(), order_A, row_A),
        offsets_E=offsets_E,
        report=RoutingReport(counts_E, losses or {}),
        row_TK=row_A.view_as(expert_TK),
    )


def route_by_expert(
    token_EC: Tensor, weight_EC: Tensor, losses: dict[str, Tensor] | None = None, threshold_E: Tensor | None = None
) -> Routing:
    """Routing in which every expert chose C tokens. No host synchronisation."""
    num_experts, capacity = token_EC.shape
    counts_E = torch.full((num_experts,), capacity, device=token_EC.device)
    return Routing(
        token_A=token_EC.flatten(),
        weight_A=weight_EC.flatten(),
        offsets_E=counts_E.cumsum(0).to(torch.int32),
        report=RoutingReport(counts_E, losses or {}, threshold_E),
        equal=True,
    )


def route_by_mask(chosen_TE: Tensor, weight_TE: Tensor, room: int | None = None) -> Routing:
    """Routing with any number of tokens an expert.

    Args:
        chosen_TE: the choices, boolean.
        weight_TE: weights.
        room: fixed number of rows, so that shapes do not depend on the choices. Choices beyond it are dropped, those of
            least weight first, and counted; spare rows have weight 0. None: one row a choice, which the host must wait
            for (one synchronisation).
    """
    counts_E = chosen_TE.sum(0)
    if room is None:
        expert_A, token_A = chosen_TE.T.nonzero(as_tuple=True)
        weight_A = weight_TE[token_A, expert_A]
        return Routing(token_A, weight_A, counts_E.cumsum(0).to(torch.int32), RoutingReport(counts_E, {}))
    T, E = chosen_TE.shape
    wanted_A = torch.where(chosen_TE, weight_TE, -math.inf).T.flatten()
    wanted_A, index_A = wanted_A.topk(min(room, T * E), sorted=False)
    index_A, order_A = index_A.sort()  # by expert, then by token
    served_A = wanted_A.index_select(0, order_A) > -math.inf
    served_E = torch.zeros_like(counts_E).scatter_add(0, index_A // T, served_A.long())
    routing = route_by_pair(index_A, weight_TE)
    report = RoutingReport(served_E, {}, dropped=counts_E.sum() - served_E.sum())
    return routing._replace(weight_A=routing.weight_A * served_A, report=report, padded=True)


def route_by_pair(pair_A: Tensor, weight_TE: Tensor, losses: dict[str, Tensor] | None = None) -> Routing:
    """Routing of given pairs of expert and token. No host synchronisation.

    Args:
        pair_A: e * T + t of each expert e and token t, ascending, int64.
        weight_TE: weights of all pairs.
        losses: scalars to add to the training loss, already weighted.
    """
    T, E = weight_TE.shape
    bounds_E = T * torch.arange(1, E + 1, device=pair_A.device)
    offsets_E = torch.searchsorted(pair_A, bounds_E, out_int32=True)
    counts_E = torch.diff(offsets_E, prepend=offsets_E.new_zeros(1)).long()
    return Routing(
        token_A=pair_A % T,
        weight_A=weight_TE.T.flatten().index_select(0, pair_A),
        offsets_E=offsets_E,
        report=RoutingReport(counts_E, losses or {}),
    )


def merge_reports(reports: Sequence[RoutingReport]) -> RoutingReport:
    """The report of a step of several micro-batches: counts summed, thresholds and losses averaged, scores joined."""
    thresholds = [report.threshold_E for report in reports if report.threshold_E is not None]
    dropped = [report.dropped for report in reports if report.dropped is not None]
    scores = [report.scores_TE for report in reports if report.scores_TE is not None]
    return RoutingReport(
        counts_E=torch.stack([report.counts_E for report in reports]).sum(0),
        losses={name: torch.stack([report.losses[name] for report in reports]).mean(0) for name in reports[0].losses},
        threshold_E=torch.stack(thresholds).mean(0) if thresholds else None,
        num_tokens=sum(report.num_tokens for report in reports),
        dropped=torch.stack(dropped).sum() if dropped else None,
        scores_TE=torch.cat(scores) if scores else None,
    )
