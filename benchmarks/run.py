"""Run the benchmarks of this machine, keep their JSON lines, and write the tables of docs/performance.md.

    python benchmarks/run.py cpu                  # make bench: under five minutes on two cores
    python benchmarks/run.py cpu --name cpu-amd   # another machine, into other results and tables
    python benchmarks/run.py gpu                  # make bench-gpu: under ten minutes on an H200
    python benchmarks/run.py gpu --dry-run        # the same cases on small models and a CPU; nothing is kept

Each case is the command that is printed. On a CPU each runs in a process of its own, so that none inherits another's
memory; on a GPU they share one process, as starting it takes longer than measuring. The results of the other cases are
kept if one fails.
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import multiprocessing
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import NamedTuple

from tables import check_page, in_short, write_tables

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"


class Case(NamedTuple):
    """One call of `diffusion-moe bench`, or of `compare.py` where there is something to compare with."""

    what: str
    recipe: str
    tokens: int
    seconds: float
    against: str | None = None

    def command(self, device: str) -> list[str]:
        """The program and its arguments."""
        program = ["compare.py"] if self.against else ["diffusion-moe", "bench"]
        options = ["--recipe", self.recipe, "--tokens", str(self.tokens)]
        options += ["--against", self.against] if self.against else []
        return [*program, self.what, *options, "--seconds", str(self.seconds), "--device", device]


class Output(NamedTuple):
    """Lines that a case printed, and its error if it failed."""

    lines: list[str]
    error: str | None


OPTIONAL = ("transformers", "scattermoe")
"""Libraries that are compared where they are installed and support the machine, and skipped elsewhere."""

CPU = [
    Case("layer", "dsmoe-s-e48", 4096, 1.2, "loop"),
    Case("layer", "dsmoe-b-e48", 4096, 1.2, "loop"),
    Case("layer", "diffmoe-s-e16", 4096, 1.2, "loop"),
    Case("layer", "diffmoe-b-e16", 4096, 1.2, "loop"),
    Case("layer", "dsmoe-s-e16", 4096, 1.2, "loop"),
    Case("layer", "dsmoe-b-e16", 2048, 1.2, "loop"),
    Case("layer", "dsmoe-s-e48", 4096, 1.2, "transformers"),
    Case("step", "dsmoe-s-e16", 6144, 4, "dense"),
    Case("step", "dsmoe-s-e48", 1024, 2, "loop"),
    Case("sample", "dsmoe-s-e48", 512, 2, "loop"),
    Case("matmuls", "dsmoe-s-e48", 4096, 0.2),
    Case("scaling", "dsmoe-s-e48", 2048, 1.5),
]

SMALL_EXPERTS = ("dsmoe-s-e48", "dsmoe-b-e48", "dsmoe-l-e48")
LARGE_EXPERTS = ("dsmoe-s-e16", "dsmoe-b-e16", "dsmoe-l-e16", "dsmoe-3b-e16")
BATCH_ROUTED = ("diffmoe-s-e16", "diffmoe-b-e16", "diffmoe-l-e8")
IMAGE = 256
"""Tokens of an image."""
BATCHES = (64 * IMAGE, 256 * IMAGE)
GPU = [
    # The matmuls first: they decide what can be expected of everything else.
    *(Case("matmuls", name, n, 0.2) for name in SMALL_EXPERTS + LARGE_EXPERTS + BATCH_ROUTED for n in BATCHES),
    *(Case("layer", name, n, 1, "loop") for name in SMALL_EXPERTS + LARGE_EXPERTS + BATCH_ROUTED for n in BATCHES),
    *(Case("layer", name, n, 1, "transformers") for name in SMALL_EXPERTS + LARGE_EXPERTS[:3] for n in BATCHES[:1]),
    *(Case("layer", name, BATCHES[0], 1, "scattermoe") for name in SMALL_EXPERTS + LARGE_EXPERTS[:3]),
    *(Case("step", name, BATCHES[0], 2, "dense") for name in LARGE_EXPERTS[:3]),
    Case("step", "dsmoe-s-e48", BATCHES[0], 2, "loop"),
    *(Case("sample", name, BATCHES[0], 2, "loop") for name in ("dsmoe-s-e16", "dsmoe-s-e48", "diffmoe-s-e16")),
    Case("scaling", "dsmoe-s-e48", BATCHES[0], 2),
]
CASES = {"cpu": CPU, "gpu": GPU}


def run_here(command: list[str]) -> Output:
    """Run a command in this process."""
    program, *arguments = command
    if program == "compare.py":
        from compare import main as program_main
    else:
        from diffusion_moe.cli import main as program_main
    out, error = io.StringIO(), io.StringIO()
    failure = None
    try:
        with redirect_stdout(out), redirect_stderr(error):
            status = program_main(arguments)
        if status:
            failure = error.getvalue().strip().removeprefix(f"{program}: ")
    except Exception as exception:  # out of memory, a kernel that fails: the other cases still run
        failure = f"{type(exception).__name__}: {(str(exception).splitlines() or [''])[0]}"
        error.write(traceback.format_exc())
    sys.stderr.write(error.getvalue() if failure and "\n" in error.getvalue().strip() else "")
    return Output(out.getvalue().splitlines(), failure)


@contextmanager
def processes(each: bool) -> Iterator[Callable[[list[str]], Output]]:
    """`run_here` in another process: a new one for each command, or the same until one fails."""

    def start() -> ProcessPoolExecutor:
        context = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1 if each else None)

    pool = start()

    def run_there(command: list[str]) -> Output:
        nonlocal pool
        try:
            output = pool.submit(_run_and_clear, command).result()
        except BrokenProcessPool:
            output = Output([], "the process died")
        if output.error is not None:
            pool.shutdown(cancel_futures=True)
            pool = start()
        return output

    try:
        yield run_there
    finally:
        pool.shutdown(cancel_futures=True)


def _run_and_clear(command: list[str]) -> Output:
    output = run_here(command)
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        with suppress(RuntimeError):  # after a failed kernel
            torch.cuda.empty_cache()
    return output


def run(
    cases: list[Case], device: str, run_command: Callable[[list[str]], Output], partial: Path
) -> tuple[list[dict], list[str]]:
    """Run one case after another, and write each line to `partial` at once.

    Returns:
        All records, and the commands that failed.
    """
    records: list[dict] = []
    failed: list[str] = []
    partial.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("w") as file:
        for case in cases:
            begin = time.perf_counter()
            command = " ".join(case.command(device))
            print(f"$ {command}", flush=True)
            output = run_command(case.command(device))
            for line in output.lines:
                file.write(line + "\n")
                records.append(json.loads(line))
                print(f"  {in_short(records[-1])}", flush=True)
            file.flush()
            print(f"  ({time.perf_counter() - begin:.0f} s)", flush=True)
            if output.error is not None:
                skipped = case.against in OPTIONAL
                print(f"  {'skipped' if skipped else 'FAILED'}: {output.error}", flush=True)
                if not skipped:
                    failed.append(command)
    return records, failed


NARROW = {"hidden_size": 32, "depth": 2, "num_heads": 2, "expert_dim": 16, "sample_size": 8, "num_classes": 10}
"""Sizes of small models."""


def small_recipes(names: Iterable[str], folder: Path) -> dict[str, str]:
    """Files with the recipes of small models with the same experts and routers, by the recipe's name."""
    from diffusion_moe.config import read_recipe, to_yaml

    files = {name: folder / f"{name}.yaml" for name in names}
    for name, file in files.items():
        recipe = read_recipe(name, [f"--model.{key}={value}" for key, value in NARROW.items()])
        file.write_text(to_yaml(recipe))
    return {name: str(file) for name, file in files.items()}


