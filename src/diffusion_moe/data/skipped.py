"""The list of images that could not be read."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


class SkippedLog:
    """A text file with a line for each unreadable image, written as soon as one is met; no name comes twice."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known = self._written()

    def note(self, names: Iterable[str]) -> None:
        """Add the names that are new. Several processes may share the file: it is read again before each addition."""
        if set(names) <= self._known:
            return
        self._known |= self._written()
        new = [name for name in dict.fromkeys(names) if name not in self._known]
        with self.path.open("a") as file:
            file.writelines(f"{name}\n" for name in new)
        self._known |= set(new)

    def count(self) -> int:
        """How many images all processes have noted, each once."""
        self._known |= self._written()
        return len(self._known)

    def _written(self) -> set[str]:
        return set(self.path.read_text().splitlines()) if self.path.is_file() else set()
