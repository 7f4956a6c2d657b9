"""EMAs made of snapshots, against the average over all steps."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from diffusion_moe import DiT
from diffusion_moe.cli import main
from diffusion_moe.config import read_recipe
from diffusion_moe.posthoc_ema import Snapshot, combination, distance, inner_product
from diffusion_moe.run_folder import RunFolder
from diffusion_moe.storage import export
from diffusion_moe.training import loop
from diffusion_moe.training.ema import power_decay, power_exponent, update_ema
from diffusion_moe.training.loop import train

KEPT = (0.05, 0.1)
STEPS = 12
SNAPSHOTS = ["--training.posthoc_ema_stds=[0.05,0.1]", "--training.posthoc_ema_every=1"]


def shares(std, steps):
    """What the weights of each step weigh in the average: the integral of the power function over the step."""
    edges = (np.arange(steps + 1) / steps) ** (power_exponent(std) + 1)
    return np.diff(edges)


@pytest.mark.parametrize("std", [0.01, 0.05, 0.1, 0.2, 0.28])
def test_a_power_function_has_the_width_it_was_made_for(std):
    gamma = power_exponent(std)
    assert gamma > 0
    assert (gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)) == pytest.approx(std**2)
    times = (np.arange(100_000) + 0.5) / 100_000
    weights = times**gamma / (times**gamma).sum()
    mean = weights @ times
    assert np.sqrt(weights @ (times - mean) ** 2) == pytest.approx(std, rel=1e-4)


def test_updates_step_by_step_make_the_power_function():
    ema, model = torch.nn.Linear(1, 40, dtype=torch.float64), torch.nn.Linear(1, 40, dtype=torch.float64)
    for step in range(1, 41):  # the weights of step i are the unit vector i
        model.weight.data = torch.eye(40, dtype=torch.float64)[:, step - 1 : step]
        update_ema(ema, model, power_decay(0.1, step))
    np.testing.assert_allclose(ema.weight.detach().numpy()[:, 0], shares(0.1, 40), rtol=1e-9, atol=1e-12)


def test_inner_products_are_integrals():
    def profile(snapshot, times):
        gamma = power_exponent(snapshot.std)
        return np.where(times <= snapshot.step, (gamma + 1) / snapshot.step * (times / snapshot.step) ** gamma, 0)

    times = (np.arange(1_000_000) + 0.5) / 1_000_000 * 9
    for a, b in ((Snapshot(7, 0.05), Snapshot(9, 0.2)), (Snapshot(9, 0.1), Snapshot(4, 0.05)), (Snapshot(5, 0.1),) * 2):
        integral = (profile(a, times) * profile(b, times)).mean() * 9
        assert inner_product(a, b) == inner_product(b, a) == pytest.approx(integral, rel=1e-4)


def test_a_kept_average_is_itself_and_others_come_near():
    snapshots = [Snapshot(step, std) for step in range(10, 201, 10) for std in KEPT]
    for i in (0, 7, 39):
        np.testing.assert_allclose(combination(snapshots, snapshots[i]), np.eye(40)[i], atol=1e-6)
    for std in (0.03, 0.07, 0.15, 0.2):
        wanted = Snapshot(200, std)
        weights_S = combination(snapshots, wanted)
        assert weights_S.sum() == pytest.approx(1)
        found = sum(
            weight * np.pad(shares(each.std, each.step), (0, 200 - each.step))
            for weight, each in zip(weights_S, snapshots)
        )
        expected = shares(std, 200)
        error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
        assert error < 0.03 and error == pytest.approx(distance(snapshots, weights_S, wanted), abs=0.01)


@pytest.fixture(scope="module")
def run(tiny_options, tmp_path_factory):
    """A run with snapshots, and the weights after each of its steps."""
    folder, history, step = tmp_path_factory.mktemp("run"), [], loop.train_step

    def noted(state, *arguments):
        result = step(state, *arguments)
        history.append({name: tensor.double().clone() for name, tensor in state.model.state_dict().items()})
        return result

    options = [*tiny_options, *SNAPSHOTS, "--optimizer.learning_rate=1e-2", "--optimizer.schedule=constant"]
    options += [f"--training.steps={STEPS}", "--evaluation.steps=2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", noted)
        train(read_recipe("digits", options), folder, log=str)
    return folder, history


def test_models_are_averages_over_all_steps_of_any_width(run, capsys):
    folder, history = run
    assert main(["ema", str(folder), "--std", "0.1,0.07,0.15"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0] == (
        f"wrote {folder / 'model-ema-std0.1'} of 12 snapshots (0.0 % off the wanted average); --weights std0.1"
    )
    export(folder / "snapshots" / f"step-{STEPS:08d}", "posthoc_0.1.", folder / "kept.safetensors")
    kept = load_file(folder / "kept.safetensors")
    for std in (0.1, 0.07, 0.15):
        found = DiT.from_pretrained(folder / f"model-ema-std{std}").state_dict()
        assert found.keys() == history[0].keys()
        for name, tensor in found.items():
            weights = torch.stack([each[name] for each in history])
            average = torch.einsum("s,s...->...", torch.from_numpy(shares(std, STEPS)), weights)
            if std == 0.1:
                torch.testing.assert_close(tensor, kept[name], rtol=1e-5, atol=1e-7)
                torch.testing.assert_close(tensor.double(), average, rtol=1e-5, atol=1e-6)
            else:
                assert (tensor - average).norm() <= 0.03 * (weights[-1] - average).norm() + 1e-6, name


@pytest.mark.slow
def test_they_are_sampled_and_swept_like_other_emas(run, capsys):
    folder, _ = run
    assert main(["ema", str(folder), "--std", "0.05,0.2"]) == 0
    few = ["--classes=3", "--per_class=2", "--format=npz"]
    assert main(["sample", str(folder), "--weights=std0.2", *few]) == 0
    assert main(["sample", str(folder / "model-ema-std0.2"), *few, "--steps=2", "--guidance_scale=1.5"]) == 0
    assert main(["sample", str(folder), "--weights=std0.05", *few]) == 0
    of_run, other = (np.load(*(folder / "samples").glob(f"*emastd{std}-*.npz"))["images"] for std in (0.2, 0.05))
    of_folder = np.load(*(folder / "model-ema-std0.2" / "samples").glob("*.npz"))["images"]
    assert (of_run == of_folder).all() and (of_run != other).any()
    (about,) = (json.loads(path.read_text()) for path in (folder / "samples").glob("*emastd0.2-*.json"))
    assert (about["weights"], about["ema_std"], about["training_steps"]) == ("std0.2", 0.2, STEPS)
    capsys.readouterr()
    assert main(["sweep", str(folder), "--weights=std0.05,std0.20", "--steps=1", "--num_samples=10"]) == 0
    points = [json.loads(path.read_text()) for path in (folder / "sweep" / "points").iterdir()]
    assert {point["weights"] for point in points} == {"std0.05", "std0.2"}


def test_what_cannot_be_made_is_refused_in_one_line(run, run_folder, capsys, tiny, tmp_path):
    folder, _ = run

    def refusal(*arguments):
        assert main(list(map(str, arguments))) == 2
        return capsys.readouterr().err.strip()

    assert refusal("ema", folder, "--std=0.3") == (
        "diffusion-moe: std is 0.3; choose above 0 and at most 0.28, several with commas"
    )
    assert "train with --training.posthoc_ema_stds=[0.05,0.1]" in refusal("ema", run_folder, "--std=0.1")
    assert "is a model and no run" in refusal("ema", folder / "model", "--std=0.1")
    assert f"`diffusion-moe ema {folder} --std 0.11` makes it" in refusal("sample", folder, "--weights=std0.11")
    damaged = shutil.copytree(folder, tmp_path / "damaged")
    file = damaged / "snapshots" / "step-00000004" / "tensors-00000-000.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert "step-00000004" in (line := refusal("ema", damaged, "--std=0.1")) and "remove this snapshot" in line
    with pytest.raises(ValueError, match=r"posthoc_ema_stds are \(0.05, 0.1\), .*init.lora_rank\); remove them"):
        read_recipe("digits", [*tiny, *SNAPSHOTS, "--init.from_checkpoint=another", "--init.lora_rank=2"])
    with pytest.raises(ValueError, match=r"posthoc_ema_stds are \(0.0,\); choose above 0 and at most 0.28"):
        read_recipe("digits", [*tiny, "--training.posthoc_ema_stds=[0.0]"])


def files(folder):
    """The content of the tensor files of all snapshots."""
    paths = sorted((folder / "snapshots").rglob("*.safetensors"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_a_resumed_run_has_the_snapshots_of_the_whole_one_bit_for_bit(tiny, tmp_path):
    def run(folder, steps):
        options = ["--optimizer.schedule=constant", "--training.checkpoint_every=2", f"--training.steps={steps}"]
        train(read_recipe("digits", [*tiny, *SNAPSHOTS, *options]), tmp_path / folder, log=str)
        return files(tmp_path / folder)

    whole = run("whole", 4)
    assert len(whole) == 4
    assert run("halves", 2).keys() < whole.keys()
    # Killed after step 3: what later steps left is removed and made again.
    snapshots = RunFolder(tmp_path / "halves").snapshots
    shutil.copytree(snapshots / "step-00000002", snapshots / "step-00000003")
    shutil.copytree(snapshots / "step-00000002", snapshots / "step-00000009")
    assert run("halves", 4) == whole
