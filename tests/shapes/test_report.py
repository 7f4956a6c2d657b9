"""Scores of pictures whose truth is known, and chance against combinatorics."""

import json
import re
from itertools import product
from pathlib import Path

import pytest
import torch

from diffusion_moe.shapes.gallery import make_gallery
from diffusion_moe.shapes.prompts import CATEGORIES, SPLITS, evaluation_prompts, questions, true_scenes
from diffusion_moe.shapes.rendering import render
from diffusion_moe.shapes.report import as_table, make_report
from diffusion_moe.shapes.scorer import score_images


@pytest.fixture(scope="module")
def prompts():
    return evaluation_prompts(0, 12, "seen") + evaluation_prompts(0, 12, "held_out")


@pytest.fixture(scope="module")
def images(prompts):
    return render(true_scenes(prompts, 5), 32)


@pytest.fixture(scope="module")
def perfect(prompts, images):
    return make_report(prompts, images, seed=0)


def test_true_images_score_one(perfect, images):
    values = perfect.as_dict()
    assert values["n"] == len(images) == 144
    for category, split in product(CATEGORIES, ("overall", *SPLITS)):
        assert values["categories"][category][split]["score"] == 1
        assert values["categories"][category][split]["true"] == 1
        assert values["categories"][category][split]["n"] == (24 if split == "overall" else 12)
    assert {values[part]["score"] for part in ("overall", *SPLITS)} == {1}
    assert json.loads(json.dumps(values)) == values


def test_chance_is_one_over_the_number_of_questions(perfect):
    """Each question is answered by its own pictures alone, and all are asked alike."""
    for category, number in {"two_object": 6, "counting": 12, "colors": 24, "position": 16, "color_attr": 120}.items():
        for split in SPLITS:
            assert perfect.tallies[category][split].chance == pytest.approx(1 / number, abs=1e-9)


def test_chance_of_single_objects_counts_the_pictures_that_answer_two_questions(perfect):
    """Twelve questions: "a large cross" is answered by itself alone, so 1/12. "a circle" by the small and the large one
    too, 3/12; with a size, by itself and perhaps by the plain one."""
    assert perfect.tallies["single_object"]["held_out"].chance == pytest.approx(1 / 12, abs=1e-9)
    # 12 prompts over 11 questions: four plain ones at 3/12, seven with a size at 1/12 to 2/12, and one more of them.
    low, high = (4 * 3 + 7 * 1 + 1) / 12 / 12, (4 * 3 + 7 * 2 + 3) / 12 / 12
    assert low <= perfect.tallies["single_object"]["seen"].chance <= high


def test_shuffled_images_score_about_chance():
    prompts = evaluation_prompts(1, 96, "seen") + evaluation_prompts(1, 48, "held_out")
    members = [i for i, prompt in enumerate(prompts) if prompt.category == "counting"]
    some = [prompts[i] for i in members]
    order = torch.randperm(len(some), generator=torch.Generator().manual_seed(0))
    report = make_report(some, render(true_scenes(some, 2), 32)[order])
    # 9 of the 12 questions are asked 96 times, 3 of them 48 times: each has a share near 1/12 of the images.
    values = report.as_dict()["categories"]["counting"]["overall"]
    assert values["score"] == pytest.approx(values["chance"], abs=0.06)


def test_the_score_is_the_share_that_is_right_and_the_mean_goes_over_categories(prompts, images):
    """All seen pictures empty, but those of one category."""
    spoiled = images.clone()
    background = images[0, :, 0, 0]
    for i, prompt in enumerate(prompts):
        if prompt.split == "seen" and prompt.category != "colors":
            spoiled[i] = background[:, None, None]
    spoiled[prompts.index(next(p for p in prompts if p.category == "colors"))] = background[:, None, None]
    values = make_report(prompts, spoiled).as_dict()
    assert values["categories"]["colors"]["seen"]["score"] == pytest.approx(11 / 12)
    assert values["seen"]["score"] == pytest.approx(11 / 12 / 6)
    assert values["held_out"]["score"] == 1
    assert values["overall"]["score"] == pytest.approx((5 * 0.5 + 23 / 24) / 6)


