"""Scores as lines of text."""

from __future__ import annotations

from typing import Any

Result = dict[str, Any]
"""Scores with all that they depend on, ready for JSON."""
TITLES = {
    "recognised": ("recognised as their class", "{:.1%}"),
    "frechet": ("Fréchet distance to the real images", "{:.3f}"),
    "nearest_neighbour": ("distance to the nearest training image", "{:.3f}"),
    "fid": ("FID", "{:.3f}"),
    "sfid": ("sFID", "{:.3f}"),
    "inception_score": ("Inception score", "{:.2f}"),
    "kid": ("KID", "{:.6f}"),
    "kernel_distance": ("kernel distance", "{:.6f}"),
    "precision": ("precision", "{:.3f}"),
    "recall": ("recall", "{:.3f}"),
}
"""Scores with their names and formats, in the order in which they are logged."""


def score_table(result: Result) -> list[str]:
    """Lines of a small table: a score a line, generated beside real images where both are known."""
    lines = [f"{'':40}{'generated':>12}" + (f"{'real':>12}" if "recognised_real" in result else "")]
    for key, (title, form) in TITLES.items():
        values = [result[name] for name in (key, f"{key}_real") if name in result]
        if key in result:
            lines.append(f"{title:40}" + "".join(f"{'-' if v is None else form.format(v):>12}" for v in values))
    return lines


def number_of(score: Any) -> Any:
    """A score as one number: for coloured shapes the share of right images, without its chance."""
    return score["score"] if isinstance(score, dict) else score


def summary(result: Result) -> str:
    """One line of what the scores depend on."""
    extractor = result["extractor"]
    parts = [f"{result['num_samples']} samples"]
    if "solver" in result:
        steps = "" if result["steps"] is None else f" {result['steps']} steps"
        low, high = result["guidance_interval"]
        interval = "" if (low, high) == (0, 1) else f" on t {low:g} to {high:g}"
        decay = result.get("ema_decay")  # None also for a post-hoc EMA, whose name is its width
        parts += [
            f"{result['solver']}{steps}, {result['function_evaluations']:g} evaluations",
            f"guidance {result['guidance_scale']:g}{interval}",
            f"weights {result['weights']}" + ("" if decay is None else f" (decay {decay:g})"),
        ]
    return "; ".join([*parts, f"{extractor['name']} {extractor['weights']}"])
