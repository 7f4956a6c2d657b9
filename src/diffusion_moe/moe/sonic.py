"""SonicMoE's experts (github.com/Dao-AILab/sonic-moe, Apache-2.0; arXiv 2512.14080) in place of ours.

An optional package of Hopper kernels that gather inside their products; only `DIFFUSION_MOE_KERNELS=sonic` asks for it.
Shape suffixes as in `experts.py`, T tokens, K experts a token.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from .routing import Routing

if TYPE_CHECKING:
    from .experts import GroupedExperts

MULTIPLE = 64
"""Of the widths; what the kernels' tiles assert."""
MIN_DIM = 512


def why_not(
    dim: int,
    expert_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    token_choice: bool,
    bias: bool,
    activation: str = "swiglu",
    dropout: float = 0.0,
) -> str | None:
    """Why SonicMoE cannot serve a layer, in one line; None if it can.

    Args:
        dtype: of the products. token_choice: whether every token has as many experts. bias: whether experts have any.
    """
    if not token_choice:
        return "SonicMoE takes token choice alone (routers tc and dsmoe)"
    if activation != "swiglu" or bias or dropout:
        return "SonicMoE takes SwiGLU experts without biases and without dropout"
    if dtype != torch.bfloat16:
        return f"SonicMoE computes in bfloat16, not {str(dtype).removeprefix('torch.')}"
    if dim < MIN_DIM or dim % MULTIPLE or expert_dim % MULTIPLE:
        return (
            f"SonicMoE takes widths that are multiples of {MULTIPLE}, tokens' from {MIN_DIM} up; "
            f"these are {dim} and {expert_dim}"
        )
    on_gpu = device.type == "cuda" and torch.cuda.is_available()
    if not on_gpu or torch.cuda.get_device_capability(device)[0] != 9:
        return f"SonicMoE needs a Hopper GPU (compute capability 9.0); the device is {device}"
    return _import_error()


def sonic_experts(experts: GroupedExperts, x_TD: Tensor, routing: Routing) -> Tensor:
    """`GroupedExperts.forward` by SonicMoE.

    Raises:
        ValueError: it cannot serve this layer.
    """
    _, F, D = experts.w_out.shape
    dropout = experts.dropout.p if experts.training else 0.0
    reason = why_not(
        *(D, F, x_TD.dtype, x_TD.device, routing.row_TK is not None, experts.b_in is not None),
        *(experts.activation, dropout),
    )
    if reason is not None:
        raise ValueError(f"{reason}; set DIFFUSION_MOE_KERNELS to auto")
    assert routing.row_TK is not None
    return _call(experts.w_in, experts.w_out, x_TD, routing.weight_A, routing.expert_A(), routing.row_TK)


@_disable_dynamo  # its kernels refuse to be traced; as torch.compiler.disable, which imports torch._dynamo at once
def _call(
    w_in_EDH: Tensor, w_out_EFD: Tensor, x_TD: Tensor, weight_A: Tensor, expert_A: Tensor, row_TK: Tensor
) -> Tensor:
    import sonicmoe
    from sonicmoe.enums import ActivationType

    T, K = row_TK.shape
    E, F, D = w_out_EFD.shape
    row_A = row_TK.flatten()  # it wants assignments token by token
    token_A = torch.arange(T, device=x_TD.device, dtype=torch.int32).repeat_interleave(K, output_size=T * K)
    # Gates and values in turn as rows of (E, 2F, D), and (E, D, F); both seen with the experts last.
    w1_EHD = w_in_EDH.to(x_TD.dtype).view(E, D, 2, F).permute(0, 3, 2, 1).reshape(E, 2 * F, D)
    w2_EDF = w_out_EFD.to(x_TD.dtype).transpose(1, 2).contiguous()
    out: tuple[Tensor, Any] = sonicmoe.moe_general_routing_inputs(
        *(x_TD, weight_A.float().index_select(0, row_A), token_A, expert_A.to(torch.int32).index_select(0, row_A)),
        *(w1_EHD.permute(1, 2, 0), None, w2_EDF.permute(1, 2, 0), None),
        *(E, torch.cuda.current_stream(x_TD.device).cuda_stream, ActivationType.SWIGLU, not torch.is_grad_enabled()),
    )
    return out[0]


@cache
def _import_error() -> str | None:
    try:
        from sonicmoe import moe_general_routing_inputs  # noqa: F401
        from sonicmoe.enums import ActivationType  # noqa: F401
    except Exception as error:  # its own imports compile code for the device, and fail in many ways
        return (
            f"SonicMoE cannot be imported ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
        )
    return None
