"""The demo keeps its promise."""

import json

import pytest

from diffusion_moe.cli import main

MARGIN = {"seen": 0.3, "held_out": 0.15}
"""Points above chance in every category, at least."""


@pytest.mark.slow
def test_the_digits_recipe_draws_recognisable_digits_that_are_not_copies(tmp_path):
    folder = str(tmp_path / "digits")
    assert main(["train", "digits", "--output_dir", folder]) == 0
    assert main(["evaluate", folder]) == 0
    scores = json.loads((tmp_path / "digits" / "evaluation.json").read_text())
    assert scores["guidance_scale"] <= 1.5
    assert scores["recognised"] >= 0.97
    assert scores["recognised_real"] >= 0.98
    assert scores["nearest_neighbour"] > 0.8 * scores["nearest_neighbour_real"]


@pytest.mark.slow
def test_the_shapes_recipe_draws_what_prompts_ask_for(tmp_path):
    """From nothing: well above chance in every category, also where the combination was never seen."""
    encoder, folder = str(tmp_path / "text"), tmp_path / "shapes-t2i"
    assert main(["text-encoder", encoder]) == 0
    assert json.loads((tmp_path / "text" / "training.json").read_text())["read_right"]["held_out"] >= 0.9
    assert main(["train", "shapes-t2i", "--output_dir", str(folder), f"--data.text_encoder={encoder}"]) == 0
    assert main(["evaluate", str(folder)]) == 0
    scores = json.loads((folder / "evaluation.json").read_text())
    for name, splits in scores["categories"].items():
        for split in ("seen", "held_out"):
            assert splits[split]["score"] >= splits[split]["chance"] + MARGIN[split], (name, split, splits[split])
            assert splits[split]["true"] >= 0.98
