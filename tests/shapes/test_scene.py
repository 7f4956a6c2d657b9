"""Contents of scenes and their positions: purity, room between objects, relations, and what is held out."""

import itertools

import pytest
import torch
from shape_scenes import scenes_of
from single_scenes import sample_scenes, scene_at

from diffusion_moe.shapes.sampling import (
    EDGE,
    GAP,
    GRID,
    KIND_SHARES,
    REACH,
    SLOPE,
    arrange,
    sample_contents,
)
from diffusion_moe.shapes.scene import (
    COLOURS,
    CONVERSE,
    HELD_OUT_COUNTS,
    HELD_OUT_LOOKS,
    HELD_OUT_PAIRS,
    HELD_OUT_RELATIONS,
    HELD_OUT_SIZES,
    LARGE_FROM,
    RELATIONS,
    SHAPES,
    SIZES,
    Content,
    Look,
    contents,
    held_out,
    relation_holds,
    seen_contents,
    size_of,
)

LAYOUTS = pytest.mark.parametrize("layout", ["free", "grid"])


def everything(repeats, layout="free"):
    """Every content, arranged several times; the rows beside the scenes."""
    rows = torch.arange(len(contents())).repeat(repeats)
    return rows.tolist(), arrange(rows, 0, "every", torch.arange(len(rows)), layout)


def test_numbers_of_contents_follow_from_the_choices():
    """2 sizes x 4 shapes x 6 colours alone; 3 counts x 24 looks; 6 pairs of shapes x 30 of colours x 4 relations."""
    kinds = [content.kind for content in contents()]
    assert {kind: kinds.count(kind) for kind in KIND_SHARES} == {"single": 48, "count": 72, "pair": 720}
    assert len(set(contents())) == 840


def test_held_out_contents_are_those_of_the_sets():
    red, blue, green = (Look("circle", colour) for colour in ("red", "blue", "green"))
    assert held_out(Content((red,))) == frozenset()
    assert held_out(Content((Look("circle", "purple"),))) == {"look"}
    assert held_out(Content((Look("cross", "red", "large"),))) == {"size"}
    assert held_out(Content((blue,) * 4)) == {"count"}
    assert held_out(Content((red, Look("cross", "white")), "above")) == {"pair"}
    assert held_out(Content((green, Look("square", "red")), "left of")) == {"relation"}
    assert held_out(Content((Look("square", "red"), green), "right of")) == {"relation"}
    assert held_out(Content((green, Look("square", "red")), "right of")) == frozenset()
    assert held_out(Content((Look("circle", "purple"), Look("square", "red")), "left of")) == {"look", "relation"}


def test_every_word_is_seen_in_training_in_other_combinations():
    """Nothing is held out so far that a model could not know its parts."""
    looks = {look for content in seen_contents() for look in content.looks}
    for shape, colour in HELD_OUT_LOOKS:
        assert sum(look.shape == shape for look in looks) >= 3
        assert sum(look.colour == colour for look in looks) >= 3
    assert {(len(c.looks), c.looks[0].shape) for c in seen_contents() if c.kind == "count"} == (
        set(itertools.product((2, 3, 4), SHAPES)) - HELD_OUT_COUNTS
    )
    assert {(look.shape, look.size) for look in looks} == set(itertools.product(SHAPES, SIZES)) - HELD_OUT_SIZES
    pairs = [c for c in seen_contents() if c.kind == "pair"]
    assert {frozenset(look.shape for look in c.looks) for c in pairs} == (
        {frozenset(pair) for pair in itertools.combinations(SHAPES, 2)} - HELD_OUT_PAIRS
    )
    said = {(c.looks[0].shape, c.relation, c.looks[1].shape) for c in pairs}
    said |= {(second, CONVERSE[relation], first) for first, relation, second in said}
    assert len(said) == 2 * (4 * 4 - len(HELD_OUT_RELATIONS))
    assert {relation for _, relation, _ in said} == set(RELATIONS)


@LAYOUTS
def test_a_scene_is_a_function_of_seed_split_and_number(layout):
    """Alone, in another order, in another batch."""
    whole = sample_scenes(3, "train", torch.arange(50), layout)
    some = sample_scenes(3, "train", torch.tensor([40, 7]), layout)
    assert [scene_at(some, 0), scene_at(some, 1)] == [scene_at(whole, 40), scene_at(whole, 7)]
    for other in (
        sample_scenes(4, "train", torch.arange(50), layout),
        sample_scenes(3, "test", torch.arange(50), layout),
    ):
        assert sum(scene_at(other, i) == scene_at(whole, i) for i in range(50)) == 0


def test_a_known_scene_stays_what_it_is():
    """Data sets made by other versions hold the same scenes."""
    scene = scene_at(sample_scenes(0, "train", torch.tensor([1])), 0)
    assert [(item.shape, item.colour) for item in scene.items] == [("circle", "red"), ("square", "purple")]
    assert (scene.items[0].x, scene.items[0].y) == pytest.approx((0.54199, 0.22690), abs=1e-5)
    assert (scene.items[1].x, scene.items[1].y) == pytest.approx((0.16807, 0.15181), abs=1e-5)


def test_kinds_come_in_their_shares_and_contents_of_a_kind_alike():
    rows = sample_contents(0, "any", torch.arange(40000))
    counts = torch.bincount(rows, minlength=len(contents()))
    for kind, share in KIND_SHARES.items():
        members = [row for row, content in enumerate(contents()) if content.kind == kind and not held_out(content)]
        sampled = counts[members]
        assert sampled.sum().item() / 40000 == pytest.approx(share, abs=0.012)
        assert sampled.amin() > 0.5 * 40000 * share / len(members)
    assert counts[[row for row, content in enumerate(contents()) if held_out(content)]].sum() == 0


