"""What the benchmark counts and times on a CUDA device, on examples whose answer is known."""

import json

import pytest
import torch

from diffusion_moe.benchmarks.counting import kernels, peak_bytes, work
from diffusion_moe.benchmarks.measure import ceilings, interleaved
from diffusion_moe.cli import main

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


def test_kernels_are_counted():
    x = torch.randn(1000, device=CUDA)
    x.add(1)
    assert kernels(lambda: x.add(1), CUDA) == 1
    assert kernels(lambda: x.add(1).mul(2).clone(), CUDA) == 3  # the last one is a copy

    def named():
        with torch.profiler.record_function("a name"):
            x.add(1)

    assert kernels(named, CUDA) == 1


def test_waits_are_counted_in_forward_and_backward():
    x = torch.randn(1000, device=CUDA, requires_grad=True)

    class WaitsInBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * float(grad.sum())

    assert work(lambda: x.add(1).sum(), CUDA).waits == 0
    assert work(lambda: x.sum().item(), CUDA).waits == 1
    assert work(lambda: WaitsInBackward.apply(x).sum().backward(), CUDA).waits == 1
    assert torch.cuda.get_sync_debug_mode() == 0


def test_peak_bytes_are_the_highest_level():
    def run():
        a = torch.empty(2**24, dtype=torch.uint8, device=CUDA)
        del a
        return torch.empty(2**23, dtype=torch.uint8, device=CUDA)

    assert peak_bytes(run, CUDA) == 2**24


def test_times_are_those_of_the_device():
    """A product of twice the operations takes about twice as long, and neither is faster than the ceiling."""
    a = torch.randn(4096, 4096, device=CUDA, dtype=torch.bfloat16)
    once, twice = interleaved([lambda: a @ a, lambda: (a @ a, a @ a)], 0.5, CUDA)
    assert 1.7 < twice.median / once.median < 2.3
    assert 2 * 4096**3 / once.median < 1.2 * ceilings(CUDA, torch.bfloat16).matmul_flops


def test_a_layer_never_waits_and_is_told_with_its_kernels(capsys):
    arguments = ["--recipe=dsmoe-s-e48", "--tokens=1024", "--seconds=0.1", "--device=cuda"]
    assert main(["bench", "layer", *arguments]) == 0
    for line in capsys.readouterr().out.splitlines():
        record = json.loads(line)
        assert record["waits"] == 0 and record["against_waits"] >= 48
        assert 0 < record["kernels"] < record["against_kernels"]
        assert record["difference"] < 0.03 and record["cuda"] == torch.version.cuda


@pytest.mark.parametrize("against", ["transformers", "scattermoe", "sonicmoe"])
def test_rivals_answer_as_the_layer_does(capsys, against):
    """Where they are installed: a larger difference is an error of the command."""
    arguments = ["--recipe=dsmoe-b-e48", "--tokens=1024", "--seconds=0.1", "--device=cuda", f"--against={against}"]
    status = main(["bench", "layer", *arguments])
    said = capsys.readouterr()
    if "cannot run here" in said.err or "cannot be imported" in said.err:
        pytest.skip(said.err.strip())
    assert status == 0, said.err
    assert len(said.out.splitlines()) == 2
