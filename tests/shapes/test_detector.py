"""Scene to image and back, and what is no shape at all."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from shape_scenes import scenes_of
from shapes_scorer import read_back, spoiled
from single_scenes import Item, Scene, sample_scenes, scene_at

from diffusion_moe.shapes.detector import detect, segment
from diffusion_moe.shapes.rendering import palette, render
from diffusion_moe.shapes.sampling import Scenes, arrange
from diffusion_moe.shapes.scene import COLOURS, SHAPES, SIZES, contents


def image_of(*items, size=32):
    return render(scenes_of(Scene(items)), size)


def rendered(inside, size=64, colour="blue", fine=8):
    """An image of the points (x, y) in [0, 1] that are inside."""
    points = (np.arange(size * fine) + 0.5) / (size * fine)
    x, y = np.meshgrid(points, points)
    alpha = torch.from_numpy(inside(x, y).reshape(size, fine, size, fine).mean((1, 3))).float()
    background, colours = palette()
    ray = (colours[list(COLOURS).index(colour)] - background)[:, None, None]
    return (background[:, None, None] + alpha * ray)[None]


def shapes_found(images):
    return [[(thing.shape, thing.colour) for thing in found] for found in detect(images)]


@st.composite
def scenes(draw):
    """One to four different small objects in the quarters of the image, or a large one."""
    look = st.tuples(st.sampled_from(SHAPES), st.sampled_from(list(COLOURS)))
    if draw(st.booleans()):
        x, y = draw(st.floats(0.36, 0.64)), draw(st.floats(0.36, 0.64))
        return Scene((Item(*draw(look), x, y, draw(st.floats(*SIZES["large"]))),))
    quarters = draw(st.lists(st.sampled_from([(x, y) for x in (0, 1) for y in (0, 1)]), min_size=1, unique=True))
    items = []
    for column, row in quarters:
        x, y = (0.26 + 0.48 * k + draw(st.floats(-0.02, 0.02)) for k in (column, row))
        items.append(Item(*draw(look), x, y, draw(st.floats(*SIZES["small"]))))
    return Scene(tuple(items))


@given(scenes(), st.sampled_from([32, 64]))
@settings(max_examples=60, deadline=None)
def test_rendered_objects_are_found(scene, size):
    found = detect(image_of(*scene.items, size=size))[0]
    assert len(found) == len(scene.items)
    for item in scene.items:
        thing = min(found, key=lambda thing: math.hypot(thing.x - item.x, thing.y - item.y))
        assert (thing.shape, thing.colour, thing.size) == (item.shape, item.colour, item.size)
        assert math.hypot(thing.x - item.x, thing.y - item.y) * size < 0.5  # pixels
        assert thing.radius == pytest.approx(item.radius, rel=0.03)
        assert thing.fit > 0.94


@pytest.mark.parametrize(
    ("blur", "noise", "size"),
    [
        (0, 0, 32),
        pytest.param(0, 0, 64, marks=pytest.mark.slow),
        *((*spoiling, size) for spoiling in ((0.025, 0.1), (0, 0.2), (0.03, 0)) for size in (32, 64)),
    ],
)
def test_every_content_is_read_back(blur, noise, size):
    """Each of the 840, held out or not: clean, blurred by 0.8 and 1 of 32 pixels, and with noise."""
    rows = torch.arange(0, len(contents()), 1 if blur == noise == 0 else 7)
    scenes = arrange(rows, 1, "back", rows)
    assert read_back(scenes, spoiled(render(scenes, size), blur, noise, seed=0)).float().mean() >= 0.99


def test_read_back_separates_wrong_pictures_from_right_ones():
    right = sample_scenes(0, "train", torch.arange(12))
    assert read_back(right, render(right, 32)).all()
    moved = Scenes(right.shape, right.colour, right.x.roll(1, 0), right.y, right.radius)
    rolled = scenes_of(*(scene_at(right, s) for s in [*range(1, 12), 0]))
    for changed in (rolled, moved):
        assert read_back(right, render(changed, 32)).float().mean() < 0.2


def test_spoiling_blurs_and_adds_noise_of_the_strength_asked_for():
    images = torch.zeros(4, 3, 32, 32)
    assert spoiled(images, 0, 0.2, seed=0).std().item() == pytest.approx(0.2, rel=0.05)
    spot = images.clone()
    spot[..., 16, 16] = 1
    blurred = spoiled(spot, 1 / 32, 0, seed=0)
    assert blurred[0, 0].sum().item() == pytest.approx(1, abs=1e-3)
    assert blurred[0, 0, 16, 16].item() == pytest.approx(1 / (2 * math.pi), rel=0.1)
    torch.testing.assert_close(spoiled(images, 0, 0.2, seed=0), spoiled(images, 0, 0.2, seed=0))


def test_pixels_are_unmixed():
    """Three quarters of a colour is that colour at 0.75; a quarter is background; orange is none of them."""
    background, colours = palette()
    orange = torch.tensor([245.0, 140, 40]) / 127.5 - 1
    pixels = torch.stack(
        (*(background + 0.75 * (colours - background)), background + 0.25 * (colours[0] - background), orange)
    )
    labels, alphas = segment(pixels.T[None, :, None])
    assert labels[0, 0].tolist() == [0, 1, 2, 3, 4, 5, -1, 6]
    torch.testing.assert_close(alphas[0, 0, :7], torch.tensor([0.75] * 6 + [0.25]))


def test_an_empty_image_holds_nothing():
    background, _ = palette()
    assert detect(background[None, :, None, None].expand(2, 3, 32, 32)) == [[], []]


R = 0.16
STRANGE = {
    "ellipse": lambda x, y: ((x - 0.5) / 1.2) ** 2 + ((y - 0.5) * 1.2) ** 2 < R**2,
    "rectangle": lambda x, y: (abs(x - 0.5) < 1.25 * R) & (abs(y - 0.5) < R / 1.25),
    "half disc": lambda x, y: ((x - 0.5) ** 2 + (y - 0.5) ** 2 < R**2) & (y < 0.5),
    "three quarters": lambda x, y: ((x - 0.5) ** 2 + (y - 0.5) ** 2 < R**2) & ((y < 0.5) | (x < 0.5)),
    "ring": lambda x, y: abs(np.hypot(x - 0.5, y - 0.5) - 0.75 * R) < R / 4,
    "triangle upside down": lambda x, y: (y > 0.4) & (abs(x - 0.5) < 0.75 * (0.65 - y)),
    "L": lambda x, y: (abs(x - 0.5) < R) & (abs(y - 0.5) < R) & ((x < 0.5) | (y > 0.5)),
    "T": lambda x, y: (abs(x - 0.5) < R) & (abs(y - 0.4) < 0.06) | (abs(x - 0.5) < 0.06) & (abs(y - 0.5) < R),
    "cross without an arm": lambda x, y: (
        (np.minimum(abs(x - 0.5), abs(y - 0.5)) < 0.06) & (np.maximum(abs(x - 0.5), abs(y - 0.5)) < 0.17) & (x < 0.56)
    ),
    "bar": lambda x, y: (abs(x - 0.5) < 0.3) & (abs(y - 0.5) < 0.05),
    "two discs that touch": lambda x, y: (np.hypot(x - 0.36, y - 0.5) < 0.14) | (np.hypot(x - 0.62, y - 0.5) < 0.14),
}


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("name", STRANGE)
def test_what_is_no_shape_is_one_unknown_patch(name, size):
    assert shapes_found(rendered(STRANGE[name], size)) == [[(None, "blue")]]


def test_random_blobs_are_seldom_taken_for_shapes():
    """Smooth noise cut at a level: under one patch in five passes, all of them roundish."""
    generator, patches = np.random.default_rng(0), []
    for _ in range(60):
        field = ndimage.gaussian_filter(generator.normal(size=(32, 32)), generator.uniform(2, 5))
        blob = field > np.quantile(field, generator.uniform(0.7, 0.97))
        background, colours = palette()
        image = background[:, None, None] + torch.from_numpy(blob) * (colours[2] - background)[:, None, None]
        patches += detect(image[None])[0]
    assert len(patches) > 100
    assert np.mean([thing.shape is not None for thing in patches]) < 0.2


def test_noise_alone_holds_no_shapes():
    generator = torch.Generator().manual_seed(0)
    for strength in (0.5, 1.0, 3.0):
        images = strength * torch.randn(8, 3, 32, 32, generator=generator)
        assert [thing.shape for found in detect(images) for thing in found if thing.shape] == []


def test_colours_off_the_palette_are_unknown():
    """An orange, a cyan and a pink disc; a faint red one is no disc either."""
    red = image_of(Item("circle", "red", 0.5, 0.5, 0.15))
    background, colours = palette()
    alpha = ((red - background[:, None, None]) / (colours[0] - background)[:, None, None]).clamp(0, 1)
    for colour in ((245, 140, 40), (40, 210, 230), (250, 150, 190)):
        ray = torch.tensor(colour) / 127.5 - 1 - background
        assert shapes_found(background[:, None, None] + alpha * ray[:, None, None]) == [[(None, None)]]
    faint = background[:, None, None] + 0.6 * alpha * (colours[0] - background)[:, None, None]
    assert shapes_found(faint) == [[(None, "red")]]


def test_shapes_too_small_or_too_large_are_none():
    """Rendered as whole squares, of radius 0.07 and 0.4."""
    for radius in (0.07, 0.4):
        found = detect(image_of(Item("square", "red", 0.5, 0.5, radius), size=64))[0]
        assert [(thing.shape, thing.colour) for thing in found] == [(None, "red")]
        assert found[0].fit > 0.9


def test_a_disc_of_two_colours_is_two_unknown_patches():
    both = image_of(Item("circle", "red", 0.5, 0.5, 0.25))
    both[..., 16:] = image_of(Item("circle", "blue", 0.5, 0.5, 0.25))[..., 16:]
    assert sorted(shapes_found(both)[0], key=str) == [(None, "blue"), (None, "red")]


def test_specks_are_left_out():
    image = image_of(Item("square", "white", 0.5, 0.5, 0.15))
    image[0, :, 3:5, 3:5] = 1
    assert shapes_found(image) == [[("square", "white")]]


def test_what_is_no_image_is_refused():
    with pytest.raises(ValueError, match=r"images have the shape \(2, 1, 8, 8\); give \(images, 3, height, width\)"):
        detect(torch.zeros(2, 1, 8, 8))
    with pytest.raises(ValueError, match="images hold values that are not finite; generate them again"):
        detect(torch.full((1, 3, 8, 8), torch.nan))
