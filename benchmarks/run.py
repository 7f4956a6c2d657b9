"""Run the benchmarks of this machine, keep their JSON lines, and write docs/performance.md's tables of them.

    python benchmarks/run.py cpu              # make bench: under five minutes on two cores
    python benchmarks/run.py cpu --name cpu-amd   # another machine's, into other results and tables
    python benchmarks/run.py gpu              # make bench-gpu: under ten minutes on an H200
    python benchmarks/run.py gpu --dry-run    # the same list, small and on a CPU; nothing is kept

Every case is the command that is printed. On a CPU each is a process of its own, so that none inherits another's
memory; on a GPU they share one, as starting it takes longer than measuring. A case that fails costs no other its
results.
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
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
    """One call of `diffusion-moe bench`."""

    what: str
    recipe: str
    tokens: int
    seconds: float
    against: str | None = None

    def arguments(self, device: str) -> list[str]:
        """After `diffusion-moe`."""
        options = ["--recipe", self.recipe, "--tokens", str(self.tokens)]
        options += ["--against", self.against] if self.against else []
        return ["bench", self.what, *options, "--seconds", str(self.seconds), "--device", device]


class Answer(NamedTuple):
    """What a case printed, and what went wrong if anything."""

    lines: list[str]
    error: str | None


OPTIONAL = ("transformers", "scattermoe", "sonicmoe")
"""Held against where they are installed and suit the machine; else left out."""

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
    Case("products", "dsmoe-s-e48", 4096, 0.2),
    Case("scaling", "dsmoe-s-e48", 2048, 1.5),
]

SMALL_EXPERTS = ("dsmoe-s-e48", "dsmoe-b-e48", "dsmoe-l-e48")
LARGE_EXPERTS = ("dsmoe-s-e16", "dsmoe-b-e16", "dsmoe-l-e16", "dsmoe-3b-e16")
POOLS = ("diffmoe-s-e16", "diffmoe-b-e16", "diffmoe-l-e8")
IMAGE = 256
"""Tokens of an image."""
BATCHES = (64 * IMAGE, 256 * IMAGE)
GPU = [
    # The products first: they decide what can be expected of everything else.
    *(Case("products", name, n, 0.2) for name in SMALL_EXPERTS + LARGE_EXPERTS + POOLS for n in BATCHES),
    *(Case("layer", name, n, 1, "loop") for name in SMALL_EXPERTS + LARGE_EXPERTS + POOLS for n in BATCHES),
    *(Case("layer", name, n, 1, "transformers") for name in SMALL_EXPERTS + LARGE_EXPERTS[:3] for n in BATCHES[:1]),
    *(Case("layer", name, BATCHES[0], 1, "scattermoe") for name in SMALL_EXPERTS + LARGE_EXPERTS[:3]),
    *(Case("layer", name, BATCHES[0], 1, "sonicmoe") for name in SMALL_EXPERTS[1:] + LARGE_EXPERTS[1:3]),
    *(Case("step", name, BATCHES[0], 2, "dense") for name in LARGE_EXPERTS[:3]),
    Case("step", "dsmoe-s-e48", BATCHES[0], 2, "loop"),
    *(Case("sample", name, BATCHES[0], 2, "loop") for name in ("dsmoe-s-e16", "dsmoe-s-e48", "diffmoe-s-e16")),
    Case("scaling", "dsmoe-s-e48", BATCHES[0], 2),
]
CASES = {"cpu": CPU, "gpu": GPU}


def answer(arguments: list[str]) -> Answer:
    """Run the command in this process."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    from diffusion_moe.cli import main as command

    out, error = io.StringIO(), io.StringIO()
    failure = None
    try:
        with redirect_stdout(out), redirect_stderr(error):
            status = command(arguments)
        if status:
            failure = error.getvalue().strip().removeprefix("diffusion-moe: ")
    except Exception as exception:  # out of memory, a kernel that fails: the other cases go on
        failure = f"{type(exception).__name__}: {(str(exception).splitlines() or [''])[0]}"
        error.write(traceback.format_exc())
    sys.stderr.write(error.getvalue() if failure and "\n" in error.getvalue().strip() else "")
    return Answer(out.getvalue().splitlines(), failure)


