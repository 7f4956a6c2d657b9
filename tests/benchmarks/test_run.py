"""`benchmarks/run.py`: its lists of cases, what it keeps, and the tables it writes."""

import json
import os
from pathlib import Path

import pytest
import run
from tables import write_tables

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "performance.md"


@pytest.fixture
def page(tmp_path):
    copy = tmp_path / "performance.md"
    copy.write_text(PAGE.read_text())
    return copy


def test_the_gpu_list_holds_what_is_to_be_measured_first():
    kinds = [case.what for case in run.GPU]
    assert kinds == sorted(kinds, key=["matmuls", "layer", "step", "sample", "scaling"].index)
    for name in ("dsmoe-s-e16", "dsmoe-l-e48", "dsmoe-3b-e16", "diffmoe-l-e8"):
        for tokens in (64 * 256, 256 * 256):
            assert run.Case("matmuls", name, tokens, 0.2) in run.GPU
            assert run.Case("layer", name, tokens, 1, "loop") in run.GPU


def test_one_case_of_each_kind_of_the_gpu_list_runs_small(monkeypatch, page, tmp_path, capsys):
    kinds = {(case.what, case.against): case for case in run.GPU}
    monkeypatch.setitem(run.CASES, "gpu", list(kinds.values()))
    assert run.main(["gpu", "--dry-run"], page, tmp_path / "results") == 0
    printed = capsys.readouterr().out
    assert printed.count("$ diffusion-moe bench") == sum(case.against is None for case in kinds.values())
    assert printed.count("$ compare.py") == sum(case.against is not None for case in kinds.values())
    assert "FAILED" not in printed and "skipped: against is scattermoe, which cannot run here" in printed
    assert page.read_text() == PAGE.read_text() and not (tmp_path / "results").exists()


@pytest.mark.slow
def test_the_whole_gpu_list_runs_small(capsys):
    assert run.main(["gpu", "--dry-run"]) == 0
    assert "FAILED" not in capsys.readouterr().out


def fake(monkeypatch, cases, outputs):
    """Cases whose outputs are given rather than measured."""

    class Given:
        def __enter__(self):
            return lambda command: outputs[next(word for word in command if word in outputs)]

        def __exit__(self, *_):
            return None

    monkeypatch.setitem(run.CASES, "cpu", cases)
    monkeypatch.setattr(run, "processes", lambda each: Given())


LAYER = {
    "benchmark": "layer",
    "mode": "forward",
    "recipe": "some-recipe",
    "tokens": 4096,
    "dtype": "bfloat16",
    "matmul_dtype": "bfloat16",
    "against": "transformers",
    "against_version": "5.0",
    "ratio": 1.5,
    "ms": 20.0,
    "against_ms": 30.0,
    "memory_ratio": 3.25,
    "peak_ratio": 2.0,
    "kernels": None,
    "operators": 69,
    "against_operators": 1123,
    "waits": 0,
    "against_waits": 48,
    "utilisation": 0.5,
    "copy_utilisation": 0.25,
    "matmul_ceiling": 4e11,
    "copy_ceiling": 8e10,
    "device": "A processor",
    "threads": 2,
    "backend": "torch",
    "torch": "2.13.0",
    "cuda": None,
    "flops_per_second": 2e11,
}
STEP = LAYER | {"benchmark": "step", "mode": "step", "images_per_second": 12.5}
MATMUL = LAYER | {
    "benchmark": "matmuls",
    "mode": "w_in forward",
    "experts": 4,
    "rows_an_expert": 8,
    "inputs": 16,
    "outputs": 32,
    "flops": 10**9,
    "ms": 10.0,
}
EXPONENT = {
    **{key: LAYER[key] for key in ("recipe", "tokens", "dtype", "device", "threads", "backend", "torch", "cuda")},
    **{"benchmark": "scaling", "mode": "exponent", "axis": "top_k", "values": [1, 2], "ms": [3.0, 250.0]},
    **{"exponent": 0.987, "standard_error": 0.012, "memory_exponent": 1.0, "memory_standard_error": 0.0},
}


