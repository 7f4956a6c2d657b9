"""`evaluate` and `sweep` of a text-to-image run on coloured shapes."""

import csv
import json
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_moe.cli import main
from diffusion_moe.config import EvaluationConfig, read_recipe
from diffusion_moe.data import load_dataset
from diffusion_moe.evaluation import extract_features
from diffusion_moe.evaluation.images import digest_of_all, digests_of
from diffusion_moe.evaluation.metrics import FeatureSums, frechet_distance
from diffusion_moe.evaluation.shapes_scorer import first_of_each
from diffusion_moe.pixels import to_uint8
from diffusion_moe.sampling.generate import Prompts, generate
from diffusion_moe.sampling.loading import load_text_encoder, load_weights
from diffusion_moe.sampling.sampler import Sampler
from diffusion_moe.sampling.source import read_source
from diffusion_moe.shapes.prompts import CATEGORIES, SPLITS, evaluation_prompts, true_scenes
from diffusion_moe.shapes.rendering import render
from diffusion_moe.shapes.report import make_report
from diffusion_moe.text import TextFeatures

OPTIONS = ["--num_samples=24", "--steps=2", "--batch_size=10", "--seed=3"]


def run(capsys, *arguments):
    """Exit status and what was said."""
    status = main([str(argument) for argument in arguments])
    return status, *capsys.readouterr()


@pytest.fixture
def prompts():
    return evaluation_prompts(3, 2, "seen") + evaluation_prompts(3, 2, "held_out")


def sampled(folder, texts):
    """The images that the options ask for, by hand; in the same batches, for otherwise a last digit might turn."""
    source = read_source(folder)
    text = TextFeatures.together(load_text_encoder(source).encode_all(texts, 10))
    settings = EvaluationConfig(num_samples=24, steps=2, batch_size=10, seed=3)
    return generate(load_weights(source), None, 24, settings, prompts=Prompts(text, text.nothing()))


def test_a_run_is_judged_by_what_its_images_show(capsys, shapes_run, prompts):
    status, out, _ = run(capsys, "evaluate", shapes_run, *OPTIONS)
    assert status == 0
    result = json.loads((shapes_run / "evaluation.json").read_text())
    pixels = to_uint8(sampled(shapes_run, [prompt.text for prompt in prompts]))
    expected = make_report(prompts, pixels / 127.5 - 1, seed=3).as_dict()
    assert {key: result[key] for key in expected} == expected
    assert result["images_sha256"] == digest_of_all(digests_of(pixels))
    assert result["prompts"]["count"] == 24 and result["prompts"]["sha256"] == result["reference"]["sha256"]
    assert result["prompts"]["origin"] == "coloured shapes, 2 of each category and split, seed 3"
    assert result["text_encoder"]["sha256"] == read_source(shapes_run).text_space.sha256
    known = {"num_samples": 24, "solver": "euler", "steps": 2, "function_evaluations": 2.0, "guidance_scale": 1.5}
    known |= {"seed": 3, "training_steps": 2, "ema_decay": 0.995, "weights": "ema"}
    assert {key: result[key] for key in known} == known
    assert result["average_capacity"] > 0 and result["seconds_per_image"] > 0
    assert "| color_attr | held out | 2 | " in out and "| mean | overall |" in out
    assert f"wrote {shapes_run / 'prompts.png'}" in out
    assert Image.open(shapes_run / "prompts.png").width > 300


def test_scores_of_other_weights_stand_beside_those_of_the_average(capsys, shapes_run):
    assert run(capsys, "evaluate", shapes_run, *OPTIONS)[0] == 0
    averaged = (shapes_run / "evaluation.json").read_bytes()
    assert run(capsys, "evaluate", shapes_run, "--weights=model", *OPTIONS)[0] == 0
    assert (shapes_run / "evaluation.json").read_bytes() == averaged
    assert json.loads((shapes_run / "evaluation-model.json").read_text())["weights"] == "model"
    assert (shapes_run / "evaluation-model.png").is_file()


def test_true_images_are_all_right(capsys, shapes_run, prompts, monkeypatch, tmp_path):
    """Were the prompts, the images or the pixels in another order, hardly one would be."""
    images = render(true_scenes(prompts, 7), 16)

    def true_ones(sampler, count, labels, prompts, first, stats):
        yield from images[first:count].split(sampler.settings.batch_size)

    monkeypatch.setattr(Sampler, "batches", true_ones)
    assert run(capsys, "evaluate", shapes_run, *OPTIONS, "--output", tmp_path / "x.json")[0] == 0
    result = json.loads((tmp_path / "x.json").read_text())
    assert result["overall"]["score"] > 0.9 > result["overall"]["chance"]
    assert (tmp_path / "x.png").is_file()
    images = images[torch.randperm(24)]
    assert run(capsys, "evaluate", shapes_run, *OPTIONS, "--output", tmp_path / "y.json")[0] == 0
    assert json.loads((tmp_path / "y.json").read_text())["overall"]["score"] < 0.5
    images = images * float("nan")
    status, _, err = run(capsys, "evaluate", shapes_run, *OPTIONS, "--output", tmp_path / "z.json")
    assert status == 2 and "generates images with values that are not finite" in err


