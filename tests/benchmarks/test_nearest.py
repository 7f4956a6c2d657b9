"""The figure of samples beside their nearest training images."""

import subprocess
import sys
from pathlib import Path

import nearest
import pytest
import torch
from PIL import Image

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "nearest.py"


def test_copies_are_found_at_distance_zero():
    torch.manual_seed(0)
    training = torch.rand(20, 3, 4, 4)
    distance, index = nearest.nearest(torch.stack((training[7], training[3] + 0.01)), training, 2, mirrored=False)
    assert index[:, 0].tolist() == [7, 3]
    assert distance[0, 0] == pytest.approx(0, abs=1e-3)
    assert distance[1, 0] == pytest.approx(0.01 * 48**0.5, rel=1e-3)
    assert (distance[:, 1] > distance[:, 0]).all()


def test_a_mirrored_copy_is_found_where_the_run_mirrors_images():
    torch.manual_seed(0)
    training = torch.rand(20, 3, 4, 4)
    copy = training[5:6].flip(-1)
    distance, index = nearest.nearest(copy, training, 2, mirrored=True)
    assert index[0, 0] == 5 and index[0, 1] != 5
    assert distance[0, 0] == pytest.approx(0, abs=1e-3)
    assert nearest.nearest(copy, training, 1, mirrored=False)[0] > 0.5


def test_a_sheet_has_each_sample_before_its_neighbours():
    samples = torch.full((2, 1, 4, 4), -1.0)
    neighbours = torch.full((2, 3, 1, 4, 4), 1.0)
    sheet = nearest.sheet(samples, neighbours, 2)
    side, gap = 4 * nearest.SCALE, nearest.GAP
    assert sheet.size == (2 * (4 * side + 2 * gap), side + gap)
    assert sheet.getpixel((side - 1, 0)) == (0, 0, 0)
    assert sheet.getpixel((side + gap, 0)) == (255, 255, 255)


@pytest.mark.slow
def test_the_script_draws_a_run(run_folder, tmp_path):
    figure = tmp_path / "nearest.png"
    done = subprocess.run([sys.executable, str(SCRIPT), str(run_folder), str(figure)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "median distance to the nearest training image: samples " in done.stdout
    assert Image.open(figure).width > 0
