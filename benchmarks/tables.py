"""Records of the benchmarks as lines for people and as tables of docs/performance.md, each between two marks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

COMPARED = ("layer", "step", "sample")


def in_short(record: dict) -> str:
    """A record in one line."""
    name = record["benchmark"]
    if name == "scaling" and record["mode"] == "exponent":
        return f"{record['axis']}: time ~ {record['axis']} ^ {_with_error(record, '')}"
    if name == "scaling":
        return f"{record['axis']} {record['value']}: {record['ms']:.2f} ms"
    speed = f", {record['flops_per_second'] / 1e9:.0f} GFLOP/s" if name == "matmuls" else ""
    return (
        f"{record['mode']:18}{record['ms']:9.2f} ms{speed}, {record['ratio']:.2f} times as fast as {record['against']}"
    )


def renamed(record: dict) -> dict:
    """A record with today's names; older records have "products" for matmuls and for their dtype."""
    benchmark = "matmuls" if record["benchmark"] == "products" else record["benchmark"]
    matmul_dtype = record.get("matmul_dtype", record.get("products", record["dtype"]))
    return record | {"benchmark": benchmark, "matmul_dtype": matmul_dtype}


def check_page(page: Path, machine: str) -> None:
    """Refuse a page without the marks before anything is measured."""
    text = page.read_text()
    for name in (machine, f"matmuls-{machine}", f"scaling-{machine}"):
        if not re.search(_between(name), text, flags=re.S):
            raise SystemExit(f"{page} has no <!-- {name} --> and <!-- end {name} -->, around its table; add them")


def write_tables(page: Path, machine: str, records: Sequence[dict]) -> None:
    """Put a machine's tables between their marks; a table without records is not changed."""
    text = page.read_text()
    records = [renamed(record) for record in records]
    comparisons = [record for record in records if record["benchmark"] in COMPARED]
    matmuls = [record for record in records if record["benchmark"] == "matmuls"]
    exponents = [record for record in records if record["benchmark"] == "scaling" and record["mode"] == "exponent"]
    for name, rows, table in (
        (machine, comparisons, comparison_table),
        (f"matmuls-{machine}", matmuls, matmuls_table),
        (f"scaling-{machine}", exponents, scaling_table),
    ):
        if rows:
            text = put_between(text, name, table(rows))
    replace_page(page, text)


def put_between(text: str, name: str, lines: Sequence[str]) -> str:
    """A page with these lines between the marks of a name."""
    return re.sub(_between(name), lambda marks: "\n".join((marks[1], *lines, marks[2])), text, flags=re.S)


def replace_page(page: Path, text: str) -> None:
    """Write a page whole or not at all."""
    partial = page.with_name(f".{page.name}.partial")
    partial.write_text(text)
    partial.replace(page)


def _between(name: str) -> str:
    return f"(<!-- {name} -->)\n.*?(<!-- end {name} -->)"


def _machine(record: dict) -> str:
    threads = f", {record['threads']} threads" if record["threads"] else ""
    cuda = f" (CUDA {record['cuda']})" if record["cuda"] else ""
    return f"{record['device']}{threads}, torch {record['torch']}{cuda}, operators in {record['backend']}"


def _ceilings(record: dict) -> str:
    return (
        f"{record['matmul_ceiling'] / 1e9:.0f} GFLOP/s in a large {record['matmul_dtype']} matmul, "
        f"{record['copy_ceiling'] / 1e9:.1f} GB/s in a copy"
    )


def comparison_table(records: Sequence[dict]) -> list[str]:
    """Layers, steps and sampling against other implementations."""
    unit = "kernels" if records[0]["kernels"] is not None else "operators"
    columns = ["what", "recipe", "tokens", "against", "ms", "theirs", "ratio", "memory kept", "peak"]
    columns += [unit, "waits", "matmuls", "memory", "images/s"]
    rows = []
    for r in records:
        kept = f"{r['memory_ratio']:.2f}" if "memory_ratio" in r else ""
        images = f"{r['images_per_second']:.3g}" if "images_per_second" in r else ""
        what = r["benchmark"] if r["mode"] == r["benchmark"] else f"{r['benchmark']}, {r['mode']}"
        against = f"{r['against']} {r['against_version']}" if r["against_version"] else r["against"]
        rows.append(
            [
                what,
                _recipe(r),
                str(r["tokens"]),
                against,
                _ms(r["ms"]),
                _ms(r["against_ms"]),
                f"{r['ratio']:.2f}",
                kept,
                f"{r['peak_ratio']:.2f}",
                f"{r[unit]} / {r[f'against_{unit}']}",
                f"{r['waits']} / {r['against_waits']}",
                f"{r['utilisation']:.0%}",
                f"{r['copy_utilisation']:.0%}",
                images,
            ]
        )
    return [f"{_machine(records[0])}; {_ceilings(records[0])}.", "", *_table(columns, rows, left=(0, 1, 3))]


def matmuls_table(records: Sequence[dict]) -> list[str]:
    """Speeds of the three ways to compute the experts' matmuls, a line for each projection."""
    scale, unit = (1e12, "TFLOP/s") if records[0]["cuda"] else (1e9, "GFLOP/s")
    cells: dict[tuple, dict[str, dict[str, float]]] = {}
    for r in records:
        projection, part = r["mode"].split()
        shape = f"{r['experts']} x {r['rows_an_expert']} x {r['inputs']} x {r['outputs']}"
        speeds = cells.setdefault((_recipe(r), r["tokens"], projection, shape), {}).setdefault(part, {})
        speeds["grouped"] = r["flops"] / r["ms"] * 1e3 / scale
        speeds[r["against"]] = r["flops"] / r["against_ms"] * 1e3 / scale
    rows = [
        [str(cell) for cell in key] + [" / ".join(f"{v:.0f}" for v in parts[part].values()) for part in parts]
        for key, parts in cells.items()
    ]
    columns = ["recipe", "tokens", "projection", "experts x rows x inputs x outputs", "forward", "dgrad", "wgrad"]
    about = f"{_machine(records[0])}; {_ceilings(records[0])}. {unit} of grouped / loop / bmm."
    return [about, "", *_table(columns, rows, left=(0, 2))]


def scaling_table(records: Sequence[dict]) -> list[str]:
    """Exponents, a line for each axis."""
    first = records[0]
    rows = [
        [
            r["axis"].replace("_", "-"),
            ", ".join(str(value) for value in r["values"]),
            ", ".join(_ms(ms) for ms in r["ms"]),
            _with_error(r, ""),
            _with_error(r, "memory_"),
        ]
        for r in records
    ]
    about = f"{_recipe(first)}, {first['tokens']} tokens, {first['dtype']}; {_machine(first)}."
    return [about, "", *_table(["axis", "from, to", "ms", "time", "memory kept"], rows, left=(0, 1, 2))]


def _with_error(record: dict, prefix: str) -> str:
    return f"{record[f'{prefix}exponent']:.2f} ± {record[f'{prefix}standard_error']:.2f}"


def _recipe(record: dict) -> str:
    return f"`{Path(record['recipe']).stem}`"


def _ms(milliseconds: float) -> str:
    return f"{milliseconds:.3g}" if milliseconds < 100 else f"{milliseconds:.0f}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int]) -> list[str]:
    rule = ["---" if i in left else "---:" for i in range(len(columns))]
    return [f"| {' | '.join(cells)} |" for cells in (columns, rule, *rows)]
