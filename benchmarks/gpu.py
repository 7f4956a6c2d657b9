"""Check and measure this version on a GPU, most valuable first: `make gpu`, under ten minutes on an H200.

    python benchmarks/gpu.py                # all stages
    python benchmarks/gpu.py layer compile  # some of them
    python benchmarks/gpu.py --small        # small models on a CPU, without compiler and graphs; nothing is kept

Stages: the tests that need a GPU, waits of the host, the layer and a step against other implementations, a compiled
step, and sampling with CUDA graphs. Each is a process of its own with a time limit. What it finds is written to
benchmarks/results/gpu-stages.jsonl at once, so that a run that is cut off has told what it knew. Only torch, triton
and what benchmarks/gpu-requirements.txt lists are needed, and the package need not be installed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from run import IMAGE, OPTIONAL, ROOT, Case, run_here, small_recipes
from tables import in_short

RECORDS = ROOT / "benchmarks" / "results" / "gpu-stages.jsonl"
BATCH = 64 * IMAGE
"""Tokens of a batch."""
SMALL_TOKENS = 64


class Stage(NamedTuple):
    """A group of commands with one time limit."""

    name: str
    seconds: float
    """Time limit."""
    cases: tuple[Case, ...] = ()
    """What is measured; empty for the tests."""
    acceleration: str = "none"


STAGES = (
    Stage("checks", 180),
    Stage(
        "waits",
        60,
        tuple(
            Case("waits", name, 0, 0)
            for name in ("dsmoe-s-e16", "diffmoe-s-e16", "jitmoe-b-16-e16", "diffmoe-l-e8-ddpm", "tc-dit-l-e16")
        ),
    ),
    Stage(
        "layer",
        100,
        (
            *(Case("layer", f"dsmoe-{size}", BATCH, 0.7, "loop") for size in ("s-e48", "b-e16", "b-e48", "s-e16")),
            *(Case("layer", f"diffmoe-{size}", BATCH, 0.7, "loop") for size in ("b-e16", "l-e8")),
            *(Case("matmuls", name, BATCH, 0.2) for name in ("dsmoe-b-e48", "dsmoe-b-e16")),
            Case("layer", "dsmoe-b-e48", BATCH, 0.7, "transformers"),
        ),
    ),
    Stage(
        "step",
        80,
        (
            *(Case("step", f"dsmoe-{size}", BATCH, 2, "dense") for size in ("s-e16", "b-e16")),
            Case("step", "dsmoe-s-e48", BATCH, 2, "loop"),
        ),
    ),
    Stage("compile", 90, tuple(Case("step", name, BATCH, 2) for name in ("dsmoe-s-e48", "dsmoe-b-e16")), "compile"),
    Stage("sample", 30, tuple(Case("sample", name, BATCH, 2) for name in ("dsmoe-s-e48", "dsmoe-b-e16"))),
    Stage("graphs", 40, tuple(Case("sample", name, BATCH, 2) for name in ("dsmoe-s-e48", "dsmoe-b-e16")), "graph"),
)
OUTCOME = re.compile(r"(\S+::.*?) (PASSED|FAILED|ERROR|SKIPPED)\b")
"""A line of pytest on one test."""
SOLVER_STEPS = 20
"""Of sampling: the capture of a graph is a part of the time."""


def commands(stage: Stage, device: str) -> Iterator[tuple[Case, list[str]]]:
    """The commands of a stage, as `run_here` takes them."""
    for case in stage.cases:
        if case.what == "waits":
            yield case, ["diffusion-moe", "bench", "waits", "--recipe", case.recipe, "--device", device]
            continue
        command = case.command(device)
        if stage.acceleration != "none":
            command += ["--acceleration", stage.acceleration]
        if case.what == "sample":
            command += ["--solver_steps", str(SOLVER_STEPS if device == "cuda" else 1)]
        yield case, command


def measure(stage: Stage, device: str) -> Iterator[dict[str, Any]]:
    """Records of a stage in this process: what each command prints, or its error."""
    for case, command in commands(stage, device):
        output = run_here(command)
        for line in output.lines:
            yield json.loads(line)
        if output.error is not None:
            # An earlier version has no waits, and libraries to compare with may be missing.
            optional = case.against in OPTIONAL or "the subject is waits" in output.error
            yield {"command": " ".join(command), "skipped" if optional else "error": output.error}


def small(stage: Stage, folder: Path) -> Stage:
    """The stage on small models, with one case of each kind but libraries to compare with, which are slow to import."""
    kinds = {(case.what, case.against): case for case in stage.cases if case.against not in OPTIONAL}
    names = small_recipes({case.recipe for case in kinds.values()}, folder)
    cases = [case._replace(recipe=names[case.recipe], tokens=SMALL_TOKENS, seconds=0.001) for case in kinds.values()]
    return stage._replace(cases=tuple(cases), acceleration="none")


def lines_of(command: list[str], seconds: float) -> Iterator[str]:
    """Lines that a program prints, as they come; one that takes longer is killed.

    Raises:
        TimeoutError: it was killed.
        ChildProcessError: it failed, without having printed why.
    """
    path = os.pathsep.join([str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
    )
    late = threading.Event()

    def stop() -> None:
        late.set()
        process.kill()

    timer = threading.Timer(seconds, stop)
    timer.start()
    try:
        assert process.stdout is not None
        for line in process.stdout:
            yield line.rstrip("\n")
        status = process.wait()
    finally:
        timer.cancel()
        process.kill()
        process.wait()
    if late.is_set():
        raise TimeoutError(f"cut off after {seconds:.0f} s")
    if status:
        raise ChildProcessError(f"it ended with status {status}")


def records_of_tests(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """A record for each test that pytest's lines report on, and one for its last line."""
    last = ""
    for line in lines:
        last = line
        found = OUTCOME.match(line)
        if found:
            yield {"test": found[1], "outcome": found[2].lower()}
        elif line.startswith("E  "):  # the reason, from the report of a failed test
            yield {"reason": line[1:].strip()}
    yield {"summary": last.strip("= ")}


