"""The loop: killed and interrupted runs end where an uninterrupted one does."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffusion_moe.cli import main
from diffusion_moe.config import read_recipe
from diffusion_moe.training import loop
from diffusion_moe.training.loop import train

STEPS = 12


def options(tiny, router="diffmoe"):
    return [
        *tiny,
        f"--model.router={router}",
        "--data.flip=true",
        f"--training.steps={STEPS}",
        "--training.checkpoint_every=4",
        "--logging.every=1",
    ]


def quietly(line):
    """Takes what the loop says."""


def start(arguments, folder):
    command = [sys.executable, "-m", "diffusion_moe", "train", "digits", "--output_dir", str(folder), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )


def fork(arguments, folder):
    """The command in a process forked from this one, which has imported everything."""
    command = ["train", "digits", "--output_dir", str(folder), *arguments]
    process = multiprocessing.get_context("fork").Process(target=main, args=(command,))
    process.start()
    return process


def has_logged(folder, step):
    metrics = folder / "metrics.jsonl"
    return metrics.exists() and len(metrics.read_text().splitlines()) >= step


def wait_for_step(process, folder, step):
    """Wait until a started run has logged a step."""
    while not has_logged(folder, step):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.005)  # leave the processor to the run


def final_state(folder):
    path = folder / "checkpoints" / f"step-{STEPS:08d}"
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


def losses(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in rows]


def assert_same_run(one, other):
    expected, found = final_state(one), final_state(other)
    assert expected.keys() == found.keys()
    different = [name for name in expected if not torch.equal(expected[name], found[name])]
    assert not different
    assert losses(one) == losses(other)


@pytest.fixture(scope="module")
def uninterrupted(tiny_options, tmp_path_factory):
    """A run in this process, to which runs in others are compared."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    train(read_recipe("digits", options(tiny_options)), folder, log=quietly)
    return folder


@pytest.fixture
def resume(tiny, capsys):
    """Give the command again, in this process; what it prints."""

    def resume(folder):
        capsys.readouterr()
        assert main(["train", "digits", "--output_dir", str(folder), *options(tiny)]) == 0
        return capsys.readouterr().out

    return resume


def test_a_killed_run_resumes_bit_for_bit(tiny, tmp_path, uninterrupted, resume):
    """SIGKILL at a random step; weights, EMA, optimizer, order, flips and thresholds end the same."""
    folder = tmp_path / "killed"
    step = random.SystemRandom().randint(1, STEPS - 2)
    process = fork(options(tiny), folder)
    while process.is_alive() and not has_logged(folder, step):
        time.sleep(0.001)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL and not (folder / "model").exists()
    output = resume(folder)
    assert ("resuming from" in output) == (step >= 5), output
    assert_same_run(uninterrupted, folder)


@pytest.mark.slow
def test_a_killed_run_with_a_loading_process_resumes_bit_for_bit(tiny, tmp_path, uninterrupted, resume):
    folder = tmp_path / "killed"
    process = start([*options(tiny), "--data.num_workers=1"], folder)
    wait_for_step(process, folder, random.SystemRandom().randint(1, STEPS - 2))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (folder / "model").exists()
    resume(folder)
    assert_same_run(uninterrupted, folder)


@pytest.mark.parametrize(
    ("number", "status"), [pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow), (signal.SIGTERM, 143)]
)
def test_an_interrupted_run_saves_logs_how_to_resume_and_resumes(tiny, tmp_path, uninterrupted, resume, number, status):
    """The signal goes to the whole process group, as a terminal's Ctrl-C does: the loading process gets it too."""
    folder = tmp_path / "interrupted"
    process = start([*options(tiny), "--data.num_workers=1"], folder)
    wait_for_step(process, folder, 2)
    os.killpg(process.pid, number)
    output = process.communicate()[0]
    assert process.returncode == status, output
    assert "Run the same command again to resume." in output
    assert "Traceback" not in output
    assert "resuming from" in resume(folder)
    assert_same_run(uninterrupted, folder)


@pytest.mark.slow
@pytest.mark.parametrize("router", ["dense", "tc", "ec", "dsmoe", "race", "threshold"])
def test_every_rule_resumes_bit_for_bit_after_a_kill(tiny, tmp_path, router):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    start(options(tiny, router), whole).communicate()
    for _ in range(3):
        process = start(options(tiny, router), killed)
        done = len(losses(killed)) if (killed / "metrics.jsonl").exists() else 0
        wait_for_step(process, killed, random.SystemRandom().randint(min(done + 1, STEPS - 1), STEPS - 1))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    start(options(tiny, router), killed).communicate()
    assert_same_run(whole, killed)


def test_a_damaged_newest_checkpoint_costs_its_steps_only(tiny, tmp_path, uninterrupted):
    recipe = read_recipe("digits", options(tiny))
    shutil.copytree(uninterrupted, tmp_path / "damaged")
    newest = tmp_path / "damaged" / "checkpoints" / f"step-{STEPS:08d}" / "tensors-00000-000.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    lines = []
    train(recipe, tmp_path / "damaged", log=lines.append)
    assert any("warning" in line and "tensors-00000-000.safetensors has" in line for line in lines)
    assert any("resuming from" in line and "step-00000008" in line for line in lines)
    assert_same_run(uninterrupted, tmp_path / "damaged")


