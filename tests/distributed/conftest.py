"""Several gloo processes on this machine."""

import multiprocessing
import socket
import time
from multiprocessing import forkserver
from pathlib import Path

import pytest
from run_script import run_script

HERE = Path(__file__).parent
LIMIT_SECONDS = 600
PRELOADED = ["torch.distributed.fsdp", "torch._dynamo", "diffusion_moe.cli", "diffusion_moe.training.loop"]
PRELOADED += ["diffusion_moe.evaluation.scorer", "diffusion_moe.storage", "diffusers"]


@pytest.fixture(scope="session")
def context():
    """A server that imports torch and this library once, and from which processes are forked."""
    context = multiprocessing.get_context("forkserver")
    forkserver._forkserver._stop()  # it may run already, for loading processes and without these imports
    context.set_forkserver_preload(PRELOADED)
    return context


@pytest.fixture(scope="session")
def start_processes(context, tmp_path_factory):
    """A function: runs a script of this folder in so many processes; their exit codes, and what they print."""

    def start(world: int, script: str, *arguments: object) -> tuple[list[int | None], list[str]]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        folder = tmp_path_factory.mktemp("processes")
        running = []
        for rank in range(world):
            environment = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            work = (HERE / script, [str(argument) for argument in arguments], environment, folder / str(rank))
            running.append(context.Process(target=run_script, args=work))
        for process in running:
            process.start()
        end = time.monotonic() + LIMIT_SECONDS
        try:
            for process in running:
                process.join(max(1, end - time.monotonic()))
        finally:
            for process in running:
                process.kill()
        return [process.exitcode for process in running], [(folder / str(rank)).read_text() for rank in range(world)]

    return start


@pytest.fixture(scope="session")
def run_processes(start_processes):
    """The same for processes that must end well: what they print."""

    def run(world: int, script: str, *arguments: object) -> list[str]:
        codes, said = start_processes(world, script, *arguments)
        assert codes == [0] * world, "\n".join(said)
        return said

    return run
