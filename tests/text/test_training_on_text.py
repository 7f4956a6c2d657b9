"""From captioned pictures to a run, by the command: from images, and from latents with cached features."""

import json

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
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
        ["--data.buckets=[8x8,10x8]", "--logging.validate_every=1", "--training.batch_size=4"],
    ],
    ids=["cross", "joint", "accumulated", "buckets"],
)
def test_training_resumes_bit_for_bit(tmp_path, tiny_t2i, options):
    options = [*tiny_t2i, *options]
    assert train(tmp_path / "whole", options, f"--training.steps={STEPS}") == 0
    assert train(tmp_path / "parts", options, "--training.steps=2") == 0
    assert train(tmp_path / "parts", options, f"--training.steps={STEPS}") == 0
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    assert len(losses(tmp_path / "whole")) == STEPS
    assert torch.tensor(losses(tmp_path / "whole")).isfinite().all()


@pytest.mark.parametrize("kind", ["t5", "clip"])
def test_a_shipped_recipe_on_a_cache_with_captions(
    tmp_path, kind, captioned_folder, vae_folder, make_text_encoder, tiny_options
):
    encoder = make_text_encoder(kind, tmp_path / "encoder")
    text = ["--captions=text", f"--text_encoder={encoder}", "--text_length=12", "--flip=false"]
    paths = [f"--vae={vae_folder}", f"--output={tmp_path / 'cache'}"]
    assert main(["encode", str(captioned_folder), *paths, *text, "--image_size=16", "--device=cpu"]) == 0
    options = [*tiny_options, "--model.sample_size=8", "--model.text_dim=16", "--model.text_length=12"]
    options += ["--data.num_workers=0", "--training.device=cpu", "--training.precision=fp32", "--training.steps=2"]
    options += [f"--data.path={tmp_path / 'cache'}", f"--model.text_pooled_dim={16 if kind == 'clip' else 0}"]
    run = tmp_path / "run"
    assert main(["train", "t2i-dsmoe-s-e16", "--output_dir", str(run), *options]) == 0
    record = json.loads((run / "model" / "data.json").read_text())
    assert record["text"]["encoder"] == str(encoder) and record["text"]["length"] == 12
    drawn = ["--prompt=a red square", "--steps=2", "--per_class=2", "--format=npz", f"--output={tmp_path / 'a.npz'}"]
    assert main(["sample", str(run), *drawn, "--width=24"]) == 0
    assert np.load(tmp_path / "a.npz")["images"].shape == (2, 16, 24, 3)
    assert main(["convert", str(run), "--output", str(tmp_path / "pipeline")]) == 0
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    assert pipe("a", num_inference_steps=1, width=20, output_type="np").images.shape == (1, 16, 20, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.text_dim=8"], "gives features of width 16 and pooled ones of 0, but model.text_dim is 8"),
        (["--model.text_length=11"], "captions have up to 12 tokens, but model.text_length is 11"),
        (["--data.text_encoder=null"], "model.text_dim is 16, but the data has no encoded captions"),
        (["--data.text_encoder=/no/such"], "cannot load the text encoder /no/such"),
        (["--diffusion.caption_dropout=2"], "diffusion.caption_dropout is 2.0; choose from 0 to 1"),
    ],
)
def test_mistakes_are_one_line(tmp_path, tiny_t2i, capsys, options, message):
    capsys.readouterr()
    assert train(tmp_path / "run", [*tiny_t2i, *options]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
