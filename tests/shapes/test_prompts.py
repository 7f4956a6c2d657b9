"""Prompts: the same for the same seed, held out where it says so, and never shown in training."""

import random

import pytest
import torch
from shapes_scorer import truth
from single_scenes import scene_at

from diffusion_moe.config import DataConfig
from diffusion_moe.data import load_dataset
from diffusion_moe.shapes.captions import MENTIONS, WORDS, describe
from diffusion_moe.shapes.prompts import (
    CATEGORIES,
    SPLITS,
    Prompt,
    RequiredObject,
    Requirement,
    evaluation_prompts,
    questions,
    true_scenes,
)
from diffusion_moe.shapes.sampling import arrange
from diffusion_moe.shapes.scene import contents, held_out, seen_contents
from diffusion_moe.shapes.scorer import find_errors


def test_numbers_of_questions_follow_from_the_held_out_sets():
    """4 + 8 sizes; 6 pairs; 3 x 4 counts; 24 looks; 4 pairs x 4 relations; 4 pairs x 30 colours: seen and held out."""
    numbers = {c: tuple(len(questions(c, split)) for split in SPLITS) for c in CATEGORIES}
    assert numbers == {
        "single_object": (11, 1),
        "two_object": (4, 2),
        "counting": (9, 3),
        "colors": (18, 6),
        "position": (12, 4),
        "color_attr": (69, 51),
    }


def test_no_training_scene_fulfils_a_held_out_question():
    """Every content that training shows, arranged, against everything that is held out."""
    rows = torch.tensor([row for row, content in enumerate(contents()) if not held_out(content)]).repeat(3)
    scenes = arrange(rows, 0, "any", torch.arange(len(rows)))
    asked = [question.requirement for category in CATEGORIES for question in questions(category, "held_out")]
    for s in range(len(rows)):
        found = truth(scene_at(scenes, s))
        assert all(find_errors(requirement, found) for requirement in asked)


def test_every_seen_question_is_fulfilled_by_training_scenes():
    for category in CATEGORIES:
        for question in questions(category, "seen"):
            rows = torch.tensor(question.rows)
            assert all(contents()[row] in seen_contents() for row in question.rows)
            scenes = arrange(rows, 0, "any", rows)
            assert not any(find_errors(question.requirement, truth(scene_at(scenes, s))) for s in range(len(rows)))


def test_no_training_caption_is_a_held_out_prompt():
    """All phrasings of all that training shows, against many prompts; and the data set's own captions."""
    rng = random.Random(0)
    captions = {
        describe(content, mention, rng)
        for content in seen_contents()
        for mention in MENTIONS[content.kind]
        for _ in range(30)
    }
    data = load_dataset(DataConfig(kind="shapes", image_size=8, channels=3), "train")
    captions |= {text for index in range(0, len(data), 20) for text in data.captions(index)}
    prompts = {split: {p.text for p in evaluation_prompts(0, 300, split)} for split in SPLITS}
    assert prompts["held_out"].isdisjoint(captions | prompts["seen"])
    assert len(prompts["seen"] - captions) < 0.02 * len(prompts["seen"])


def test_prompts_are_a_function_of_the_seed_and_use_the_closed_words():
    for split in SPLITS:
        prompts = evaluation_prompts(5, 40, split)
        assert prompts == evaluation_prompts(5, 40, split)
        assert prompts != evaluation_prompts(6, 40, split)
        assert [p.category for p in prompts] == [c for c in CATEGORIES for _ in range(40)]
        assert {p.split for p in prompts} == {split}
        assert {word for p in prompts for word in p.text.split(" ")} <= set(WORDS)
        # The first prompts of more are the same ones.
        assert [p for p in evaluation_prompts(5, 60, split) if p.category == "colors"][:40] == prompts[120:160]


def test_questions_are_asked_evenly():
    prompts = [p for p in evaluation_prompts(0, 45, "seen") if p.category == "colors"]
    asked = [p.requirement for p in prompts]
    assert {asked.count(requirement) for requirement in set(asked)} == {2, 3}
    assert len(set(asked)) == 18


def test_texts_say_what_is_required():
    for prompt in evaluation_prompts(1, 80, "seen") + evaluation_prompts(1, 80, "held_out"):
        words = prompt.text.split(" ")
        for want in prompt.requirement.wanted:
            said = want.shape if want.count == 1 else {"cross": "crosses"}.get(want.shape, f"{want.shape}s")
            assert said in words
            assert want.colour is None or words[words.index(said) - 1] == want.colour
            assert want.size is None or want.size in words
            assert want.count == 1 or {2: "two", 3: "three", 4: "four"}[want.count] in words
        if prompt.requirement.relation:
            first, second = (want.shape for want in prompt.requirement.wanted)
            relation = prompt.requirement.relation
            if words.index(first) > words.index(second):
                relation = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}[relation]
            assert relation.split(" ")[0] in words
        assert prompt.as_dict()["requirement"]["wanted"][0]["shape"] == prompt.requirement.wanted[0].shape


def test_true_scenes_fulfil_their_prompts():
    for split in SPLITS:
        prompts = evaluation_prompts(2, 60, split)
        scenes = true_scenes(prompts, seed=3)
        for s, prompt in enumerate(prompts):
            assert find_errors(prompt.requirement, truth(scene_at(scenes, s))) == []


def test_what_cannot_be_asked_is_refused():
    with pytest.raises(ValueError, match="per_category is 0; it must be positive"):
        evaluation_prompts(0, 0, "seen")
    with pytest.raises(ValueError, match="the prompt 'five circles' asks for nothing of the category counting"):
        true_scenes([Prompt("five circles", "counting", "seen", Requirement((RequiredObject("circle", 5),)))], 0)
