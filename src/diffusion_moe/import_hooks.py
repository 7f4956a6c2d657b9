"""Actions after the import of another library's module. Waiting for one imports nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

Action = Callable[[ModuleType], None]


def when_imported(name: str, action: Action) -> None:
    """Call an action with the module of a full name: now if it is imported already, and after each later import."""
    _finder.actions.setdefault(name, []).append(action)
    if name in sys.modules:
        action(sys.modules[name])


class _Finder(MetaPathFinder):
    """Finds the modules that actions wait for as Python would, and calls the actions once a module has run."""

    def __init__(self) -> None:
        self.actions: dict[str, list[Action]] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of a module that an action waits for, whose loader calls the action at its end; else None."""
        spec = PathFinder.find_spec(fullname, path, target) if fullname in self.actions else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            for action in self.actions[fullname]:
                action(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


_finder = _Finder()
sys.meta_path.insert(0, _finder)
