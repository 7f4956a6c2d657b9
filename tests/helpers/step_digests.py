"""Digests of what training steps leave behind, for each kind of model; `python step_digests.py cuda` prints them."""

import hashlib
import json
import sys
from contextlib import nullcontext

import torch

from diffusion_moe.config import read_recipe
from diffusion_moe.data import Batch
from diffusion_moe.models import make_model
from diffusion_moe.text import TextFeatures
from diffusion_moe.training.deterministic import deterministic_algorithms
from diffusion_moe.training.state import state_from_model
from diffusion_moe.training.step import train_step

SMALL = [
    *("--model.hidden_size=64", "--model.depth=2", "--model.num_heads=4", "--model.expert_dim=32"),
    *("--model.num_experts=4", "--model.moe_layer_freq=1", "--training.batch_size=8", "--training.accumulation=2"),
]
TEXT = ["--model.num_classes=0", "--model.text_dim=12", "--model.text_length=5"]
KINDS = {
    "dsmoe": ["--model.router=dsmoe", "--model.top_k=2", "--model.balance=aux"],
    "tc": ["--model.router=tc", "--model.top_k=2", "--model.balance=aux", "--model.expert_bias=true"],
    "ec": ["--model.router=ec", "--model.capacity=2", "--model.expert_activation=gelu"],
    "diffmoe": ["--model.router=diffmoe"],
    "dense": ["--model.router=dense"],
    "ddpm": ["--model.process=ddpm", "--model.prediction=epsilon", "--model.learn_sigma=true"],
    "jit": [
        *("--model.backbone=jit", "--model.prediction=x", "--model.bottleneck_dim=16", "--model.norm=rmsnorm"),
        *("--model.class_tokens=2", "--model.class_tokens_from=1", "--model.qk_norm=true"),
    ],
    "sinks and windows": ["--model.attention_sinks=true", "--model.sliding_window=3", "--model.num_kv_heads=2"],
    "dropout": [f"--model.{kind}dropout=0.1" for kind in ("", "attention_", "expert_")],
    "text": [*TEXT, "--model.num_kv_heads=2"],
    "muon": ["--optimizer.kind=muon"],
}


def digest(kind: str, device: torch.device, precision: str, deterministic: bool, steps: int = 2) -> str:
    """SHA-256 of weights, EMA and moments after a few steps from the same start."""
    recipe = read_recipe("digits", [*SMALL, *KINDS[kind], f"--training.precision={precision}"])
    model, images = recipe.model, recipe.training.batch_size
    torch.manual_seed(0)
    text = None
    if model.text_dim:
        mask = torch.arange(model.text_length) < torch.randint(1, model.text_length + 1, (images, 1))
        text = TextFeatures(torch.randn(images, model.text_length, model.text_dim), mask)
    shape = (images, model.in_channels, model.sample_size, model.sample_size)
    batch = Batch(torch.randn(shape), torch.randint(max(1, model.num_classes), (images,)), text=text)
    state = state_from_model(make_model(model), recipe, device)
    with deterministic_algorithms(device.type == "cuda") if deterministic else nullcontext():
        losses = [train_step(state, recipe, batch).loss for _ in range(steps)]
    assert all(loss == loss for loss in losses)
    moments = state.optimizer.named_moments().values()
    left = [*state.model.state_dict().values(), *state.ema.state_dict().values(), *moments]
    hashed = hashlib.sha256()
    for tensor in left:
        hashed.update(torch.as_tensor(tensor).detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()


if __name__ == "__main__":
    for kind in KINDS:
        for precision in ("bf16", "fp32"):
            twice = [digest(kind, torch.device(sys.argv[1]), precision, deterministic=True) for _ in range(2)]
            print(json.dumps({"kind": kind, "precision": precision, "digests": twice}), flush=True)
