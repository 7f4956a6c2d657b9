"""What is counted, on examples whose answer is known."""

import contextlib
import warnings
from types import SimpleNamespace

import torch

from diffusion_moe.benchmarks.counting import SYNC_WARNING, launches, peak_bytes, saved_bytes, sync_warnings, work

CPU = torch.device("cpu")


def test_saved_bytes_are_those_autograd_keeps_without_the_parameters():
    x, w = torch.randn(10, 20, requires_grad=True), torch.randn(20, 30, requires_grad=True)
    # exp keeps its result; the product keeps that once more, and the parameter.
    assert saved_bytes(lambda: x.exp() @ w, excluded=(w,)) == 10 * 20 * 4
    assert saved_bytes(lambda: x.exp() @ w) == 10 * 20 * 4 + 20 * 30 * 4
    assert saved_bytes(lambda: x + 1) == 0


def test_peak_bytes_are_the_highest_level():
    def run():
        a = torch.empty(2**20, dtype=torch.uint8)
        b = torch.empty(2**19, dtype=torch.uint8)
        del a
        c = torch.empty(2**18, dtype=torch.uint8)
        return b, c

    assert peak_bytes(run, CPU) == 2**20 + 2**19


def test_operators_and_waits_are_counted():
    x = torch.randn(8)
    done = work(lambda: (x + 1) * 2, CPU)
    assert (done.operators, done.waits) == (2, 0)
    done = work(lambda: (x > 0).nonzero(), CPU)
    assert (done.operators, done.waits) == (2, 1)


def test_flops_are_two_a_multiply_add():
    a, b = torch.ones(3, 4), torch.ones(4, 5)
    assert work(lambda: a @ b, CPU).flops == 2 * 3 * 4 * 5


def test_compiled_parts_are_counted_as_if_they_were_not():
    a = torch.ones(3, 4)
    product = torch.compile(lambda b: (a @ b).exp(), backend="eager", fullgraph=True)
    product(torch.ones(4, 5))
    done = work(lambda: product(torch.ones(4, 5)), CPU)
    assert (done.operators, done.flops) == (3, 2 * 3 * 4 * 5)


def test_bytes_are_of_inputs_and_outputs_but_not_of_views_and_empty_tensors():
    x = torch.randn(4, 8)
    assert work(lambda: x + x, CPU).bytes == 3 * 4 * 8 * 4
    assert work(lambda: x.t().reshape(8, 4)[2:].unsqueeze(0), CPU).bytes == 0
    assert work(lambda: torch.empty_like(x), CPU).bytes == 0
    row = torch.ones(1, 16)
    assert work(lambda: row.expand(100, 16) * 2, CPU).bytes == 16 * 4 + 100 * 16 * 4
    assert work(lambda: x.mul_(2), CPU).bytes == 2 * 4 * 8 * 4


def test_waits_on_a_gpu_are_torchs_own_warnings(monkeypatch):
    """With torch.cuda played by a stand-in: tests/gpu has the real one."""
    modes = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def run():
        for _ in range(3):
            warnings.warn(SYNC_WARNING, stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    assert sync_warnings(run) == 3
    assert modes == ["warn", "default"]
    with contextlib.suppress(ZeroDivisionError):
        sync_warnings(lambda: 1 / 0)
    assert modes[-1] == "default"


def test_launches_are_what_ran_on_the_gpu_but_no_named_ranges():
    def event(device_type, named=False):
        return SimpleNamespace(device_type=lambda: device_type, is_user_annotation=lambda: named)

    on_gpu, on_cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    assert launches([event(on_gpu), event(on_cpu), event(on_gpu, named=True), event(on_gpu)]) == 2
