"""Patches and time features, number by number."""

import math

import torch

from diffusion_moe.nn.embeddings import TimestepEmbedder, patchify, unpatchify
from diffusion_moe.nn.norm import make_norm, modulate


def test_patchify_orders_tokens_by_rows_and_patches_by_channel():
    x_BCHW = torch.arange(2 * 3 * 4 * 6.0).view(2, 3, 4, 6)
    tokens = patchify(x_BCHW, 2)
    assert tokens.shape == (2, 6, 12)
    for n in range(6):
        row, column = divmod(n, 3)
        expected = [x_BCHW[1, c, 2 * row + i, 2 * column + j] for c in range(3) for i in range(2) for j in range(2)]
        assert tokens[1, n].tolist() == [float(v) for v in expected]


def test_unpatchify_reads_patches_pixel_by_pixel_with_channels_last():
    tokens = torch.arange(6 * 12.0).view(1, 6, 12)
    image = unpatchify(tokens, 2, 4, 6)
    assert image.shape == (1, 3, 4, 6)
    for c in range(3):
        for y in range(4):
            for x in range(6):
                assert image[0, c, y, x] == tokens[0, (y // 2) * 3 + x // 2, ((y % 2) * 2 + x % 2) * 3 + c]


def test_round_trip_once_the_channels_are_moved_last():
    torch.manual_seed(0)
    x_BCHW = torch.randn(2, 3, 4, 6)
    moved = patchify(x_BCHW, 2).unflatten(-1, (3, 4)).transpose(-1, -2).flatten(-2)
    assert torch.equal(unpatchify(moved, 2, 4, 6), x_BCHW)
    assert not torch.equal(unpatchify(patchify(x_BCHW, 2), 2, 4, 6), x_BCHW)


def test_time_features_are_cosines_then_sines():
    embedder, seen = TimestepEmbedder(8), []
    embedder.mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    times = [0.0, 0.37, 1.0]
    out = embedder(torch.tensor(times))
    frequencies = [10000 ** (-j / 128) for j in range(128)]
    expected = [[f(t * w) for f in (math.cos, math.sin) for w in frequencies] for t in times]
    torch.testing.assert_close(seen[0], torch.tensor(expected), rtol=1e-5, atol=1e-6)
    first, _, last = embedder.mlp
    hidden = seen[0] @ first.weight.T + first.bias
    torch.testing.assert_close(out, (hidden * torch.sigmoid(hidden)) @ last.weight.T + last.bias, rtol=1e-4, atol=1e-5)


def test_time_features_of_low_precision_times_are_computed_in_float32():
    embedder, seen = TimestepEmbedder(8), []
    embedder.mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    embedder(torch.tensor([0.75], dtype=torch.bfloat16))
    embedder(torch.tensor([0.75]))
    assert seen[0].dtype == torch.float32 and torch.equal(seen[0], seen[1])


def test_norms_are_the_plain_formulas():
    torch.manual_seed(0)
    x = torch.randn(3, 5, 8) + 2
    layer, rms = make_norm("layernorm", 8), make_norm("rmsnorm", 8)
    torch.nn.init.normal_(rms.weight)
    assert not list(layer.parameters())
    centred = x - x.mean(-1, keepdim=True)
    torch.testing.assert_close(layer(x), centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt())
    torch.testing.assert_close(rms(x), rms.weight * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt())


def test_modulation_scales_and_shifts_each_image():
    x, shift, scale = (
        torch.ones(2, 3, 2),
        torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
        torch.tensor([[0.0, 1.0], [2.0, -1.0]]),
    )
    assert modulate(x, shift, scale)[:, 0].tolist() == [[2.0, 4.0], [6.0, 4.0]]
