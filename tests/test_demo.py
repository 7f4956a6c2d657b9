"""The demo keeps its promise."""

import json

import pytest

from diffusion_moe.cli import main


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
