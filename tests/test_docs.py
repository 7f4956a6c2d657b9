"""The code in the documentation runs."""

import re
from pathlib import Path

import torch

from diffusion_moe.moe import ROUTERS
from diffusion_moe.routing_rules import RULES

DOCS = Path(__file__).parents[1] / "docs"


def blocks(page: str) -> list[str]:
    """The Python blocks of a page."""
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)


def test_the_layer_and_a_rule_of_your_own():
    use, own = blocks("moe-layer.md")
    names = {"torch": torch, "x": torch.randn(2, 5, 384), "task_loss": 0.0}
    exec(use.split("...")[0], names)
    assert names["y"].shape == (2, 5, 384)
    try:
        exec(own, names)
        out = names["layer"](names["x"])
        assert out.report.counts_E.sum() == 2 * 5 * 2
    finally:
        for table in (ROUTERS, RULES):
            table.pop("noisy", None)


def test_the_models_page(monkeypatch):
    (block,) = blocks("models.md")
    names: dict = {}
    with torch.device("meta"):
        exec(block, names)
    assert names["small"].settings.depth == 4 and names["small"].settings.num_experts == 16
    assert sum(p.numel() for p in names["model"].parameters()) == 96_870_560


def test_the_diffusers_page(tmp_path, monkeypatch):
    """On a small model under the name that the page uses."""
    from diffusion_moe import ClassToImagePipeline, DiT, default_scheduler

    model = DiT(sample_size=8, in_channels=3, hidden_size=32, depth=2, num_heads=2, num_classes=100, expert_dim=8)
    names = {i: f"class {i}" for i in range(100)} | {7: "golden retriever"}
    ClassToImagePipeline(model, default_scheduler(model.settings), id2label=names).save_pretrained(
        tmp_path / "dsmoe-s-e16"
    )
    monkeypatch.chdir(tmp_path)
    use, lora = blocks("diffusers.md")
    names = {}
    exec(use, names)
    assert [image.size for image in names["images"]] == [(8, 8)] * 2
    exec(lora, names)
    adapted = {name for name, p in names["pipe"].transformer.named_parameters() if p.requires_grad}
    assert any("experts" in name for name in adapted) and any("attn.qkv" in name for name in adapted)
