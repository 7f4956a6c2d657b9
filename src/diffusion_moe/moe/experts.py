"""The experts: stacked weights, and one grouped matmul for each of the two projections.

The way of a forward pass, the same on a CPU and a GPU:

1. `GroupedExperts.forward` hands weights and routing to `expert_autograd.apply_experts`.
2. `ExpertFunction` dispatches tokens to rows, multiplies (`expert_matmul.py`: `ops.gmm`, which is torch's `grouped_mm`,
   or `bmm`), applies the weighted activation, multiplies again and combines rows to tokens.
3. On a GPU dispatch is a gather and matmuls are torch's; activation and combine are the Triton kernels of `kernels/`
   (`backend.py` chooses).

Shape suffixes: T tokens of the batch, D width, E experts, F expert width, A assignments (rows), H columns of the first
projection (F for GELU, 2F for SwiGLU: gates first, then values).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .activation import ExpertActivation, activate
from .expert_autograd import (
    ExpertSettings,
    ExpertWeights,
    WeightedActivation,
    apply_experts,
    rows_by_token,
    weight_matrix,
)
from .expert_matmul import ExpertBias
from .ops import gmm
from .parallel import Combine, Dispatch, parallel_experts
from .precision import compute_dtype, full_precision, matmul_dtype
from .routing import Routing

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class GroupedExperts(nn.Module):
    """E feed-forward networks of one shape, each applied to the tokens routed to it.

    Args:
        dim: token width D.
        expert_dim: hidden width F.
        num_experts: E.
        activation: "swiglu" or "gelu" (tanh form).
        bias: add a bias to both projections.
        dropout: rate of dropout of the hidden layer, in training.
    """

    recompute = False
    """Recompute the first projection in the backward pass: a third less is kept, a fifth more is computed."""
    group: ProcessGroup | None = None
    """Processes that the experts are sharded over (see `moe.parallel`); None: this process holds all."""
    is_transposed = True
    """Layout of the matrices for peft: (inputs, outputs), so that LoRA's A multiplies the inputs."""

    def __init__(
        self,
        dim: int,
        expert_dim: int,
        num_experts: int,
        activation: ExpertActivation = "swiglu",
        bias: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.activation: ExpertActivation = activation
        self.dropout = nn.Dropout(dropout)
        columns = 2 * expert_dim if activation == "swiglu" else expert_dim
        self.w_in = nn.Parameter(torch.empty(num_experts, dim, columns))
        self.w_out = nn.Parameter(torch.empty(num_experts, expert_dim, dim))
        self.b_in = nn.Parameter(torch.zeros(num_experts, columns)) if bias else None
        self.b_out = nn.Parameter(torch.zeros(num_experts, dim)) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw each expert's matrices Xavier-uniform by themselves; set biases to zero."""
        for w_in_DH, w_out_FD in zip(self.w_in, self.w_out):
            for w_DF in w_in_DH.split(w_out_FD.shape[0], dim=1):
                nn.init.xavier_uniform_(w_DF)
            nn.init.xavier_uniform_(w_out_FD)
        for bias in (self.b_in, self.b_out):
            if bias is not None:
                nn.init.zeros_(bias)

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """Weighted sum of each token's experts, (T, D) in the dtype of x_TD; zero for a token with none."""
        if self.dropout.p and self.training and self.group is None:
            return self._with_dropout(x_TD, routing)
        weights = ExpertWeights(self.w_in, self.w_out, self.b_in, self.b_out)
        settings = ExpertSettings(self.activation, compute_dtype(x_TD), self.recompute)
        if self.group is None:
            out_TD = apply_experts(x_TD, routing, weights, settings)
        else:
            out_TD = parallel_experts(x_TD, routing, weights, settings, self.group)
        return out_TD.to(x_TD.dtype)

    def _with_dropout(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """`forward` operator by operator, so that autograd keeps the dropout mask.

        As there, the routing weight multiplies the activation, and no gradient is added up by atomics.
        """
        dtype, offsets_E = matmul_dtype(x_TD, compute_dtype(x_TD)), routing.offsets_E
        rows = rows_by_token(routing, len(x_TD))
        h_AH = gmm(Dispatch.apply(x_TD.to(dtype), routing.token_A, *rows), self.w_in.to(dtype), offsets_E)
        if self.b_in is not None:
            h_AH = h_AH + ExpertBias.apply(self.b_in.to(dtype), offsets_E, len(h_AH))
        a_AF = self.dropout(WeightedActivation.apply(h_AH, routing.weight_A, self.activation))
        out_TD = Combine.apply(gmm(a_AF, self.w_out.to(dtype), offsets_E), routing.token_A, *rows)
        if self.b_out is not None:
            shape = (len(x_TD), len(offsets_E))
            weight_TE = weight_matrix(routing.weight_A, routing.token_A, routing.expert_A(), shape)
            with full_precision(x_TD):
                out_TD = out_TD + (weight_TE @ self.b_out.to(weight_TE.dtype)).to(dtype)
        return out_TD.to(x_TD.dtype)


def experts_loop(experts: GroupedExperts, x_TD: Tensor, routing: Routing) -> Tensor:
    """`GroupedExperts.forward` as a plain loop over experts: the oracle of the tests."""
    out_TD = x_TD.new_zeros(x_TD.shape)
    start = 0
    for e, end in enumerate(routing.offsets_E.tolist()):
        token = routing.token_A[start:end]
        weight = routing.weight_A[start:end]
        start = end
        h = x_TD[token] @ experts.w_in[e]
        if experts.b_in is not None:
            h = h + experts.b_in[e]
        y = activate(h, experts.activation) @ experts.w_out[e]
        if experts.b_out is not None:
            y = y + experts.b_out[e]
        out_TD = out_TD.index_add(0, token, (weight[:, None] * y).to(out_TD.dtype))
    return out_TD
