"""The MoE layer as a plain loop over experts, as most code writes it, and a dense layer of equal activated parameters.

Each expert is a module of linear layers of its own. Token choice loops over the experts and the tokens that chose each
(one wait for the device per expert); rules that choose tokens over the batch stack every expert's output and scatter it
into a buffer of experts x tokens. Shape suffixes as in `moe.routing`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diffusion_moe.moe import FeedForward, MoEFeedForward, MoEOutput, Routing
from diffusion_moe.moe.activation import activated


class PlainFeedForward(nn.Module):
    """`FeedForward` as most code writes it: autograd saves whatever the operators ask for."""

    def __init__(self, network: FeedForward) -> None:
        super().__init__()
        self.activation = network.activation
        self.gate_proj, self.up_proj, self.down_proj = network.gate_proj, network.up_proj, network.down_proj

    def forward(self, x: Tensor) -> Tensor:
        inputs = (self.up_proj(x),) if self.gate_proj is None else (self.gate_proj(x), self.up_proj(x))
        return self.down_proj(activated(self.activation, *inputs))


class LoopMoE(nn.Module):
    """A copy of a `MoEFeedForward` that computes the same in a loop."""

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
        equal = self.training and routing.row_TK is None  # every expert takes the same number of tokens
        y_BND = (self._stacked if equal else self._looped)(x_TD, routing).view_as(x_BND)
        if self.shared is not None:
            y_BND = y_BND + self.shared(x_BND)
        elif self.add_input:
            y_BND = y_BND + x_BND
        return MoEOutput(y_BND, routing.report)

    def _looped(self, x_TD: Tensor, routing: Routing) -> Tensor:
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

    def _stacked(self, x_TD: Tensor, routing: Routing) -> Tensor:
        E, (T, D) = len(self.experts), x_TD.shape
        token_EC, weight_EC = routing.token_A.view(E, -1), routing.weight_A.view(E, -1)
        x_ECD = x_TD[token_EC]
        y_ECD = torch.stack([expert(x_CD) for expert, x_CD in zip(self.experts, x_ECD)]) * weight_EC[..., None]
        position_A = (token_EC + T * torch.arange(E, device=x_TD.device)[:, None]).flatten()
        out_SD = torch.zeros(E * T, D, dtype=y_ECD.dtype, device=x_TD.device)
        out_SD = out_SD.scatter(0, position_A[:, None].expand(-1, D), y_ECD.flatten(0, 1))
        return out_SD.view(E, T, D).sum(0).to(x_TD.dtype)


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


def dense_equivalent(layer: MoEFeedForward, experts_per_token: float) -> FeedForward:
    """A dense layer with as many parameters as a token activates: those of its experts and of the shared one."""
    experts = layer.experts
    F, D = experts.w_out.shape[1:]
    width = experts_per_token * F
    if layer.shared is not None:
        width += sum(p.numel() for p in layer.shared.parameters()) / ((experts.w_in.shape[2] // F + 1) * D)
    return FeedForward(D, round(width), experts.activation, experts.b_in is not None)
