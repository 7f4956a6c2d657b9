"""The examples run as a user runs them, and do what they claim."""

import json
import os
import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.run import parse_args

from diffusion_moe.cli import main

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_moe_in_your_transformer_learns_and_balances(capsys):
    runpy.run_path(str(EXAMPLES / "moe_in_your_transformer.py"), run_name="__main__")
    lines = re.findall(r"step +(\d+)  loss ([\d.]+)  tokens per expert \[([\d, ]+)\]", capsys.readouterr().out)
    assert [int(step) for step, _, _ in lines] == [0, 10, 20, 30, 40]
    losses = [float(loss) for _, loss, _ in lines]
    loads = [[int(count) for count in load.split(", ")] for _, _, load in lines]
    assert losses[-1] < 0.5 * losses[0]
    assert all(len(load) == 8 and sum(load) == 2 * 16 * 24 for load in loads)
    assert max(loads[-1]) < max(loads[0])


SLURM = EXAMPLES / "slurm.sh"
STAND_INS = {
    "scontrol": 'echo "$@" >> "$LOGS/scontrol"; if [ "$1" = show ]; then echo node7; echo node8; fi',
    "scancel": 'echo "$@" >> "$LOGS/scancel"; kill -TERM "$(cat "$LOGS/pid")"',
    "srun": 'exec "$@"',
    "torchrun": f"""exec {sys.executable} -c '
import json, os, signal, sys
logs = os.environ["LOGS"]
json.dump([sys.argv[1:], dict(os.environ)], open(logs + "/torchrun", "w"))
if os.environ["ENDS"] == "when asked":
    signal.pthread_sigmask(signal.SIG_BLOCK, {{signal.SIGTERM}})
    open(logs + "/pid", "w").write(str(os.getpid()))
    os.kill(int(os.environ["SCRIPT"]), signal.SIGTERM)
    signal.sigwait({{signal.SIGTERM}})
    sys.exit(1)
sys.exit(int(os.environ["ENDS"]))
' "$@"
""",
}
"""What the script calls, without a cluster."""


@pytest.fixture
def slurm(tmp_path):
    """Runs the script; returns its exit status, torchrun's arguments and environment, and what Slurm was told."""
    commands = tmp_path / "commands"
    commands.mkdir()
    for name, text in STAND_INS.items():
        (commands / name).write_text(f"#!/bin/sh\n{text}\n")
        (commands / name).chmod(0o755)

    def run(*arguments, ends="0", nodes=2):
        job = {"SLURM_JOB_ID": "41234", "SLURM_JOB_NUM_NODES": str(nodes), "SLURM_JOB_NODELIST": "node[7-8]"}
        shared = {"PATH": f"{commands}:{os.environ['PATH']}", "LOGS": str(tmp_path), "ENDS": ends}
        # As `sbatch` starts it, but that the stand-in for training must know whom to tell.
        command = ["bash", "-c", 'SCRIPT=$$ exec bash "$0" "$@"', str(SLURM), *arguments]
        status = subprocess.run(command, env=os.environ | job | shared, timeout=60).returncode
        asked, environment = json.loads((tmp_path / "torchrun").read_text())
        told = {
            name: (tmp_path / name).read_text().splitlines()
            for name in ("scontrol", "scancel")
            if (tmp_path / name).exists()
        }
        return status, asked, environment, told

    return run


def test_the_slurm_script_starts_what_the_command_understands(slurm, capsys):
    assert subprocess.run(["bash", "-n", str(SLURM)]).returncode == 0
    options = ["--data.path", "a path", "--training.batch_size=64", "--parallel.shard", "4"]
    status, arguments, environment, told = slurm("dsmoe-s-e16", *options)
    assert (status, told) == (0, {"scontrol": ["show hostnames node[7-8]"]})
    launch = parse_args(arguments)
    assert (launch.nnodes, launch.nproc_per_node, launch.rdzv_endpoint) == ("2", "8", "node7:21234")
    assert (launch.rdzv_backend, launch.rdzv_id, launch.max_restarts) == ("c10d", "41234", 3)
    assert (launch.module, launch.training_script) == (True, "diffusion_moe")
    assert main([*launch.training_script_args, "--print_config"]) == 0
    shown = capsys.readouterr().out
    assert "path: a path" in shown and "replicate: 2" in shown and "shard: 4" in shown  # the later one
    stop = int(re.search(r"stop_seconds: (\d+)", shown).group(1))
    before_the_end = int(re.search(r"--signal=B:TERM@(\d+)", SLURM.read_text()).group(1))
    assert stop < int(environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < before_the_end


def test_the_slurm_script_queues_again_what_was_asked_to_stop_alone(slurm):
    status, _, _, told = slurm("digits", ends="when asked", nodes=1)
    assert status == 128 + signal.SIGTERM
    assert told == {
        "scontrol": ["show hostnames node[7-8]", "requeue 41234"],
        "scancel": ["--signal=TERM 41234.0"],
    }


def test_the_slurm_script_ends_as_training_does(slurm):
    status, _, _, told = slurm("digits", ends="1")
    assert (status, told["scontrol"]) == (1, ["show hostnames node[7-8]"])
