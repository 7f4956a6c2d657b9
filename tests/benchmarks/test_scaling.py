"""Exponents of known laws, and the points they are measured at."""

import math

import pytest
import torch

from diffusion_moe.benchmarks.scaling import axes, fit_power, scaling
from diffusion_moe.config import ModelConfig, read_recipe

CPU = torch.device("cpu")


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 2.3])
def test_a_power_law_is_found_exactly(exponent):
    values = [256, 512, 1024, 2048]
    power = fit_power(values, [3.7 * value**exponent for value in values])
    assert power.exponent == pytest.approx(exponent, abs=1e-12)
    assert power.standard_error == pytest.approx(0, abs=1e-9)


def test_the_standard_error_is_that_of_least_squares():
    """Points at x = 0, 1, 2, 3 and y = 0, 1, 1, 3 (powers of e): slope 0.9, residual 0.7, so 0.7 / 2 / 5 squared."""
    power = fit_power([math.exp(x) for x in range(4)], [math.exp(y) for y in (0, 1, 1, 3)])
    assert power.exponent == pytest.approx(0.9)
    assert power.standard_error == pytest.approx(math.sqrt(0.7 / 2 / 5))


def test_the_axes_of_a_published_recipe_double():
    points = axes(read_recipe("dsmoe-s-e48").model, 16, 256)
    values = {axis: [point.value for point in row] for axis, row in points.items()}
    assert values == {
        "tokens": [1024, 2048, 4096, 8192, 16384],
        "experts": [12, 24, 48, 96, 192],
        "width": [96, 192, 384, 768],
        "top_k": [1, 2, 4, 8, 16],
    }
    narrowest = points["width"][0].config
    assert (narrowest.hidden_size, narrowest.expert_dim) == (96, 32)
    assert {p.images for axis in ("experts", "width", "top_k") for p in points[axis]} == {16}


def test_experts_stay_enough_for_their_groups_and_for_a_token():
    points = axes(read_recipe("dsmoe-s-e16").model, 4, 256)  # top_k 2, two groups
    assert [point.value for point in points["experts"]] == [4, 8, 16, 32, 64]
    points = axes(ModelConfig(num_experts=8, top_k=8), 4, 256)
    assert [point.value for point in points["experts"]] == [8, 16, 32, 64, 128]


def test_a_pool_varies_its_capacity():
    points = axes(read_recipe("diffmoe-s-e16").model, 4, 256)
    assert [point.config.capacity for point in points["top_k"]] == [1, 2, 4, 8, 16]


def test_too_few_experts_are_refused():
    with pytest.raises(ValueError, match="a token can reach 4 experts, too few for 4 points"):
        axes(ModelConfig(num_experts=4), 4, 256)


def test_operations_grow_as_the_layer_says():
    """Counted, not timed. A token meets top_k experts and the shared one, of three matrices, and the router."""
    config = ModelConfig(hidden_size=64, num_heads=2, expert_dim=32, num_experts=8, top_k=2)
    records = list(scaling(config, 2, 16, 1e-3, CPU, torch.float32))
    exponents = {record["axis"]: record for record in records if record["mode"] == "exponent"}
    assert list(exponents) == ["tokens", "experts", "width", "top_k"]
    assert all(math.isfinite(record["exponent"]) and record["standard_error"] >= 0 for record in exponents.values())
    for axis, record in exponents.items():
        rows = [other for other in records if other["axis"] == axis and other["mode"] != "exponent"]
        assert [row["value"] for row in rows] == record["values"] and len(rows) >= 4
        assert [row["ms"] for row in rows] == record["ms"]
    for record in records:
        if record["mode"] == "exponent":
            continue
        sizes = {"tokens": 32, "experts": 8, "width": 64, "top_k": 2} | {record["axis"]: record["value"]}
        D, F = sizes["width"], sizes["width"] // 2
        forward = 2 * sizes["tokens"] * (3 * (sizes["top_k"] + 1) * D * F + sizes["experts"] * D)
        assert record["flops"] == 3 * forward
    assert exponents["tokens"]["memory_exponent"] == pytest.approx(1, abs=0.1)
