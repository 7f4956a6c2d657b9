"""Steps whose loss is not finite: skipped, rolled back, and in the end reported."""

import json
import os
import signal
from types import SimpleNamespace

import pytest
import torch
from poisoned_digits import poison_digits

from diffusion_moe.cli import main
from diffusion_moe.config import read_recipe
from diffusion_moe.data import load_dataset
from diffusion_moe.training.checkpoint import Checkpoints, state_tensors
from diffusion_moe.training.dataloader import images_of_step
from diffusion_moe.training.loop import train
from diffusion_moe.training.nonfinite import NonFiniteError, NonFiniteSteps, RollBack
from diffusion_moe.training.state import make_state

STEPS = 12


class Rule:
    """The rule alone, on a state without a model; `take` answers whether a checkpoint is saved after a step."""

    def __init__(self, limit):
        self.state = SimpleNamespace(step=0, nonfinite_steps=[], skipped_steps=set(), rolled_back=False)
        self.steps = NonFiniteSteps(self.state, limit)
        self.loaded = 0

    def take(self, step, finite, due=False, last=False):
        self.steps.note(step, finite)
        return self.steps.should_save(due, last)

    def roll_back(self):
        return self.steps.roll_back(self.load)

    def load(self):
        self.loaded += 1


def test_up_to_the_limit_in_a_row_are_skipped():
    rule = Rule(limit=2)
    for step, finite in enumerate([False, False, True, False, False, True], start=1):
        rule.take(step, finite)
    assert rule.state.nonfinite_steps == [] and not rule.steps.undecided
    rule.take(7, False)
    rule.take(8, False)
    with pytest.raises(RollBack):
        rule.take(9, False)
    assert rule.state.nonfinite_steps == [7, 8, 9]


def test_a_roll_back_skips_the_row_and_a_second_one_is_refused_until_a_later_step_is_finite():
    rule = Rule(limit=0)
    for step in (4, 6):
        with pytest.raises(RollBack):
            rule.take(step, False)
        assert rule.roll_back() == [step]
        assert (rule.state.nonfinite_steps, rule.state.rolled_back, rule.steps.undecided) == ([], True, True)
        assert not rule.take(step - 1, True)  # before the skipped step: nothing is known yet
        assert rule.state.rolled_back
        assert rule.take(step + 1, True)  # beyond it: saved at once
        assert (rule.state.rolled_back, rule.steps.undecided) == (False, False)
    assert rule.state.skipped_steps == {4, 6} and rule.loaded == 2
    with pytest.raises(RollBack):
        rule.take(8, False)
    rule.roll_back()
    with pytest.raises(RollBack):
        rule.take(9, False)
    assert rule.roll_back() is None
    assert rule.loaded == 3 and rule.state.skipped_steps == {4, 6, 8} and rule.state.nonfinite_steps == [9]


def test_a_checkpoint_that_is_due_waits_for_the_next_finite_step_or_the_last():
    rule = Rule(limit=5)
    assert rule.take(1, True, due=True)
    assert not rule.take(2, True)
    assert not rule.take(3, False, due=True)
    assert rule.steps.undecided and not rule.take(4, False)
    assert rule.take(5, True) and not rule.steps.undecided
    assert not rule.take(6, False, due=True)
    assert rule.take(7, False, last=True)


def test_a_roll_back_forgets_the_checkpoint_that_was_due():
    rule = Rule(limit=1)
    assert not rule.take(4, False, due=True)
    with pytest.raises(RollBack):
        rule.take(5, False)
    assert rule.roll_back() == [4, 5]
    assert not rule.take(3, True)


@pytest.fixture
def recipe(tiny):
    def make(*options):
        shown = [f"--training.steps={STEPS}", "--logging.every=1", "--training.max_nonfinite_steps=1"]
        return read_recipe("digits", [*tiny, *shown, "--model.router=dsmoe", "--training.checkpoint_every=4", *options])

    return make


@pytest.fixture
def poison(recipe, monkeypatch):
    """Spoils an image of each of some steps' batches; all batches of the test's runs are of different images."""

    def spoil(*steps):
        dataset = load_dataset(recipe().data, "train")
        images = {images_of_step(recipe(), dataset, step)[-1] for step in steps}
        poison_digits(monkeypatch, images)

    return spoil


def final_state(recipe, folder):
    state = make_state(recipe, torch.device("cpu"))
    checkpoints = Checkpoints(folder / "checkpoints", recipe.training)
    checkpoints.load_latest(state)
    assert state.step == STEPS
    return state


def logged(folder):
    """The steps of which metrics.jsonl has a loss; fails on what is no JSON."""

    def refuse(constant):
        raise AssertionError(constant)

    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=refuse) for line in lines]
    return [row["step"] for row in rows if "loss" in row]


def test_a_few_are_left_out_and_change_nothing(recipe, poison, tmp_path):
    """As if their batches had been left out from the start, which the other run does after going back."""
    poison(6, 7)
    lines = []
    train(recipe("--training.max_nonfinite_steps=2"), tmp_path / "on", log=lines.append)
    train(recipe(), tmp_path / "back", log=lines.append)
    assert sum("was skipped" in line for line in lines) == 4
    on, back = (final_state(recipe(), tmp_path / name) for name in ("on", "back"))
    assert (on.skipped_steps, back.skipped_steps) == (set(), {6, 7})
    expected, found = state_tensors(on), state_tensors(back)
    assert not [name for name in expected if "ema." not in name and not torch.equal(expected[name], found[name])]
    for folder in ("on", "back"):
        assert logged(tmp_path / folder) == [step for step in range(1, STEPS + 1) if step not in (6, 7)]


