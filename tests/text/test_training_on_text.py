"""From captioned pictures to a run, by the command."""

import json

import pytest
import torch
from safetensors.torch import load_file

from diffusion_moe.cli import main

STEPS = 3


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def train(folder, options, *more):
    return main(["train", "digits", "--output_dir", str(folder), *options, "--logging.every=1", *more])


def weights(folder):
    return load_file(next((folder / "model").glob("*.safetensors")))


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--model.router=diffmoe", "--model.text_conditioning=joint", "--model.text_null=empty"],
        ["--model.router=dense", "--training.accumulation=2", "--logging.validate_every=3"],
    ],
    ids=["cross", "joint", "accumulated"],
)
def test_training_goes_on_bit_for_bit(tmp_path, tiny_t2i, options):
    options = [*tiny_t2i, *options]
    assert train(tmp_path / "whole", options, f"--training.steps={STEPS}") == 0
    assert train(tmp_path / "parts", options, "--training.steps=2") == 0
    assert train(tmp_path / "parts", options, f"--training.steps={STEPS}") == 0
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    assert len(losses(tmp_path / "whole")) == STEPS
    assert torch.tensor(losses(tmp_path / "whole")).isfinite().all()
