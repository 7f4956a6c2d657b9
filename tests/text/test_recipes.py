"""The shipped text-to-image recipes, and what the page says of them."""

import dataclasses
import random
import re
from pathlib import Path

import pytest

from diffusion_moe.config import read_recipe, recipe_names
from diffusion_moe.counts import PAPER_MILLION, model_size
from diffusion_moe.shapes.captions import MENTIONS, WORDS, describe
from diffusion_moe.shapes.scene import contents
from diffusion_moe.shapes.text_encoder.options import TextEncoderOptions
from diffusion_moe.shapes.text_encoder.train import make_tokenizer

NAMES = ["t2i-diffmoe-l-e16", "t2i-dit-l", "t2i-dsmoe-l-e48", "t2i-dsmoe-s-e16"]
PAGE = Path(__file__).parents[2] / "docs" / "text-to-image.md"


@pytest.mark.parametrize("name", NAMES)
def test_the_backbone_is_that_of_the_class_conditional_recipe(name):
    ours, theirs = read_recipe(name).model, read_recipe(name.removeprefix("t2i-")).model
    text = {"num_classes": 0, "qk_norm": True, "text_dim": ours.text_dim, "text_length": 120}
    assert dataclasses.replace(theirs, **text) == ours


def test_the_large_ones_activate_nearly_as_much():
    activated = [model_size(read_recipe(name).model).activated for name in NAMES[:3]]
    assert max(activated) / min(activated) < 1.03


def test_the_documented_sizes_are_those_of_the_models():
    rows = re.findall(r"^\| `(t2i-[\w-]+)` \| .*\| ([\d.]+) \| ([\d.]+) \|$", PAGE.read_text(), re.MULTILINE)
    assert {name for name, *_ in rows} == set(NAMES) <= set(recipe_names())
    for name, *documented in rows:
        size = model_size(read_recipe(name).model)
        assert documented == [f"{count / PAPER_MILLION:.1f}" for count in (size.total, size.activated)], name


def test_the_shapes_recipe_takes_the_encoder_s_features_and_every_caption():
    recipe = read_recipe("shapes-t2i")
    assert recipe.model.text_dim == TextEncoderOptions().width
    draw, tokenizer = random.Random(0), make_tokenizer(WORDS)
    said = [describe(content, m, draw) for content in contents() for m in MENTIONS[content.kind] for _ in range(4)]
    longest = max(len(ids) for ids in tokenizer(said)["input_ids"])
    assert longest == 14 <= recipe.data.text_length == recipe.model.text_length