def test_more_in_a_row_go_back_to_the_last_good_checkpoint(recipe, poison, tmp_path):
    """One is made after the first good step beyond them, which is where going back again would lead."""
    poison(7, 8, 9)
    lines = []
    train(recipe("--training.max_nonfinite_steps=2"), tmp_path, log=lines.append)
    assert [line for line in lines if "rolled back" in line] == [
        "warning: rolled back to step 4; the batches of steps 7 to 9 are skipped"
    ]
    assert final_state(recipe(), tmp_path).skipped_steps == {7, 8, 9}
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step-00000012", "step-00000010"}


def test_a_checkpoint_that_is_owed_is_made_after_the_next_good_step(recipe, poison, tmp_path):
    poison(8)
    train(recipe(), tmp_path, log=str)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step-00000012", "step-00000009"}


def test_a_run_that_stays_bad_stops_and_names_the_images(recipe, poison, tmp_path):
    poison(2, 3, 4, 5)
    long = recipe("--training.checkpoint_every=100")
    lines = []
    with pytest.raises(NonFiniteError, match="steps 4 to 5"):
        train(long, tmp_path, log=lines.append)
    assert lines[-1].startswith("stopped: ") and "nonfinite-steps.json" in lines[-1] and "\n" not in lines[-1]
    named = json.loads((tmp_path / "nonfinite-steps.json").read_text())
    dataset = load_dataset(long.data, "train")
    assert named == {
        "steps": [4, 5],
        "training_images": {str(step): images_of_step(long, dataset, step) for step in (4, 5)},
    }
    # The same again stops again: it remembers what it left out, and that it has gone back.
    again = []
    with pytest.raises(NonFiniteError):
        train(long, tmp_path, log=again.append)
    assert not [line for line in again if "step 2 was" in line or "step 3 was" in line or "rolled back" in line]
    # Allowed to leave more out, it comes to its end.
    train(recipe("--training.checkpoint_every=100", "--training.max_nonfinite_steps=2"), tmp_path, log=str)
    assert final_state(long, tmp_path).skipped_steps == {2, 3}


def test_it_goes_back_again_if_a_good_step_came_after_those_left_out(recipe, poison, tmp_path):
    """Each time to the first good step after the last time, so that a run of many bad batches comes to its end."""
    poison(2, 3, 5, 6, 8, 9)
    lines = []
    train(recipe("--training.checkpoint_every=100"), tmp_path, log=lines.append)
    assert [line.partition(";")[0] for line in lines if "rolled back" in line] == [
        "warning: rolled back to step 0",
        "warning: rolled back to step 4",
        "warning: rolled back to step 7",
    ]
    assert final_state(recipe(), tmp_path).skipped_steps == {2, 3, 5, 6, 8, 9}
    assert logged(tmp_path) == [1, 4, 7, 10, 11, 12]


def test_bad_steps_before_an_interruption_do_not_count_after_going_back(recipe, poison, tmp_path):
    """The checkpoint of the interruption lies among them, and is the one that is gone back to."""
    poison(7, 8, 9, 10, 11)
    bad = recipe("--training.max_nonfinite_steps=3")
    asked = []

    def interrupt(line):
        if "step 7 was" in line and not asked:
            asked.append(line)
            os.kill(os.getpid(), signal.SIGTERM)

    assert train(bad, tmp_path, log=interrupt).interrupted_by == signal.SIGTERM
    lines = []
    train(bad, tmp_path, log=lines.append)
    assert [line for line in lines if "rolled back" in line] == [
        "warning: rolled back to step 9; the batches of steps 7 to 10 are skipped"
    ]
    assert final_state(bad, tmp_path).skipped_steps == {7, 8, 9, 10}


def test_the_command_exits_with_1_and_one_line(tiny, poison, tmp_path, capsys):
    poison(1, 2, 3, 4)
    options = [f"--training.steps={STEPS}", "--training.max_nonfinite_steps=1", "--output_dir", str(tmp_path)]
    assert main(["train", "digits", *tiny, *options]) == 1
    shown = capsys.readouterr()
    assert shown.out.splitlines()[-1].startswith("stopped: the loss or gradient of steps 3 to 4 is not finite")
    assert shown.err == ""


@pytest.mark.parametrize("when", ["rolled back", "step 9 "], ids=["after going back", "among bad steps"])
def test_a_run_interrupted_there_ends_as_the_uninterrupted_one(recipe, poison, tmp_path, when):
    """Only EMAs may differ, by what they moved in skipped steps."""
    poison(7, 8, 9, 10)
    bad = recipe("--training.max_nonfinite_steps=3")
    train(bad, tmp_path / "whole", log=str)
    asked = []

    def interrupt(line):
        if when in line and not asked:
            asked.append(line)
            os.kill(os.getpid(), signal.SIGTERM)

    assert train(bad, tmp_path / "stopped", log=interrupt).interrupted_by == signal.SIGTERM
    train(bad, tmp_path / "stopped", log=str)
    whole, stopped = (final_state(bad, tmp_path / name) for name in ("whole", "stopped"))
    assert whole.skipped_steps == stopped.skipped_steps == {7, 8, 9, 10}
    expected, found = state_tensors(whole), state_tensors(stopped)
    assert not [name for name in expected if "ema." not in name and not torch.equal(expected[name], found[name])]
    assert logged(tmp_path / "whole") == logged(tmp_path / "stopped")
