"""`benchmarks/compare.py`: our layer, steps and sampling against other implementations."""

import json

import compare
import pytest

QUICK = ["--recipe=digits", "--tokens=64", "--seconds=0.001", "--dtype=float32", "--device=cpu"]


def records_of(capsys, *arguments):
    assert compare.main(arguments) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("against", ["loop", "dense"])
def test_layer_lines_hold_what_was_measured(capsys, against):
    records = records_of(capsys, "layer", *QUICK, f"--against={against}")
    assert [record["mode"] for record in records] == ["forward", "forward+backward"]
    for record in records:
        assert record["ratio"] == pytest.approx(record["against_ms"] / record["ms"])
        assert record["memory_ratio"] == pytest.approx(record["against_saved_bytes"] / record["saved_bytes"])
        assert record["peak_ratio"] == pytest.approx(record["against_peak_bytes"] / record["peak_bytes"])
        assert record["waits"] == 0 and record["against_waits"] == (8 if against == "loop" else 0)
        assert ("difference" in record) == (against == "loop")
        assert {"torch", "device", "threads", "backend", "ms_quartiles", "rounds", "operators"} <= record.keys()
    # digits: 64 tokens, D 108, F 96, 2 of 8 experts and a shared one, three matrices each; the router's 8 rows.
    assert records[0]["flops"] == 2 * 64 * (3 * 3 * 108 * 96 + 8 * 108)


@pytest.mark.parametrize("what", ["step", "sample"])
@pytest.mark.parametrize("against", ["loop", "transformers"])
def test_steps_and_samples_are_timed(capsys, what, against):
    if against != "loop":
        pytest.importorskip(against)
    (record,) = records_of(capsys, what, *QUICK, f"--against={against}")
    assert record["benchmark"] == what and record["images"] == 4 and record["ratio"] > 0 and record["flops"] > 0
    for prefix in ("", "against_"):
        assert record[f"{prefix}images_per_second"] == pytest.approx(4e3 / record[f"{prefix}ms"])


def test_a_layer_is_compared_with_transformers(capsys):
    transformers = pytest.importorskip("transformers")
    for record in records_of(capsys, "layer", *QUICK, "--against=transformers"):
        assert record["against_version"] == transformers.__version__
        assert record["difference"] < 1e-6
        assert record["memory_ratio"] > 1


def test_our_layer_alone_is_recomputed(capsys):
    plain = records_of(capsys, "layer", *QUICK)[1]
    recomputed = records_of(capsys, "layer", *QUICK, "--recompute")[1]
    assert recomputed["saved_bytes"] < plain["saved_bytes"]
    assert recomputed["against_saved_bytes"] == plain["against_saved_bytes"]


def test_an_output_too_far_from_ours_is_refused(capsys, monkeypatch):
    monkeypatch.setattr("naive_loop.LoopMoE._looped", lambda self, x_TD, routing: 2 * x_TD)
    assert compare.main(["layer", *QUICK]) == 2
    error = capsys.readouterr().err
    assert "the output of loop differs from ours by" in error and error.count("\n") == 1


def test_an_implementation_that_fails_is_named(capsys, monkeypatch):
    def fails(self, x_TD, routing):
        raise RuntimeError("no kernel\nfor this device")

    monkeypatch.setattr("naive_loop.LoopMoE._looped", fails)
    assert compare.main(["layer", *QUICK]) == 2
    error = capsys.readouterr().err
    assert "loop fails on this layer: no kernel" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["layer", "--against=nothing"], "against is nothing"),
        (["scaling"], "scaling"),
        (["step", "--acceleration=compile"], "but loop cannot be compiled or captured"),
        (["layer", "--recipe=dit-s"], "recipe dit-s has no experts"),
        (["layer", *QUICK, "--against=scattermoe"], "against is scattermoe, which cannot run here"),
    ],
)
def test_mistakes_are_one_line(capsys, arguments, expected):
    assert compare.main(arguments) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1
