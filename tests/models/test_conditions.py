"""Images without class and prompt, and where a model's router sends them."""

import dataclasses

import pytest
import torch

from diffusion_moe import DiT
from diffusion_moe.config import ModelConfig
from diffusion_moe.models.conditions import routing_context, unconditional_images

TEXT = {"text_dim": 6, "text_length": 3}
SMALL = {
    "sample_size": 8, "in_channels": 3, "num_classes": 5, "hidden_size": 32, "depth": 2, "num_heads": 4,
    "router": "promoe", "num_experts": 4, "expert_dim": 16, "moe_layer_freq": 1,
}  # fmt: skip
LABELS = torch.tensor([0, 5, 5])
MASK = torch.tensor([[True, False, False], [True, True, False], [False, False, False]])


@pytest.mark.parametrize(
    ("settings", "labels", "text", "mask", "expected"),
    [
        ({}, LABELS, None, None, [False, True, True]),
        ({"num_classes": 0, **TEXT}, None, torch.zeros(3, 3, 6), MASK, [False, False, True]),
        ({"num_classes": 0, **TEXT}, None, torch.zeros(3, 3, 6), None, [False, False, False]),
        (TEXT, LABELS, torch.zeros(3, 3, 6), MASK, [False, False, True]),
    ],
    ids=["classes", "text", "no mask", "classes and text"],
)
def test_an_image_has_neither_class_nor_prompt(settings, labels, text, mask, expected):
    config, times = ModelConfig(**{**SMALL, **settings}), torch.rand(3)
    assert unconditional_images(config, labels, text, mask).tolist() == expected
    context = routing_context(config, times, torch.randn(3, 32), labels, text, mask)
    assert context.unconditional_B.tolist() == expected and context[:2] == (None, None)
    config = dataclasses.replace(config, router="dsmoe")
    assert routing_context(config, times, torch.randn(3, 32), labels, text, mask) is None


@pytest.mark.parametrize("text", [{}, TEXT, TEXT | {"text_conditioning": "joint"}], ids=["", "cross", "joint"])
def test_their_tokens_go_to_the_last_expert(text):
    """As the unconditional half of guidance does."""
    model = DiT(**SMALL, **text).eval()
    given = {"encoder_hidden_states": torch.randn(3, 3, 6), "encoder_attention_mask": MASK} if text else {}
    tokens = 19 if text.get("text_conditioning") else 16
    for report in model(torch.randn(3, 3, 8, 8), torch.rand(3), LABELS, **given).routing:
        assert report.counts_E[-1] == tokens * (1 if text else 2)
        assert report.counts_E.sum() == tokens * (4 + 1 if text else 2 + 2)  # top_k is 2


def test_a_rule_that_needs_them_refuses_a_model_without():
    for settings in ({"num_classes": 0}, {"null_class": False}):
        with pytest.raises(ValueError, match="promoe needs images without class or prompt; set model"):
            ModelConfig(**{**SMALL, **settings})