def test_tables_hold_the_numbers(monkeypatch, page, tmp_path, capsys):
    outputs = {
        "layer": run.Output([json.dumps(LAYER), json.dumps(STEP)], None),
        "matmuls": run.Output(
            [
                json.dumps(MATMUL | {"against": "loop", "against_ms": 20.0}),
                json.dumps(MATMUL | {"against": "bmm", "against_ms": 5.0}),
            ],
            None,
        ),
        "scaling": run.Output([json.dumps(EXPONENT)], None),
    }
    fake(monkeypatch, [run.Case(what, "some-recipe", 4096, 1) for what in outputs], outputs)
    assert run.main(["cpu"], page, tmp_path) == 0
    text = page.read_text()
    held = "| `some-recipe` | 4096 | transformers 5.0 | 20 | 30 | 1.50 | 3.25 | 2.00 | 69 / 1123 | 0 / 48 | 50% | 25%"
    for row in [
        "A processor, 2 threads, torch 2.13.0, operators in torch; 400 GFLOP/s in a large bfloat16 matmul, 80.0 GB/s",
        f"| layer, forward {held} |  |",
        f"| step {held} | 12.5 |",
        "| `some-recipe` | 4096 | w_in | 4 x 8 x 16 x 32 | 100 / 50 / 200 |",
        "| top-k | 1, 2 | 3, 250 | 0.99 ± 0.01 | 1.00 ± 0.00 |",
    ]:
        assert row in text
    # Everything outside the marks stays, and the lines are kept as they came.
    assert text.split("<!-- cpu -->")[0] == PAGE.read_text().split("<!-- cpu -->")[0]
    assert text.split("## On a GPU")[1] == PAGE.read_text().split("## On a GPU")[1]
    lines = (tmp_path / "cpu.jsonl").read_text().splitlines()
    assert lines == [line for output in outputs.values() for line in output.lines]
    assert not (tmp_path / "cpu.partial.jsonl").exists()


def test_another_machines_results_have_a_name_of_their_own(monkeypatch, page, tmp_path):
    fake(monkeypatch, [run.Case("layer", "x", 4096, 1)], {"layer": run.Output([json.dumps(LAYER)], None)})
    assert run.main(["cpu", "--name", "cpu-amd"], page, tmp_path) == 0
    assert [path.name for path in tmp_path.glob("*.jsonl")] == ["cpu-amd.jsonl"]
    before, after = PAGE.read_text().split("<!-- cpu-amd -->"), page.read_text().split("<!-- cpu-amd -->")
    assert before[0] == after[0] and "A processor" in after[1].split("<!-- end cpu-amd -->")[0]
    with pytest.raises(SystemExit, match="has no <!-- other -->"):
        run.main(["cpu", "--name", "other"], page, tmp_path)


def test_a_failed_case_costs_no_other_its_results(monkeypatch, page, tmp_path, capsys):
    outputs = {
        "layer": run.Output([json.dumps(LAYER)], "out of memory"),
        "step": run.Output([], "against is scattermoe, which cannot run here"),
        "scaling": run.Output([json.dumps(EXPONENT)], None),
    }
    cases = [run.Case(what, "x", 4096, 1, "scattermoe" if what == "step" else None) for what in outputs]
    fake(monkeypatch, cases, outputs)
    assert run.main(["cpu"], page, tmp_path) == 1
    printed = capsys.readouterr()
    assert "FAILED: out of memory" in printed.out and "skipped: against is scattermoe" in printed.out
    assert printed.err == "failed: diffusion-moe bench layer --recipe x --tokens 4096 --seconds 1 --device cpu\n"
    assert len((tmp_path / "cpu.jsonl").read_text().splitlines()) == 2


def test_where_everything_fails_the_old_results_stay(monkeypatch, page, tmp_path):
    (tmp_path / "cpu.jsonl").write_text("old\n")
    fake(monkeypatch, [run.Case("layer", "x", 4096, 1)], {"layer": run.Output([], "no")})
    assert run.main(["cpu"], page, tmp_path) == 1
    assert (tmp_path / "cpu.jsonl").read_text() == "old\n" and page.read_text() == PAGE.read_text()


def test_a_page_without_marks_is_refused_before_measuring(page):
    page.write_text("# Speed\n")
    with pytest.raises(SystemExit, match="has no <!-- cpu --> and <!-- end cpu -->"):
        run.main(["cpu"], page)


def test_cases_run_in_other_processes_and_a_mistake_is_reported():
    with run.processes(each=True) as run_command:
        first, second = run_command(["diffusion-moe", "--version"]), run_command(["diffusion-moe", "no-such-verb"])
    assert first.lines[0].startswith("diffusion-moe ") and first.error is None
    assert second == run.Output([], "there is no verb no-such-verb; see --help for all names")


def test_a_process_that_dies_is_replaced(monkeypatch):
    monkeypatch.setattr(run, "_run_and_clear", os._exit)
    with run.processes(each=False) as run_command:
        assert run_command(3) == run.Output([], "the process died")
        assert run_command(4) == run.Output([], "the process died")


def test_records_of_older_versions_stay_readable(tmp_path):
    """The tables of the page are those of the kept records, whose keys are older."""
    copy = tmp_path / "performance.md"
    for name in ("cpu", "cpu-amd"):
        lines = (ROOT / "benchmarks" / "results" / f"{name}.jsonl").read_text().splitlines()
        copy.write_text(PAGE.read_text())
        write_tables(copy, name, [json.loads(line) for line in lines])
        assert copy.read_text() == PAGE.read_text()
