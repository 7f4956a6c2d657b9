"""The command `bench`."""

import json

import pytest
import torch

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
        assert {
            "torch",
            "device",
            "threads",
            "backend",
            "ms_quartiles",
            "rounds",
            "peak_ratio",
            "operators",
        } <= record.keys()
    # digits: 64 tokens, D 108, F 96, 2 of 8 experts and a shared one, three matrices each; the router's 8 rows.
    forward = 2 * 64 * (3 * 3 * 108 * 96 + 8 * 108)
    assert records[0]["flops"] == forward
    assert records[1]["flops"] == 3 * forward


@pytest.mark.parametrize(("asked", "products"), [("low_precision", "bfloat16"), ("float32", "float32")])
@pytest.mark.parametrize("what", ["layer", "products"])
def test_lines_say_what_products_run_in(what, asked, products, capsys, monkeypatch):
    """And are held against what the machine can do in that."""
    from diffusion_moe.benchmarks.measure import ceilings

    monkeypatch.setenv("DIFFUSION_MOE_CPU_MATMUL", asked)
    assert main(["bench", what, *QUICK, "--dtype=bfloat16"]) == 0
    ceiling = ceilings(torch.device("cpu"), getattr(torch, products)).matmul_flops
    for line in capsys.readouterr().out.splitlines():
        record = json.loads(line)
        assert (record["dtype"], record["products"]) == ("bfloat16", products)
        assert record["matmul_ceiling"] == ceiling


def test_a_choice_of_products_that_there_is_not_is_one_line(capsys, monkeypatch):
    monkeypatch.setenv("DIFFUSION_MOE_CPU_MATMUL", "fp32")
    assert main(["bench", "layer", *QUICK, "--dtype=bfloat16"]) != 0
    told = capsys.readouterr().err
    assert told == "diffusion-moe: DIFFUSION_MOE_CPU_MATMUL is 'fp32'; choose auto, low_precision, float32\n"


@pytest.mark.parametrize("what", ["step", "sample"])
@pytest.mark.parametrize("against", ["loop", "transformers"])
def test_steps_and_samples_are_timed(capsys, what, against):
    if against != "loop":
        pytest.importorskip(against)
    assert main(["bench", what, *QUICK, f"--against={against}"]) == 0
    (record,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert record["benchmark"] == what and record["images"] == 4 and record["ratio"] > 0 and record["flops"] > 0
    for prefix in ("", "against_"):
        assert record[f"{prefix}images_per_second"] == pytest.approx(4e3 / record[f"{prefix}ms"])


def test_a_layer_is_held_against_transformers(capsys):
    transformers = pytest.importorskip("transformers")
    assert main(["bench", "layer", *QUICK, "--against=transformers"]) == 0
    for line in capsys.readouterr().out.splitlines():
        record = json.loads(line)
        assert record["against_version"] == transformers.__version__
        assert record["difference"] < 1e-6
        assert record["memory_ratio"] > 1


def test_making_hidden_layers_again_keeps_less(capsys):
    kept = {}
    for recompute in ("false", "true"):
        assert main(["bench", "layer", *QUICK, f"--recompute={recompute}"]) == 0
        record = json.loads(capsys.readouterr().out.splitlines()[1])
        kept[recompute] = record["saved_bytes"], record["against_saved_bytes"], record["flops"]
    # digits: 64 tokens, 2 experts each and a shared one, gate and value of 96 float32 numbers; their products are made
    # once more.
    assert kept["false"][0] - kept["true"][0] == 64 * (2 + 1) * 2 * 96 * 4
    assert kept["true"][1] == kept["false"][1]
    again = kept["true"][2] - kept["false"][2]
    assert again == 2 * 64 * 108 * (2 * 2 * 96 + 3 * 96)  # of the shared expert also the last product


def test_an_answer_too_far_from_ours_is_refused(capsys, monkeypatch):
    monkeypatch.setattr("diffusion_moe.benchmarks.loop.LoopMoE._each", lambda self, x_TD, routing: 2 * x_TD)
    assert main(["bench", "layer", *QUICK]) == 2
    error = capsys.readouterr().err
    assert "the answer of loop differs from ours by" in error and error.count("\n") == 1


def test_a_rival_that_fails_is_named(capsys, monkeypatch):
    def fails(self, x_TD, routing):
        raise RuntimeError("no kernel\nfor this device")

    monkeypatch.setattr("diffusion_moe.benchmarks.loop.LoopMoE._each", fails)
    assert main(["bench", "layer", *QUICK]) == 2
    error = capsys.readouterr().err
    assert "loop fails on this layer: no kernel" in error and error.count("\n") == 1


@pytest.mark.parametrize(("what", "lines"), [("products", 12), ("scaling", 5 + 5 + 4 + 4 + 4)])
def test_products_and_growth_are_lines_too(capsys, what, lines):
    assert main(["bench", what, *QUICK]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(records) == lines
    assert all(record["benchmark"] == what and record["recipe"] == "digits" for record in records)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["bench"], "the thing to time is missing"),
        (["bench", "layr"], "layr"),
        (["bench", "layer", "--recipe=dit-s"], "recipe dit-s has no experts"),
        (["bench", "layer", "--recipe=digits", "--tokens=65"], "tokens is 65; give a multiple of an image's 16"),
        (["bench", "layer", "--tokens=0"], "tokens is 0"),
        (["bench", "layer", "--against=nothing"], "against is nothing"),
        (["bench", "sample", "--recompute"], "recompute is true, but sample has no backward pass"),
        (["bench", "layer", "--acceleration=compile"], "acceleration is compile, which layer does not have"),
        (["bench", "step", "--acceleration=compile"], "but loop cannot be compiled or captured"),
        (["bench", "step", "--solver-steps=8"], "solver_steps is 8, but only sample has a solver"),
        (["bench", "scaling", "--recipe=digits", "--tokens=64", "--against=loop"], "against is loop, but scaling has"),
        (["bench", "layer", *QUICK, "--against=scattermoe"], "against is scattermoe, which cannot run here"),
    ],
)
def test_mistakes_are_one_line(capsys, arguments, expected):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1
