"""A rehearsal of two nodes on one machine: two torchrun agents that meet over the network."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from run_state import final_state

from diffusion_moe.cli import main

WORKER = Path(__file__).with_name("fault_worker.py")
STEPS = 12
LIMIT_SECONDS = 200


@pytest.fixture
def options(tiny):
    several = [f"--training.steps={STEPS}", "--training.checkpoint_every=4", "--logging.every=1"]
    return [*tiny, *several, "--optimizer.eps=1e-5"]


@pytest.fixture
def start(tmp_path, options, monkeypatch):
    """Starts an agent of two, with a process or more; they are gone when the test ends."""
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    agents = []

    def start(node, *faults, more=(), processes=1, restarts=0):
        name = f"{len(agents)}"
        (tmp_path / f"{name}.json").write_text(json.dumps(faults))
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--nproc-per-node={processes}"]
        command += [f"--max-restarts={restarts}", "--rdzv-id=rehearsal", "--rdzv-backend=c10d"]
        command += [f"--rdzv-endpoint=127.0.0.1:{port}", f"--rdzv-conf=is_host={int(node == 0)}"]
        command += ["--local-addr=127.0.0.1", str(WORKER), str(tmp_path / f"{name}.json"), "train", "digits", *options]
        command += [*more, "--output_dir", str(tmp_path / "nodes")]
        with (tmp_path / f"{name}.out").open("w") as out:
            agents.append(subprocess.Popen(command, stdout=out, stderr=out))
        return agents[-1]

    yield start
    for agent in agents:
        agent.kill()
        agent.wait()
    for path in tmp_path.glob("*.json.pid.*"):
        try:
            os.kill(int(path.name.rpartition(".")[2]), signal.SIGKILL)
        except ProcessLookupError:
            continue


def assert_as_alone(options, tmp_path):
    """One process ends with the same within the rounding of sums in another order."""
    assert main(["train", "digits", *options, "--output_dir", str(tmp_path / "alone")]) == 0
    found, expected = final_state(tmp_path / "nodes", STEPS), final_state(tmp_path / "alone", STEPS)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=5e-6, msg=lambda text, name=name: name + text)
    numbers = [
        [[row["step"], row["loss"], row["grad_norm"]] for row in map(json.loads, lines.read_text().splitlines())]
        for lines in (tmp_path / "nodes" / "metrics.jsonl", tmp_path / "alone" / "metrics.jsonl")
    ]
    assert len(numbers[0]) == STEPS
    torch.testing.assert_close(torch.tensor(numbers[0]), torch.tensor(numbers[1]), rtol=1e-5, atol=0)


@pytest.mark.slow
def test_two_nodes_of_two_processes_equal_one_process(start, options, tmp_path):
    layout = ["--parallel.replicate=2", "--parallel.experts=2"]
    agents = [start(node, more=layout, processes=2) for node in (0, 1)]
    assert [agent.wait(LIMIT_SECONDS) for agent in agents] == [0, 0]
    assert_as_alone(options, tmp_path)


@pytest.mark.slow
def test_a_node_is_lost_and_another_takes_its_place(start, options, tmp_path):
    """The one that is left waits for it, and both resume from the last checkpoint."""
    layout = ["--parallel.shard=2"]
    lost = {"do": "kill_all", "step": 7, "more": int(signal.SIGKILL), "rank": None, "at": "step"}
    stays, goes = start(0, more=layout, restarts=3), start(1, lost, more=layout, restarts=3)
    assert goes.wait(LIMIT_SECONDS) == -signal.SIGKILL
    comes = start(1, more=layout, restarts=3)
    assert [stays.wait(LIMIT_SECONDS), comes.wait(LIMIT_SECONDS)] == [0, 0]
    said = (tmp_path / "0.out").read_text() + (tmp_path / "2.out").read_text()
    assert f"resuming from {tmp_path}/nodes/checkpoints/step-00000004" in said
    assert_as_alone(options, tmp_path)
