"""Positions against formulas written with plain numbers."""

import math

import pytest
import torch

from diffusion_moe.nn.position import apply_rotary, rotary_table, sincos_table


def test_sincos_table_is_the_plain_formula():
    """First half the column, second half the row; in each, sines then cosines at 10000^(-j / (D / 4))."""
    height, width, dim = 3, 5, 12
    table = sincos_table(height, width, dim)
    for token in range(height * width):
        row, column = divmod(token, width)
        frequencies = [10000 ** (-j / 3) for j in range(3)]
        expected = [f(p * w) for p in (column, row) for f in (math.sin, math.cos) for w in frequencies]
        torch.testing.assert_close(table[token], torch.tensor(expected))


def rotated(x: list[float], positions: list[float], pairs: str = "halves") -> list[float]:
    """One head in as many parts as positions; in each, pair j turns by position * 10000^(-j / half)."""
    part = len(x) // len(positions)
    half = part // 2
    out = list(x)
    for p, position in enumerate(positions):
        for j in range(half):
            a, b = (j, half + j) if pairs == "halves" else (2 * j, 2 * j + 1)
            a, b = p * part + a, p * part + b
            angle = position * 10000 ** (-j / half)
            out[a] = x[a] * math.cos(angle) - x[b] * math.sin(angle)
            out[b] = x[b] * math.cos(angle) + x[a] * math.sin(angle)
    return out


@pytest.mark.parametrize("pairs", ["halves", "neighbours"])
@pytest.mark.parametrize("axes", [1, 2])
def test_rotary_is_the_plain_formula(axes, pairs):
    """Two axes: the row turns the first half of the head, the column the second."""
    torch.manual_seed(0)
    height, width, head_dim = 3, 4, 8
    x = torch.randn(2, 3, height * width, head_dim)
    y = apply_rotary(x, rotary_table(height, width, head_dim, axes, pairs))
    for token in range(height * width):
        positions = [token] if axes == 1 else list(divmod(token, width))
        for b in range(2):
            for h in range(3):
                expected = torch.tensor(rotated(x[b, h, token].tolist(), positions, pairs))
                torch.testing.assert_close(y[b, h, token], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pairs", ["halves", "neighbours"])
def test_tokens_before_the_image_stay_still(pairs):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4 + 9, 8)
    y = apply_rotary(x, rotary_table(3, 3, 8, 2, pairs, still_tokens=4))
    assert torch.equal(y[:, :, :4], x[:, :, :4])
    assert torch.equal(y[:, :, 4:], apply_rotary(x[:, :, 4:], rotary_table(3, 3, 8, 2, pairs)))


@pytest.mark.parametrize("axes", [1, 2])
def test_rotary_preserves_norms(axes):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 16, 8)
    y = apply_rotary(x, rotary_table(4, 4, 8, axes))
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(y[:, :, 0], x[:, :, 0]) and not torch.allclose(y[:, :, 1:], x[:, :, 1:], atol=0.1)


def test_rotary_in_one_dimension_sees_only_the_distance():
    """The same query and key at every position: their product is constant along the diagonals, and varies across."""
    torch.manual_seed(0)
    table = rotary_table(1, 10, 8, 1)
    q, k = (apply_rotary(torch.randn(8).expand(1, 1, 10, 8), table)[0, 0] for _ in range(2))
    score = q @ k.T
    for distance in range(-9, 10):
        diagonal = score.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-4)
    assert score[0].std() > 0.1


def test_rotary_in_two_dimensions_sees_only_the_distance_of_rows_and_columns():
    torch.manual_seed(0)
    table = rotary_table(3, 3, 8, 2)
    q, k = (apply_rotary(torch.randn(8).expand(1, 1, 9, 8), table)[0, 0] for _ in range(2))
    score = (q @ k.T).view(3, 3, 3, 3)  # row and column of q, row and column of k
    torch.testing.assert_close(score[0, 0, 1, 2], score[1, 0, 2, 2])
    torch.testing.assert_close(score[0, 1, 1, 0], score[1, 2, 2, 1])
    assert abs(float(score[0, 0, 1, 2] - score[0, 0, 2, 1])) > 1e-3


def test_rotary_computes_in_float32_and_answers_in_the_inputs_dtype():
    torch.manual_seed(0)
    x, table = torch.randn(1, 2, 16, 8).bfloat16(), rotary_table(4, 4, 8, 2)
    y = apply_rotary(x, table)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, apply_rotary(x.float(), table).bfloat16())
