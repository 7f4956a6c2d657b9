"""Other libraries' experts with our weights and our routing, so that both compute the same.

Each adapter takes tokens, the experts that each token chose and their weights, and computes in the dtype of the tokens.
Shape suffixes: B images, N tokens of one image, T tokens of the batch, D width, E experts, F expert width, K experts a
token.
"""

from __future__ import annotations

import copy
from importlib import import_module
from typing import Literal, NamedTuple

import torch
from naive_loop import PlainFeedForward
from torch import Tensor, nn
from torch.func import functional_call

from diffusion_moe.benchmarks.measure import installed_version
from diffusion_moe.moe import GroupedExperts, MoEFeedForward, MoEOutput, RoutingReport
from diffusion_moe.moe.balance import balance_loss
from diffusion_moe.moe.precision import compute_dtype, full_precision
from diffusion_moe.moe.routers import DSMoERouter, TokenChoice

Library = Literal["transformers", "scattermoe"]


class Choice(NamedTuple):
    """Choice of a token-choice router before our grouping by expert: the libraries group for themselves."""

    expert_TK: Tensor
    weight_TK: Tensor
    report: RoutingReport


class _Ungrouped(TokenChoice):
    """A token-choice router that stops before grouping."""

    def routing(self, expert: Tensor, weight: Tensor, share: Tensor | None) -> Choice:  # type: ignore[override]
        expert_TK, weight_TK, losses = expert.flatten(0, -2), weight.flatten(0, -2), {}
        chosen_A = expert_TK.flatten()
        counts_E = chosen_A.new_zeros(self.config.num_experts).scatter_add_(0, chosen_A, torch.ones_like(chosen_A))
        if self.training and self.config.balance == "aux":
            assert share is not None
            losses["balance"] = self.config.balance_weight * balance_loss(share.flatten(0, -2), counts_E)
        return Choice(expert_TK, weight_TK, RoutingReport(counts_E, losses, num_tokens=len(expert_TK)))


class _UngroupedSigmoid(_Ungrouped, DSMoERouter):
    """DSMoE's scores and groups of experts, as `_Ungrouped`."""


UNGROUPED: dict[type, type] = {TokenChoice: _Ungrouped, DSMoERouter: _UngroupedSigmoid}


