"""Checkpoints: whole, verified, and never the loss of an older one."""

import json

import pytest
import torch

from diffusion_moe.config import read_recipe
from diffusion_moe.data import batches_from, load_dataset
from diffusion_moe.storage import AsyncWriter, CheckpointError, checkpoint_path, checkpoints_in
from diffusion_moe.training.checkpoint import Checkpoints, load_checkpoint, state_tensors
from diffusion_moe.training.state import make_state
from diffusion_moe.training.step import train_step

CPU = torch.device("cpu")


@pytest.fixture
def recipe(tiny):
    return read_recipe("digits", [*tiny, "--model.router=diffmoe", "--optimizer.schedule=constant"])


def run(recipe, state, steps):
    data = load_dataset(recipe.data, "train")
    for draws in batches_from(state.step, state.step + steps, len(data), recipe.training.batch_size, 0):
        train_step(state, recipe, data.__getitems__(draws))


def save_checkpoint(folder, state, keep):
    recipe = read_recipe("digits", [f"--training.keep_checkpoints={keep}"])
    checkpoints = Checkpoints(folder, recipe.training)
    checkpoints.save_state(state)
    checkpoints.close()
    return checkpoint_path(folder, state.step)


def load_latest(folder, state):
    found = Checkpoints(folder, read_recipe("digits").training).load_latest(state)
    return found.path, found.problems


def test_a_restored_state_continues_bit_for_bit(recipe, tmp_path):
    state = make_state(recipe, CPU)
    run(recipe, state, 3)
    path = save_checkpoint(tmp_path, state, keep=2)
    run(recipe, state, 3)
    restored = make_state(recipe, CPU)
    load_checkpoint(path, restored)
    assert restored.step == 3
    run(recipe, restored, 3)
    expected, found = state_tensors(state), state_tensors(restored)
    names = dict(state.model.named_parameters())
    assert {f"optimizer.{moment}.{name}" for name in names for moment in ("step", "exp_avg")} < expected.keys()
    assert {f"ema.{name}" for name in names} < expected.keys()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_the_newest_are_kept_and_leftovers_go(recipe, tmp_path):
    state = make_state(recipe, CPU)
    (tmp_path / "step-00000001.partial").mkdir()
    for _ in range(4):
        run(recipe, state, 1)
        save_checkpoint(tmp_path, state, keep=2)
    assert [path.name for path in checkpoints_in(tmp_path)] == ["step-00000004", "step-00000003"]
    assert len(list(tmp_path.iterdir())) == 2


def _tensors(path):
    return path / "tensors-00000-000.safetensors"


def _truncate(path):
    data = _tensors(path).read_bytes()
    _tensors(path).write_bytes(data[: len(data) // 2])


def _flip_a_bit(path):
    data = bytearray(_tensors(path).read_bytes())
    data[-5] ^= 1
    _tensors(path).write_bytes(data)


def _lose_a_file(path):
    _tensors(path).unlink()


def _lose_the_manifest(path):
    (path / "manifest.json").unlink()


def _cut_the_manifest(path):
    (path / "manifest.json").write_text((path / "manifest.json").read_text()[:20])


def _replace_the_manifest(path):
    (path / "manifest.json").write_text(json.dumps([1, 2]))


@pytest.mark.parametrize(
    "damage",
    [_truncate, _flip_a_bit, _lose_a_file, _lose_the_manifest, _cut_the_manifest, _replace_the_manifest],
)
def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_is_used(recipe, tmp_path, damage):
    state = make_state(recipe, CPU)
    run(recipe, state, 1)
    good = save_checkpoint(tmp_path, state, keep=3)
    at_one = {name: tensor.clone() for name, tensor in state_tensors(state).items()}
    run(recipe, state, 1)
    bad = save_checkpoint(tmp_path, state, keep=3)
    damage(bad)
    with pytest.raises(CheckpointError, match="step-00000002"):
        load_checkpoint(bad, make_state(recipe, CPU))
    restored = make_state(recipe, CPU)
    path, problems = load_latest(tmp_path, restored)
    assert path == good
    assert len(problems) == 1
    assert "step-00000002" in problems[0]
    assert restored.step == 1
    assert all(torch.equal(tensor, at_one[name]) for name, tensor in state_tensors(restored).items())


def test_a_damaged_newer_checkpoint_does_not_push_out_a_good_one(recipe, tmp_path):
    """Resumed from before the damaged one, with room for a single checkpoint."""
    state = make_state(recipe, CPU)
    run(recipe, state, 3)
    _truncate(save_checkpoint(tmp_path, state, keep=1))
    earlier = make_state(recipe, CPU)
    for _ in range(2):
        run(recipe, earlier, 1)
        good = save_checkpoint(tmp_path, earlier, keep=1)
    assert load_latest(tmp_path, make_state(recipe, CPU))[0] == good
    run(recipe, earlier, 1)
    assert save_checkpoint(tmp_path, earlier, keep=1) == load_latest(tmp_path, make_state(recipe, CPU))[0]
    assert len(checkpoints_in(tmp_path)) == 1


def test_a_failed_save_leaves_the_older_checkpoint_whole(recipe, tmp_path, monkeypatch):
    state = make_state(recipe, CPU)
    run(recipe, state, 1)
    good = save_checkpoint(tmp_path, state, keep=1)
    run(recipe, state, 1)

    def full_disk(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("diffusion_moe.storage.writing.write_safetensors", full_disk)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(tmp_path, state, keep=1)
    assert load_latest(tmp_path, make_state(recipe, CPU)) == (good, [])


def test_training_continues_while_the_state_of_the_call_is_written(recipe, tmp_path):
    state = make_state(recipe, CPU)
    run(recipe, state, 2)
    state.skipped_steps = {7}
    at_two = {name: tensor.clone() for name, tensor in state_tensors(state).items()}
    checkpoints = Checkpoints(tmp_path, recipe.training)
    checkpoints.save_state(state)
    run(recipe, state, 1)
    checkpoints.close()
    restored = make_state(recipe, CPU)
    load_checkpoint(checkpoint_path(tmp_path, 2), restored)
    assert (restored.step, restored.skipped_steps) == (2, {7})
    assert all(torch.equal(tensor, at_two[name]) for name, tensor in state_tensors(restored).items())


def test_another_models_checkpoint_is_refused(recipe, tmp_path, tiny):
    state = make_state(recipe, CPU)
    run(recipe, state, 1)
    path = save_checkpoint(tmp_path, state, keep=1)
    other = make_state(read_recipe("digits", [*tiny, "--model.router=dense"]), CPU)
    with pytest.raises(CheckpointError, match="is of other tensors") as caught:
        load_checkpoint(path, other)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["step", "skipped_steps", "nonfinite_steps", "rolled_back", "seed", "batch_sizes"])
def test_a_checkpoint_that_lacks_metadata_is_refused(recipe, tmp_path, monkeypatch, name):
    save = AsyncWriter.save

    def save_less(self, step, tensors, metadata):
        save(self, step, tensors, {key: value for key, value in metadata.items() if key != name})

    monkeypatch.setattr(AsyncWriter, "save", save_less)
    path = save_checkpoint(tmp_path, make_state(recipe, CPU), keep=1)
    with pytest.raises(CheckpointError, match=f"is of another version: its metadata lack '{name}'"):
        load_checkpoint(path, make_state(recipe, CPU))