def test_if_no_checkpoint_is_good_training_does_not_silently_start_from_scratch(tiny, tmp_path, uninterrupted):
    recipe = read_recipe("digits", options(tiny))
    shutil.copytree(uninterrupted, tmp_path, dirs_exist_ok=True)
    for path in tmp_path.glob("checkpoints/*/manifest.json"):
        path.unlink()
    with pytest.raises(ValueError, match="no checkpoint in"):
        train(recipe, tmp_path, log=quietly)


def test_a_longer_run_of_the_same_recipe_continues(tiny, tmp_path):
    arguments = [*options(tiny), "--optimizer.schedule=constant"]
    train(read_recipe("digits", [*arguments, f"--training.steps={STEPS // 2}"]), tmp_path / "longer", log=quietly)
    train(read_recipe("digits", arguments), tmp_path / "longer", log=quietly)
    train(read_recipe("digits", arguments), tmp_path / "whole", log=quietly)
    assert_same_run(tmp_path / "whole", tmp_path / "longer")


def test_the_run_folder_is_as_documented(tiny, tmp_path):
    arguments = [option for option in options(tiny) if "tensorboard" not in option]
    recipe = read_recipe("digits", arguments)
    train(recipe, tmp_path, log=quietly)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"recipe.yaml", "checkpoints", "metrics.jsonl", "tensorboard", "model", ".lock"}
    assert read_recipe(tmp_path / "recipe.yaml") == recipe
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step-00000012", "step-00000008"}
    row = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"step", "loss", "grad_norm", "learning_rate", "images_per_second", "loss_capacity"} <= row.keys()
    assert {"model_tflops", "memory_gb", "imbalance", "seconds_data", "seconds_forward"} <= row.keys()
    assert {"moe_0/load_max", "moe_0/load_entropy", "moe_0/dead_experts", "moe_0/threshold"} <= row.keys()
    assert row["moe_0/capacity"] == recipe.model.capacity  # a pool is always full
    bins = [value for name, value in row.items() if name.startswith("loss_t")]
    assert min(bins) <= row["loss"] <= max(bins)


def test_the_saved_model_is_the_ema(uninterrupted):
    from diffusion_moe import DiT

    saved = DiT.from_pretrained(uninterrupted / "model").state_dict()
    ema = {name[4:]: tensor for name, tensor in final_state(uninterrupted).items() if name.startswith("ema.")}
    assert saved.keys() == ema.keys()
    assert all(torch.equal(saved[name], ema[name]) for name in saved)


def test_a_terminal_gets_a_bar(tiny, tmp_path, monkeypatch):
    """On a pseudo-terminal standard error shows a bar with step, loss and speed."""
    import pty

    master, terminal = pty.openpty()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with os.fdopen(terminal, "w") as stderr, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stderr)
        process = fork(options(tiny), tmp_path / "run")
    shown = b""
    try:
        while part := os.read(master, 4096):
            shown += part
    except OSError:  # the other end is closed
        pass
    process.join()
    os.close(master)
    assert (tmp_path / "run" / "model").exists()
    assert b"step 12/12" in shown
    assert b"images/s" in shown


@pytest.fixture
def images(tmp_path):
    """Sixteen grey images of two classes, the first of them broken."""
    folder = tmp_path / "images"
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        for i in range(8):
            Image.fromarray(np.full((8, 8), 16 * i, dtype=np.uint8)).save(folder / name / f"{i}.png")
    (folder / "a" / "0.png").write_bytes(b"broken")
    return [
        "--data.kind=folder",
        f"--data.path={folder}",
        "--data.test_fraction=0",
        "--model.num_classes=2",
    ]


def test_unreadable_images_are_counted_in_the_metrics(tiny, tmp_path, images):
    lines = []
    recipe = read_recipe("digits", [*options(tiny), *images, "--data.on_corrupt=skip"])
    train(recipe, tmp_path / "run", log=lines.append)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["skipped_images"] == 1  # each step of 16 draws it once
    assert any("unreadable images were replaced by others: 1 (data.on_corrupt" in line for line in lines)
    assert (tmp_path / "run" / "skipped.txt").read_text() == f"{tmp_path / 'images' / 'a' / '0.png'}\n"


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_ends_the_run_with_one_line(tiny, tmp_path, images, workers):
    # The first image is read to compare shapes, in this process; the broken one is moved to where only workers look.
    folder = tmp_path / "images" / "a"
    (folder / "0.png").rename(folder / "5.png")
    recipe = read_recipe("digits", [*options(tiny), *images, f"--data.num_workers={workers}"])
    with pytest.raises(ValueError, match=r"cannot read image .*a/5\.png") as caught:
        train(recipe, tmp_path / "run", log=quietly)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("precision", "slow"), [("bf16", True), ("bf16", False), ("fp32", True)])
def test_a_processor_that_is_slow_in_bfloat16_is_logged(precision, slow, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "SLOW_DTYPES", frozenset({torch.bfloat16} if slow else ()))
    lines = []
    recipe = read_recipe("digits", [*tiny, "--training.steps=1", f"--training.precision={precision}"])
    train(recipe, tmp_path / "run", log=lines.append)
    warnings = [line for line in lines if line.startswith("warning")]
    logged = ["warning: this processor multiplies bfloat16 slower than float32; training.precision fp32 is faster"]
    assert warnings == (logged if slow and precision == "bf16" else [])
