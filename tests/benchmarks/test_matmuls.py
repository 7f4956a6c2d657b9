"""Three ways to the same matmuls."""

import pytest
import torch

from diffusion_moe.benchmarks.matmuls import matmuls, ways_of
from diffusion_moe.config import ModelConfig

CPU = torch.device("cpu")
E, C, INPUTS, OUTPUTS = 3, 5, 8, 4


@pytest.mark.parametrize("part", ["forward", "dgrad", "wgrad"])
def test_all_ways_agree_with_einsum(part):
    x, dy, w = torch.randn(E * C, INPUTS), torch.randn(E * C, OUTPUTS), torch.randn(E, INPUTS, OUTPUTS)
    x_ECI, dy_ECO = x.view(E, C, INPUTS), dy.view(E, C, OUTPUTS)
    a, b, expected = {
        "forward": (x, w, torch.einsum("eci,eio->eco", x_ECI, w).flatten(0, 1)),
        "dgrad": (dy, w.transpose(1, 2), torch.einsum("eco,eio->eci", dy_ECO, w).flatten(0, 1)),
        "wgrad": (x, dy, torch.einsum("eci,eco->eio", x_ECI, dy_ECO)),
    }[part]
    ways = ways_of(E, C, CPU)[part]
    assert ways.keys() == {"grouped", "loop", "bmm"}
    for way in ways.values():
        torch.testing.assert_close(way(a, b), expected)


@pytest.mark.parametrize(
    ("settings", "rows", "columns"),
    [
        ({"router": "dsmoe", "top_k": 3, "expert_activation": "swiglu"}, 3 * 2 * 16 // 8, 2 * 24),
        ({"router": "diffmoe", "capacity": 1.5, "expert_activation": "gelu"}, 48 // 8, 24),
    ],
)
def test_records_hold_the_shapes_and_operations_of_the_layer(settings, rows, columns):
    config = ModelConfig(num_experts=8, hidden_size=32, num_heads=2, expert_dim=24, **settings)
    records = list(matmuls(config, 2, 16, 1e-3, CPU, torch.float32))
    assert [(r["mode"], r["against"]) for r in records] == [
        (f"{name} {part}", against)
        for name in ("w_in", "w_out")
        for part in ("forward", "dgrad", "wgrad")
        for against in ("loop", "bmm")
    ]
    for record in records:
        assert (record["experts"], record["rows_an_expert"]) == (8, rows)
        wide = columns if record["mode"].startswith("w_in") else 24
        assert record["flops"] == 2 * 8 * rows * 32 * wide
        assert record["ratio"] == pytest.approx(record["against_ms"] / record["ms"])
        assert record["utilisation"] == pytest.approx(record["flops"] / record["ms"] * 1e3 / record["matmul_ceiling"])


def test_too_few_tokens_are_refused():
    config = ModelConfig(num_experts=32, hidden_size=32, num_heads=2, top_k=1)
    with pytest.raises(ValueError, match="tokens is 16, too few for 32 experts"):
        next(matmuls(config, 1, 16, 1e-3, CPU, torch.float32))
