"""Sizes against the published ones."""

import dataclasses
import json
import re
from functools import cache
from pathlib import Path

import pytest

from diffusion_moe.config import ModelConfig, read_recipe, recipe_names
from diffusion_moe.counts import PAPER_MILLION, Size, model_flops, model_size

# What the published configurations say of each model, and what its published (or freshly built) state dict counts.
PUBLISHED = json.loads((Path(__file__).parent / "published_sizes.json").read_text())
COUNTED = [name for name, published in PUBLISHED.items() if "total" in published]
NOT_COUNTED = [*(name for name in PUBLISHED if name not in COUNTED), "diffmoe-l-e8-ddpm", "dit-xl-ddpm"]
DOCS = Path(__file__).parents[2] / "docs" / "models.md"


@cache
def config_of(name: str) -> ModelConfig:
    return read_recipe(name).model


@cache
def size_of(name: str) -> Size:
    return model_size(config_of(name))


@pytest.mark.parametrize("name", COUNTED)
def test_parameters_are_the_published_ones(name):
    size = size_of(name)
    assert size.total == PUBLISHED[name]["total"]
    assert size.activated == pytest.approx(PUBLISHED[name]["activated"], rel=1e-12)


@pytest.mark.parametrize("name", NOT_COUNTED)
def test_other_parameters_are_those_of_the_formula(name):
    """A latent model with tanh-GELU layers of width 4D written out, with the fixed table of positions."""
    config = config_of(name)
    D, E, depth = config.hidden_size, config.num_experts, config.depth
    embeddings = (16 * D + D) + (256 * D + D + D * D + D) + 1001 * D + 256 * D
    block = (3 * D * D + 3 * D) + (D * D + D) + (6 * D * D + 6 * D)  # attention and modulation
    output = (2 * D * D + 2 * D) + (32 * D + 32)
    mlp = (4 * D * D + 4 * D) + (4 * D * D + D)
    gate = E * D + ((D * D + D) + (D * E + E) if config.router == "diffmoe" else 0)
    mixtures = 0 if config.router == "dense" else depth // 2
    dense = embeddings + depth * block + output + (depth - mixtures) * mlp
    size = size_of(name)
    assert size.total == dense + mixtures * (gate + E * mlp)
    assert size.activated == dense + mixtures * (gate + mlp)


@pytest.mark.parametrize(("name", "million"), [("dit-s", 33), ("dit-b", 130), ("dit-l", 458), ("dit-xl", 675)])
def test_dense_models_are_as_large_as_the_dit_paper_says(name, million):
    """DiT, arXiv 2212.09748; its "M" is 10^6."""
    assert size_of(name).total == pytest.approx(million * 1e6, abs=0.7e6)


@pytest.mark.parametrize(
    ("like", "total", "activated"), [("s", 75, 33), ("b", 300, 130), ("l", 1063, 458), ("xl", 1568, 675)]
)
def test_promoe_models_are_as_large_as_the_paper_says(like, total, activated):
    """ProMoE, arXiv 2510.24711, table 2; its "M" is 10^6."""
    dense = config_of(f"dit-{like}")
    width = {"hidden_size": dense.hidden_size, "depth": dense.depth, "num_heads": dense.num_heads}
    config = dataclasses.replace(config_of("promoe-s-e14"), **width, expert_dim=2 * dense.hidden_size)
    size = model_size(config)
    assert size.total == pytest.approx(total * 1e6, abs=0.7e6)
    assert size.activated == pytest.approx(activated * 1e6, abs=0.7e6)


def test_the_documented_sizes_are_those_of_the_models():
    section = DOCS.read_text().split("\n## Sizes\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `([\w-]+)` \| .*\| ([\d.]+) \| ([\d.]+) \|$", section, re.MULTILINE)
    papers = {name for name in recipe_names() if not name.startswith("t2i-")}
    assert sorted(name for name, *_ in rows) == sorted(papers - {"digits", "image-folder", "pictures", "shapes-t2i"})
    for name, *documented in rows:
        counts = size_of(name).total, size_of(name).activated
        assert documented == [f"{count / PAPER_MILLION:.1f}" for count in counts], name


def test_operations_are_those_of_the_matrix_products():
    """A dense block's products written out: embeddings, modulation, attention, feed-forward, output."""
    config = ModelConfig(
        sample_size=8, in_channels=1, hidden_size=32, depth=1, num_heads=2, num_classes=10, router="dense"
    )
    D, N = 32, 16
    condition = 256 * D + D * D + D * 6 * D + D * 2 * D
    tokens = 4 * D + D * 3 * D + 2 * N * D + D * D + 2 * D * 4 * D + D * 4
    assert model_flops(config).total == 2 * (condition + N * tokens)


def test_only_the_chosen_experts_operations_count():
    base = {"sample_size": 8, "hidden_size": 32, "depth": 2, "num_heads": 2, "expert_dim": 24, "num_experts": 8}
    one, three = (model_flops(ModelConfig(**base, top_k=k)).total for k in (1, 3))
    assert three - one == 2 * 2 * 16 * 3 * 32 * 24  # two experts more, 16 tokens, three matrices, two a multiply-add