class TransformersExperts(nn.Module):
    """transformers' experts (`Qwen3MoeExperts`) as its own `grouped_mm` implementation runs them."""

    def __init__(self, experts: GroupedExperts) -> None:
        super().__init__()
        try:
            module = import_module("transformers.models.qwen3_moe.modeling_qwen3_moe")
            from transformers import Qwen3MoeConfig
        except ImportError as error:
            raise ValueError(f"against is transformers, which cannot be imported ({first_line(error)})") from error
        if not hasattr(module, "Qwen3MoeExperts"):
            raise ValueError(
                f"against is transformers, but {installed_version('transformers')} keeps experts one by one; "
                "install 5.0 or newer"
            )
        E, F, D = experts.w_out.shape
        config = Qwen3MoeConfig(
            num_experts=E,
            hidden_size=D,
            moe_intermediate_size=F,
            hidden_act="silu",
        )
        config._experts_implementation = "grouped_mm"
        self.inner = module.Qwen3MoeExperts(config)
        with torch.no_grad():
            self.inner.gate_up_proj.copy_(experts.w_in.transpose(1, 2))  # gates first, as in ours
            self.inner.down_proj.copy_(experts.w_out.transpose(1, 2))

    def forward(self, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
        return functional_call(self.inner, _cast(self.inner, x_TD.dtype), (x_TD, expert_TK, weight_TK.to(x_TD.dtype)))


class ScatterExperts(nn.Module):
    """ScatterMoE's `GLUMLP` (0.3): the first half of its first projection is the value, the second the gate."""

    def __init__(self, experts: GroupedExperts, top_k: int) -> None:
        super().__init__()
        try:
            module = import_module("scattermoe.mlp")
        except ImportError as error:
            raise ValueError(
                f"against is scattermoe, which cannot be imported ({first_line(error)}); "
                "install it from github.com/shawntan/scattermoe"
            ) from error
        E, F, D = experts.w_out.shape
        self.inner = module.GLUMLP(input_size=D, hidden_size=F, num_experts=E, top_k=top_k)
        with torch.no_grad():
            gate_EDF, value_EDF = experts.w_in.chunk(2, dim=2)
            self.inner.experts.weight.copy_(torch.cat((value_EDF, gate_EDF), dim=2).transpose(1, 2))
            self.inner.output_experts.weight.copy_(experts.w_out.transpose(1, 2))

    def forward(self, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
        return functional_call(self.inner, _cast(self.inner, x_TD.dtype), (x_TD, weight_TK.to(x_TD.dtype), expert_TK))


class ForeignMoE(nn.Module):
    """A copy of a `MoEFeedForward` around another library's experts: our router, and the shared expert plainly.

    Autocast is off inside the experts: their weights are cast once per forward pass, as ours are.
    """

    def __init__(self, layer: MoEFeedForward, experts: nn.Module) -> None:
        super().__init__()
        self.router = copy.deepcopy(layer.router)
        self.router.__class__ = UNGROUPED[type(layer.router)]
        self.experts, self.add_input = experts, layer.add_input
        self.shared = None if layer.shared is None else PlainFeedForward(copy.deepcopy(layer.shared))

    def forward(self, x_BND: Tensor) -> MoEOutput:
        choice = self.router(x_BND)
        x_TD = x_BND.flatten(0, 1).to(compute_dtype(x_BND))
        with full_precision(x_BND):
            y_BND = self.experts(x_TD, choice.expert_TK, choice.weight_TK).view_as(x_BND)
        if self.shared is not None:
            y_BND = y_BND + self.shared(x_BND)
        elif self.add_input:
            y_BND = y_BND + x_BND
        return MoEOutput(y_BND.to(x_BND.dtype), choice.report)


def with_library(library: Library, layer: MoEFeedForward, device: torch.device, dtype: torch.dtype) -> ForeignMoE:
    """A layer with a library's experts, with copies of our weights.

    Raises:
        ValueError: the library is not installed, or does not support the layer, the device or the dtype.
    """
    experts, kind = layer.experts, layer.router.config.kind
    if type(layer.router) not in UNGROUPED:
        raise ValueError(
            f"against is {library}, which supports token choice alone, but the router is {kind}; choose loop"
        )
    if experts.activation != "swiglu" or experts.b_in is not None:
        biases = " with biases" if experts.b_in is not None else ""
        raise ValueError(
            f"against is {library}, which supports swiglu without biases alone, but the experts are "
            f"{experts.activation}{biases}; choose loop"
        )
    reason = unsupported(library, layer, device, dtype)
    if reason is not None:
        raise ValueError(f"against is {library}, which cannot run here: {reason}")
    if library == "transformers":
        return ForeignMoE(layer, TransformersExperts(experts))
    return ForeignMoE(layer, ScatterExperts(experts, layer.router.config.top_k))


def unsupported(library: Library, layer: MoEFeedForward, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a library cannot run a layer; None if it can."""
    if library == "scattermoe":
        return None if device.type == "cuda" else "it needs a CUDA device"
    unit = 16 // dtype.itemsize  # grouped_mm's alignment, which transformers does not check
    odd = [width for width in layer.experts.w_out.shape[1:] if width % unit]
    return f"a width of {odd[0]} is not a multiple of {unit}, as its grouped_mm needs" if odd else None


def _cast(module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: parameter.to(dtype) for name, parameter in module.named_parameters()}


def first_line(error: Exception) -> str:
    """An error's message, short enough for one line."""
    return (str(error).splitlines() or [type(error).__name__])[0]
