"""List of the images that could not be read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


class SkippedLog:
    """A text file with a line for each unreadable image, written as soon as one is met; names are unique.

    Several processes may share the file: it is read again before each addition.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: set[str] = set()

    def note(self, names: Sequence[str]) -> None:
        """Add the names that are new."""
        if self._known.issuperset(names):
            return
        self.count()
        new = [name for name in dict.fromkeys(names) if name not in self._known]
        with self.path.open("a") as file:
            file.writelines(f"{name}\n" for name in new)
        self._known.update(new)

    def count(self) -> int:
        """Number of different images that all processes have noted."""
        if self.path.is_file():
            self._known.update(self.path.read_text().splitlines())
        return len(self._known)
