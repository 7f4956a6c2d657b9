"""Captions say what is there, in a closed list of words; the data set hands them out."""

import random

import numpy as np
import pytest
import torch
from single_scenes import sample_scenes

from diffusion_moe.config import DataConfig
from diffusion_moe.data import load_dataset
from diffusion_moe.data.order import SampledImage
from diffusion_moe.shapes import captions
from diffusion_moe.shapes.captions import MENTIONS, WORDS, Mention, describe
from diffusion_moe.shapes.rendering import render
from diffusion_moe.shapes.scene import Content, Look, contents


def config(**changes):
    return DataConfig(kind="shapes", **{"image_size": 16, "channels": 3} | changes)


def all_texts(content, mention, count=60):
    return {describe(content, mention, random.Random(seed)) for seed in range(count)}


def test_all_phrasings_of_a_single_object():
    content = Content((Look("cross", "red", "large"),))
    assert all_texts(content, Mention(colour=True)) == {
        f"{frame}{number} red cross" for frame in ("", "a picture of ", "there is ") for number in ("a", "one")
    }
    assert "a large cross" in all_texts(content, Mention(size=True))
    assert "a large red cross" in all_texts(content, Mention(colour=True, size=True))


def test_all_phrasings_of_a_count():
    content = Content((Look("triangle", "green"),) * 3)
    assert all_texts(content, Mention()) == {
        "three triangles",
        "a picture of three triangles",
        "there are three triangles",
    }
    assert "three green triangles" in all_texts(content, Mention(colour=True))


def test_all_phrasings_of_a_pair():
    content = Content((Look("circle", "red"), Look("square", "blue")), "left of")
    assert all_texts(content, Mention(colour=True)) == {
        frame + objects
        for frame in ("", "a picture of ", "there is ")
        for objects in ("a red circle and a blue square", "a blue square and a red circle")
    }
    assert all_texts(content, Mention(relation=True), 200) == {
        frame + objects
        for frame in ("", "a picture of ", "there is ")
        for objects in (
            "a circle left of a square",
            "a circle to the left of a square",
            "a square right of a circle",
            "a square to the right of a circle",
        )
    }
    above = Content((Look("circle", "red"), Look("square", "blue")), "above")
    plain = {
        text for text in all_texts(above, Mention(relation=True)) if text.startswith("a ") and "picture" not in text
    }
    assert plain == {"a circle above a square", "a square below a circle"}


def test_words_are_all_there_are_and_no_more():
    used = {
        word
        for content in contents()
        for mention in MENTIONS[content.kind]
        for text in all_texts(content, mention, 12)
        for word in text.split(" ")
    }
    assert used == set(WORDS)
    assert list(WORDS) == sorted(set(WORDS))


def test_captions_are_a_function_of_split_index_and_number():
    data, again = load_dataset(config(), "train", seed=0), load_dataset(config(image_size=64), "train", seed=7)
    assert [data.captions(i) for i in (5, 900)] == [again.captions(i) for i in (5, 900)]
    other = load_dataset(config(), "test")
    assert sum(data.captions(i) == other.captions(i) for i in range(200)) < 20
    assert captions.caption(data.content(5), 0, "shapes/train", 5, 3) == data.captions(5)[3]


def test_captions_of_a_scene_say_more_and_more():
    """Each way of mentioning has its turn; nothing is said that is not so."""
    data = load_dataset(config(), "train")
    for index in range(60):
        content, texts = data.content(index), data.captions(index)
        assert len(texts) == 4
        for number, text in enumerate(texts):
            mention = MENTIONS[content.kind][number % len(MENTIONS[content.kind])]
            assert text in all_texts(content, mention, 200)


@pytest.mark.parametrize("layout", ["free", "grid"])
def test_images_are_those_of_the_scenes(layout):
    data = load_dataset(config(image_size=32, shapes_layout=layout), "train")
    batch = data.read([11, 3])
    torch.testing.assert_close(batch.images, render(sample_scenes(0, "train", torch.tensor([11, 3]), layout), 32))
    assert batch.labels.tolist() == [0, 0]
    again = data.__getitems__([SampledImage(3, 2, 5), SampledImage(11, 9, 6)])
    torch.testing.assert_close(again.images, batch.images.flip(0))
    assert again.positions.tolist() == [5, 6]


def test_splits_share_the_scenes_out_and_differ():
    train, test = (load_dataset(config(test_fraction=0.1), split) for split in ("train", "test"))
    assert (len(train), len(test)) == (90_000, 10_000)
    assert not np.array_equal(train.contents[:1000], test.contents[:1000])
    images = torch.cat((train.read(range(500)).images, test.read(range(500)).images)).flatten(1)
    assert len(torch.unique(images, dim=0)) == 1000
    assert train.metadata() == {"class_names": []}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"flip": True}, "data.flip is true, but captions of shapes say left and right; set it to false"),
        ({"channels": 1}, "data.channels is 1, but shapes have colours; set it to 3"),
        ({"path": "here"}, "data.path is here, but shapes are rendered, not read; remove it"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        load_dataset(config(**changes), "train")
