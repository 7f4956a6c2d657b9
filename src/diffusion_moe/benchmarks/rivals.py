"""Other libraries' experts with our weights and our routing, so that what is compared answers the same.

Each adapter takes tokens, the experts each token chose and their weights, and computes in the dtype of the tokens.
A library that is missing, or does not suit, is a `ValueError` that says why. Shape suffixes: B images, N tokens of one
image, T tokens of the batch, D width, E experts, F expert width, K experts a token.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from importlib import import_module
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..moe import GroupedExperts, MoEFeedForward, MoEOutput, RoutingReport
from ..moe.balance import balance_loss
from ..moe.precision import compute_dtype, full_precision
from ..moe.routers import DSMoERouter, TokenChoice
from .loop import LoopMoE, PlainFeedForward, dense_equivalent
from .measure import installed_version
from .options import Against


class Choice(NamedTuple):
    """What a token-choice router decided, before our grouping by expert: the libraries group for themselves."""

    expert_TK: Tensor
    weight_TK: Tensor
    report: RoutingReport


class _Ungrouped(TokenChoice):
    """A token-choice router that stops before grouping."""

    def routing(self, expert: Tensor, weight: Tensor, share: Tensor | None) -> Choice:  # type: ignore[override]
        expert_TK, weight_TK, losses = expert.flatten(0, -2), weight.flatten(0, -2), {}
        if self.training and self.config.balance == "aux":
            assert share is not None
            losses["balance"] = self.config.balance_weight * balance_loss(share.flatten(0, -2), expert_TK)
        chosen_A = expert_TK.flatten()
        counts_E = chosen_A.new_zeros(self.config.num_experts).scatter_add_(0, chosen_A, torch.ones_like(chosen_A))
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
            self.inner.gate_up_proj.copy_(experts.w_in.transpose(1, 2))  # gates first, as ours
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


class SonicExperts(nn.Module):
    """SonicMoE's experts (0.1) for any routing: rows of the first projection are gate and value in turn."""

    def __init__(self, experts: GroupedExperts) -> None:
        super().__init__()
        try:
            self.run = import_module("sonicmoe").moe_general_routing_inputs
            enums = import_module("sonicmoe.enums")
        except ImportError as error:
            raise ValueError(f"against is sonicmoe, which cannot be imported ({first_line(error)})") from error
        self.activation = enums.ActivationType.SWIGLU
        gate_EDF, value_EDF = experts.w_in.detach().chunk(2, dim=2)
        self.w_in_EHD = nn.Parameter(torch.stack((gate_EDF, value_EDF), dim=3).flatten(2).transpose(1, 2).contiguous())
        self.w_out_EDF = nn.Parameter(experts.w_out.detach().transpose(1, 2).contiguous())

    def forward(self, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
        T, K = expert_TK.shape
        token_A = torch.arange(T, dtype=torch.int32, device=x_TD.device).repeat_interleave(K, output_size=T * K)
        out_TD, _ = self.run(
            x_TD,
            weight_TK.float().flatten(),
            token_A,
            expert_TK.flatten().int(),
            self.w_in_EHD.to(x_TD.dtype).permute(1, 2, 0),
            None,
            self.w_out_EDF.to(x_TD.dtype).permute(1, 2, 0),
            None,
            E=len(self.w_out_EDF),
            stream_id=torch.cuda.current_stream().cuda_stream if x_TD.is_cuda else 0,
            activation_type=self.activation,
            is_inference_mode_enabled=not torch.is_grad_enabled(),
        )
        return out_TD


class ForeignMoE(nn.Module):
    """A copy of a `MoEFeedForward` around another library's experts: our router, and the shared expert plainly.

    Autocast is off inside the experts: their weights are cast once a forward pass, as ours are.
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


def make_rival(
    against: Against, layer: MoEFeedForward, experts_a_token: float, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    """What a layer is held against, with copies of its weights where they mean the same.

    Raises:
        ValueError: the library is not there, or does not suit the layer, the device or the dtype.
    """
    if against == "loop":
        return LoopMoE(copy.deepcopy(layer))
    if against == "dense":
        return dense_equivalent(layer, experts_a_token)
    experts, kind = layer.experts, layer.router.config.kind
    if type(layer.router) not in UNGROUPED:
        raise ValueError(f"against is {against}, which is for token choice, but the router is {kind}; choose loop")
    if experts.activation != "swiglu" or experts.b_in is not None:
        raise ValueError(
            f"against is {against}, but the experts are {experts.activation}"
            f"{' with biases' if experts.b_in is not None else ''}; it is for swiglu without"
        )
    why_not = UNSUITED[against](layer, device, dtype)
    if why_not is not None:
        raise ValueError(f"against is {against}, which cannot run here: {why_not}")
    if against == "transformers":
        return ForeignMoE(layer, TransformersExperts(experts))
    if against == "scattermoe":
        return ForeignMoE(layer, ScatterExperts(experts, layer.router.config.top_k))
    return ForeignMoE(layer, SonicExperts(experts))


def _transformers_unsuited(layer: MoEFeedForward, device: torch.device, dtype: torch.dtype) -> str | None:
    unit = 16 // dtype.itemsize  # grouped_mm's alignment, which transformers does not look after
    odd = [width for width in layer.experts.w_out.shape[1:] if width % unit]
    return f"a width of {odd[0]} is not a multiple of {unit}, as its grouped_mm needs" if odd else None


def _scattermoe_unsuited(layer: MoEFeedForward, device: torch.device, dtype: torch.dtype) -> str | None:
    return None if device.type == "cuda" else "it needs a CUDA device"


def _sonicmoe_unsuited(layer: MoEFeedForward, device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return "it needs a Hopper GPU"
    return None if dtype == torch.bfloat16 else f"it computes in bfloat16, not {str(dtype).removeprefix('torch.')}"


UNSUITED: dict[str, Callable[[MoEFeedForward, torch.device, torch.dtype], str | None]] = {
    "transformers": _transformers_unsuited,
    "scattermoe": _scattermoe_unsuited,
    "sonicmoe": _sonicmoe_unsuited,
}

DISTRIBUTIONS = {"transformers": "transformers", "scattermoe": "scattermoe", "sonicmoe": "sonic-moe"}
"""What a rival is installed as."""


def rival_version(against: Against) -> str | None:
    """The version of the library held against; None where it is ours."""
    return installed_version(DISTRIBUTIONS[against]) if against in DISTRIBUTIONS else None


def _cast(module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: parameter.to(dtype) for name, parameter in module.named_parameters()}


def first_line(error: Exception) -> str:
    """An error's message, short enough for one line."""
    return (str(error).splitlines() or [type(error).__name__])[0]
