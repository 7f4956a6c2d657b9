"""Right pictures are right; pictures made to deceive are wrong, and the reason says why."""

import pytest
import torch
from shape_scenes import scenes_of
from shapes_scorer import spoiled
from single_scenes import Item, Scene

from diffusion_moe.shapes.prompts import Prompt, RequiredObject, Requirement, evaluation_prompts, true_scenes
from diffusion_moe.shapes.rendering import palette, render
from diffusion_moe.shapes.scorer import score_images

SIZES = pytest.mark.parametrize("size", [32, 64])
BINDING = Prompt(
    "a red circle and a blue square",
    "color_attr",
    "seen",
    Requirement((RequiredObject("circle", colour="red"), RequiredObject("square", colour="blue"))),
)
LEFT = Prompt("", "position", "seen", Requirement((RequiredObject("circle"), RequiredObject("square")), "left of"))
THREE = Prompt("three triangles", "counting", "seen", Requirement((RequiredObject("triangle", 3),)))
LARGE = Prompt("a large circle", "single_object", "seen", Requirement((RequiredObject("circle", size="large"),)))
YELLOW = Prompt("a yellow cross", "colors", "seen", Requirement((RequiredObject("cross", colour="yellow"),)))


def image_of(*items, size=32):
    return render(scenes_of(Scene(items)), size)[0]


def score_of(prompt, image):
    (score,) = score_images([prompt], image[None])
    return score


def item(shape, colour, x, y, radius=0.15):
    return Item(shape, colour, x, y, radius)


@SIZES
@pytest.mark.parametrize(
    ("prompt", "items"),
    [
        (BINDING, [item("circle", "red", 0.3, 0.3), item("square", "blue", 0.7, 0.6)]),
        (BINDING, [item("square", "blue", 0.3, 0.3), item("circle", "red", 0.7, 0.6)]),
        (LEFT, [item("circle", "green", 0.25, 0.5), item("square", "white", 0.75, 0.4)]),
        (LEFT, [item("circle", "green", 0.25, 0.3), item("square", "white", 0.7, 0.75)]),
        (THREE, [item("triangle", "red", x, y) for x, y in ((0.25, 0.3), (0.75, 0.3), (0.5, 0.75))]),
        (LARGE, [item("circle", "blue", 0.5, 0.5, 0.24)]),
        (YELLOW, [item("cross", "yellow", 0.5, 0.5)]),
        (YELLOW, [item("cross", "yellow", 0.5, 0.5, 0.25)]),
    ],
)
def test_right_pictures(prompt, items, size):
    assert score_of(prompt, image_of(*items, size=size)).errors == ()


@SIZES
@pytest.mark.parametrize(
    ("prompt", "items", "reason"),
    [
        (
            BINDING,
            [item("circle", "blue", 0.3, 0.3), item("square", "red", 0.7, 0.6)],
            "circle is blue instead of red; square is red instead of blue",
        ),
        (BINDING, [item("circle", "red", 0.3, 0.3)], "no squares instead of one"),
        (
            BINDING,
            [item("circle", "red", 0.3, 0.3), item("circle", "blue", 0.7, 0.6)],
            "two circles instead of one; no squares instead of one",
        ),
        (
            BINDING,
            [item("circle", "red", 0.3, 0.3), item("square", "blue", 0.7, 0.6), item("cross", "white", 0.25, 0.75)],
            "one cross not asked for",
        ),
        (LEFT, [item("circle", "red", 0.75, 0.5), item("square", "red", 0.25, 0.5)], "circle is not left of square"),
        (LEFT, [item("circle", "red", 0.5, 0.25), item("square", "red", 0.5, 0.75)], "circle is not left of square"),
        (LEFT, [item("circle", "red", 0.42, 0.25), item("square", "red", 0.58, 0.75)], "circle is not left of square"),
        (THREE, [item("triangle", "red", x, 0.5) for x in (0.25, 0.75)], "two triangles instead of three"),
        (
            THREE,
            [item("triangle", "red", x, y, 0.14) for x in (0.25, 0.75) for y in (0.25, 0.75)],
            "four triangles instead of three",
        ),
        (LARGE, [item("circle", "blue", 0.5, 0.5, 0.15)], "circle is small instead of large"),
        (YELLOW, [item("cross", "white", 0.5, 0.5)], "cross is white instead of yellow"),
        (YELLOW, [item("square", "yellow", 0.5, 0.5)], "one square not asked for; no crosses instead of one"),
        (YELLOW, [], "no crosses instead of one"),
    ],
)
def test_wrong_pictures_and_why(prompt, items, reason, size):
    score = score_of(prompt, image_of(*items, size=size))
    assert not score.correct
    assert score.reason == reason


@SIZES
def test_objects_that_run_into_each_other_are_wrong(size):
    """Three triangles of which two touch; a square that hides a part of the circle."""
    touching = [item("triangle", "red", x, y) for x, y in ((0.25, 0.7), (0.5, 0.7), (0.5, 0.25))]
    assert score_of(THREE, image_of(*touching, size=size)).errors[0] == "1 patch is no shape"
    covered = image_of(item("circle", "red", 0.4, 0.5), size=size)
    start = round(0.42 * size)
    square = slice(start, start + round(0.28 * size))
    covered[:, square, square] = palette()[1][3][:, None, None]
    score = score_of(BINDING, covered)
    assert score.errors[0] == "1 patch is no shape"
    assert "no circles instead of one" in score.errors


@SIZES
def test_a_patch_that_is_no_shape_makes_a_right_picture_wrong(size):
    image = image_of(item("circle", "red", 0.3, 0.3), item("square", "blue", 0.75, 0.3), size=size)
    assert score_of(BINDING, image).correct
    image[:, round(0.7 * size) : round(0.76 * size), size // 8 : -size // 8] = 1
    assert score_of(BINDING, image).reason == "1 patch is no shape"


def test_noise_and_plain_images_are_wrong_for_every_prompt():
    prompts = evaluation_prompts(0, 6, "seen") + evaluation_prompts(0, 6, "held_out")
    noise = torch.randn(len(prompts), 3, 32, 32, generator=torch.Generator().manual_seed(0))
    background, colours = palette()
    plain = [colour[:, None, None].expand_as(noise) for colour in (background, *colours)]
    for images in (noise, 0.3 * noise + 0.5, *plain):
        assert not any(score.correct for score in score_images(prompts, images))


@SIZES
@pytest.mark.parametrize(("blur", "noise"), [(0, 0), (0.025, 0.1)])
def test_true_images_are_right(size, blur, noise):
    prompts = evaluation_prompts(3, 30, "seen") + evaluation_prompts(3, 30, "held_out")
    images = spoiled(render(true_scenes(prompts, 4), size), blur, noise, seed=0)
    assert sum(score.correct for score in score_images(prompts, images)) >= 0.99 * len(prompts)


def test_a_score_has_the_detections():
    score = score_of(YELLOW, image_of(item("cross", "white", 0.4, 0.6)))
    assert [(thing.shape, thing.colour) for thing in score.found] == [("cross", "white")]
    assert (score.found[0].x, score.found[0].y) == pytest.approx((0.4, 0.6), abs=0.01)


def test_as_many_images_as_prompts():
    with pytest.raises(ValueError, match="there are 2 images for 1 prompts; give one for each"):
        score_images([YELLOW], torch.zeros(2, 3, 32, 32))
