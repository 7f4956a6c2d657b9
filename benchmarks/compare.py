"""Time the layer, a training step or sampling against another implementation: one JSON line a measurement.

    python benchmarks/compare.py layer --recipe dsmoe-s-e48 --tokens 4096 --against loop
    python benchmarks/compare.py step --recipe dsmoe-s-e16 --tokens 2048 --against dense

Options are those of `diffusion-moe bench`, and --against.
"""

from __future__ import annotations

import copy
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from naive_loop import LoopMoE, dense_equivalent
from other_libraries import Library, with_library
from torch import nn

from diffusion_moe.allocator import keep_compiled_products, keep_freed_memory
from diffusion_moe.benchmarks.candidates import Candidate
from diffusion_moe.benchmarks.cases import Setting, make_candidates, make_module, read_setting
from diffusion_moe.benchmarks.measure import installed_version, interleaved, machine, measurements
from diffusion_moe.benchmarks.options import BenchOptions
from diffusion_moe.cli.command_line import CommandLine
from diffusion_moe.cli.parsing import parse
from diffusion_moe.moe import MoEFeedForward

What = Literal["layer", "step", "sample"]
Against = Literal["loop", "dense", "transformers", "scattermoe"]
TOLERANCE = 0.03
"""Largest difference of two outputs, relative to the norm of ours: bfloat16 rounds to 0.004."""
COMPARED = (
    "ms",
    "ms_quartiles",
    "rounds",
    "saved_bytes",
    "peak_bytes",
    "operators",
    "waits",
    "kernels",
    "images_per_second",
)
"""Keys of a record that the other implementation has too, with the prefix `against_`."""


@dataclass(frozen=True)
class CompareOptions(BenchOptions):
    """What to measure, how long, and against what."""

    against: Against = "loop"
    """loop: the same as a plain loop over experts. dense: a dense layer with as many activated parameters.
    transformers, scattermoe: that library's experts with our weights and our routing (token choice, SwiGLU without
    biases), where it is installed."""


def compare(what: What, options: CompareOptions) -> Iterator[dict[str, Any]]:
    """One record a measurement; keys that begin with `against_` are those of the other implementation.

    Raises:
        ValueError: the options do not fit, or the other implementation is missing, fails or computes something else.
    """
    if options.acceleration != "none" and options.against != "dense":
        raise ValueError(
            f"acceleration is {options.acceleration}, but {options.against} cannot be compiled or captured; choose "
            "dense"
        )
    setting = read_setting(what, options)
    metadata = setting.metadata(what) | {"against": options.against, "against_version": version_of(options.against)}
    module = make_module(what, setting)
    other = replace_layers(copy.deepcopy(module), setting, options.against)
    ours = make_candidates(what, module, setting)
    theirs = make_candidates(what, other, replace(setting, options=replace(options, recompute=False)))
    if what == "layer" and options.against != "dense":
        metadata["difference"] = difference(ours["forward"], theirs["forward"], options.against)
    for mode in ours:
        yield metadata | {"mode": mode} | compared(ours[mode], theirs[mode], what, setting) | machine(setting.device)


def compared(ours: Candidate, theirs: Candidate, what: What, setting: Setting) -> dict[str, Any]:
    """Both candidates timed in turn and counted."""
    times = interleaved([ours.run, theirs.run], setting.options.seconds, setting.device)
    own, other = (
        measurements(candidate, time, setting.device, setting.dtype) for candidate, time in zip((ours, theirs), times)
    )
    if what != "layer":
        for record, time in zip((own, other), times):
            record["images_per_second"] = setting.images / time.median
    record = own | {f"against_{key}": other[key] for key in COMPARED if key in other}
    record["ratio"] = other["ms"] / own["ms"]
    record["peak_ratio"] = other["peak_bytes"] / max(1, own["peak_bytes"])
    if own.get("saved_bytes"):
        record["memory_ratio"] = other["saved_bytes"] / own["saved_bytes"]
    return record


def replace_layers(module: nn.Module, setting: Setting, against: Against) -> nn.Module:
    """A layer, or every MoE layer of a model (in place), in the other implementation."""
    if isinstance(module, MoEFeedForward):
        return other_layer(module, setting, against).to(setting.device)
    for block in module.blocks:
        if isinstance(block.mlp, MoEFeedForward):
            block.mlp = other_layer(block.mlp, setting, against).to(setting.device)
    return module


def other_layer(layer: MoEFeedForward, setting: Setting, against: Against) -> nn.Module:
    """One layer in the other implementation, with copies of its weights where they mean the same."""
    if against == "loop":
        return LoopMoE(copy.deepcopy(layer))
    if against == "dense":
        return dense_equivalent(layer, setting.config.experts_per_token)
    return with_library(against, layer, setting.device, setting.dtype)


@torch.no_grad()
def difference(ours: Candidate, theirs: Candidate, against: Against) -> float:
    """Distance of the two outputs, relative to the norm of ours.

    Raises:
        ValueError: it is too large to be rounding, or the other implementation fails.
    """
    expected = ours.run()[0].float()
    name = f"{against} {version_of(against) or ''}".strip()
    try:
        output = theirs.run()[0].float()
    except Exception as error:  # another library's code: anything may go wrong in it
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{name} fails on this layer: {first_line}") from error
    found = float((output - expected).norm() / expected.norm())
    if not found <= TOLERANCE:
        raise ValueError(f"the output of {name} differs from ours by {found:.3g} of its norm; they do not compare")
    return found


def version_of(against: Against) -> str | None:
    """Version of the other library; None for our own code."""
    return installed_version(against) if against in get_args(Library) else None


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the records; a user's mistake is one line on standard error and exit status 2."""
    keep_freed_memory()  # as the command does
    keep_compiled_products()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    choices = get_args(What)
    first = ("subject", f"what to time: {', '.join(choices)}")
    line = CommandLine("compare.py", __doc__ or "", (CompareOptions,), first=first, program="python benchmarks/")
    try:
        given = parse(line, sys.argv[1:] if arguments is None else arguments)
        if given.first not in choices:
            raise ValueError(f"the subject is {given.first}; choose one of {', '.join(choices)}")
        for record in compare(given.first, given.options(CompareOptions)):  # type: ignore[arg-type]
            print(json.dumps(record), flush=True)
    except ValueError as error:
        print(f"compare.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
