"""Pixels of known scenes, against closed forms and against counting points."""

import pytest
import torch
from shape_scenes import scenes_of
from single_scenes import Item, Scene, sample_scenes

from diffusion_moe.shapes import rendering, sampling
from diffusion_moe.shapes.rendering import AREAS, SQUARE_HALF, coverage, palette, render
from diffusion_moe.shapes.scene import BACKGROUND, COLOURS, SHAPES


def one(shape, x, y, radius, size=(32, 32)):
    return coverage(shape, *torch.tensor([[x], [y], [radius]]), size)[0]


def counted(shape, x, y, radius, size, fine=16):
    """The same by asking fine x fine points a pixel whether they are inside."""
    points = (torch.arange(size * fine) + 0.5) / fine
    dx, dy = (points - x)[None, :] / radius, (points - y)[:, None] / radius
    if shape == "circle":
        inside = dx**2 + dy**2 < 1
    elif shape == "square":
        inside = (dx.abs() < 0.88) & (dy.abs() < 0.88)
    elif shape == "cross":
        inside = (dx.abs() < 0.36) & (dy.abs() < 1.05) | (dx.abs() < 1.05) & (dy.abs() < 0.36)
    else:  # corners at 90, 210 and 330 degrees, 1.2 from the middle
        corners = torch.deg2rad(torch.tensor([90.0, 210.0, 330.0]))
        x_C, y_C = 1.2 * corners.cos(), -1.2 * corners.sin()
        inside = torch.ones(1, 1, dtype=torch.bool)
        for a, b in ((0, 1), (1, 2), (2, 0)):
            inside = inside & ((x_C[b] - x_C[a]) * (dy - y_C[a]) - (y_C[b] - y_C[a]) * (dx - x_C[a]) < 0)
    return inside.float().view(size, fine, size, fine).mean((1, 3))


def test_a_square_on_the_pixels_has_exact_pixels():
    """Edges at 8 and 16 and at 8 and 15.5: whole pixels have the colour, half pixels the mean with the background."""
    half = 4 / 32
    scene = Scene((Item("square", "blue", 12 / 32, 12 / 32, half / SQUARE_HALF),))
    image = render(scenes_of(scene), 32)[0]
    background, blue = (torch.tensor(c) / 127.5 - 1 for c in (BACKGROUND, COLOURS["blue"]))
    inside = torch.zeros(32, 32, dtype=torch.bool)
    inside[8:16, 8:16] = True
    torch.testing.assert_close(image[:, inside], blue[:, None].expand(3, 64), atol=1e-5, rtol=0)
    torch.testing.assert_close(image[:, ~inside], background[:, None].expand(3, 1024 - 64), atol=1e-5, rtol=0)
    moved = render(scenes_of(Scene((Item("square", "blue", 12.5 / 32, 12 / 32, half / SQUARE_HALF),))), 32)[0]
    torch.testing.assert_close(moved[:, 8:16, 8], ((background + blue) / 2)[:, None].expand(3, 8), atol=1e-5, rtol=0)
    torch.testing.assert_close(moved[:, 8:16, 16], ((background + blue) / 2)[:, None].expand(3, 8), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("shape", "tolerance"), [("square", 1e-5), ("cross", 1e-5), ("circle", 0.006), ("triangle", 0.006)]
)
@pytest.mark.parametrize("radius", [4.4, 5.1, 8.3])
def test_areas_and_centroids(shape, tolerance, radius):
    """Square and cross are exact; the others only miss the curve, or the corners, within a pixel."""
    alpha, x, y = one(shape, 15.3, 16.8, radius), 15.3, 16.8
    assert alpha.sum().item() == pytest.approx(AREAS[shape] * radius**2, rel=tolerance)
    middles = torch.arange(32) + 0.5
    assert (alpha.sum(0) @ middles / alpha.sum()).item() == pytest.approx(x, abs=0.02)  # pixels
    assert (alpha.sum(1) @ middles / alpha.sum()).item() == pytest.approx(y, abs=0.05)


@pytest.mark.parametrize("shape", SHAPES)
def test_coverage_is_the_share_of_points_inside(shape):
    alpha, points = one(shape, 15.3, 16.8, 5.2), counted(shape, 15.3, 16.8, 5.2, 32)
    assert (alpha - points).abs().mean() < 0.002
    assert (alpha - points).abs().amax() < 0.1
    assert ((alpha > 0.5) != (points > 0.5)).sum() <= 2


def test_a_triangle_points_up_and_a_circle_is_round():
    alpha = one("triangle", 16.0, 16.0, 6.0)
    rows = alpha.sum(1)
    filled = rows[(rows > 0.5).nonzero()[:, 0]]
    assert (filled[1:-1].diff() > 0).all()
    torch.testing.assert_close(alpha, alpha.flip(1))
    disc = one("circle", 16.0, 16.0, 6.0)
    torch.testing.assert_close(disc, disc.T)
    torch.testing.assert_close(disc, disc.flip(0))


def test_images_are_the_same_at_both_sizes():
    """64 pixels averaged over squares of four are 32 pixels, but for corners."""
    scenes = sample_scenes(0, "train", torch.arange(64))
    small, large = render(scenes, 32), render(scenes, 64)
    averaged = large.view(64, 3, 32, 2, 32, 2).mean((3, 5))
    assert (averaged - small).abs().mean() < 0.003
    assert (averaged - small).abs().amax() < 0.5


def test_images_lie_in_range_on_their_background():
    images = render(sample_scenes(0, "train", torch.arange(256)), 32)
    assert images.dtype == torch.float32
    assert images.abs().amax() <= 1
    border = torch.cat((images[..., 0, :], images[..., -1, :], images[..., 0], images[..., -1]), -1)
    background, _ = palette()
    assert (border - background[:, None]).abs().amax() < 0.1  # only a triangle's corner leaves a trace


def test_one_by_one_and_in_a_batch_are_the_same():
    together = render(sample_scenes(5, "train", torch.arange(40)), 32)
    for s in range(40):
        torch.testing.assert_close(
            render(sample_scenes(5, "train", torch.tensor([s])), 32)[0], together[s], atol=1e-6, rtol=0
        )


def test_rendering_is_a_few_operations_whatever_the_number(monkeypatch):
    """One coverage a shape and one call for random numbers, for ten scenes and for a thousand."""
    calls = []
    real, uniforms = rendering.coverage, sampling.uniforms
    monkeypatch.setattr(rendering, "coverage", lambda *args: calls.append("coverage") or real(*args))
    monkeypatch.setattr(sampling, "uniforms", lambda *args: calls.append("uniforms") or uniforms(*args))
    counts = []
    for number in (40, 1000):
        calls.clear()
        assert render(sample_scenes(0, "train", torch.arange(number)), 32).shape == (number, 3, 32, 32)
        counts.append((calls.count("coverage"), calls.count("uniforms")))
    assert counts == [(4, 2), (4, 2)]


def test_an_empty_scene_is_background():
    background, _ = palette()
    image = render(scenes_of(Scene(())), 8)[0]
    torch.testing.assert_close(image, background[:, None, None].expand(3, 8, 8))
