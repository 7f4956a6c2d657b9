"""Times, ceilings and records, where their answer is known."""

import pytest
import torch

from diffusion_moe.benchmarks.candidates import Candidate
from diffusion_moe.benchmarks.measure import (
    WARM_UP_ROUNDS,
    Times,
    backend,
    ceilings,
    interleaved,
    machine,
    measurements,
)

CPU = torch.device("cpu")


def test_candidates_take_turns():
    order = []
    times = interleaved([lambda: order.append("a"), lambda: order.append("b")], seconds=0.1, device=CPU)
    assert order == ["a", "b"] * (WARM_UP_ROUNDS + times[0].rounds)
    assert times[0].rounds >= 5
    assert all(0 <= time.low <= time.median <= time.high for time in times)
    assert Times.of([1.0, 2.0, 3.0]).median == 2.0


def test_warming_up_stops_where_it_would_take_longer_than_measuring():
    order = []
    interleaved([lambda: order.append("a")], seconds=0, device=CPU)
    assert len(order) == 1 + 3


class FakeClock:
    """torch.cuda where every run takes 4 ms on the device."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        clock = self

        class Event:
            def __init__(self, enable_timing=False):
                assert enable_timing

            def record(self):
                self.at = clock.now

            def elapsed_time(self, other):
                return other.at - self.at  # milliseconds

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)

    def run(self):
        self.now += 4.0


def test_a_gpu_is_timed_by_events_over_runs_queued_together(monkeypatch):
    """With torch.cuda played by a stand-in: tests/gpu has the real one."""
    clock = FakeClock(monkeypatch)
    (times,) = interleaved([clock.run], seconds=0, device=torch.device("cuda"))
    assert times.median == pytest.approx(4e-3)
    assert clock.now == 4.0 * (1 + 3 * 5)  # one to warm up; then five a timing, which fill 20 ms


def test_ceilings_are_of_this_machine():
    limits = ceilings(CPU, torch.float32)
    assert 1e9 < limits.matmul_flops < 1e14 and 1e8 < limits.copy_bytes < 1e13


def test_a_record_holds_counts_and_shares_of_the_ceilings():
    a, b = torch.randn(64, 64, requires_grad=True), torch.randn(64, 64)
    record = measurements(Candidate(lambda: a @ b, lambda: a @ b), Times.of([2e-3]), CPU, torch.float32)
    assert record["ms"] == 2 and record["flops"] == 2 * 64**3
    assert record["flops_per_second"] == 64**3 / 1e-3
    assert record["operator_bytes"] == 3 * 64 * 64 * 4
    assert record["copy_utilisation"] * record["copy_ceiling"] == pytest.approx(record["bytes_per_second"])
    assert record["saved_bytes"] == 64 * 64 * 4  # b
    assert record["kernels"] is None and record["waits"] == 0


@pytest.mark.parametrize(
    ("chosen", "triton", "expected"),
    [("auto", False, "torch"), ("auto", True, "triton"), ("torch", True, "torch")],
)
def test_the_backend_is_what_moe_backend_chooses(chosen, triton, expected, monkeypatch):
    monkeypatch.setattr("diffusion_moe.moe.backend.chosen", lambda: chosen)
    monkeypatch.setattr("diffusion_moe.moe.backend.takes_triton", lambda x: triton)
    assert backend(CPU) == expected


def test_the_machine_is_named():
    about = machine(CPU)
    assert about["torch"] == torch.__version__ and about["threads"] == torch.get_num_threads()
    assert about["grouped_matmul"] == {"bf16": "grouped_mm", "fp32": "grouped_mm"}
    assert about["device"] and about["cuda"] is None
