"""A request to stop is heard, and its time limit kept, whatever the process is at."""

import signal
import subprocess
import sys
import threading

import pytest

from diffusion_moe.training.signals import requests_to_stop, torchrun_has_ended

WAITS_FOR_ANOTHER = """
import sys
from datetime import timedelta
from torch.distributed import HashStore
from diffusion_moe.training.signals import requests_to_stop

with requests_to_stop(float(sys.argv[1])):
    print("waiting", flush=True)
    HashStore().wait(["what nobody writes"], timedelta(minutes=5))
"""


@pytest.mark.parametrize(("signals", "seconds", "why"), [(1, 0.1, "could not stop within 0.1 s"), (9, 200, "at once")])
def test_a_process_that_waits_for_another_ends_in_time(signals, seconds, why):
    """Python's own handlers do not run there."""
    command = [sys.executable, "-c", WAITS_FOR_ANOTHER, str(seconds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "waiting\n"
        pause = threading.Event()
        for _ in range(signals):
            process.send_signal(signal.SIGTERM)
            if signals > 1:
                pause.wait(0.4)  # more than an echo
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 143
    assert said.startswith("diffusion-moe: ") and why in said and said.count("\n") == 1


def test_handlers_and_threads_are_as_before_afterwards():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT), threading.active_count()
    with requests_to_stop(100) as received:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert received == [signal.SIGTERM, signal.SIGINT]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT), threading.active_count()) == before
    assert signal.set_wakeup_fd(-1) == -1


def test_outside_the_main_thread_signals_are_left_to_the_caller():
    found = []

    def use():
        with requests_to_stop(100) as received:
            found.append((received, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert found == [([], signal.getsignal(signal.SIGTERM))]


def test_torchrun_is_missed_only_by_what_it_started(monkeypatch):
    for started, expected in ((False, False), (True, True)):
        monkeypatch.setattr("os.getppid", lambda: 100)
        monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
        if started:
            monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
        gone = torchrun_has_ended()
        assert not gone()
        monkeypatch.setattr("os.getppid", lambda: 1)
        assert gone() is expected
