"""The MoE layer as a plain loop over experts: what most code does, and what ours is held against.

Each expert is a module of linear layers of its own. Token choice goes expert by expert through the tokens that chose
it (a wait for the device an expert); a pool stacks every expert's answer and scatters it into a buffer of experts x
tokens. Shape suffixes as in `moe.routing`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..moe import FeedForward, MoEFeedForward, MoEOutput, Routing
from ..moe.activation import activated


class PlainFeedForward(nn.Module):
    """`FeedForward` as most code writes it: autograd keeps whatever the operators ask it to."""

    def __init__(self, network: FeedForward) -> None:
        super().__init__()
        self.activation = network.activation
        self.gate_proj, self.up_proj, self.down_proj = network.gate_proj, network.up_proj, network.down_proj

    def forward(self, x: Tensor) -> Tensor:
        inputs = (self.up_proj(x),) if self.gate_proj is None else (self.gate_proj(x), self.up_proj(x))
        return self.down_proj(activated(self.activation, *inputs))


class LoopMoE(nn.Module):
    """A copy of a `MoEFeedForward` that computes the same, naively."""

    def __init__(self, layer: MoEFeedForward) -> None:
        super().__init__()
        experts = layer.experts
        E, F, D = experts.w_out.shape
        self.router, self.add_input = layer.router, layer.add_input
        self.shared = None if layer.shared is None else PlainFeedForward(layer.shared)
        bias = experts.b_in is not None
        copies = [FeedForward(D, F, experts.activation, bias) for _ in range(E)]
        for e, expert in enumerate(copies):
            _copy_expert(layer, e, expert)
        self.experts = nn.ModuleList(PlainFeedForward(expert) for expert in copies)

    def forward(self, x_BND: Tensor) -> MoEOutput:
        routing = self.router(x_BND)
        x_TD = x_BND.flatten(0, 1)
        equal = self.training and routing.row_TK is None  # a pool: every expert takes as many tokens
        y_BND = (self._pool if equal else self._each)(x_TD, routing).view_as(x_BND)
        if self.shared is not None:
            y_BND = y_BND + self.shared(x_BND)
        elif self.add_input:
            y_BND = y_BND + x_BND
        return MoEOutput(y_BND, routing.report)

    def _each(self, x_TD: Tensor, routing: Routing) -> Tensor:
        out_TD = torch.zeros_like(x_TD)
        weight_TE = routing.weight_A.new_zeros(len(x_TD), len(self.experts))
        weight_TE = weight_TE.index_put((routing.token_A, routing.expert_A()), routing.weight_A)
        chosen_TE = torch.zeros_like(weight_TE, dtype=torch.bool)
        chosen_TE[routing.token_A, routing.expert_A()] = True
        for e, expert in enumerate(self.experts):
            (token_C,) = torch.where(chosen_TE[:, e])
            if len(token_C):
                y_CD = expert(x_TD[token_C]) * weight_TE[token_C, e, None]
                out_TD.index_add_(0, token_C, y_CD.to(out_TD.dtype))
        return out_TD

    def _pool(self, x_TD: Tensor, routing: Routing) -> Tensor:
        E, (T, D) = len(self.experts), x_TD.shape
        token_EC, weight_EC = routing.token_A.view(E, -1), routing.weight_A.view(E, -1)
        x_ECD = x_TD[token_EC]
        y_ECD = torch.stack([expert(x_CD) for expert, x_CD in zip(self.experts, x_ECD)]) * weight_EC[..., None]
        place_A = (token_EC + T * torch.arange(E, device=x_TD.device)[:, None]).flatten()
        wide = torch.zeros(E * T, D, dtype=y_ECD.dtype, device=x_TD.device)
        wide = wide.scatter(0, place_A[:, None].expand(-1, D), y_ECD.flatten(0, 1))
        return wide.view(E, T, D).sum(0).to(x_TD.dtype)


@torch.no_grad()
def _copy_expert(layer: MoEFeedForward, e: int, expert: FeedForward) -> None:
    experts = layer.experts
    first = [expert.up_proj] if expert.gate_proj is None else [expert.gate_proj, expert.up_proj]
    for linear, w_DF in zip(first, experts.w_in[e].chunk(len(first), dim=1)):
        linear.weight.copy_(w_DF.T)
    expert.down_proj.weight.copy_(experts.w_out[e].T)
    if experts.b_in is not None and experts.b_out is not None:
        for linear, b_F in zip(first, experts.b_in[e].chunk(len(first))):
            linear.bias.copy_(b_F)
        expert.down_proj.bias.copy_(experts.b_out[e])


def dense_equivalent(layer: MoEFeedForward, experts_a_token: float) -> FeedForward:
    """A dense layer with as many parameters as serve a token: those of the chosen experts and of the shared one."""
    experts = layer.experts
    F, D = experts.w_out.shape[1:]
    width = experts_a_token * F
    if layer.shared is not None:
        width += sum(p.numel() for p in layer.shared.parameters()) / ((experts.w_in.shape[2] // F + 1) * D)
    return FeedForward(D, round(width), experts.activation, experts.b_in is not None)