@contextmanager
def processes(each: bool) -> Iterator[Callable[[list[str]], Answer]]:
    """`answer` in another process: in one of its own each time, or in the same until a case fails."""

    def start() -> ProcessPoolExecutor:
        context = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1 if each else None)

    pool = start()

    def ask(arguments: list[str]) -> Answer:
        nonlocal pool
        try:
            answered = pool.submit(_answer_and_clear, arguments).result()
        except BrokenProcessPool:
            answered = Answer([], "the process died")
        if answered.error is not None:
            pool.shutdown(cancel_futures=True)
            pool = start()
        return answered

    try:
        yield ask
    finally:
        pool.shutdown(cancel_futures=True)


def _answer_and_clear(arguments: list[str]) -> Answer:
    answered = answer(arguments)
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        with suppress(RuntimeError):  # after a failed kernel
            torch.cuda.empty_cache()
    return answered


def run(
    cases: list[Case], device: str, ask: Callable[[list[str]], Answer], partial: Path
) -> tuple[list[dict], list[str]]:
    """Ask case after case; the lines go to `partial` as they come.

    Returns:
        All records, and what failed.
    """
    records: list[dict] = []
    failed: list[str] = []
    partial.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("w") as file:
        for case in cases:
            arguments, begin = case.arguments(device), time.perf_counter()
            print("$ diffusion-moe", " ".join(arguments), flush=True)
            answered = ask(arguments)
            for line in answered.lines:
                file.write(line + "\n")
                records.append(json.loads(line))
                print(f"  {in_short(records[-1])}", flush=True)
            file.flush()
            print(f"  ({time.perf_counter() - begin:.0f} s)", flush=True)
            if answered.error is not None:
                left_out = case.against in OPTIONAL
                print(f"  {'left out' if left_out else 'FAILED'}: {answered.error}", flush=True)
                if not left_out:
                    failed.append(" ".join(arguments))
    return records, failed


def small_cases(cases: list[Case], folder: Path) -> list[Case]:
    """The same cases on models that take no time: same experts, routers and rules, narrow and shallow."""
    from diffusion_moe.config import read_recipe, to_yaml

    narrow = {"hidden_size": 32, "depth": 2, "num_heads": 2, "expert_dim": 16, "sample_size": 8, "num_classes": 10}
    tokens = 4 * (narrow["sample_size"] // 2) ** 2
    for name in {case.recipe for case in cases}:
        recipe = read_recipe(name, [f"--model.{key}={value}" for key, value in narrow.items()])
        (folder / f"{name}.yaml").write_text(to_yaml(recipe))
    return [case._replace(recipe=str(folder / f"{case.recipe}.yaml"), tokens=tokens, seconds=0.001) for case in cases]


def main(arguments: list[str] | None = None, page: Path = PAGE, results: Path = RESULTS) -> int:
    """Measure, keep what was measured, and write the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("machine", choices=list(CASES))
    parser.add_argument("--dry-run", action="store_true", help="small models on a CPU; nothing is kept")
    parser.add_argument("--name", help="of the results and of the marks in the page; the machine's unless given")
    parsed = parser.parse_args(arguments)
    machine, cases, begin = parsed.machine, CASES[parsed.machine], time.perf_counter()
    name = parsed.name or machine
    check_page(page, name)
    if parsed.dry_run:
        with tempfile.TemporaryDirectory() as folder:
            records, failed = run(small_cases(cases, Path(folder)), "cpu", answer, Path(folder) / "partial.jsonl")
            copy = Path(folder) / "page.md"
            copy.write_text(page.read_text())
            write_tables(copy, name, records)
    else:
        partial = results / f"{name}.partial.jsonl"
        with processes(each=machine == "cpu") as ask:
            records, failed = run(cases, "cuda" if machine == "gpu" else "cpu", ask, partial)
        if records:
            partial.replace(results / f"{name}.jsonl")
            write_tables(page, name, records)
    print(f"{len(records)} records in {time.perf_counter() - begin:.0f} s")
    for command in failed:
        print(f"failed: diffusion-moe {command}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
