"""`training.deterministic`: the same steps leave the same bytes, for all routing rules and kinds of model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from step_digests import KINDS

pytestmark = pytest.mark.gpu
WORKER = Path(__file__).parents[1] / "helpers" / "step_digests.py"


def test_the_same_steps_leave_the_same_bytes():
    """In a process of its own, because cuBLAS is set up before CUDA starts."""
    environment = {name: value for name, value in os.environ.items() if name != "CUBLAS_WORKSPACE_CONFIG"}
    command = [sys.executable, str(WORKER), "cuda"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(records) == 2 * len(KINDS)
    assert [record for record in records if len(set(record["digests"])) > 1] == []
