"""A process that is killed ends the others within seconds, also those that wait for their devices."""

import signal
import time

import pytest

LINE = (
    "diffusion-moe: another process ended or cannot be reached; see its messages; finished checkpoints are kept. Run "
    "the same command again to resume."
)


@pytest.mark.parametrize("killed", [0, 2], ids=["main", "last"])
def test_processes_that_wait_for_a_device_end_with_one_line(start_processes, killed):
    began = time.monotonic()
    codes, said = start_processes(3, "lost_worker.py", killed, "device")
    assert time.monotonic() - began < 120
    assert codes == [-signal.SIGKILL if rank == killed else 1 for rank in range(3)]
    assert [LINE in text for text in said] == [rank != killed for rank in range(3)]


def test_processes_that_are_done_are_not_concerned(start_processes):
    codes, said = start_processes(3, "lost_worker.py", 1, "done")
    assert codes == [0, -signal.SIGKILL, 0], said
    assert not any(LINE in text for text in said)
