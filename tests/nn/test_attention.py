"""Attention against the softmax formula, head by head."""

import diffusers.models.attention  # noqa: F401  gives layers set_attention_backend
import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName

from diffusion_moe.nn.attention import CrossAttention, SelfAttention, window_mask
from diffusion_moe.nn.position import apply_rotary, rotary_table


def plain_attention(layer: SelfAttention, x_ND: torch.Tensor, rotary=None, window=0) -> torch.Tensor:
    """One image, one head at a time."""
    heads, kv_heads, size = layer.num_heads, layer.num_kv_heads, layer.head_dim
    queries, keys, values = layer.qkv(x_ND).split([heads * size, kv_heads * size, kv_heads * size], dim=1)
    outs = []
    for head in range(heads):
        shared = head // (heads // kv_heads)  # consecutive query heads share a key and value head
        q = layer.q_norm(queries[:, head * size : (head + 1) * size])
        k = layer.k_norm(keys[:, shared * size : (shared + 1) * size])
        v = values[:, shared * size : (shared + 1) * size]
        if rotary is not None:
            q, k = apply_rotary(q[None, None], rotary)[0, 0], apply_rotary(k[None, None], rotary)[0, 0]
        exp = torch.exp(q @ k.T / size**0.5)
        if window:
            places = range(len(x_ND))
            exp = exp * torch.tensor([[float(abs(i - j) < window) for j in places] for i in places])
        # The sink takes its share of the sum, and gives nothing.
        sink = 0 if layer.sinks is None else torch.exp(layer.sinks[head])
        outs.append(exp / (exp.sum(dim=1, keepdim=True) + sink) @ v)
    return layer.proj(torch.cat(outs, dim=1))


@pytest.mark.parametrize("num_kv_heads", [None, 4, 2, 1])
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("axes", [0, 1, 2])
def test_equals_the_softmax_formula(num_kv_heads, qk_norm, axes):
    torch.manual_seed(0)
    layer = SelfAttention(32, 4, num_kv_heads, qk_norm)
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.3)
    rotary = rotary_table(3, 3, 8, axes) if axes else None
    x_BND = torch.randn(2, 9, 32)
    expected = torch.stack([plain_attention(layer, x_ND, rotary) for x_ND in x_BND])
    torch.testing.assert_close(layer(x_BND, rotary), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_kv_heads", [None, 2])
@pytest.mark.parametrize(("sinks", "window"), [(True, 0), (False, 1), (False, 3), (True, 2)])
@pytest.mark.parametrize("head_dim", [None, 12])
def test_sinks_and_windows_equal_the_softmax_formula(num_kv_heads, sinks, window, head_dim):
    torch.manual_seed(0)
    layer = SelfAttention(32, 4, num_kv_heads, head_dim=head_dim, sinks=sinks)
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.3)
    rotary = rotary_table(3, 3, head_dim or 8, 2)
    x_BND = torch.randn(2, 9, 32, requires_grad=True)
    inputs = [x_BND, *layer.parameters()]
    expected = torch.stack([plain_attention(layer, x_ND, rotary, window) for x_ND in x_BND])
    actual = layer(x_BND, rotary, window_mask(x_BND, window, sinks))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    grads = torch.autograd.grad(actual.square().mean(), inputs)
    torch.testing.assert_close(grads, torch.autograd.grad(expected.square().mean(), inputs), rtol=1e-3, atol=1e-5)


def test_backends_without_masks_are_refused_where_a_mask_is_needed():
    layer = SelfAttention(32, 4, sinks=True)
    layer.set_attention_backend("native")
    layer(torch.randn(1, 4, 32))
    layer.processor._attention_backend = AttentionBackendName.FLASH
    with pytest.raises(ValueError, match="takes no mask"):
        layer(torch.randn(1, 4, 32))


def test_qk_norm_makes_the_size_of_queries_and_keys_irrelevant():
    torch.manual_seed(0)
    x_BND = torch.randn(1, 6, 16)
    for qk_norm in (True, False):
        layer = SelfAttention(16, 2, qk_norm=qk_norm)
        torch.nn.init.zeros_(layer.qkv.bias)
        before = layer(x_BND)
        with torch.no_grad():
            layer.qkv.weight[:32] *= 10
        assert torch.allclose(layer(x_BND), before, atol=1e-4) == qk_norm


