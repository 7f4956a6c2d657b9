"""The code in the documentation runs."""

import re
from pathlib import Path

import torch

from diffusion_moe.moe import ROUTERS

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
        ROUTERS.pop("noisy", None)
