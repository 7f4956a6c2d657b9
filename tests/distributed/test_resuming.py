"""A run resumes from its checkpoint in any layout of processes, and ends where the uninterrupted one does."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from run_state import final_state
from safetensors.torch import load_file

from diffusion_moe import DiT
from diffusion_moe.cli import main
from diffusion_moe.storage import export

STEPS = 8
EXPERTS, SHARD, REPLICATE = ([f"--parallel.{axis}=2"] for axis in ("experts", "shard", "replicate"))


@pytest.fixture
def options(tiny):
    several = ["--training.extra_ema_decays=[0.5]", "--training.checkpoint_every=2", "--logging.every=1"]
    several += ["--training.posthoc_ema_stds=[0.1]", "--training.posthoc_ema_every=4"]
    shown = ["--logging.validate_every=2", "--logging.validate_images=32", "--logging.sample_every=2"]
    return [
        *tiny,
        *several,
        *shown,
        "--training.ema_decay=0.9",
        "--optimizer.eps=1e-5",
        "--optimizer.schedule=constant",
        "--evaluation.steps=2",
    ]


@pytest.fixture
def run(options, tmp_path, run_processes):
    """Trains, one after another, what is named: (folder, steps, options), on so many processes."""

    def run(world, *runs):
        todo = [
            {"arguments": [*options, "--output_dir", str(tmp_path / folder), f"--training.steps={steps}", *more]}
            for folder, steps, more in runs
        ]
        if world == 1:
            assert [main(["train", "digits", *each["arguments"]]) for each in todo] == [0] * len(todo)
        else:
            (tmp_path / "runs.json").write_text(json.dumps(todo))
            run_processes(world, "run_worker.py", tmp_path / "runs.json")

    return run


def metrics(folder, names=("loss", "grad_norm", "val_loss", "val_loss_ema_0.9", "val_loss_ema_0.5")):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {(row["step"], name): row[name] for row in rows for name in names if name in row}


def snapshots(folder):
    """The tensors of all snapshots of a run, whole, by their step."""
    taken = {path.name: folder / f"{path.name}.safetensors" for path in (folder / "snapshots").iterdir()}
    for name, file in taken.items():
        export(folder / "snapshots" / name, "posthoc_0.1.", file)
    return {name: load_file(file) for name, file in taken.items()}


def assert_same(one, other, tolerance=0.0):
    expected, found = final_state(one, STEPS), final_state(other, STEPS)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=tolerance, msg=lambda text, name=name: name + text)
    snapshots_of_one, others = snapshots(one), snapshots(other)
    # A run with more steps than it first had keeps the snapshots of its earlier ends too.
    assert snapshots_of_one.keys() == {"step-00000004", "step-00000008"} <= others.keys()
    for step, tensors in snapshots_of_one.items():
        for name, tensor in tensors.items():
            torch.testing.assert_close(others[step][name], tensor, rtol=0, atol=tolerance)
    numbers, others = metrics(one), metrics(other)
    assert len(numbers) == 2 * STEPS + 3 * 4
    assert {key: others[key] for key in numbers} == pytest.approx(numbers, rel=2 * tolerance, abs=0)


def preview(folder, step):
    return np.array(Image.open(folder / "previews" / f"step-{step:08d}.png"), dtype=int)


def test_two_processes_then_one(run, tmp_path):
    alone, moved = tmp_path / "alone", tmp_path / "moved"
    run(1, ("alone", STEPS, []))
    run(2, ("moved", STEPS // 2, EXPERTS))
    # What was sharded is saved whole, each EMA its own.
    expected = final_state(moved, STEPS // 2)
    for folder, kind in (("model", "ema"), ("model-ema-0.5", "ema_0.5")):
        published = DiT.from_pretrained(moved / folder).state_dict()
        assert {f"{kind}.{name}" for name in published} == {name for name in expected if name.startswith(f"{kind}.")}
        assert all(torch.equal(tensor, expected[f"{kind}.{name}"]) for name, tensor in published.items())
    assert not torch.equal(expected["ema.x_embedder.weight"], expected["ema_0.5.x_embedder.weight"])
    # Images show the EMA as it is, not as it was when its weights were last gathered.
    assert np.abs(preview(moved, 4) - preview(alone, 4)).max() <= 1
    assert np.abs(preview(alone, 2) - preview(alone, 4)).max() > 1
    run(1, ("moved", STEPS, []))
    assert_same(alone, moved, 5e-6)
    assert all(math.isfinite(value) for value in metrics(moved).values())


@pytest.mark.slow
def test_two_processes_resume_bit_for_bit(run, tmp_path):
    for layout in (EXPERTS, SHARD, REPLICATE):
        whole, halves = f"whole {layout}", f"halves {layout}"
        run(2, (whole, STEPS, layout), (halves, STEPS // 2, layout), (halves, STEPS, layout))
        assert_same(tmp_path / whole, tmp_path / halves)


@pytest.mark.slow
@pytest.mark.parametrize(
    "router",
    [
        ["--model.router=dsmoe"],
        ["--model.router=diffmoe", "--parallel.pool=global"],
        ["--model.router=race", "--parallel.pool=global"],
        ["--model.router=threshold"],
    ],
)
def test_one_process_then_four_then_two_then_one(run, tmp_path, router):
    run(1, ("alone", STEPS, router), ("moved", 2, router))
    run(4, ("moved", 4, [*router, *SHARD, *EXPERTS]))
    run(2, ("moved", 6, [*router, *REPLICATE]))
    run(1, ("moved", STEPS, router))
    assert_same(tmp_path / "alone", tmp_path / "moved", 5e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout", [[*SHARD, *EXPERTS], [*REPLICATE, *SHARD]], ids=["shard x experts", "replicate x shard"]
)
def test_four_processes_resume_bit_for_bit(run, tmp_path, layout):
    run(4, ("whole", STEPS, layout), ("halves", 3, layout), ("halves", STEPS, layout))
    assert_same(tmp_path / "whole", tmp_path / "halves")