def test_grouped_query_attention_has_fewer_rows():
    assert SelfAttention(32, 4).qkv.out_features == 96
    assert SelfAttention(32, 4, 1).qkv.out_features == 32 + 2 * 8


@pytest.mark.parametrize("qk_norm", [False, True])
def test_autocast_is_close_to_float32(qk_norm):
    torch.manual_seed(0)
    layer, x_BND, rotary = SelfAttention(32, 4, 2, qk_norm), torch.randn(2, 9, 32), rotary_table(3, 3, 8, 2)
    expected = layer(x_BND, rotary)
    with torch.autocast("cpu", torch.bfloat16):
        actual = layer(x_BND, rotary)
    assert actual.dtype == torch.bfloat16
    assert (actual - expected).norm() / expected.norm() < 2.0**-6


@pytest.mark.parametrize("sinks", [False, True])
def test_dropout_of_attention_weights_keeps_the_mean_and_is_for_training_only(sinks):
    torch.manual_seed(0)
    layer = SelfAttention(16, 2, sinks=sinks, attention_dropout=0.5)
    x_BND = torch.randn(1, 6, 16)
    with torch.no_grad():
        exact = layer.eval()(x_BND)
        assert torch.equal(layer(x_BND), exact)
        draws = torch.cat([layer.train()(x_BND) for _ in range(2000)])
    assert (draws[0] - draws[1]).abs().max() > 0.01
    torch.testing.assert_close(draws.mean(0), exact[0], rtol=0, atol=0.02)


def test_dropout_of_the_output_zeroes_its_share():
    torch.manual_seed(0)
    layer = SelfAttention(16, 2, dropout=0.3).train()
    torch.nn.init.ones_(layer.proj.bias)
    zeros = (layer(torch.randn(20, 30, 16)) == 0).float().mean()
    assert zeros == pytest.approx(0.3, abs=0.02)
    assert (layer.eval()(torch.randn(20, 30, 16)) != 0).all()


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
def test_attention_to_a_text_equals_the_softmax_formula(num_kv_heads):
    """With a mask heads are repeated rather than grouped; output and every gradient are those of the formula."""
    torch.manual_seed(0)
    layer, size = CrossAttention(32, 4, num_kv_heads), 8
    x_BND, text_BLD = torch.randn(2, 9, 32, requires_grad=True), torch.randn(2, 5, 32, requires_grad=True)
    mask_BL = torch.tensor([[True, True, False, True, False], [True] * 5])
    inputs = [x_BND, text_BLD, *layer.parameters()]
    keys, values = layer.kv(text_BLD).unflatten(-1, (2, num_kv_heads, size)).unbind(2)
    outs = []
    for head, q_BNI in enumerate(layer.q(x_BND).split(size, dim=-1)):
        shared = head // (4 // num_kv_heads)
        logits_BNL = q_BNI @ keys[:, :, shared].transpose(1, 2) / size**0.5
        weights_BNL = logits_BNL.masked_fill(~mask_BL[:, None], -torch.inf).softmax(-1)
        outs.append(weights_BNL @ values[:, :, shared])
    expected = layer.proj(torch.cat(outs, dim=-1))
    actual = layer(x_BND, text_BLD, mask_BL)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    grads = torch.autograd.grad(actual.square().mean(), inputs)
    torch.testing.assert_close(grads, torch.autograd.grad(expected.square().mean(), inputs), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("sinks", "window"), [(True, 0), (False, 3), (True, 3)])
def test_kernels_get_masks_without_grouped_heads_and_no_gradient_of_a_mask(monkeypatch, sinks, window):
    """What a GPU's kernels take: grouped heads without a mask, or a mask of booleans with as many heads of keys."""
    calls, real = [], torch.nn.functional.scaled_dot_product_attention

    def recorded(q, k, v, **options):
        calls.append((q, k, v, options))
        return real(q, k, v, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recorded)
    x_BND = torch.randn(2, 9, 32)
    SelfAttention(32, 4, 2, sinks=sinks)(x_BND, mask_NM=window_mask(x_BND, window, sinks))
    ((q, k, v, options),) = calls
    assert q.shape[-1] == k.shape[-1] == v.shape[-1] and q.shape[-1] % 8 == 0
    if window:
        assert options["attn_mask"].dtype == torch.bool and not options["enable_gqa"] and k.shape[1] == q.shape[1]
    else:
        assert options["attn_mask"] is None and options["enable_gqa"] and k.shape[1] == 2
