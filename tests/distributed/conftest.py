"""Several gloo processes on this machine."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

HERE = Path(__file__).parent
LIMIT_SECONDS = 600


def processes(world: int, script: str, *arguments: object) -> list[str]:
    """What so many processes of a script of this folder print, once all have ended well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / script), *map(str, arguments)]
    running = [
        subprocess.Popen(
            command,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    end = time.monotonic() + LIMIT_SECONDS
    try:
        said = [process.communicate(timeout=max(1, end - time.monotonic()))[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0] * world, "\n".join(said)
    return said


@pytest.fixture(scope="session")
def run_processes():
    """The function `processes`."""
    return processes