def test_one_split_and_one_category_can_be_scored_alone(prompts, images):
    members = [i for i, p in enumerate(prompts) if (p.category, p.split) == ("position", "held_out")]
    values = make_report([prompts[i] for i in members], images[members]).as_dict()
    assert set(values) == {"overall", "held_out", "n", "categories"}
    assert list(values["categories"]) == ["position"]


def test_a_report_is_a_function_of_its_arguments(prompts, images, perfect):
    assert make_report(prompts, images, seed=0) == perfect


def test_table_shows_every_number(perfect):
    lines = as_table(perfect.as_dict()).split("\n")
    assert len(lines) == 2 + 6 * 3 + 3
    assert "| counting | held out | 12 | 100.0% | 8.3% | 100.0% |" in lines
    assert lines[-3].startswith("| mean | overall |  | 100.0% |")


def test_nothing_to_score_is_refused():
    with pytest.raises(ValueError, match="there are no prompts to score; give some"):
        make_report([], torch.zeros(0, 3, 32, 32))


def test_picture_frames_right_ones_green_and_wrong_ones_red(prompts, images):
    some, shown = prompts[:2] + prompts[40:42], images[[0, 1, 42, 43]]
    scores = score_images(some, shown)
    shot = make_gallery(some, shown, scores, columns=2)
    assert [score.correct for score in scores] == [True, True, False, False]
    assert shot.size == (2 * 148 + 12, 2 * 218 + 12)
    corners = [shot.getpixel((12 + column * 148, 12 + row * 218)) for row in (0, 1) for column in (0, 1)]
    assert corners == [(26, 152, 80)] * 2 + [(215, 48, 39)] * 2
    # The picture itself is within the frame, four times enlarged.
    middle = ((shown[0] + 1) * 127.5).round().byte()
    for y, x in ((0, 0), (16, 16), (31, 31)):
        assert shot.getpixel((16 + 4 * x + 2, 16 + 4 * y + 2)) == tuple(middle[:, y, x].tolist())


def test_picture_wants_one_of_each(prompts, images):
    with pytest.raises(ValueError, match="there are 2 prompts, 1 images and 0 scores; give one of each"):
        make_gallery(prompts[:2], images[:1], [])


def test_the_page_shows_what_there_is(tmp_path, monkeypatch):
    """docs/shapes.md: its code runs and says what the data say; its table of chances is what is measured."""
    page = (Path(__file__).parents[2] / "docs" / "shapes.md").read_text()
    read, scored, geneval = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict = {}
    exec(read, names)
    assert repr(names["data"].captions(1)[:2])[:-1] in read
    monkeypatch.chdir(tmp_path)
    names["print"] = lambda text: None
    assert scored.count("50") == 2
    prompts = evaluation_prompts(seed=0, per_category=5, split="seen") + evaluation_prompts(0, 5, "held_out")
    names["images"] = render(true_scenes(prompts, 1), 16)
    exec(scored.replace("50", "5"), names)
    assert (tmp_path / "prompts.png").is_file()
    assert len(names["report"].scores) == 60
    counts = re.search(r"\| questions, seen \+ held out \| (.*) \|", page).group(1)
    assert counts.split(" | ") == [" + ".join(str(len(questions(c, s))) for s in SPLITS) for c in CATEGORIES]
    (tmp_path / "geneval" / "prompts").mkdir(parents=True)
    line = {"tag": "colors", "prompt": "a red cup", "include": [{"class": "cup", "count": 1, "color": "red"}]}
    (tmp_path / "geneval" / "prompts" / "evaluation_metadata.jsonl").write_text(json.dumps(line))
    exec(geneval, names | {"sample": lambda text, number: torch.zeros(4, 3, 8, 8)})
    assert (tmp_path / "images" / "00000" / "samples" / "0003.png").is_file()