def test_interrupted_work_goes_on_and_ends_the_same(capsys, shapes_run, monkeypatch, tmp_path):
    monkeypatch.setattr(extract_features, "PART", 5)
    options = [*OPTIONS, "--batch_size=5", "--output"]
    assert run(capsys, "evaluate", shapes_run, *options, tmp_path / "whole.json")[0] == 0
    work, parts = extract_features._extract_part, []

    def interrupted(images, extractor, part, *more):
        if len(parts) == 2:
            raise KeyboardInterrupt
        parts.append(part)
        work(images, extractor, part, *more)

    monkeypatch.setattr(extract_features, "_extract_part", interrupted)
    assert run(capsys, "evaluate", shapes_run, *options, tmp_path / "killed.json")[0] == 130
    monkeypatch.setattr(extract_features, "_extract_part", work)
    status, out, _ = run(capsys, "evaluate", shapes_run, *options, tmp_path / "killed.json")
    assert status == 0 and "resuming: 10 of 24 images are done" in out
    whole, killed = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("whole", "killed"))
    assert whole | {"seconds_per_image": 0} == killed | {"seconds_per_image": 0}
    assert (tmp_path / "whole.png").read_bytes() == (tmp_path / "killed.png").read_bytes()


def test_the_picture_has_a_row_for_each_category_and_split():
    prompts = [prompt for split in SPLITS for prompt in evaluation_prompts(0, 8, split)]
    shown = [prompts[i] for i in first_of_each(prompts)]
    assert [(p.category, p.split) for p in shown[::6]] == list(product(CATEGORIES, SPLITS))
    assert len(shown) == 72 and shown[:6] == prompts[:6]


def test_a_sweep_puts_the_score_in_the_place_of_fid(capsys, tmp_path, shapes_run):
    arguments = ["sweep", shapes_run, *OPTIONS, "--guidance_scale=1,4", "--output", tmp_path]
    status, out, _ = run(capsys, *arguments)
    assert status == 0
    assert (tmp_path / "guidance.png").is_file()
    rows = list(csv.DictReader((tmp_path / "sweep.csv").read_text().splitlines()))
    assert [float(row["guidance_scale"]) for row in rows] == [1.0, 4.0]
    assert rows[0]["images_sha256"] != rows[1]["images_sha256"]
    (heads,) = [line.split() for line in out.splitlines() if line.split()[:1] == ["guidance"]]
    assert heads == ["guidance", "evaluations", "capacity", "s/image", "overall", "seen", "held", "out"]
    assert run(capsys, "evaluate", shapes_run, *OPTIONS, "--guidance_scale=4")[0] == 0
    alone = json.loads((shapes_run / "evaluation.json").read_text())
    assert rows[1]["images_sha256"] == alone["images_sha256"]
    for part in ("overall", "seen", "held_out"):
        assert float(rows[1][part]) == alone[part]["score"]


def test_with_a_reference_features_are_compared_and_captions_shown(capsys, shapes_run, small_inception, tmp_path):
    data = replace(read_recipe(shapes_run / "recipe.yaml").data, text_encoder=None)
    held_out = load_dataset(data, "test")
    real = to_uint8(held_out.read(range(40)).images)
    np.savez(tmp_path / "real.npz", arr_0=real.permute(0, 2, 3, 1).numpy())
    assert run(capsys, "stats", tmp_path / "real.npz", "--output", tmp_path / "ref.npz")[0] == 0
    options = ["--reference", tmp_path / "ref.npz", *OPTIONS, "--output", tmp_path / "x.json"]
    assert run(capsys, "evaluate", shapes_run, *options)[0] == 0
    result = json.loads((tmp_path / "x.json").read_text())
    pixels = to_uint8(sampled(shapes_run, [held_out.captions(number)[0] for number in range(24)]))
    assert result["images_sha256"] == digest_of_all(digests_of(pixels))
    fake, true = (FeatureSums.of(small_inception()(images)["pool"]).moments() for images in (pixels, real))
    assert result["fid"] == pytest.approx(frechet_distance(fake, true), rel=1e-5)
    assert result["prompts"]["origin"] == "held-out captions of shapes" and result["prompts"]["count"] == 24
    assert "overall" not in result


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--num_samples=100"], "num_samples is 100, but prompts of coloured shapes are of 6 categories"),
        (["--num_samples=100"], "give a multiple of 12, as 96 or 108"),
        (["--num_samples=5"], "give a multiple of 12, as 12\n"),
        (["--prompts=x.txt"], "coloured shapes are scored by questions of their own; remove the option"),
        (["--text_encoder=/no/such"], "cannot load the text encoder /no/such"),
        (["--extractor=inception"], "there is nothing to compare with"),
    ],
)
def test_mistakes_are_one_line(capsys, shapes_run, options, expected):
    for verb in ("evaluate", "sweep"):
        status, _, err = run(capsys, verb, shapes_run, *OPTIONS, *options)
        assert status == 2 and expected in err and err.count("\n") == 1
