"""Classes by name or number, as users give them to the command and to the pipelines.

A text is a name, or else a number. `#2` is always class number 2, and `name:2` always the class named 2.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping

NUMBER = re.compile(r"-?[0-9]+")
NAME = "name:"


def by_name(names: Mapping[int, str]) -> dict[str, tuple[int, ...]]:
    """Numbers of the classes that each name may mean. Names are the whole text of a class and each synonym in it.

    Args:
        names: text of each class by its number, synonyms separated by commas.
    """
    found: dict[str, tuple[int, ...]] = {}
    for number, text in sorted(names.items()):
        for name in sorted({text.strip(), *(part.strip() for part in text.split(","))} - {""}):
            found[name] = (*found.get(name, ()), number)
    return found


def class_number(text: str, known: Mapping[str, tuple[int, ...]], count: int) -> int:
    """Number of the class that a text means, from 0 to count - 1.

    Args:
        text: a name, a number, `#` and a number, or `name:` and a name.
        known: class numbers by name; see `by_name`.
        count: number of classes.

    Raises:
        ValueError: no class or several have this name; the message says what to give instead.
    """
    text = text.strip()
    if NUMBER.fullmatch(text.removeprefix("#")) and text.startswith("#"):
        return checked(int(text[1:]), count)
    only_name = text.startswith(NAME)
    name = text.removeprefix(NAME).strip()
    number = int(name) if NUMBER.fullmatch(name) and not only_name else None
    meant = known.get(name, ())
    if len(meant) > 1:
        raise ValueError(f"{name!r} is the name of classes {', '.join(map(str, meant))}; give one as #{meant[0]}")
    if not meant and number is None:
        raise ValueError(_no_class(name, known, count))
    if not meant:
        assert number is not None
        return checked(number, count, _near(name, known))
    if number is not None and number != meant[0] and 0 <= number < count:
        raise ValueError(
            f"{name!r} is the name of class {meant[0]} and the number of another; give #{number} for the number or "
            f"{NAME}{name} for the name"
        )
    return checked(meant[0], count)


def checked(number: int, count: int, near: str = "") -> int:
    """The number, if it is in range.

    Args:
        number: number of a class.
        count: number of classes.
        near: names that may have been meant, for the message.

    Raises:
        ValueError: it is out of range.
    """
    if not 0 <= number < count:
        raise ValueError(
            f"class {number} is out of range; the model has classes 0 to {count - 1}{near and f'; {near}'}"
        )
    return number


def _no_class(name: str, known: Mapping[str, tuple[int, ...]], count: int) -> str:
    numbers = f"give a number from 0 to {count - 1}"
    if not known:
        return f"there is no class {name!r}, because the classes have no names here (no id2label); {numbers}"
    return f"there is no class {name!r}; {_near(name, known) or numbers}"


def _near(name: str, known: Mapping[str, tuple[int, ...]]) -> str:
    single = [synonym for synonym in known if "," not in synonym]
    near = difflib.get_close_matches(name, single, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else ""
