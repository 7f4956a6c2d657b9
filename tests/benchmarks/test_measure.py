"""What is counted, on examples whose answer is known."""

import torch

from diffusion_moe.benchmarks.measure import (
    WARM_UP_ROUNDS,
    Times,
    ceilings,
    flops,
    interleaved,
    operators,
    peak_bytes,
    saved_bytes,
)

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
    assert operators(lambda: (x + 1) * 2) == (2, 0)
    called, waits = operators(lambda: (x > 0).nonzero())
    assert (called, waits) == (2, 1)


def test_flops_are_two_a_multiply_add():
    assert flops(lambda: torch.ones(3, 4) @ torch.ones(4, 5)) == 2 * 3 * 4 * 5


def test_contestants_take_turns():
    order = []
    times = interleaved([lambda: order.append("a"), lambda: order.append("b")], seconds=0, device=CPU, least=3)
    assert order == ["a", "b"] * (WARM_UP_ROUNDS + 3)
    assert all(0 <= time.low <= time.median <= time.high for time in times)
    assert Times.of([1.0, 2.0, 3.0]).median == 2.0


def test_ceilings_are_of_this_machine():
    limits = ceilings(CPU, torch.float32)
    assert 1e9 < limits.matmul_flops < 1e14 and 1e8 < limits.copy_bytes < 1e13
