"""Natural order of names: 2 before 10."""

from __future__ import annotations

import re
from typing import Any

_DIGITS = re.compile(r"([0-9]+)")


def natural_key(name: str) -> tuple[Any, str]:
    """Key to sort names by: numbers in them by value, letters without regard to case, equal ones by the name itself."""
    # Odd parts are the digits, so that numbers are compared with numbers only.
    parts = tuple(int(part) if i % 2 else part.casefold() for i, part in enumerate(_DIGITS.split(name)))
    return parts, name
