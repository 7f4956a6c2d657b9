"""Counts and times of the benchmark on a CUDA device, on examples whose results are known."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffusion_moe.benchmarks.counting import kernels, peak_bytes, work
from diffusion_moe.benchmarks.measure import ceilings, interleaved

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
COMPARE = Path(__file__).parents[2] / "benchmarks" / "compare.py"


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
    """A matmul of twice the operations takes about twice as long, and neither is faster than the ceiling."""
    a = torch.randn(4096, 4096, device=CUDA, dtype=torch.bfloat16)
    once, twice = interleaved([lambda: a @ a, lambda: (a @ a, a @ a)], 0.5, CUDA)
    assert 1.7 < twice.median / once.median < 2.3
    assert 2 * 4096**3 / once.median < 1.2 * ceilings(CUDA, torch.bfloat16).matmul_flops


def run(*arguments):
    """Records of `benchmarks/compare.py layer` in a process of its own."""
    options = ["--tokens=1024", "--seconds=0.1", "--device=cuda"]
    done = subprocess.run([sys.executable, COMPARE, "layer", *options, *arguments], capture_output=True, text=True)
    if "cannot run here" in done.stderr or "cannot be imported" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_layer_never_waits_and_its_kernels_are_counted():
    for record in run("--recipe=dsmoe-s-e48"):
        assert record["waits"] == 0 and record["against_waits"] >= 48
        assert 0 < record["kernels"] < record["against_kernels"]
        assert record["difference"] < 0.03 and record["cuda"] == torch.version.cuda


@pytest.mark.parametrize("against", ["transformers", "scattermoe"])
def test_libraries_compute_as_the_layer_does(against):
    """Where they are installed: a larger difference is an error of the script."""
    assert len(run("--recipe=dsmoe-b-e48", f"--against={against}")) == 2
