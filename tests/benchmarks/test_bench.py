"""The command `bench`."""

import json

import pytest
import torch

from diffusion_moe.benchmarks.measure import ceilings
from diffusion_moe.cli import main

QUICK = ["--recipe=digits", "--tokens=64", "--seconds=0.001", "--dtype=float32", "--device=cpu"]


def bench(capsys, *arguments):
    assert main(["bench", *arguments]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_layer_lines_hold_what_was_measured(capsys):
    records = bench(capsys, "layer", *QUICK)
    assert [record["mode"] for record in records] == ["forward", "forward+backward"]
    for record in records:
        assert record["waits"] == 0
        assert record["utilisation"] == pytest.approx(record["flops_per_second"] / record["matmul_ceiling"])
        assert {"torch", "device", "threads", "backend", "ms_quartiles", "rounds", "operators"} <= record.keys()
    # digits: 64 tokens, D 108, F 96, 2 of 8 experts and a shared one, three matrices each; the router's 8 rows.
    forward = 2 * 64 * (3 * 3 * 108 * 96 + 8 * 108)
    assert records[0]["flops"] == forward
    assert records[1]["flops"] == 3 * forward


@pytest.mark.parametrize(("asked", "dtype"), [("low_precision", "bfloat16"), ("float32", "float32")])
@pytest.mark.parametrize("what", ["layer", "matmuls"])
def test_lines_hold_the_dtype_of_matmuls(what, asked, dtype, capsys, monkeypatch):
    """And the machine's ceiling is that of this dtype."""
    monkeypatch.setenv("DIFFUSION_MOE_CPU_MATMUL", asked)
    ceiling = ceilings(torch.device("cpu"), getattr(torch, dtype)).matmul_flops
    for record in bench(capsys, what, *QUICK, "--dtype=bfloat16"):
        assert (record["dtype"], record["matmul_dtype"]) == ("bfloat16", dtype)
        assert record["matmul_ceiling"] == ceiling


def test_an_unknown_dtype_of_matmuls_is_one_line(capsys, monkeypatch):
    monkeypatch.setenv("DIFFUSION_MOE_CPU_MATMUL", "fp32")
    assert main(["bench", "layer", *QUICK, "--dtype=bfloat16"]) != 0
    printed = capsys.readouterr().err
    assert printed == "diffusion-moe: DIFFUSION_MOE_CPU_MATMUL is 'fp32'; choose auto, low_precision, float32\n"


@pytest.mark.parametrize("what", ["step", "sample"])
def test_steps_and_samples_are_timed(capsys, what):
    (record,) = bench(capsys, what, *QUICK)
    assert record["benchmark"] == what and record["images"] == 4 and record["flops"] > 0
    assert record["images_per_second"] == pytest.approx(4e3 / record["ms"])
    assert record.get("solver") == ("euler" if what == "sample" else None)


def test_recomputing_hidden_layers_saves_less(capsys):
    saved = {}
    for recompute in ("false", "true"):
        record = bench(capsys, "layer", *QUICK, f"--recompute={recompute}")[1]
        saved[recompute] = record["saved_bytes"], record["flops"]
    # digits: 64 tokens, 2 experts each and a shared one, gate and value of 96 float32 values; their matmuls are
    # computed once more.
    assert saved["false"][0] - saved["true"][0] == 64 * (2 + 1) * 2 * 96 * 4
    again = saved["true"][1] - saved["false"][1]
    assert again == 2 * 64 * 108 * (2 * 2 * 96 + 3 * 96)  # of the shared expert also the last matmul


@pytest.mark.parametrize(("what", "lines"), [("matmuls", 12), ("scaling", 5 + 5 + 4 + 4 + 4)])
def test_matmuls_and_growth_are_lines_too(capsys, what, lines):
    records = bench(capsys, what, *QUICK)
    assert len(records) == lines
    assert all(record["benchmark"] == what and record["recipe"] == "digits" for record in records)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["bench"], "the subject is missing"),
        (["bench", "layr"], "layr"),
        (["bench", "products"], "bench products is now called matmuls; use diffusion-moe bench matmuls"),
        (["bench", "layer", "--recipe=dit-s"], "recipe dit-s has no experts"),
        (["bench", "layer", "--recipe=digits", "--tokens=65"], "tokens is 65; give a multiple of an image's 16"),
        (["bench", "layer", "--tokens=0"], "tokens is 0"),
        (["bench", "layer", "--against=loop"], "--against is not an option of bench"),
        (["bench", "sample", "--recompute"], "recompute is true, but sample has no backward pass"),
        (["bench", "layer", "--acceleration=compile"], "acceleration is compile, which is not supported for layer"),
        (["bench", "step", "--solver-steps=8"], "solver_steps is 8, but only sample has a solver"),
    ],
)
def test_mistakes_are_one_line(capsys, arguments, expected):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1
