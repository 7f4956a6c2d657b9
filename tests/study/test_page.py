"""The page of a study is a function of its file and its records."""

import json
from pathlib import Path

import pytest

from diffusion_moe.cli import main
from diffusion_moe.study.definition import read_study
from diffusion_moe.study.page import Results, make_page
from diffusion_moe.study.records import append_record, read_records, recipe_hashes

FOLDER = Path(__file__).parent / "page"


@pytest.fixture
def study(monkeypatch):
    monkeypatch.chdir(FOLDER)
    return read_study(Path("study.yaml"))


def test_the_command_rebuilds_the_page_from_the_records_alone(study, tmp_path, capsys):
    page = tmp_path / "page.md"
    assert main(["study", "study.yaml", "--records", "records.jsonl", "--page", str(page)]) == 0
    assert page.read_text() == (FOLDER / "page.md").read_text()
    assert (tmp_path / "page-curves.png").read_bytes().startswith(b"\x89PNG")
    assert "1 records of other recipes are left out" in capsys.readouterr().out
    assert not Path("out").exists()


def test_numbers_of_the_page_by_hand(study):
    """Differences of dsmoe and dense: -0.05, -0.049, -0.052; t(0.975, 2) is 4.3027."""
    results = Results(study, read_records(Path("records.jsonl")))
    difference = results.difference(study.claims[0].pairs[0], "small", study.claims[0])
    deviation = ((0.0003333**2 + 0.0013333**2 + 0.0016667**2) / 2) ** 0.5
    assert difference.mean == pytest.approx(-0.151 / 3)
    assert difference.high - difference.mean == pytest.approx(4.30265 * deviation / 3**0.5, rel=1e-3)
    margin = results.difference(study.claims[2].pairs[0], "small", study.claims[2])
    assert margin.mean == pytest.approx(
        sum(10 * (a - 1.01 * b) for a, b in [(0.97, 0.95), (1, 0.971), (0.95, 0.938)]) / 3
    )


def test_seconds_are_those_of_a_timing_in_turns(study):
    """A step of dense takes 2 s and one of dsmoe 3 s, whatever the runs took."""
    hashes = recipe_hashes(study, "small")
    timing = {"scale": "small", "step_seconds": dict.fromkeys(hashes, 3.0) | {"dense": 2.0}, "recipe_hashes": hashes}
    results = Results(study, [*read_records(Path("records.jsonl")), timing])
    for name, seconds in (("dense", 2.0), ("dsmoe", 3.0)):
        for record in results.of(name, "small"):
            assert record["seconds"] == pytest.approx(seconds * record["val_curve"][-1].step)
            assert [point.seconds for point in record["val_curve"]] == pytest.approx(
                [seconds * point.step for point in record["val_curve"]]
            )


def test_without_records_the_page_says_how_to_run(study):
    page = make_page(study, [], None)
    assert "No run has finished yet." in page
    assert "    diffusion-moe study study.yaml\n" in page
    assert "| " not in page


def test_records_of_another_recipe_are_not_used(study):
    other = [record | {"recipe_hash": "123456789abc"} for record in read_records(Path("records.jsonl"))]
    assert make_page(study, other, None) == make_page(study, [], None)


def test_a_damaged_record_is_named(tmp_path):
    path = tmp_path / "records.jsonl"
    append_record(path, {"recipe_hash": "a"})
    append_record(path, {"recipe_hash": "b"})
    assert [record["recipe_hash"] for record in read_records(path)] == ["a", "b"]
    path.write_text(path.read_text() + json.dumps({"recipe_hash": "c"})[:-4])
    with pytest.raises(ValueError, match=r"line 3 of .*records\.jsonl is no record of a study"):
        read_records(path)


def test_the_page_of_the_papers_claims_is_that_of_its_records(monkeypatch):
    root = Path(__file__).parents[2]
    monkeypatch.chdir(root)
    records = read_records(Path("benchmarks/results/study/records.jsonl"))
    figure = "study-curves.png" if records else None
    made = make_page(read_study(Path("benchmarks/study.yaml")), records, figure)
    assert made == (root / "docs" / "study.md").read_text(), "run `make study-page`"
