"""A plan as text."""

from __future__ import annotations

from ..counts import model_flops
from ..log import Log
from .options import PlanOptions
from .plan import Plan

SHOWN = 12
"""Layouts that are listed."""
LABELS = {"averages": "EMAs", "gathered": "gathered weights"}
"""Names of kinds of memory, where they differ from the fields'."""
TIMES = (("days", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1))
"""Units of a time, and their parts."""


def print_plan(plan: Plan, name: str, options: PlanOptions, log: Log) -> None:
    """The layouts, if there is a choice, and all numbers of the chosen one."""
    if len(plan.layouts) > 1:
        _print_layouts(plan, options, log)
    layout, training, compute = plan.chosen, plan.recipe.training, plan.compute
    sizes = layout.parallel
    spread = f"replicate {sizes.replicate} x shard {sizes.shard} x experts {sizes.experts}"
    log(f"{name} on 1 process" if plan.world == 1 else f"{name} on {plan.world} processes, {spread}")

    def row(label: str, value: str) -> None:
        log(f"  {label:22}{value}")

    log("parameters")
    row("all", f"{plan.size.total:,}")
    row("activated by a token", f"{round(plan.size.activated):,}")
    if plan.trains_a_part:
        row("that learn", f"{plan.tensors.learning:,}")
    log("a step")
    row("images", f"{training.batch_size:,}, {plan.images_per_process:,} at a time on each process")
    row("tokens", f"{training.batch_size * plan.tokens_per_image:,}, {plan.tokens_per_image:,} an image")
    row("forward and backward", f"{_short(compute.forward)}FLOP + {_short(compute.backward)}FLOP")
    if training.token_drop_rate:
        saved = 1 - compute.forward / (training.batch_size * model_flops(plan.recipe.model).total)
        row("saved by dropping", f"{saved:.0%} of all FLOPs, mean over the steps; memory is that of all tokens")
    if compute.recompute:
        row("recomputed", f"{_short(compute.recompute)}FLOP")
    log("memory of a process")
    for field, value in vars(layout.memory).items():
        if value:
            at_most = ", at most" if field == "activations" and plan.trains_a_part else ""
            row(LABELS.get(field, field), f"{_short(value)}B{at_most}")
    row("together", f"{_short(layout.memory.total)}B of {options.memory_gb:g} GB{'' if layout.fits else ': too much'}")
    log("on the disk")
    row("a checkpoint", f"{_short(plan.tensors.checkpoint)}B")
    row("the EMA model", f"{_short(plan.tensors.published)}B")
    if plan.tensors.snapshots:
        row("all snapshots", f"{_short(plan.tensors.snapshots)}B")
    log("the run")
    images = training.steps * training.batch_size
    row("steps", f"{training.steps:,}")
    row("images", f"{images:,}, {_short(images * plan.tokens_per_image)} tokens")
    row("model FLOPs", f"{training.steps * compute.model:.3g}")
    peak = f"{100 * options.utilisation:g} % of {plan.world} x {options.peak_tflops:g} TFLOP/s"
    row("time", f"{duration(plan.seconds)} at {peak}, {_short(images / plan.seconds)} images/s")
    if not layout.fits:
        log("to fit: a larger training.accumulation, training.recompute blocks, or more processes")


def _print_layouts(plan: Plan, options: PlanOptions, log: Log) -> None:
    log(f"layouts of {plan.world} processes, least communication first")
    log(f"  {'replicate':>9} {'shard':>6} {'experts':>8} {'memory':>10}   of {options.memory_gb:g} GB")
    shown = list(plan.layouts[:SHOWN])
    if plan.chosen not in shown:
        shown.append(plan.chosen)
    for layout in shown:
        parallel = layout.parallel
        mark = ("fits" if layout.fits else "too much") + (", suggested" if layout is plan.chosen else "")
        memory = f"{_short(layout.memory.total)}B"
        log(f"  {parallel.replicate:9} {parallel.shard:6} {parallel.experts:8} {memory:>10}   {mark}")
    if len(plan.layouts) > len(shown):
        log(f"  and {len(plan.layouts) - len(shown)} more (--json lists all)")
    log("")


def _short(count: float) -> str:
    """Three digits, and the prefix of a unit."""
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= 0.9995 * size:
            return f"{count / size:.3g} {prefix}"
    return f"{count:.3g}"


def duration(seconds: float) -> str:
    """A time in days and hours, hours and minutes, or minutes and seconds."""
    if seconds < 60:
        return f"{seconds:.2g} s"
    seconds = round(seconds)
    unit, size, smaller, smaller_size = next(row for row in TIMES if seconds >= row[1])
    return f"{seconds // size} {unit} {seconds % size // smaller_size} {smaller}"
