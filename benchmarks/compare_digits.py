"""Train the routing rules on digits, three seeds each, and write the table to docs/digits.md.

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

from diffusion_moe.models.sizes import model_size
from diffusion_moe.parsing import read_recipe

RULES = {
    "dense": ("no experts", ["--model.router=dense"]),
    "tc": ("softmax top-2, auxiliary loss 0.01", ["--model.router=tc", "--model.balance=aux"]),
    "ec": ("expert choice per image, capacity 2", ["--model.router=ec"]),
    "diffmoe": ("token choice over the batch, capacity 2, thresholds per image", ["--model.router=diffmoe"]),
    "dsmoe": ("sigmoid top-2, correction bias", ["--model.router=dsmoe"]),
}
SEEDS = (0, 1, 2)
PAGE = Path(__file__).parents[1] / "docs" / "digits.md"


def run_one(rule: str, seed: int, folder: Path) -> dict:
    """Train and score one run in processes of its own, on one thread; return its scores."""
    run = folder / f"{rule}-seed{seed}"
    if not (run / "evaluation.json").exists():
        command = [sys.executable, "-m", "diffusion_moe"]
        options = [*RULES[rule][1], f"--training.seed={seed}", "--logging.tensorboard=false"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        for verb in (["train", "digits", "--output_dir", str(run), *options], ["evaluate", str(run)]):
            subprocess.run([*command, *verb], check=True, env=environment, stdout=subprocess.DEVNULL)
    scores = json.loads((run / "evaluation.json").read_text())
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    scores["loss"] = statistics.mean(row["loss"] for row in rows[-10:])
    scores["imbalance"] = statistics.mean(row.get("imbalance", 0) for row in rows[-10:])
    print(f"{run.name}: recognised {scores['recognised']:.1%}, Fréchet {scores['frechet']:.2f}", flush=True)
    return scores


def spread(values: list[float], form: str) -> str:
    """Mean and standard deviation over seeds."""
    return f"{statistics.mean(values):{form}} ± {statistics.stdev(values):{form}}"


def page(results: dict[str, list[dict]]) -> str:
    """The table as Markdown."""
    recipe = read_recipe("digits")
    first = results["dense"][0]
    lines = [
        "# Five routing rules on digits",
        "",
        f"Written by `make compare`. Each row is the recipe `digits` ({recipe.training.steps} steps of "
        f"{recipe.training.batch_size} images) with another routing rule: mean and standard "
        f"deviation over {len(SEEDS)} seeds. Scores are of {first['num_samples']} images each, {first['solver']} with "
        f"{first['steps']} steps, guidance {first['guidance_scale']}, EMA weights.",
        "",
        f"Real held-out digits: {first['recognised_real']:.1%} recognised; Fréchet distance of the training "
        f"to the held-out split {first['frechet_real']:.2f}; distance to the nearest training image "
        f"{first['nearest_neighbour_real']:.3f}.",
        "",
        "| rule | | parameters | activated | training loss | recognised | Fréchet | nearest neighbour | imbalance |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for rule, (words, options) in RULES.items():
        size, scores = model_size(read_recipe("digits", options).model), results[rule]
        cells = [
            rule,
            words,
            f"{size.total:,}",
            f"{size.activated:,.0f}",
            spread([s["loss"] for s in scores], ".4f"),
            spread([100 * s["recognised"] for s in scores], ".1f") + " %",
            spread([s["frechet"] for s in scores], ".1f"),
            spread([s["nearest_neighbour"] for s in scores], ".3f"),
            spread([s["imbalance"] for s in scores], ".2f") if rule != "dense" else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "Training loss: mean of the last ten logged steps. Imbalance: load of the busiest expert over the mean load at "
        "the end of training (1 is even). Differences within the spread of the seeds are not significant: this page "
        "shows that every rule trains, and is not a ranking of the papers.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs/compare"), help="folder of the runs")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, on one thread each")
    arguments = parser.parse_args()
    pairs = [(rule, seed) for seed in SEEDS for rule in RULES]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        scores = list(pool.map(lambda pair: run_one(*pair, arguments.runs), pairs))
    results = {rule: [s for (r, _), s in zip(pairs, scores, strict=True) if r == rule] for rule in RULES}
    PAGE.write_text(page(results))
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
