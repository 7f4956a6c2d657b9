"""Train the recipe shapes-t2i and a dense model of equal activated parameters; write scores into docs/shapes.md.

Every run is the shipped recipe with overrides. Finished runs are kept, so the script can be interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tables import put_between, replace_page

from diffusion_moe.config import read_recipe
from diffusion_moe.counts import model_size
from diffusion_moe.shapes.prompts import CATEGORIES, SPLITS

MODELS = {
    "DiffMoE": [],
    "dense": ["--model.router=dense", "--model.mlp_dim=276"],  # wider, to compensate for gates and predictors
}
PAGE = Path(__file__).parents[1] / "docs" / "shapes.md"


def command(*arguments: str) -> None:
    """Run the command in a process of its own, on one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole = [sys.executable, "-m", "diffusion_moe", *arguments]
    subprocess.run(whole, check=True, env=environment, stdout=subprocess.DEVNULL)


def run_one(model: str, seed: int, folder: Path) -> dict:
    """Train and score one run; return its scores."""
    run = folder / f"{model.lower()}-seed{seed}"
    if not (run / "evaluation.json").exists():
        options = [*MODELS[model], f"--data.text_encoder={folder / 'text'}", f"--training.seed={seed}"]
        command("train", "shapes-t2i", "--output_dir", str(run), *options, "--logging.tensorboard=false")
        command("evaluate", str(run))
    scores = json.loads((run / "evaluation.json").read_text())
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    scores["loss"] = statistics.mean([row["loss"] for row in rows if "loss" in row][-10:])
    print(f"{run.name}: seen {scores['seen']['score']:.1%}, held out {scores['held_out']['score']:.1%}", flush=True)
    return scores


def percent(values: list[float]) -> str:
    """Mean over seeds, with the standard deviation if there are several."""
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread} %"


def table(results: dict[str, list[dict]]) -> list[str]:
    """The scores as Markdown."""
    recipe, first = read_recipe("shapes-t2i"), next(iter(results.values()))[0]
    seeds = len(next(iter(results.values())))
    sizes = {model: model_size(read_recipe("shapes-t2i", options).model) for model, options in MODELS.items()}
    words = "; ".join(f"{model} {size.activated:,.0f} of {size.total:,}" for model, size in sizes.items())
    losses = "; ".join(f"{m} {statistics.mean(s['loss'] for s in runs):.4f}" for m, runs in results.items())
    lines = [
        f"{recipe.training.steps} steps of {recipe.training.batch_size} images, {seeds} "
        f"seed{'s' if seeds > 1 else ''}; {first['num_samples']} images a run, {first['solver']} with "
        f"{first['steps']} steps, guidance {first['guidance_scale']}, EMA weights. Activated parameters: {words}. "
        f"Training loss at the end: {losses}.",
        "",
        "| category | split | chance | true images | " + " | ".join(results) + " |",
        "| --- | --- | ---: | ---: |" + " ---: |" * len(results),
    ]
    rows = [(category, split, ("categories", category, split)) for category in CATEGORIES for split in SPLITS]
    rows += [("mean", split, (split,)) for split in SPLITS]
    for name, split, path in rows:
        cells = {model: [at(scores, path) for scores in runs] for model, runs in results.items()}
        one = next(iter(cells.values()))[0]
        scored = [percent([tally["score"] for tally in tallies]) for tallies in cells.values()]
        ends = [name, split.replace("_", " "), percent([one["chance"]]), percent([one["true"]]), *scored]
        lines.append(f"| {' | '.join(ends)} |")
    return lines


def at(scores: dict, path: tuple[str, ...]) -> dict:
    """A part of the scores."""
    for key in path:
        scores = scores[key]
    return scores


def main() -> None:
    """Run what is missing, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs/compare-t2i"), help="folder of the runs")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each model")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, on one thread each")
    arguments = parser.parse_args()
    command("text-encoder", str(arguments.runs / "text"))
    pairs = [(model, seed) for seed in range(arguments.seeds) for model in MODELS]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        scores = list(pool.map(lambda pair: run_one(*pair, arguments.runs), pairs))
    results = {model: [s for (m, _), s in zip(pairs, scores, strict=True) if m == model] for model in MODELS}
    replace_page(PAGE, put_between(PAGE.read_text(), "compare", table(results)))
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
