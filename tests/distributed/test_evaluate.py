"""Scores and statistics of two gloo processes equal those of one, also after a kill."""

import json
import signal

import numpy as np
import pytest

from diffusion_moe.cli import main
from diffusion_moe.evaluation import classifier, extract_features
from diffusion_moe.evaluation.reference import read_reference


@pytest.fixture
def start(start_processes):
    """The command in `world` processes with the environment that torchrun gives them; their exit codes and outputs."""

    def start(world, arguments, parts=0):
        return start_processes(world, "command_worker.py", parts, *arguments)

    return start


@pytest.fixture(autouse=True)
def as_in_the_worker(monkeypatch):
    monkeypatch.setattr(classifier, "EPOCHS", 1)
    monkeypatch.setattr(extract_features, "PART", 10)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, tiny_options):
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    assert main(["train", "digits", "--output_dir", str(folder), *tiny_options, "--training.steps=2"]) == 0
    return folder


def scores(path):
    """What does not depend on how long it took."""
    return {key: value for key, value in json.loads(path.read_text()).items() if key != "seconds_per_image"}


@pytest.mark.slow
@pytest.mark.parametrize(("run", "count"), [("run_folder", 45), ("shapes_run", 48)])
def test_a_killed_evaluation_is_finished_by_two_processes_bit_for_bit(run, count, tmp_path, request, start):
    folder = request.getfixturevalue(run)
    options = ["evaluate", folder, f"--num_samples={count}", "--batch_size=5", "--steps=2", "--output"]
    codes, _ = start(1, [*options, tmp_path / "killed.json"], parts=2)
    assert codes == [-signal.SIGKILL]
    (folder,) = (path for path in tmp_path.iterdir() if path.name.startswith(".progress"))
    assert len(list(folder.glob("part-*"))) == 2
    codes, (main_output, other_output) = start(2, [*options, tmp_path / "killed.json"])
    assert codes == [0, 0]
    assert f"resuming: 20 of {count} images are done" in main_output
    assert "wrote" in main_output and other_output == ""
    assert main([str(argument) for argument in [*options, tmp_path / "whole.json"]]) == 0
    assert scores(tmp_path / "killed.json") == scores(tmp_path / "whole.json")
    pictures = ["killed.png", "whole.png"] if run == "shapes_run" else []
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["killed.json", "whole.json", *pictures])
    assert len({(tmp_path / name).read_bytes() for name in pictures}) == len(pictures) // 2


def test_statistics_of_two_processes_equal_those_of_one(tmp_path, start):
    options = ["stats", "digits", "--extractor=classifier", "--split=test", "--num_features=50", "--batch_size=50"]
    options += ["--data.test_fraction=0.9"]  # a classifier of few images
    assert main([*options, "--output", str(tmp_path / "1.npz")]) == 0
    assert start(2, [*options, "--output", tmp_path / "2.npz"])[0] == [0, 0]
    one, two = (read_reference(tmp_path / f"{world}.npz") for world in (1, 2))
    np.testing.assert_allclose(two.pool.mean_D, one.pool.mean_D, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(two.pool.covariance_DD, one.pool.covariance_DD, rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(two.features_RD, one.features_RD)
    assert (two.about, two.extractor) == (one.about, one.extractor)
