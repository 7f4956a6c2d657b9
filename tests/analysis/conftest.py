"""A small finished run of any kind."""

import pytest
import torch

from diffusion_moe.cli import main
from diffusion_moe.models import load_model

KINDS = {
    "tc": ["--model.router=tc"],
    "ec": ["--model.router=ec"],
    "diffmoe": ["--model.router=diffmoe"],
    "dsmoe": ["--model.router=dsmoe"],
    "promoe": ["--model.router=promoe"],
    "dense": ["--model.router=dense"],
    "class-free": ["--model.num_classes=0", "--model.router=diffmoe"],
    "ddpm": ["--model.process=ddpm", "--model.prediction=epsilon", "--evaluation.solver=ddim"],
    "jit": ["--model.backbone=jit", "--model.prediction=x", "--model.bottleneck_dim=6", "--model.class_tokens=3"],
    "bounded": ["--model.prediction=x", "--diffusion.loss=velocity", "--diffusion.loss_min_gap=0.4"],
}


@pytest.fixture(scope="session")
def run_of(tmp_path_factory, tiny_options):
    """The folder of a run of one of `KINDS`, trained for four steps when first asked for."""
    folders = {}

    def run(kind):
        if kind not in folders:
            folder = tmp_path_factory.mktemp("runs") / kind
            options = [*tiny_options, *KINDS[kind], "--training.steps=4", "--logging.every=1"]
            assert main(["train", "digits", "--output_dir", str(folder), *options]) == 0
            stir(folder / "model")
            folders[kind] = folder
        return folders[kind]

    return run


def stir(folder):
    """Make the outputs depend on time and class, as they hardly do after four steps."""
    model = load_model(folder)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "adaln" in name or "final" in name:
                parameter.normal_(std=0.2)
        for name, buffer in model.named_buffers():
            if name.endswith("threshold"):
                buffer.fill_(0.5)
    model.save_pretrained(folder)
