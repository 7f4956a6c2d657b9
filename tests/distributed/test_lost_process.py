"""A process that is killed ends the others within seconds, also those that wait for their devices."""

import signal
import socket
import time

import pytest

from diffusion_moe.training import lost_process

LINE = (
    "diffusion-moe: another process ended or cannot be reached; see its messages; finished checkpoints are kept. Run "
    "the same command again to resume."
)


@pytest.mark.parametrize("killed", [0, pytest.param(2, marks=pytest.mark.slow)])
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


def test_strangers_do_not_count():
    """A port scanner connects and closes, or sends what it likes."""
    server = socket.create_server(("127.0.0.1", 0))
    invitation = lost_process._Invitation("127.0.0.1", server.getsockname()[1], b"s" * 16)
    watch = lost_process._Watch(server, invitation)
    for message in (b"", b"GET / HTTP/1.1\r\n\r\n"):
        with socket.create_connection(invitation[:2]) as stranger:
            stranger.sendall(message)
    friend = socket.create_connection(invitation[:2])
    for part in (b"s" * 9, b"s" * 7):
        friend.sendall(part)
        time.sleep(0.05)
    end = time.monotonic() + 30
    while not watch.connections and time.monotonic() < end:
        time.sleep(0.01)
    assert watch.thread.is_alive() and len(watch.connections) == 1
    watch.close(lost_process.GOODBYE)
    assert friend.recv(9) == lost_process.GOODBYE and not watch.thread.is_alive()