@LAYOUTS
def test_objects_keep_their_distance_and_their_sizes(layout):
    """Boxes of every content stay EDGE inside the image and GAP apart along x or y."""
    rows, scenes = everything(12, layout)
    reach = scenes.radius * torch.tensor([REACH[shape] for shape in SHAPES])[scenes.shape]
    there = scenes.radius > 0
    assert there.sum(1).tolist() == [len(contents()[row].looks) for row in rows]
    for z in (scenes.x, scenes.y):
        assert (z - reach)[there].amin() >= EDGE - 1e-6
        assert (z + reach)[there].amax() <= 1 - EDGE + 1e-6
    for i, j in itertools.combinations(range(4), 2):
        both = there[:, i] & there[:, j]
        away = torch.maximum((scenes.x[:, i] - scenes.x[:, j]).abs(), (scenes.y[:, i] - scenes.y[:, j]).abs())
        assert (away - reach[:, i] - reach[:, j])[both].amin() >= GAP - 1e-6


def test_objects_go_everywhere():
    """Single objects reach all edges; so do pairs and counts. No position is preferred to its mirror image."""
    rows, scenes = everything(12)
    kinds = [contents()[row].kind for row in rows]
    for kind in KIND_SHARES:
        members = torch.tensor([k == kind for k in kinds])
        there = (scenes.radius > 0) & members[:, None]
        for z in (scenes.x[there], scenes.y[there]):
            assert z.amin() < 0.2
            assert z.amax() > 0.8
            assert z.mean().item() == pytest.approx(0.5, abs=0.02)


def test_the_grid_has_nine_positions():
    """For small objects and for large ones; lone ones are at each of them as often."""
    _, scenes = everything(60, "grid")
    there = scenes.radius > 0
    large = scenes.radius[:, :1] >= LARGE_FROM
    assert (there[large[:, 0]].sum(1) == 1).all()
    step = torch.tensor(GRID)[large.long()]
    x, y = ((z - 0.5) / step for z in (scenes.x, scenes.y))
    assert max((z - z.round())[there].abs().amax() for z in (x, y)) < 1e-5
    position_of = (3 * (x.round() + 1) + y.round() + 1).long()[:, 0]
    for members in (large[:, 0], ~large[:, 0]):
        counts = torch.bincount(position_of[members & (there.sum(1) == 1)])
        assert len(counts) == 9 and counts.amin() > 0.8 * counts.sum() / 9


def test_both_layouts_show_the_same_contents():
    free, grid = (sample_scenes(0, "train", torch.arange(50), layout) for layout in ("free", "grid"))
    for i in range(50):
        looks = [
            [(item.shape, item.colour, item.size) for item in scene_at(scenes, i).items] for scenes in (free, grid)
        ]
        assert looks[0] == looks[1]


@LAYOUTS
def test_scenes_show_their_contents(layout):
    rows, scenes = everything(3, layout)
    for s, row in enumerate(rows):
        content, items = contents()[row], scene_at(scenes, s).items
        assert [(item.shape, item.colour, item.size) for item in items] == [
            (look.shape, look.colour, look.size) for look in content.looks
        ]
        if content.relation:
            first, second = ((item.x, item.y) for item in items)
            assert [relation for relation in RELATIONS if relation_holds(first, relation, second)] == [content.relation]
            away = [abs(a - b) for a, b in zip(first, second)]
            assert min(away) <= (SLOPE + 0.15) * max(away)


def test_scenes_and_values_turn_into_each_other():
    scenes = sample_scenes(0, "train", torch.arange(30))
    back = scenes_of(*(scene_at(scenes, s) for s in range(30)))
    for name in ("shape", "colour", "x", "y", "radius"):
        there = scenes.radius > 0
        torch.testing.assert_close(getattr(back, name)[there], getattr(scenes, name)[there])


def test_words_for_sizes_lie_midway():
    (_, small), (large, _) = SIZES["small"], SIZES["large"]
    assert abs(LARGE_FROM - (small + large) / 2) < 0.005
    assert [size_of(small), size_of(large)] == ["small", "large"]


def test_a_relation_is_a_cone_of_60_degrees():
    assert relation_holds((0.2, 0.5), "left of", (0.6, 0.5))
    assert not relation_holds((0.6, 0.5), "left of", (0.2, 0.5))
    assert relation_holds((0.5, 0.2), "above", (0.5, 0.6))
    assert relation_holds((0.5, 0.6), "below", (0.5, 0.2))
    origin = (0.0, 0.0)
    assert relation_holds((1.0, 1.70), "right of", origin)  # tan 60 degrees is 1.732
    assert not relation_holds((1.0, 1.76), "right of", origin)
    assert not any(relation_holds(origin, relation, origin) for relation in RELATIONS)


def test_colours_are_far_apart():
    """Whatever share of a colour a pixel holds from one half on, it is nearer to that colour's line than to others'."""
    from diffusion_moe.shapes.rendering import palette

    background, colours = palette()
    rays = torch.nn.functional.normalize(colours - background, dim=1)
    angles = torch.rad2deg(torch.acos((rays @ rays.T).clamp(-1, 1)))[~torch.eye(len(COLOURS), dtype=bool)]
    assert angles.amin() > 25
