"""Refusing a setting."""

from __future__ import annotations


def require(condition: bool, message: str) -> None:
    """Refuse a setting.

    Raises:
        ValueError: the condition does not hold.
    """
    if not condition:
        raise ValueError(message)
