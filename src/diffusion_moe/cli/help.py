"""The help of a verb, from the docstrings of its options' dataclasses."""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from dataclasses import MISSING
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from ..config.build import as_text
from ..config.fields import hints
from .command_line import CommandLine

WIDTH, INDENT = 120, 34
SHORT = 100
"""Lines of a help that is printed whole."""
PLACEHOLDERS = {int: "INT", float: "FLOAT", bool: "BOOL", str: "TEXT", Path: "PATH"}


@cache
def field_docs(section: type) -> dict[str, str]:
    """The docstring after each field of a dataclass and of those it inherits from, in one line."""
    docs: dict[str, str] = {}
    for kind in reversed(section.__mro__[:-1]):
        tree = ast.parse(inspect.getsource(sys.modules[kind.__module__]))
        body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == kind.__name__)
        for field, after in pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(field.target, ast.Name):
                docs[field.target.id] = " ".join(str(ast.literal_eval(after.value)).split())
    return docs


def help_text(line: CommandLine, everything: bool) -> str:
    """The help of a verb: all options if that is short or wanted, else without the less common fields of a recipe."""
    whole = _describe(line, everything=True)
    if everything or whole.count("\n") < SHORT:
        return whole
    note = "`--help all` lists every option. A BOOL without its value is true."
    return f"{_describe(line, everything=False)}\n\n{note}"


def _describe(line: CommandLine, everything: bool) -> str:
    lines = [f"usage: {line.usage()}", "", *textwrap.wrap(" ".join((line.description or "").split()), WIDTH), ""]
    if line.first is not None:
        lines += [*_row(line.first[0].upper(), line.first[1]), ""]
    heading = ""
    for option in line.options():
        if not everything and not option.field.metadata.get("common", True):
            continue
        title = (option.kind.__doc__ or "").splitlines()[0]
        title = f"{option.section}: {title}" if option.section else title
        if title != heading:
            lines += [*([""] if heading else []), title]
            heading = title
        default = line.default(option)
        note = " (required)" if default is MISSING else f" (default: {as_text(default) or repr(default)})"
        placeholder = _placeholder(hints(option.kind)[option.field.name])
        doc = field_docs(option.kind)[option.field.name] + ("" if default is None else note)
        lines += _row(f"--{option.name} {placeholder}", doc)
    return "\n".join(lines)


def _row(name: str, text: str) -> list[str]:
    """A name, and its text to the right of it or, beside a long name, below."""
    indent = " " * INDENT
    wrapped = textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
    if len(name) + 4 > INDENT:
        return [f"  {name}", *wrapped]
    return [f"  {name:{INDENT - 2}}{wrapped[0].lstrip()}", *wrapped[1:]]


def _placeholder(hint: Any) -> str:
    """The values of a type, as `{a,b}` or INT."""
    kinds = get_args(hint)
    if get_origin(hint) is Literal:
        return f"{{{','.join(map(str, kinds))}}}"
    if get_origin(hint) is tuple:
        return f"[{PLACEHOLDERS[kinds[0]]},...]"
    if kinds:
        return _placeholder(next(kind for kind in kinds if kind is not NoneType))
    return PLACEHOLDERS[hint]
