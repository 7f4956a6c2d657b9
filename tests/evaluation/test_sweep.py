"""Sweeps: which points, each once, and what is written of them."""

import csv
import json
import shutil

import pytest

from diffusion_moe.cli import main
from diffusion_moe.config import EvaluationConfig
from diffusion_moe.evaluation import evaluate, sweep
from diffusion_moe.evaluation.grid import make_points, read_grid
from diffusion_moe.evaluation.options import SweepOptions
from diffusion_moe.evaluation.plot_sweep import lines_of


def run(capsys, *arguments):
    """Exit status and what was said."""
    status = main([str(argument) for argument in arguments])
    return status, *capsys.readouterr()


def chosen(points):
    """What a point chooses, in short."""
    return [(p.weights, p.settings.solver, p.settings.steps, p.settings.guidance_scale) for p in points]


def test_all_combinations_in_order_and_options_over_the_file():
    options = SweepOptions(guidance_scale="1, 2.5", weights="model,ema")
    points = make_points(options, {"guidance_scale": [7], "steps": [5, 9]}, EvaluationConfig())
    expected = [(w, "euler", n, g) for w in ("model", "ema") for n in (5, 9) for g in (1.0, 2.5)]
    assert chosen(points) == expected


def test_points_of_equal_images_are_one():
    options = SweepOptions(guidance_scale="1,2", guidance_interval="0:1,0.1:0.9", solver="euler,dopri5", steps="3,4")
    points = make_points(options, {}, EvaluationConfig())
    # Guidance 1 has no interval and dopri5 no steps: (2 + 1) choices of solver and steps times (2 + 1) of guidance.
    assert len(points) == 9
    assert len(make_points(SweepOptions(steps="3,3"), {}, EvaluationConfig())) == 1


