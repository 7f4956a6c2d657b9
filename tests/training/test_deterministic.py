"""`training.deterministic` on a CPU: every kind of model trains so, to the same bits; and what is refused for CUDA."""

import os

import pytest
import torch
from step_digests import KINDS, digest

from diffusion_moe.config import read_recipe
from diffusion_moe.training import deterministic
from diffusion_moe.training.deterministic import VARIABLE, deterministic_algorithms
from diffusion_moe.training.loop import train


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_trains_to_the_same_bits(kind):
    cpu = torch.device("cpu")
    assert digest(kind, cpu, "fp32", deterministic=True) == digest(kind, cpu, "fp32", deterministic=False)


def test_a_run_uses_it_while_it_trains_only(tiny, tmp_path, monkeypatch):
    seen, step = [], deterministic_algorithms

    def watched(on_gpu):
        seen.append(on_gpu)
        return step(on_gpu)

    monkeypatch.setattr("diffusion_moe.training.loop.deterministic_algorithms", watched)
    during = []
    recipe = read_recipe("digits", [*tiny, "--training.steps=2", "--logging.every=1", "--training.deterministic=true"])
    train(recipe, tmp_path / "run", log=lambda line: during.append(torch.are_deterministic_algorithms_enabled()))
    assert seen == [False] and all(during) and not torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.deterministic and VARIABLE not in os.environ


@pytest.mark.parametrize("value", [":4096:8", ":16:8", ""])
def test_cublas_is_set_up_before_cuda_starts(value, monkeypatch):
    monkeypatch.setenv(VARIABLE, value)
    with deterministic_algorithms(on_gpu=True):
        assert os.environ[VARIABLE] == (value or ":4096:8")


def test_what_cublas_was_set_up_for_is_refused(monkeypatch):
    monkeypatch.setenv(VARIABLE, ":0:0")
    with (
        pytest.raises(ValueError, match=f"{VARIABLE} is :0:0, but .* needs :4096:8 or :16:8; remove the variable"),
        deterministic_algorithms(on_gpu=True),
    ):
        pass
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setattr(deterministic.torch.cuda, "is_initialized", lambda: True)
    with (
        pytest.raises(ValueError, match=f"uses CUDA already and {VARIABLE} is not set; set it to :4096:8 or :16:8"),
        deterministic_algorithms(on_gpu=True),
    ):
        pass
    assert not torch.are_deterministic_algorithms_enabled() and VARIABLE not in os.environ
