"""`benchmarks/run.py`: its lists of cases, what it keeps, and the tables it writes."""

import json
import os
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PAGE = BENCHMARKS.parent / "docs" / "performance.md"


@pytest.fixture
def run(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import run

    yield run
    for name in ("run", "tables"):
        sys.modules.pop(name, None)


@pytest.fixture
def page(tmp_path):
    copy = tmp_path / "performance.md"
    copy.write_text(PAGE.read_text())
    return copy


def test_the_gpu_list_holds_what_is_to_be_measured_first(run):
    kinds = [case.what for case in run.GPU]
    assert kinds == sorted(kinds, key=["products", "layer", "step", "sample", "scaling"].index)
    for name in ("dsmoe-s-e16", "dsmoe-l-e48", "dsmoe-3b-e16", "diffmoe-l-e8"):
        for tokens in (64 * 256, 256 * 256):
            assert run.Case("products", name, tokens, 0.2) in run.GPU
            assert run.Case("layer", name, tokens, 1, "loop") in run.GPU


def test_one_case_of_each_kind_of_the_gpu_list_runs_small(run, monkeypatch, page, tmp_path, capsys):
    kinds = {(case.what, case.against): case for case in run.GPU}
    monkeypatch.setitem(run.CASES, "gpu", list(kinds.values()))
    assert run.main(["gpu", "--dry-run"], page, tmp_path / "results") == 0
    told = capsys.readouterr().out
    assert told.count("$ diffusion-moe bench") == len(kinds)
    assert "FAILED" not in told and "left out: against is scattermoe, which cannot run here" in told
    assert page.read_text() == PAGE.read_text() and not (tmp_path / "results").exists()


@pytest.mark.slow
def test_the_whole_gpu_list_runs_small(run, capsys):
    assert run.main(["gpu", "--dry-run"]) == 0
    assert "FAILED" not in capsys.readouterr().out


def fake(run, monkeypatch, cases, answers):
    """Cases whose answers are given rather than measured."""

    class Given:
        def __enter__(self):
            return lambda arguments: answers[arguments[1]]

        def __exit__(self, *_):
            return None

    monkeypatch.setitem(run.CASES, "cpu", cases)
    monkeypatch.setattr(run, "processes", lambda each: Given())


HELD = {
    "benchmark": "layer",
    "mode": "forward",
    "recipe": "some-recipe",
    "tokens": 4096,
    "dtype": "bfloat16",
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
STEP = HELD | {"benchmark": "step", "mode": "step", "images_per_second": 12.5}
PRODUCT = HELD | {
    "benchmark": "products",
    "mode": "w_in forward",
    "experts": 4,
    "rows_an_expert": 8,
    "inputs": 16,
    "outputs": 32,
    "flops": 10**9,
    "ms": 10.0,
}
EXPONENT = {
    **{key: HELD[key] for key in ("recipe", "tokens", "dtype", "device", "threads", "backend", "torch", "cuda")},
    **{"benchmark": "scaling", "mode": "exponent", "axis": "top_k", "values": [1, 2], "ms": [3.0, 250.0]},
    **{"exponent": 0.987, "standard_error": 0.012, "memory_exponent": 1.0, "memory_standard_error": 0.0},
}


def test_tables_hold_the_numbers(run, monkeypatch, page, tmp_path, capsys):
    answers = {
        "layer": run.Answer([json.dumps(HELD), json.dumps(STEP)], None),
        "products": run.Answer(
            [
                json.dumps(PRODUCT | {"against": "loop", "against_ms": 20.0}),
                json.dumps(PRODUCT | {"against": "bmm", "against_ms": 5.0}),
            ],
            None,
        ),
        "scaling": run.Answer([json.dumps(EXPONENT)], None),
    }
    fake(run, monkeypatch, [run.Case(what, "some-recipe", 4096, 1) for what in answers], answers)
    assert run.main(["cpu"], page, tmp_path) == 0
    text = page.read_text()
    held = "| `some-recipe` | 4096 | transformers 5.0 | 20 | 30 | 1.50 | 3.25 | 2.00 | 69 / 1123 | 0 / 48 | 50% | 25%"
    for row in [
        "A processor, 2 threads, torch 2.13.0, operators in torch; 400 GFLOP/s in a large bfloat16 product, 80.0 GB/s",
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
    assert lines == [line for answered in answers.values() for line in answered.lines]
    assert not (tmp_path / "cpu.partial.jsonl").exists()


def test_another_machines_results_have_a_name_of_their_own(run, monkeypatch, page, tmp_path):
    fake(run, monkeypatch, [run.Case("layer", "x", 4096, 1)], {"layer": run.Answer([json.dumps(HELD)], None)})
    assert run.main(["cpu", "--name", "cpu-amd"], page, tmp_path) == 0
    assert [path.name for path in tmp_path.glob("*.jsonl")] == ["cpu-amd.jsonl"]
    before, after = PAGE.read_text().split("<!-- cpu-amd -->"), page.read_text().split("<!-- cpu-amd -->")
    assert before[0] == after[0] and "A processor" in after[1].split("<!-- end cpu-amd -->")[0]
    with pytest.raises(SystemExit, match="has no <!-- other -->"):
        run.main(["cpu", "--name", "other"], page, tmp_path)


def test_a_failed_case_costs_no_other_its_results(run, monkeypatch, page, tmp_path, capsys):
    answers = {
        "layer": run.Answer([json.dumps(HELD)], "out of memory"),
        "step": run.Answer([], "against is scattermoe, which cannot run here"),
        "scaling": run.Answer([json.dumps(EXPONENT)], None),
    }
    cases = [run.Case(what, "x", 4096, 1, "scattermoe" if what == "step" else None) for what in answers]
    fake(run, monkeypatch, cases, answers)
    assert run.main(["cpu"], page, tmp_path) == 1
    said = capsys.readouterr()
    assert "FAILED: out of memory" in said.out and "left out: against is scattermoe" in said.out
    assert said.err == "failed: diffusion-moe bench layer --recipe x --tokens 4096 --seconds 1 --device cpu\n"
    assert len((tmp_path / "cpu.jsonl").read_text().splitlines()) == 2


def test_where_everything_fails_the_old_results_stay(run, monkeypatch, page, tmp_path):
    (tmp_path / "cpu.jsonl").write_text("old\n")
    fake(run, monkeypatch, [run.Case("layer", "x", 4096, 1)], {"layer": run.Answer([], "no")})
    assert run.main(["cpu"], page, tmp_path) == 1
    assert (tmp_path / "cpu.jsonl").read_text() == "old\n" and page.read_text() == PAGE.read_text()


def test_a_page_without_marks_is_refused_before_measuring(run, page):
    page.write_text("# Speed\n")
    with pytest.raises(SystemExit, match="has no <!-- cpu --> and <!-- end cpu -->"):
        run.main(["cpu"], page)


def test_cases_run_in_other_processes_and_a_mistake_is_told(run):
    with run.processes(each=True) as ask:
        first, second = ask(["--version"]), ask(["no-such-verb"])
    assert first.lines[0].startswith("diffusion-moe ") and first.error is None
    assert second == run.Answer([], "there is no verb no-such-verb; see --help for all names")


def test_a_process_that_dies_is_replaced(run, monkeypatch):
    monkeypatch.setattr(run, "_answer_and_clear", os._exit)
    with run.processes(each=False) as ask:
        assert ask(3) == run.Answer([], "the process died")
        assert ask(4) == run.Answer([], "the process died")