def test_a_file_holds_lists_and_other_settings(tmp_path):
    path = tmp_path / "grid.yaml"
    path.write_text("guidance_interval: [[0, 1], '0.1:1']\nsteps: 8\nnum_samples: 20\nreference: ref.npz\n")
    lists, others = read_grid(path)
    assert others == {"num_samples": 20, "reference": "ref.npz"}
    points = make_points(SweepOptions(), lists, EvaluationConfig())
    assert [(p.settings.guidance_interval, p.settings.steps) for p in points] == [((0.0, 1.0), 8), ((0.1, 1.0), 8)]
    path.write_text("guidance_interval: [0.2, 0.8]\n")
    (point,) = make_points(SweepOptions(), read_grid(path).lists, EvaluationConfig())
    assert point.settings.guidance_interval == (0.2, 0.8)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--steps=few"], "steps holds 'few'; expected a whole number at each position of the list"),
        (["--guidance_interval=0.1"], "expected two times with a colon, as 0.1:1"),
        (["--weights=best"], "expected ema or model"),
        (["--guidance_interval=0.9:0.1"], "give 0 <= low <= high <= 1"),
        (["--solver=euler,ddim"], "solver is ddim, but the model's process is flow"),
        (["--solver=magic"], "choose one of euler"),
        (["--steps=0"], "evaluation.steps is 0; it must be positive"),
        (["--grid=none.yaml"], "cannot read none.yaml"),
        (["--grid=list.yaml"], "list.yaml is not a mapping"),
        (["--grid=wrong.yaml"], "there is no guidance; did you mean guidance_scale"),
        (["--grid=type.yaml"], "num_samples is many; expected int"),
        (["--extractor=inception"], "there is nothing to compare with"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_generated(
    capsys, monkeypatch, tmp_path, run_folder, arguments, expected
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep, "score_model", None)
    (tmp_path / "list.yaml").write_text("- 1")
    (tmp_path / "wrong.yaml").write_text("guidance: [1]")
    (tmp_path / "type.yaml").write_text("num_samples: many")
    status, _, err = run(capsys, "sweep", run_folder, *arguments)
    assert status == 2
    assert expected in err
    assert err.count("\n") == 1


def test_a_sweep_scores_each_point_once_as_evaluate_does(capsys, tmp_path, run_folder, monkeypatch):
    reference = tmp_path / "ref.npz"
    assert run(capsys, "stats", "digits", "--extractor=classifier", "--split=test", "--output", reference)[0] == 0
    usual = ["--num_samples=20", "--steps=2", "--reference", reference]
    grid = ["--guidance_scale=1,3", "--threshold_scale=0.5,1", "--weights=ema,model", "--output", tmp_path / "sweep"]
    status, out, _ = run(capsys, "sweep", run_folder, *usual, *grid)
    assert status == 0
    assert {path.name for path in (tmp_path / "sweep").iterdir()} == {
        "points",
        "sweep.csv",
        "guidance.png",
        "capacity.png",
        "time.png",
    }
    rows = list(csv.DictReader((tmp_path / "sweep" / "sweep.csv").read_text().splitlines()))
    settings = [(row["weights"], float(row["threshold_scale"]), float(row["guidance_scale"])) for row in rows]
    assert settings == [(w, t, g) for w in ("ema", "model") for t in (0.5, 1.0) for g in (1.0, 3.0)]
    assert [row["ema_decay"] for row in rows] == ["0.995"] * 4 + [""] * 4
    # Lower thresholds never serve fewer experts.
    capacity = {key: float(row["average_capacity"]) for key, row in zip(settings, rows)}
    assert all(capacity[w, 0.5, g] >= capacity[w, 1.0, g] for w in ("ema", "model") for g in (1.0, 3.0))
    assert capacity["model", 0.5, 1.0] > capacity["model", 1.0, 1.0]
    assert all(row["num_samples"] == "20" and "20 samples" in row["warnings"] for row in rows)
    assert all(len(row["extractor_weights"]) == len(row["reference_sha256"]) == 16 for row in rows)
    # The table has a line a point, and the columns that vary.
    table = [line.split() for line in out.splitlines() if line.split()[:1] in (["weights"], ["ema"], ["model"])]
    assert table[0][:3] == ["weights", "thresholds", "guidance"] and len(table) == 9
    # One point alone is what `evaluate` says of it.
    one = ["--threshold_scale=0.5", "--guidance_scale=3", "--output", tmp_path / "one.json"]
    assert run(capsys, "evaluate", run_folder, *usual, *one)[0] == 0
    alone = json.loads((tmp_path / "one.json").read_text())
    assert float(rows[1]["frechet"]) == alone["frechet"]
    assert rows[1]["images_sha256"] == alone["images_sha256"]
    # Done points are not redone, another one is.
    done = []
    score_model = evaluate.score_model
    monkeypatch.setattr(sweep, "score_model", lambda *a: done.append(a[0].settings.guidance_scale) or score_model(*a))
    assert run(capsys, "sweep", run_folder, *usual, *grid)[0] == 0
    assert done == []
    grid[0] = "--guidance_scale=3,4"
    assert run(capsys, "sweep", run_folder, *usual, *grid)[0] == 0
    assert done == [4.0] * 4


def test_an_interrupted_sweep_goes_on(capsys, tmp_path, run_folder, monkeypatch):
    """Without statistics a run's own data judges; what one call has learned the next one uses."""
    arguments = ["sweep", run_folder, "--num_samples=10", "--steps=1,2,3", "--output", tmp_path]
    points = []

    def stop_at_the_third(*a):
        if len(points) == 2:
            raise KeyboardInterrupt
        points.append(a[0].settings.steps)
        return evaluate.score_model(*a)

    monkeypatch.setattr(sweep, "score_model", stop_at_the_third)
    assert run(capsys, *arguments)[0] == 130
    monkeypatch.setattr(sweep, "score_model", lambda *a: points.append(a[0].settings.steps) or evaluate.score_model(*a))
    status, out, _ = run(capsys, *arguments)
    assert status == 0
    assert points == [1, 2, 3]
    assert "3 of 3: weights ema, euler 3 steps" in out and "recognised" in out
    rows = list(csv.DictReader((tmp_path / "sweep.csv").read_text().splitlines()))
    assert [float(row["function_evaluations"]) for row in rows] == [1, 2, 3]


def test_lines_of_a_figure_differ_in_one_name():
    results = [
        {
            "weights": "ema",
            "solver": "euler",
            "steps": n,
            "guidance_interval": [0, 1],
            "threshold_scale": 1,
            "guidance_scale": g,
        }
        for g in (3, 1)
        for n in (9, 4)
    ]
    lines = lines_of(results, "guidance_scale")
    assert {title: [r["guidance_scale"] for r in members] for title, members in lines.items()} == {
        "4 steps": [1, 3],
        "9 steps": [1, 3],
    }


def test_further_averages_are_weights_too(capsys, tmp_path, tiny):
    folder, small = tmp_path / "run", ["--num_samples=10", "--steps=1"]
    options = ["--training.steps=4", "--training.extra_ema_decays=[0.5]", "--training.ema_decay=0.9"]
    assert run(capsys, "train", "digits", "--output_dir", folder, *tiny, *options)[0] == 0
    assert run(capsys, "sweep", folder, *small, "--weights=ema,0.5,model")[0] == 0
    rows = list(csv.DictReader((folder / "sweep" / "sweep.csv").read_text().splitlines()))
    assert [(row["weights"], row["ema_decay"]) for row in rows] == [("ema", "0.9"), ("0.5", "0.5"), ("model", "")]
    assert len({row["images_sha256"] for row in rows}) == 3
    shutil.rmtree(folder / "model")
    (folder / "model-ema-0.5").rename(folder / "model")
    assert run(capsys, "evaluate", folder, *small)[0] == 0
    assert json.loads((folder / "evaluation.json").read_text())["images_sha256"] == rows[1]["images_sha256"]
    for verb in ("sweep", "evaluate"):
        status, _, err = run(capsys, verb, folder, *small, "--weights=0.7")
        assert status == 2 and "has no such EMA; choose ema or model: it has no further EMA" in err
    assert "weights is best; choose ema or model" in run(capsys, "evaluate", folder, *small, "--weights=best")[2]
