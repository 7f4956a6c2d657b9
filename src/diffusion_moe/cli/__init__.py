"""The command `diffusion-moe`: a file a verb or a family of verbs, all of them thin."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import NamedTuple

from ..allocator import keep_compiled_products, keep_freed_memory
from ..config.build import unknown_name

USER_ERROR = 2


class Verb(NamedTuple):
    """Where a verb's function is."""

    module: str
    """A file of this folder, which has a function of the verb's name."""
    computes: bool
    """It runs a model."""


VERBS = {
    "train": Verb("train", True),
    "inspect": Verb("data", False),
    "plan": Verb("train", False),
    "sample": Verb("sample", True),
    "convert": Verb("convert", False),
    "encode": Verb("data", True),
    "text-encoder": Verb("convert", True),
    "evaluate": Verb("evaluate", True),
    "stats": Verb("evaluate", True),
    "sweep": Verb("evaluate", True),
    "study": Verb("study", True),
    "analyze": Verb("sample", True),
    "bench": Verb("measure", True),
    "recipes": Verb("measure", False),
}


def function_of(verb: str) -> Callable[[Sequence[str]], int]:
    """The function of a verb, which takes its arguments and returns the exit status."""
    return getattr(import_module(f".{VERBS[verb].module}", __name__), verb.replace("-", "_"))


def usage() -> str:
    """The text of `diffusion-moe --help`."""
    lines = [f"  {verb:14}{(function_of(verb).__doc__ or '').splitlines()[0]}" for verb in VERBS]
    return "\n".join(
        [
            "usage: diffusion-moe VERB ...",
            "",
            "Diffusion transformers with mixtures of experts: train, sample, evaluate.",
            "",
            *lines,
            "",
            "`diffusion-moe VERB --help` explains the options of a verb.",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; a user's mistake is one line on standard error and exit status 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else USER_ERROR
    if arguments[0] == "--version":
        from .. import __version__

        print(f"diffusion-moe {__version__}")
        return 0
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    try:
        if arguments[0] not in VERBS:
            raise ValueError(
                unknown_name(arguments[0], list(VERBS)).replace("no", "no verb", 1).replace("--help all", "--help")
            )
        if VERBS[arguments[0]].computes:
            keep_freed_memory()
            keep_compiled_products()
        return function_of(arguments[0])(arguments[1:])
    except ValueError as error:
        if os.environ.get("DIFFUSION_MOE_TRACEBACK"):
            raise
        print(f"diffusion-moe: {error}", file=sys.stderr)
        return USER_ERROR
    except SystemExit as stop:
        return int(stop.code or 0)
    except KeyboardInterrupt:
        print("diffusion-moe: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        file = "" if error.filename is None else f": {error.filename}"
        print(f"diffusion-moe: {error.strerror or error}{file}", file=sys.stderr)
        return 1
