"""A plan as text."""

from __future__ import annotations

from collections.abc import Callable

from ..log import Log
from .options import PlanOptions
from .plan import Plan, ProcessLayout

SHOWN = 12
"""Layouts that are listed."""
MEMORY = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "averages": "EMAs",
    "activations": "activations",
    "gathered": "gathered weights",
}


def print_plan(plan: Plan, name: str, options: PlanOptions, log: Log) -> None:
    """The layouts, if there is a choice, and all numbers of the chosen one."""
    if len(plan.layouts) > 1:
        _print_layouts(plan, options, log)
    layout, training, compute = plan.chosen, plan.recipe.training, plan.compute
    log(f"{name} on {_processes(plan.world)}{_layout(layout) if plan.world > 1 else ''}")
    row = _rows(log)
    log("parameters")
    row("all", f"{plan.size.total:,}")
    row("activated by a token", f"{round(plan.size.activated):,}")
    if plan.learning < plan.size.total - _tables(plan):
        row("that learn", f"{plan.learning:,}")
    log("a step")
    row("images", f"{training.batch_size:,}, {plan.images_per_process:,} at a time on each process")
    row("tokens", f"{training.batch_size * plan.tokens_per_image:,}, {plan.tokens_per_image:,} an image")
    row("forward and backward", f"{_short(compute.forward)}FLOP + {_short(compute.backward)}FLOP")
    if compute.recompute:
        row("recomputed", f"{_short(compute.recompute)}FLOP")
    log("memory of a process")
    for field, label in MEMORY.items():
        if value := getattr(layout.memory, field):
            at_most = ", at most" if field == "activations" and plan.bounds_activations else ""
            row(label, f"{_short(value)}B{at_most}")
    row("together", f"{_short(layout.memory.total)}B of {options.memory_gb:g} GB{'' if layout.fits else ': too much'}")
    log("on the disk")
    row("a checkpoint", f"{_short(plan.checkpoint_bytes)}B")
    row("the EMA model", f"{_short(plan.model_bytes)}B")
    log("the run")
    images = training.steps * training.batch_size
    row("steps", f"{training.steps:,}")
    row("images", f"{images:,}, {_short(images * plan.tokens_per_image)} tokens")
    row("model FLOPs", f"{training.steps * compute.model:.3g}")
    peak = f"{100 * options.utilisation:g} % of {plan.world} x {options.peak_tflops:g} TFLOP/s"
    row("time", f"{duration(plan.seconds)} at {peak}, {_short(images / plan.seconds)} images/s")
    if not layout.fits:
        log("to fit: a larger training.accumulation, training.recompute blocks, or more processes")


def _rows(log: Log) -> Callable[[str, str], None]:
    return lambda label, value: log(f"  {label:22}{value}")


def _print_layouts(plan: Plan, options: PlanOptions, log: Log) -> None:
    log(f"layouts of {plan.world} processes, least communication first")
    log(f"  {'replicate':>9} {'shard':>6} {'experts':>8} {'memory':>10}   of {options.memory_gb:g} GB")
    shown = list(plan.layouts[:SHOWN])
    if plan.chosen not in shown:
        shown.append(plan.chosen)
    for layout in shown:
        parallel = layout.parallel
        mark = ("fits" if layout.fits else "too much") + (", suggested" if layout is plan.chosen else "")
        sizes = (
            f"{parallel.replicate:9} {parallel.shard:6} {parallel.experts:8} {_short(layout.memory.total) + 'B':>10}"
        )
        log(f"  {sizes}   {mark}")
    if len(plan.layouts) > len(shown):
        log(f"  and {len(plan.layouts) - len(shown)} more (--json lists all)")
    log("")


def _tables(plan: Plan) -> int:
    """Fixed positions, which the papers count as parameters."""
    model = plan.recipe.model
    return plan.tokens_per_image * model.hidden_size if model.adds_sincos else 0


def _processes(world: int) -> str:
    return "1 process" if world == 1 else f"{world} processes"


def _layout(layout: ProcessLayout) -> str:
    parallel = layout.parallel
    return f", replicate {parallel.replicate} x shard {parallel.shard} x experts {parallel.experts}"


def _short(count: float) -> str:
    """Three digits, and the prefix of a unit."""
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= 0.9995 * size:
            return f"{count / size:.3g} {prefix}"
    return f"{count:.3g}"


def duration(seconds: float) -> str:
    """In days and hours, hours and minutes, or minutes and seconds."""
    if seconds < 60:
        return f"{seconds:.2g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} days {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s"
