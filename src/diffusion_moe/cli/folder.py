"""The command line of verbs that sample from a folder: its model, their options, and settings like the run's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..config import EvaluationConfig
from ..sampling.source import Source, read_source
from .command_line import CommandLine
from .parsing import parse

FOLDER = ("folder", "folder of a run, or one that `diffusion-moe convert` made")


class Folder(NamedTuple):
    """A folder and how to sample from it."""

    source: Source
    options: Any
    """The verb's own."""
    settings: EvaluationConfig


def read_folder(
    verb: Callable[[Sequence[str]], int],
    arguments: Sequence[str],
    options: type,
    hidden: Iterable[str] = (),
    usual: Mapping[str, Any] | None = None,
) -> Folder:
    """Parse the command line of a verb that samples from a folder.

    Args:
        verb: its function.
        options: the dataclass of the verb's own options.
        hidden: sampling settings that are not options of the verb.
        usual: settings that the verb does not take from the run.
    """
    name, own, usual = verb.__name__, (options, EvaluationConfig), usual or {}
    line = CommandLine(name, verb.__doc__, own, first=FOLDER, hidden={EvaluationConfig: hidden}, defaults=usual)
    given = parse(line, arguments)
    source = read_source(Path(given.first))
    unconditional = is_unconditional(source)
    defaults = {**vars(source.settings), **({"guidance_scale": 1.0} if unconditional else {}), **usual}
    settings = given.options(EvaluationConfig, defaults)
    if unconditional and settings.guidance_scale != 1:
        raise ValueError(f"guidance_scale is {settings.guidance_scale}, but the model is unconditional; remove it")
    return Folder(source, given.options(options), settings)


def is_unconditional(source: Source) -> bool:
    """True for a model without classes and text, which cannot be guided."""
    return source.config.num_classes == 0 and source.config.text_dim == 0
