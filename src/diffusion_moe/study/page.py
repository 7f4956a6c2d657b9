"""The page of a study in Markdown, from its records alone."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from ..config import Recipe
from ..planning.table import duration
from .claims import Claim, Pair
from .curves import CurvePoint, reached
from .definition import Study
from .intervals import Interval, Verdict, all_of, paired_difference
from .records import Record, current, step_seconds

DIGITS = {"val_loss": 4, "gap": 4, "fd": 2, "kid": 4, "seconds": 0}
"""Decimals of each metric."""
NAMES = {"val_loss": "held-out loss", "gap": "gap", "fd": "FD", "kid": "KID", "seconds": "seconds"}


class Results:
    """The records of a study, by variant and scale."""

    def __init__(self, study: Study, records: Sequence[Record]) -> None:
        self.study = study
        self.step_seconds = {scale: step_seconds(study, records, scale) for scale in study.scales}
        self.records = [self._timed(record) for record in current(study, records)]
        self.by_cell: dict[tuple[str, str], dict[int, Record]] = {}
        for record in self.records:
            self.by_cell.setdefault((record["variant"], record["scale"]), {})[record["seed"]] = record

    def _timed(self, record: Record) -> Record:
        """The record with seconds by the timing of its scale, if there is one."""
        times = self.step_seconds[record["scale"]]
        if times is None:
            return record
        curve = [CurvePoint(*point) for point in record["val_curve"]]
        an_image = times[record["variant"]] * curve[0].step / curve[0].images
        curve = [point._replace(seconds=point.images * an_image) for point in curve]
        return record | {"val_curve": curve, "seconds": record["images"] * an_image}

    def of(self, variant: str, scale: str) -> list[Record]:
        """Finished runs of a variant, in the order of the seeds."""
        cell = self.by_cell.get((variant, scale), {})
        return [cell[seed] for seed in self.study.fields.seeds if seed in cell]

    def values(self, variant: str, scale: str, metric: str) -> list[float]:
        """A metric of the finished runs of a variant; empty if one has none."""
        found = [record[metric] for record in self.of(variant, scale)]
        return [] if None in found else found

    def difference(self, pair: Pair, scale: str, claim: Claim) -> Interval | None:
        """The paired difference over the seeds that both have; None if there are none."""
        better, worse = (self.by_cell.get((name, scale), {}) for name in pair)
        seeds = [seed for seed in self.study.fields.seeds if seed in better and seed in worse]
        values = [(better[seed][claim.metric], worse[seed][claim.metric]) for seed in seeds]
        if not values or any(None in both for both in values):
            return None
        first, second = zip(*values)
        return paired_difference(first, second, claim.margin)


def make_page(study: Study, records: Sequence[Record], figure: str | None) -> str:
    """The page of a study.

    Args:
        study: the study.
        records: of its file; those of other recipes are left out.
        figure: path of the figure of loss curves, relative to the page; None without records.
    """
    results, fields = Results(study, records), study.fields
    lines = [f"# {fields.title}", "", *([fields.text.strip(), ""] if fields.text else [])]
    lines += [_conditions(study, results), ""]
    if not results.records:
        lines += [
            "No run has finished yet. The command resumes where it was stopped:",
            "",
            f"    diffusion-moe study {study.file} --plan    # variants, parameters and the estimated time",
            f"    diffusion-moe study {study.file}",
            "",
        ]
        return "\n".join(lines)
    lines += _claims(results)
    lines += _variants(results)
    lines += _time_to_quality(results)
    lines += _levels(results)
    if figure is not None:
        lines += ["## Loss curves", "", f"![Held-out loss over images, a panel a claim]({figure})", ""]
    lines += _cost(results)
    return "\n".join(lines)


def _conditions(study: Study, results: Results) -> str:
    recipe: Recipe = next(iter(study.recipes.values()))
    fields, runs = study.fields, len(list(study.runs()))
    seeds = ", ".join(map(str, fields.seeds))
    return (
        f"Written by `diffusion-moe study {study.file}`: the recipe `{fields.recipe}`, {recipe.training.steps:,} "
        f"steps of {recipe.training.batch_size} images, {len(study.variants)} variants, seeds {seeds}; "
        f"{len(results.records)} of {runs} runs have finished. One seed gives all variants the same images in the same "
        "order, the same noise and times, in training and for the held-out loss. The held-out loss is that of the EMA "
        "weights. Differences are means over seeds of paired differences, with 95 % t-intervals; a verdict is told "
        f"only where the interval excludes zero. Activated parameters differ from those of `{fields.reference}` by at "
        f"most {100 * fields.tolerance:g} %, unless a variant is marked unequal."
    )


def _table(heading: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> list[str]:
    """A table whose first `left` columns are aligned to the left."""
    marks = ["---"] * left + ["---:"] * (len(heading) - left)
    return ["| " + " | ".join(cells) + " |" for cells in (heading, marks, *rows)] + [""]


def _claims(results: Results) -> list[str]:
    lines, summary, details = ["## Claims", ""], [], []
    for number, claim in enumerate(results.study.claims, start=1):
        rows: list[list[str]] = []
        verdicts: list[str] = []
        for scale in results.study.scales:
            pairs = [pair for pair in claim.pairs if all((name, scale) in results.study.recipes for name in pair)]
            found = [(pair, results.difference(pair, scale, claim)) for pair in pairs]
            verdicts.append(all_of([_verdict(difference) for _, difference in found]) if found else "not studied")
            rows += [_pair_row(results, claim, scale, pair, difference) for pair, difference in found]
        summary.append([f"{number}. {claim.text}", *verdicts])
        heading = ["lower", "higher", "scale", "difference", "95 % interval", "of the higher", "seeds", "verdict"]
        allowed = f"; differences are from the higher one times {1 + claim.margin:g}" if claim.margin else ""
        details += [f"### {number}. {claim.text}", "", f"By {NAMES[claim.metric]}{allowed}.", ""]
        details += _table(heading, rows, left=3)
        details += [claim.note.strip(), ""] if claim.note else []
    if not summary:
        return []
    return [*lines, *_table(["claim", *results.study.scales], summary, left=1 + len(results.study.scales)), *details]


def _verdict(difference: Interval | None) -> Verdict:
    return "cannot be told" if difference is None else difference.verdict


def _pair_row(results: Results, claim: Claim, scale: str, pair: Pair, difference: Interval | None) -> list[str]:
    if difference is None:
        return [pair.better, pair.worse, scale, "", "", "", "0", "cannot be told"]
    digits, higher = DIGITS[claim.metric], statistics.fmean(results.values(pair.worse, scale, claim.metric))
    bounds = f"{difference.low:+.{digits}f} to {difference.high:+.{digits}f}" if difference.pairs > 1 else ""
    relative = f"{100 * difference.mean / higher:+.2f} %" if higher else ""
    mean = f"{difference.mean:+.{digits}f}"
    return [pair.better, pair.worse, scale, mean, bounds, relative, str(difference.pairs), difference.verdict]


def _variants(results: Results) -> list[str]:
    text = (
        "Mean over seeds ± standard deviation. The gap is the held-out loss minus that of training images, at uniform "
        "times. FD and KID compare generated with held-out images by the features of a classifier. Seconds are those "
        f"of training steps{_timing(results)}."
    )
    lines = ["## Variants", "", text, ""]
    for scale in results.study.scales:
        rows = []
        for name, variant in results.study.variants.items():
            records = results.of(name, scale)
            if not records:
                continue
            cells = [_spread(results.values(name, scale, metric), DIGITS[metric]) for metric in DIGITS]
            sizes = [f"{records[0][key]:,.0f}" for key in ("activated", "total")]
            rows.append([name + (" (unequal)" if variant.unequal else ""), *sizes, *cells, str(len(records))])
        heading = ["variant", "activated", "total", *(NAMES[metric] for metric in DIGITS), "seeds"]
        title = [f"### {scale}", ""] if len(results.study.scales) > 1 else []
        lines += [*title, *_table(heading, rows)] if rows else []
    return lines


def _timing(results: Results) -> str:
    timed = all(results.step_seconds.values())
    return ", timed for all variants in turns" if timed else ", as the runs took them"


def _spread(values: Sequence[float], digits: int) -> str:
    """Mean, and the standard deviation if there are several; a dash for none."""
    if not values:
        return "-"
    mean = f"{statistics.fmean(values):,.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):,.{digits}f}" if len(values) > 1 else mean


def _time_to_quality(results: Results) -> list[str]:
    reference = results.study.fields.reference
    text = (
        f"Images and seconds of training until a variant's held-out loss is that of `{reference}` with the same seed "
        f"at its end, means over seeds; then the same over what `{reference}` took."
    )
    lines = ["## Time to quality", "", text, ""]
    heading = ["variant", "scale", "images", "seconds", "images, ratio", "seconds, ratio"]
    rows = []
    for scale in results.study.scales:
        ends = {record["seed"]: record for record in results.of(reference, scale)}
        for name in results.study.variants:
            pairs = [(record, ends[record["seed"]]) for record in results.of(name, scale) if record["seed"] in ends]
            if pairs:
                rows.append([name, scale, *_reached_cells(pairs)])
    return [*lines, *_table(heading, rows, left=2)]


def _reached_cells(pairs: Sequence[tuple[Record, Record]]) -> list[str]:
    found = []
    for record, end in pairs:
        at = reached([CurvePoint(*point) for point in record["val_curve"]], end["val_loss"])
        if at is not None:
            found.append((at.images, at.seconds, at.images / end["images"], at.seconds / end["seconds"]))
    if len(found) < len(pairs):
        missed = "not reached" if not found else f"not reached by {len(pairs) - len(found)} of {len(pairs)}"
        return [missed, "", "", ""]
    images, seconds, image_ratio, second_ratio = (statistics.fmean(column) for column in zip(*found))
    return [f"{images:,.0f}", f"{seconds:,.0f}", f"{image_ratio:.2f}", f"{second_ratio:.2f}"]


def _levels(results: Results) -> list[str]:
    lines = [
        "## By noise level",
        "",
        "Held-out loss at times t, from noise (0) to data (1), means over seeds.",
        "",
    ]
    count = len(results.records[0]["val_loss_by_level"])
    heading = ["variant", "scale", *(f"{i / count:.1f}-{(i + 1) / count:.1f}" for i in range(count))]
    rows = []
    for scale in results.study.scales:
        for name in results.study.variants:
            losses = [record["val_loss_by_level"] for record in results.of(name, scale)]
            if losses:
                rows.append([name, scale, *(f"{statistics.fmean(level):.4f}" for level in zip(*losses))])
    return [*lines, *_table(heading, rows, left=2)]


def _cost(results: Results) -> list[str]:
    spent = duration(sum(record["seconds"] for record in results.records))
    machines = dict.fromkeys(
        f"{m['device']}, {m['threads']} threads, torch {m['torch']}, diffusion_moe {m['diffusion_moe']}"
        if m["threads"]
        else f"{m['device']}, torch {m['torch']}, diffusion_moe {m['diffusion_moe']}"
        for m in (record["machine"] for record in results.records)
    )
    images = sum(record["images"] for record in results.records)
    text = f"{len(results.records)} runs took {spent} of training on {images:,} images."
    return ["## Cost", "", text, "", *(f"- {name}" for name in machines), ""]
