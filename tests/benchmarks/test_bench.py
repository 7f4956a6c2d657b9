"""The command `bench`."""

import json

import pytest

from diffusion_moe.cli import main

QUICK = ["--recipe=digits", "--tokens=64", "--seconds=0.001", "--dtype=float32", "--device=cpu"]


@pytest.mark.parametrize("against", ["loop", "dense"])
def test_layer_lines_hold_what_was_measured(capsys, against):
    assert main(["bench", "layer", *QUICK, f"--against={against}"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["mode"] for record in records] == ["forward", "forward+backward"]
    for record in records:
        assert record["ratio"] == pytest.approx(record["against_ms"] / record["ms"])
        assert record["memory_ratio"] == pytest.approx(record["against_saved_bytes"] / record["saved_bytes"])
        assert record["waits"] == 0 and record["against_waits"] == (8 if against == "loop" else 0)
        assert record["utilisation"] == pytest.approx(record["flops_per_second"] / record["matmul_ceiling"])
        assert {"torch", "device", "threads", "ms_quartiles", "peak_ratio", "operators"} <= record.keys()
    # digits: 64 tokens, D 108, F 96, 2 of 8 experts and a shared one, three matrices each; the router's 8 rows.
    forward = 2 * 64 * (3 * 3 * 108 * 96 + 8 * 108)
    assert records[0]["flops"] == forward
    assert records[1]["flops"] == 3 * forward


@pytest.mark.parametrize("what", ["step", "sample"])
def test_steps_and_samples_are_timed(capsys, what):
    assert main(["bench", what, *QUICK]) == 0
    (record,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert record["benchmark"] == what and record["images"] == 4 and record["ratio"] > 0 and record["flops"] > 0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["bench"], "the thing to time is missing"),
        (["bench", "layr"], "layr"),
        (["bench", "layer", "--recipe=dit-s"], "recipe dit-s has no experts"),
        (["bench", "layer", "--recipe=digits", "--tokens=65"], "tokens is 65; give a multiple of an image's 16"),
        (["bench", "layer", "--tokens=0"], "tokens is 0"),
        (["bench", "layer", "--against=nothing"], "against is nothing"),
    ],
)
def test_mistakes_are_one_line(capsys, arguments, expected):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1
