"""The type of functions that take lines of progress for people, such as `print`."""

from collections.abc import Callable

Log = Callable[[str], None]
