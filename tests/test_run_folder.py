"""Two runs do not write into one folder."""

import os
import signal
import subprocess
import sys

import pytest

from diffusion_moe.run_folder import RunFolder

HOLDER = """
import sys
from pathlib import Path
from diffusion_moe.run_folder import RunFolder

with RunFolder(Path(sys.argv[1])).reserved(print):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """A process that trains in the folder."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_the_folder_of_a_run_that_trains_is_refused(holder, tmp_path):
    said = []
    reserved = RunFolder(tmp_path).reserved(said.append, wait_seconds=0.3)
    with pytest.raises(ValueError, match=rf"process {holder.pid} on .* trains in {tmp_path}; end it, wait for it, or"):
        reserved.__enter__()
    assert len(said) == 1 and said[0].endswith(f"trains in {tmp_path}; waiting for its end")


def test_the_folder_of_a_killed_run_is_free(holder, tmp_path):
    """Whoever waits for it trains at once."""
    with RunFolder(tmp_path).reserved(lambda line: os.kill(holder.pid, signal.SIGKILL), wait_seconds=60):
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")
    with RunFolder(tmp_path).reserved(pytest.fail):  # and again
        pass
