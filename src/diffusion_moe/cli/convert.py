"""The verbs that write models: `convert`, `ema` and `text-encoder`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..conversion import ConvertOptions, export_reference_checkpoint, to_pipeline
from ..posthoc_ema import EmaOptions, make_emas
from ..shapes.text_encoder.options import TextEncoderOptions
from .command_line import CommandLine
from .output import log
from .parsing import parse


def convert(arguments: Sequence[str]) -> int:
    """Make a pipeline folder of a reference checkpoint or a run, or the other way with --to published."""
    first = ("source", "a reference checkpoint, a folder that holds one, a hub id, or a run")
    given = parse(CommandLine("convert", convert.__doc__, (ConvertOptions,), first=first), arguments)
    options = given.options(ConvertOptions)
    work = to_pipeline if options.to == "diffusers" else export_reference_checkpoint
    log(work(given.first, options))
    return 0


def ema(arguments: Sequence[str]) -> int:
    """Make EMA models of any width from a run's snapshots (training.posthoc_ema_stds), after training."""
    first = ("run", "a finished run")
    given = parse(CommandLine("ema", ema.__doc__, (EmaOptions,), first=first), arguments)
    make_emas(Path(given.first), given.options(EmaOptions), log)
    return 0


def text_encoder(arguments: Sequence[str]) -> int:
    """Train a small text encoder and tokenizer for the coloured shapes, from scratch, in a minute."""
    first = ("folder", "its folder; an encoder that is there already is kept")
    line = CommandLine("text-encoder", text_encoder.__doc__, (TextEncoderOptions,), first=first)
    given = parse(line, arguments)
    options = given.options(TextEncoderOptions)
    from ..shapes.text_encoder.train import make_text_encoder

    make_text_encoder(Path(given.first), options, log)
    return 0
