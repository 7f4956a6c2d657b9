"""Sizes against the published ones."""

import pytest

from diffusion_moe.config import ModelConfig
from diffusion_moe.models.sizes import model_size

DSMOE = {"learn_sigma": True, "mlp_activation": "silu"}
DIFFMOE = {
    "learn_sigma": True,
    "router": "diffmoe",
    "position": "sincos",
    "expert_activation": "gelu",
    "expert_bias": True,
    "shared": "none",
}
E48 = {"num_experts": 48, "expert_dim": 128, "top_k": 5}
PUBLISHED = {
    "DSMoE-S-E16": (DSMOE | {"depth": 10, "num_groups": 2, "top_groups": 2}, 96870560, 34939040),
    "DSMoE-S-E48": (DSMOE | E48, 69238304, 31194656),
    "DiffMoE-S-E16": (DIFFMOE | {"expert_dim": 1536}, 140265344, 33924224),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_the_published_ones(name):
    settings, total, activated = PUBLISHED[name]
    size = model_size(ModelConfig(**settings))
    assert (size.total, size.activated) == (total, activated)


def test_operations_are_those_of_the_matrix_products():
    """A dense block's products written out: embeddings, modulation, attention, feed-forward, output."""
    config = ModelConfig(
        sample_size=8, in_channels=1, hidden_size=32, depth=1, num_heads=2, num_classes=10, router="dense"
    )
    D, N = 32, 16
    condition = 256 * D + D * D + D * 6 * D + D * 2 * D
    tokens = 4 * D + D * 3 * D + 2 * N * D + D * D + 2 * D * 4 * D + D * 4
    assert model_size(config).flops == 2 * (condition + N * tokens)


def test_only_the_chosen_experts_operations_count():
    base = {"sample_size": 8, "hidden_size": 32, "depth": 2, "num_heads": 2, "expert_dim": 24, "num_experts": 8}
    one, three = (model_size(ModelConfig(**base, top_k=k)).flops for k in (1, 3))
    assert three - one == 2 * 2 * 16 * 3 * 32 * 24  # two experts more, 16 tokens, three matrices, two a multiply-add