def small_cases(cases: list[Case], folder: Path) -> list[Case]:
    """The same cases on small models."""
    files, tokens = small_recipes({case.recipe for case in cases}, folder), 4 * (NARROW["sample_size"] // 2) ** 2
    return [case._replace(recipe=files[case.recipe], tokens=tokens, seconds=0.001) for case in cases]


def main(arguments: list[str] | None = None, page: Path = PAGE, results: Path = RESULTS) -> int:
    """Measure, keep the records, and write the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("machine", choices=list(CASES))
    parser.add_argument("--dry-run", action="store_true", help="small models on a CPU; nothing is kept")
    parser.add_argument("--name", help="name of the results and of the tables (default: the machine)")
    parsed = parser.parse_args(arguments)
    machine, cases, begin = parsed.machine, CASES[parsed.machine], time.perf_counter()
    name = parsed.name or machine
    check_page(page, name)
    if parsed.dry_run:
        with tempfile.TemporaryDirectory() as folder:
            records, failed = run(small_cases(cases, Path(folder)), "cpu", run_here, Path(folder) / "partial.jsonl")
            copy = Path(folder) / "page.md"
            copy.write_text(page.read_text())
            write_tables(copy, name, records)
    else:
        partial = results / f"{name}.partial.jsonl"
        with processes(each=machine == "cpu") as run_there:
            records, failed = run(cases, "cuda" if machine == "gpu" else "cpu", run_there, partial)
        if records:
            partial.replace(results / f"{name}.jsonl")
            write_tables(page, name, records)
    print(f"{len(records)} records in {time.perf_counter() - begin:.0f} s")
    for command in failed:
        print(f"failed: {command}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
