"""The demos keep their promises."""

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


@pytest.mark.slow
def test_the_shapes_recipe_draws_what_prompts_ask(tmp_path):
    """Well above chance in every category of what training shows, and on the whole of what it does not."""
    text, run = str(tmp_path / "text"), str(tmp_path / "shapes-t2i")
    assert main(["text-encoder", text]) == 0
    assert main(["train", "shapes-t2i", "--output_dir", run, f"--data.text_encoder={text}"]) == 0
    assert main(["evaluate", run]) == 0
    scores = json.loads((tmp_path / "shapes-t2i" / "evaluation.json").read_text())
    for category, splits in scores["categories"].items():
        assert splits["seen"]["true"] == 1.0
        assert splits["seen"]["score"] > splits["seen"]["chance"] + 0.4, category
    assert scores["seen"]["score"] > scores["seen"]["chance"] + 0.6
    assert scores["held_out"]["score"] > scores["held_out"]["chance"] + 0.03
