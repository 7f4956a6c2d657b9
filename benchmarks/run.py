"""Run the benchmarks of this machine, keep their JSON lines, and write docs/performance.md's table of them.

    python benchmarks/run.py cpu      # make bench: a few minutes on two cores
    python benchmarks/run.py gpu      # make bench-gpu

Every measurement is a process of its own, so that none inherits another's memory.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "performance.md"

CPU = [
    ("layer", "dsmoe-s-e48", 4096, "loop"),
    ("layer", "dsmoe-b-e48", 4096, "loop"),
    ("layer", "diffmoe-s-e16", 4096, "loop"),
    ("layer", "diffmoe-b-e16", 4096, "loop"),
    ("layer", "dsmoe-s-e16", 4096, "loop"),
    ("layer", "dsmoe-b-e16", 2048, "loop"),
    ("step", "dsmoe-s-e16", 2048, "dense"),
    ("step", "dsmoe-s-e48", 2048, "loop"),
    ("sample", "dsmoe-s-e48", 1024, "loop"),
]
SIZES = ("dsmoe-s-e16", "dsmoe-s-e48", "dsmoe-b-e16", "dsmoe-b-e48", "dsmoe-l-e16", "dsmoe-l-e48")
POOLS = ("diffmoe-s-e16", "diffmoe-b-e16", "diffmoe-l-e8")
GPU = [("layer", name, tokens, "loop") for name in SIZES + POOLS for tokens in (16384, 65536)]
GPU += [("step", name, 16384, "dense") for name in ("dsmoe-s-e16", "dsmoe-b-e16", "dsmoe-l-e16")]
GPU += [("sample", "dsmoe-s-e16", 16384, "loop")]


def main(machine: str) -> int:
    """Measure, and keep what was measured."""
    cases, seconds = (CPU, 4) if machine == "cpu" else (GPU, 3)
    lines: list[str] = []
    for what, recipe, tokens, against in cases:
        command = [sys.executable, "-m", "diffusion_moe", "bench", what, "--recipe", recipe, "--tokens", str(tokens)]
        command += ["--against", against, "--seconds", str(seconds), "--device", "cuda" if machine == "gpu" else "cpu"]
        print("$", " ".join(["diffusion-moe", *command[3:]]), flush=True)
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            print(run.stderr.strip(), file=sys.stderr)
            return run.returncode
        for line in run.stdout.splitlines():
            record = json.loads(line)
            print(
                f"  {record['mode']:18}{record['ms']:9.1f} ms, {record['ratio']:.2f} times as fast as {against}",
                flush=True,
            )
            lines.append(line)
    results = ROOT / "benchmarks" / "results" / f"{machine}.jsonl"
    results.parent.mkdir(exist_ok=True)
    results.write_text("\n".join(lines) + "\n")
    write_table(machine, [json.loads(line) for line in lines])
    return 0


def write_table(machine: str, records: list[dict]) -> None:
    """Put the table of one machine into the page, between its marks."""
    first = records[0]
    about = (
        f"{first['device']}, "
        + (f"{first['threads']} threads, " if first["threads"] else "")
        + f"torch {first['torch']}"
    )
    rows = [
        f"{about}; {first['matmul_ceiling'] / 1e9:.0f} GFLOP/s in a large {first['dtype']} product, "
        f"{first['copy_ceiling'] / 1e9:.1f} GB/s in a copy.",
        "",
        "| what | recipe | tokens | against | ms | theirs | ratio | memory kept | peak | utilisation |",
        "| --- | --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for r in records:
        memory = f"{r['memory_ratio']:.2f}" if "memory_ratio" in r else ""
        rows.append(
            f"| {r['benchmark']}, {r['mode']} | `{r['recipe']}` | {r['tokens']} | {r['against']} | {r['ms']:.1f} "
            f"| {r['against_ms']:.1f} | {r['ratio']:.2f} | {memory} | {r['peak_ratio']:.2f} | {r['utilisation']:.0%} |"
        )
    marks = f"<!-- {machine} -->\n", f"<!-- end {machine} -->"
    page = PAGE.read_text()
    PAGE.write_text(
        re.sub(f"{marks[0]}.*?{marks[1]}", lambda m: marks[0] + "\n".join(rows) + "\n" + marks[1], page, flags=re.S)
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else "cpu"))
