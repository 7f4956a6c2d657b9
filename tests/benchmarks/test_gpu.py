"""`benchmarks/gpu.py`: its stages on a CPU, what a cut-off run leaves, and what it needs."""

import json
import re
import subprocess
import sys
from pathlib import Path

import gpu
import pytest

ROOT = Path(__file__).parents[2]
BARE = """
import sys

class Bare:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in {missing} else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Bare(finder) for finder in sys.meta_path]
sys.path.insert(0, "benchmarks")
import gpu

sys.exit(gpu.main(["--small"]))
"""
MISSING = ("diffusers", "datasets", "accelerate", "torchdiffeq", "sklearn", "matplotlib", "tensorboard", "rich", "PIL")
"""Packages that a machine with torch and gpu-requirements.txt alone lacks."""


@pytest.mark.slow
def test_all_stages_run_small_without_what_a_bare_machine_lacks():
    before = gpu.RECORDS.read_bytes() if gpu.RECORDS.exists() else None
    command = [sys.executable, "-c", BARE.format(missing=set(MISSING))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    *_, summary = done.stdout.partition("\n\n")
    lines = summary.splitlines()
    assert [line.split()[:2] for line in lines] == [[stage.name, "passed"] for stage in gpu.STAGES]
    for name, what in (
        ("checks", r"\d+ passed"),
        ("waits", "waits in training|skipped"),
        ("layer", "times as fast as loop"),
        ("step", "times as fast as dense, .* as loop"),
        ("compile", " ms"),
        ("sample", " ms"),
        ("graphs", " ms"),
    ):
        assert re.search(what, next(line for line in lines if line.startswith(name)))
    assert (gpu.RECORDS.read_bytes() if gpu.RECORDS.exists() else None) == before


def test_requirements_are_installed_dependencies_with_versions():
    """Every line is a package that constraints.txt pins, and none is torch or triton, which the machine has."""
    lines = (ROOT / "benchmarks" / "gpu-requirements.txt").read_text().splitlines()
    names = [line for line in lines if line and not line.startswith("#")]
    pinned = {line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert names and {name.lower() for name in names} <= pinned
    assert not {"torch", "triton", *MISSING} & set(names)


def test_the_limits_leave_ten_minutes():
    assert sum(stage.seconds for stage in gpu.STAGES) <= 600
    assert [stage.name for stage in gpu.STAGES][:4] == ["checks", "waits", "layer", "step"]


def stage_of(monkeypatch, *programs):
    """Stages whose records come from these programs."""
    given = iter(programs)
    monkeypatch.setattr(
        gpu, "lines_of", lambda command, seconds, real=gpu.lines_of: real([sys.executable, "-c", next(given)], seconds)
    )
    stages = tuple(gpu.Stage(name, 5, (gpu.Case("layer", "x", 1, 1),)) for name in "abc"[: len(programs)])
    monkeypatch.setattr(gpu, "STAGES", stages)


RECORD = {"benchmark": "layer", "mode": "forward", "recipe": "x", "ms": 1.0, "against": "loop", "ratio": 1.5}


def test_a_stage_that_is_cut_off_or_dies_leaves_its_records(monkeypatch, tmp_path, capsys):
    line = f"print({json.dumps(RECORD)!r}, flush=True)"
    failed = f"print({json.dumps({'command': 'c', 'error': 'out of memory'})!r})"
    stage_of(monkeypatch, f"{line}\nimport time; time.sleep(60)", f"{line}\nimport os; os._exit(3)", failed)
    monkeypatch.setattr(gpu, "STAGES", (gpu.STAGES[0]._replace(seconds=1), *gpu.STAGES[1:]))
    assert gpu.main([], tmp_path / "records.jsonl") == 1
    found = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    assert [(record["stage"], record.get("result")) for record in found] == [
        ("a", None), ("a", "incomplete"), ("b", None), ("b", "incomplete"), ("c", None), ("c", "failed"),
    ]  # fmt: skip
    assert found[0] == {"stage": "a"} | RECORD and found[1]["problem"] == "cut off after 1 s"
    assert found[3]["problem"] == "it ended with status 3" and found[4]["error"] == "out of memory"
    printed = capsys.readouterr().out
    assert re.search(r"a +incomplete +\d\.\d s  1\.50 to 1\.50 times as fast as loop; cut off after 1 s", printed)


def test_outcomes_of_tests_are_recorded_one_by_one():
    lines = [
        "tests/gpu/test_a.py::test_one PASSED [ 33%]",
        "tests/gpu/test_a.py::test_two[1-a b] FAILED [ 66%]",
        "tests/gpu/test_a.py::test_three SKIPPED (no triton) [100%]",
        "E   AssertionError: they differ",
        "==== 1 failed, 1 passed, 1 skipped in 3.00s ====",
    ]
    records = list(gpu.records_of_tests(lines))
    assert [record.get("outcome") for record in records] == ["passed", "failed", "skipped", None, None]
    assert records[1]["test"] == "tests/gpu/test_a.py::test_two[1-a b]"
    assert records[3:] == [
        {"reason": "AssertionError: they differ"},
        {"summary": "1 failed, 1 passed, 1 skipped in 3.00s"},
    ]


def test_an_unknown_stage_is_refused(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["nothing"])
    assert "there is no stage nothing; choose from checks, waits" in capsys.readouterr().err
