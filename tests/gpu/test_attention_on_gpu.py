"""Attention on a CUDA device: fused kernels run in every variant, and compute what the plain formula does."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffusion_moe.nn.attention import CrossAttention, SelfAttention, window_mask

pytestmark = pytest.mark.gpu
FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]


def results(layer, inputs, backends):
    """Output and all gradients in bfloat16; an error where none of the backends takes the call."""
    with torch.autocast("cuda", torch.bfloat16), sdpa_kernel(backends):
        y = layer(*inputs)
        return y, *torch.autograd.grad(y.float().square().sum(), (inputs[0], *layer.parameters()))


def compare(layer, *inputs):
    fused, plain = (results(layer, inputs, backends) for backends in (FUSED, [SDPBackend.MATH]))
    for actual, expected in zip(fused, plain):
        assert (actual.float() - expected.float()).norm() < 3e-2 * expected.float().norm()


@pytest.mark.parametrize("num_kv_heads", [6, 2, 1])
@pytest.mark.parametrize(("sinks", "window"), [(False, 0), (True, 0), (False, 9), (True, 9)])
def test_self_attention(num_kv_heads, sinks, window):
    layer = SelfAttention(384, 6, num_kv_heads, qk_norm=True, sinks=sinks).cuda()
    if sinks:
        torch.nn.init.normal_(layer.sinks)
    x_BND = torch.randn(2, 65, 384, device="cuda", requires_grad=True)
    compare(layer, x_BND, None, window_mask(x_BND, window, sinks))


@pytest.mark.parametrize("num_kv_heads", [6, 2, 1])
def test_attention_to_a_text(num_kv_heads):
    layer = CrossAttention(384, 6, num_kv_heads).cuda()
    mask_BL = torch.arange(13, device="cuda") < torch.tensor([[5], [13]], device="cuda")
    x_BND = torch.randn(2, 64, 384, device="cuda", requires_grad=True)
    compare(layer, x_BND, torch.randn(2, 13, 384, device="cuda"), mask_BL)
