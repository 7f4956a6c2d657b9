"""The command `diffusion-moe`: a file a verb or a family of verbs, all of them thin."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from ..allocator import keep_compiled_products, keep_freed_memory
from ..config.build import unknown_name

USER_ERROR = 2
VERBS = {
    "train": "train",
    "inspect": "data",
    "plan": "train",
    "sample": "sample",
    "convert": "convert",
    "ema": "convert",
    "encode": "data",
    "text-encoder": "convert",
    "evaluate": "evaluate",
    "stats": "evaluate",
    "sweep": "evaluate",
    "analyze": "sample",
    "study": "study",
    "bench": "measure",
    "recipes": "measure",
}
"""The file of each verb in this folder; it has a function of the verb's name."""
LIGHT_VERBS = ("inspect", "plan", "convert", "ema", "recipes")
"""Verbs that run no model."""


def function_of(verb: str) -> Callable[[Sequence[str]], int]:
    """The function of a verb, which takes its arguments and returns the exit status."""
    return getattr(import_module(f".{VERBS[verb]}", __name__), verb.replace("-", "_"))


def usage() -> str:
    """The text of `diffusion-moe --help`."""
    rows = "\n".join(f"  {verb:14}{(function_of(verb).__doc__ or '').splitlines()[0]}" for verb in VERBS)
    summary = "Diffusion transformers with mixtures of experts: train, sample, evaluate."
    note = "`diffusion-moe VERB --help` explains the options of a verb."
    return f"usage: diffusion-moe VERB ...\n\n{summary}\n\n{rows}\n\n{note}"


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
            message = unknown_name(arguments[0], list(VERBS)).replace("--help all", "--help")
            raise ValueError(message.replace("no", "no verb", 1))
        if arguments[0] not in LIGHT_VERBS:
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
