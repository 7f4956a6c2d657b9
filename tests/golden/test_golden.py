"""Our models against answers of the published code: see cases/README.md.

`DIFFUSION_MOE_GOLDEN` names another folder of such cases.
"""

import os
from pathlib import Path

import golden_cases
import pytest

FOLDER = Path(os.environ.get("DIFFUSION_MOE_GOLDEN") or Path(__file__).parent / "cases")
CASES = sorted(path.parent.name for path in FOLDER.glob("*/case.json"))

each_case = pytest.mark.parametrize("name", CASES)


def test_there_are_cases():
    assert CASES, f"no case in {FOLDER}"


@each_case
def test_weights_and_settings_go_over_and_back_unchanged(name):
    golden_cases.check_weights_and_settings_go_over_and_back_unchanged(golden_cases.load(FOLDER / name))


@each_case
def test_outputs(name):
    golden_cases.check_outputs(golden_cases.load(FOLDER / name))


@each_case
def test_selections_and_thresholds(name):
    golden_cases.check_selections_and_thresholds(golden_cases.load(FOLDER / name))


@each_case
def test_flow_losses_and_gradients(name):
    golden_cases.check_flow_losses_and_gradients(golden_cases.load(FOLDER / name))


@each_case
def test_pixel_losses_and_gradients(name):
    golden_cases.check_pixel_losses_and_gradients(golden_cases.load(FOLDER / name))


@each_case
def test_flow_samples(name):
    golden_cases.check_flow_samples(golden_cases.load(FOLDER / name))


@each_case
def test_ddpm_losses_and_samples(name):
    golden_cases.check_ddpm_losses_and_samples(golden_cases.load(FOLDER / name))
