"""What all tests share."""

import os

# Small products on several threads are slower than on one, and threads that wait by spinning disturb their neighbours.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

torch.set_num_threads(1)

TINY = [
    "--model.hidden_size=32",
    "--model.depth=2",
    "--model.num_heads=2",
    "--model.expert_dim=16",
    "--model.num_experts=4",
    "--training.batch_size=16",
    "--optimizer.warmup_steps=0",
    "--logging.tensorboard=false",
]


@pytest.fixture(scope="session")
def tiny_options() -> tuple[str, ...]:
    """Options that make the digits recipe small enough for tests."""
    return tuple(TINY)


@pytest.fixture
def tiny(tiny_options: tuple[str, ...]) -> list[str]:
    """The same, as a list of the test's own."""
    return list(tiny_options)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Tests do not depend on their order."""
    torch.manual_seed(0)
