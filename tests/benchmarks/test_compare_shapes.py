"""`benchmarks/compare_shapes.py`: models of equal size, and the table it writes."""

import json
import sys

import compare_shapes as compare

from diffusion_moe.config import read_recipe
from diffusion_moe.counts import model_size
from diffusion_moe.shapes.prompts import CATEGORIES


def test_both_models_activate_as_much():
    activated = [model_size(read_recipe("shapes-t2i", options).model).activated for options in compare.MODELS.values()]
    assert max(activated) / min(activated) < 1.001


def tally(score):
    return {"n": 50, "score": score, "chance": 0.1, "true": 1.0}


def scores(value):
    categories = {name: {"seen": tally(value), "held_out": tally(value / 2)} for name in CATEGORIES}
    settings = {"num_samples": 600, "solver": "euler", "steps": 20, "guidance_scale": 2.0}
    return settings | {"categories": categories, "seen": tally(value), "held_out": tally(value / 2)}


def test_the_table_is_written_from_finished_runs(monkeypatch, tmp_path):
    """Finished runs are not repeated."""
    page = tmp_path / "shapes.md"
    page.write_text("before\n<!-- compare -->\nold\n<!-- end compare -->\nafter\n")
    for name, values in {"diffmoe": (0.8, 0.9), "dense": (0.5, 0.5)}.items():
        for seed, value in enumerate(values):
            run = tmp_path / "runs" / f"{name}-seed{seed}"
            run.mkdir(parents=True)
            (run / "evaluation.json").write_text(json.dumps(scores(value)))
            (run / "metrics.jsonl").write_text("".join(json.dumps({"loss": 0.1 * value}) + "\n" for _ in range(12)))
    called = []
    monkeypatch.setattr(compare, "command", lambda *arguments: called.append(arguments[0]))
    monkeypatch.setattr(compare, "PAGE", page)
    monkeypatch.setattr(sys, "argv", ["compare_shapes.py", f"--runs={tmp_path / 'runs'}", "--seeds=2"])
    compare.main()
    text = page.read_text()
    assert called == ["text-encoder"] and "old" not in text and text.startswith("before\n<!-- compare -->\n9000 steps")
    assert "DiffMoE 0.0850; dense 0.0500" in text
    assert "| counting | held out | 10.0 % | 100.0 % | 42.5 ± 3.5 % | 25.0 ± 0.0 % |" in text
    assert text.count("\n| ") == 2 + 12 + 2 and text.endswith("<!-- end compare -->\nafter\n")