def records_of(stage: Stage, is_small: bool) -> Iterator[dict[str, Any]]:
    """Records of a stage, as they come."""
    if not stage.cases:
        tests = ["tests/gpu", "-m", "gpu"] if not is_small else ["tests/nn/test_position.py"]
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb=short", "-vv", *tests]
        yield from records_of_tests(lines_of(command, stage.seconds))
    elif is_small:
        with tempfile.TemporaryDirectory() as folder:
            yield from measure(small(stage, Path(folder)), "cpu")
    else:
        command = [sys.executable, str(Path(__file__)), "--measure", stage.name]
        yield from map(json.loads, lines_of(command, stage.seconds))


def run_stage(stage: Stage, is_small: bool, write: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Run a stage, and write its records and at last its summary."""
    begin, records, problem = time.perf_counter(), [], ""
    try:
        for record in records_of(stage, is_small):
            records.append(record)
            write({"stage": stage.name} | record)
            print(f"  {short(record)}", flush=True)
    except (ChildProcessError, TimeoutError, ValueError) as error:
        problem = str(error)
    failed = [r for r in records if "error" in r or r.get("outcome") in ("failed", "error")]
    result = {
        "stage": stage.name,
        "result": "failed" if failed else "incomplete" if problem else "passed",
        "seconds": round(time.perf_counter() - begin, 1),
        "records": len(records),
        "failed": len(failed),
        "found": in_one_line(records),
        "problem": problem,
    }
    write(result)
    return result


def short(record: dict[str, Any]) -> str:
    """A record in one line."""
    if "test" in record:
        return f"{record['outcome']:8} {record['test']}"
    if record.get("benchmark") == "waits":
        waits = f"{record['waits']} waits in training, {record.get('sampling_waits', 0)} in sampling"
        return f"{Path(record['recipe']).stem}: {waits}"
    if "ratio" in record:
        return f"{Path(record['recipe']).stem}: {in_short(record)}"
    if "ms" in record:
        return f"{Path(record['recipe']).stem}: {record['mode']} {record['ms']:.2f} ms"
    return "; ".join(f"{key}: {value}" for key, value in record.items())


def in_one_line(records: list[dict[str, Any]]) -> str:
    """What the records of a stage amount to."""
    parts = []
    outcomes = [record["outcome"] for record in records if "outcome" in record]
    parts += [f"{outcomes.count(name)} {name}" for name in sorted(set(outcomes))]
    waits = [record["waits"] for record in records if record.get("benchmark") == "waits"]
    parts += [f"{sum(waits)} waits in training of {len(waits)} recipes"] if waits else []
    compared = [record for record in records if "ratio" in record and record["benchmark"] != "matmuls"]
    for against in sorted({record["against"] for record in compared}):
        ratios = [record["ratio"] for record in compared if record["against"] == against]
        parts.append(f"{min(ratios):.2f} to {max(ratios):.2f} times as fast as {against}")
    alone = [record for record in records if "ms" in record and "ratio" not in record]
    parts += [f"{Path(record['recipe']).stem} {record['ms']:.2f} ms" for record in alone]
    parts += [f"{sum('skipped' in record for record in records)} skipped"] if not parts else []
    return ", ".join(parts)


def main(arguments: list[str] | None = None, records: Path = RECORDS) -> int:
    """Run the stages, print a line for each, and return 1 if one failed or was cut off."""
    by_name = {stage.name: stage for stage in STAGES}
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("stages", nargs="*", help=f"stages to run, of {', '.join(by_name)} (default: all)")
    parser.add_argument("--small", action="store_true", help="small models on a CPU; nothing is kept")
    parser.add_argument("--measure", choices=list(by_name), help=argparse.SUPPRESS)
    parsed = parser.parse_args(arguments)
    if parsed.measure:
        for record in measure(by_name[parsed.measure], "cuda"):
            print(json.dumps(record), flush=True)
        return 0
    unknown = set(parsed.stages) - set(by_name)
    if unknown:
        parser.error(f"there is no stage {', '.join(sorted(unknown))}; choose from {', '.join(by_name)}")
    results = []
    path = Path(os.devnull) if parsed.small else records
    with path.open("w") as file:

        def write(record: dict[str, Any]) -> None:
            file.write(json.dumps(record) + "\n")
            file.flush()

        for name in parsed.stages or by_name:
            print(f"{name} (at most {by_name[name].seconds:.0f} s)", flush=True)
            results.append(run_stage(by_name[name], parsed.small, write))
    print()
    for result in results:
        line = f"{result['stage']:8} {result['result']:10} {result['seconds']:6.1f} s  {result['found']}"
        print(line + (f"; {result['problem']}" if result["problem"] else ""))
    return 0 if all(result["result"] == "passed" for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
