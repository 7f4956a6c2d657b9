"""The code in the documentation runs, and what it says of the tree is so."""

import re
from pathlib import Path

import pytest
import torch

import diffusion_moe
from diffusion_moe.moe import ROUTERS
from diffusion_moe.routing_rules import RULES

ROOT = Path(__file__).parents[1]


def blocks(page: str) -> list[str]:
    """The Python blocks of a page."""
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


@pytest.fixture
def small_pipeline(tmp_path, monkeypatch):
    """The working directory holds a small model under the name that the pages use."""
    from diffusion_moe import ClassToImagePipeline, DiT, default_scheduler

    model = DiT(sample_size=8, in_channels=3, hidden_size=32, depth=2, num_heads=2, num_classes=100, expert_dim=8)
    names = {i: f"class {i}" for i in range(100)} | {7: "golden retriever"}
    ClassToImagePipeline(model, default_scheduler(model.settings), id2label=names).save_pretrained(
        tmp_path / "dsmoe-s-e16"
    )
    monkeypatch.chdir(tmp_path)


def test_the_readme(small_pipeline):
    pipeline, layer = blocks("README.md")
    names = {}
    exec(pipeline, names)
    assert names["image"].size == (8, 8)
    names = {"tokens": torch.randn(2, 5, 384)}
    exec(layer, names)
    assert names["out"].hidden_states.shape == (2, 5, 384)
    assert names["out"].report.counts_E.sum() == 2 * 5 * 2


def test_the_changelog_begins_with_this_version():
    versions = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == diffusion_moe.__version__


def test_contributing_lists_every_room():
    table = (ROOT / "CONTRIBUTING.md").read_text().partition("## Rooms")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    listed = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    package = ROOT / "src" / "diffusion_moe"
    folders = {path.parent.name for path in package.glob("*/__init__.py")}
    modules = {path.stem for path in package.glob("[!_]*.py")}
    assert sorted(listed) == sorted(folders | modules)


def test_the_layer_and_a_rule_of_your_own():
    use, own = blocks("docs/moe-layer.md")
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
    (block,) = blocks("docs/models.md")
    names: dict = {}
    with torch.device("meta"):
        exec(block, names)
    assert names["small"].settings.depth == 4 and names["small"].settings.num_experts == 16
    assert sum(p.numel() for p in names["model"].parameters()) == 96_870_560


def test_the_diffusers_page(small_pipeline):
    use, lora = blocks("docs/diffusers.md")
    names = {}
    exec(use, names)
    assert [image.size for image in names["images"]] == [(8, 8)] * 2
    exec(lora, names)
    adapted = {name for name, p in names["pipe"].transformer.named_parameters() if p.requires_grad}
    assert any("experts" in name for name in adapted) and any("attn.qkv" in name for name in adapted)
