"""Report of `inspect` on a data set: counts by class and split, sizes, modes, and problems."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..config import DataConfig
from ..data.image_table import ImageTable
from .examine import Examined

SHOWN_CLASSES = 50
SHOWN_PROBLEMS = 20
SHOWN_COPIES = 3


@dataclass(frozen=True)
class Report:
    """Facts about an examined data set."""

    config: DataConfig
    table: ImageTable
    held_out: np.ndarray
    """True for images that are held out from training, bool."""
    examined: Sequence[Examined]
    copies: Sequence[tuple[int, ...]]
    """Groups of images whose files have equal contents, by index."""

    def name(self, index: int) -> str:
        """Path of an image in the folder, or its row in the data set."""
        return self.table.image(index).name.removeprefix(f"{str(self.config.path).rstrip('/')}/")

    def copies_across(self, values: np.ndarray) -> int:
        """Number of groups of equal files whose images differ in `values`, one an image."""
        return sum(len(set(values[list(group)].tolist())) > 1 for group in self.copies)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; the classes are in the order of their labels."""
        counts = np.bincount(self.table.labels, minlength=len(self.table.class_names))
        sides = np.array([(found.width, found.height) for found in self.examined if found.width]).reshape(-1, 2)
        # Smallest, median and largest of each side.
        spread = np.quantile(sides, (0, 0.5, 1), axis=0).astype(int).T.tolist() if len(sides) else []
        return {
            "path": self.config.path,
            "kind": self.config.kind,
            "images": len(self.examined),
            "classes": dict(zip(self.table.class_names, counts.tolist())),
            "held_out": int(self.held_out.sum()),
            "unreadable": {self.name(i): found.problem for i, found in enumerate(self.examined) if found.problem},
            "ignored": dict(self.table.left_out),
            "notes": list(self.table.notes),
            "sizes": dict(zip(("width", "height"), spread)),
            "modes": dict(Counter(found.mode for found in self.examined if found.mode).most_common()),
            "image_size": self.config.image_size,
            "smaller_than_image_size": int((sides.min(axis=1) < self.config.image_size).sum()),
            "duplicates": {
                "images": sum(len(group) - 1 for group in self.copies),
                "groups": len(self.copies),
                "groups_across_classes": self.copies_across(self.table.labels),
                "groups_across_split": self.copies_across(self.held_out),
                "examples": [[self.name(index) for index in group] for group in self.copies[:SHOWN_COPIES]],
            },
        }

    def lines(self) -> Iterator[str]:
        """The report as text."""
        facts = self.to_dict()
        classes = facts["classes"]
        count = "1 class" if len(classes) == 1 else f"{len(classes)} classes"
        yield f"{self.config.path}: {facts['images']} images in {count}, {facts['held_out']} of them held out"
        held_out = np.bincount(self.table.labels[self.held_out], minlength=len(classes))
        width = max(len(name) for name in [*list(classes)[:SHOWN_CLASSES], "class"])
        yield f"{'label':>7}  {'class':{width}}{'images':>10}{'held out':>10}"
        for label, (name, number) in enumerate(list(classes.items())[:SHOWN_CLASSES]):
            yield f"{label:>7}  {name:{width}}{number:>10}{held_out[label]:>10}"
        if len(classes) > SHOWN_CLASSES:
            yield f"         and {len(classes) - SHOWN_CLASSES} more; --json lists them"
        if facts["sizes"]:
            w, h = facts["sizes"]["width"], facts["sizes"]["height"]
            yield f"width {w[0]} to {w[2]} pixels, median {w[1]}; height {h[0]} to {h[2]}, median {h[1]}"
        smaller = facts["smaller_than_image_size"]
        yield f"smaller than data.image_size {self.config.image_size}, and so enlarged: {smaller}"
        yield f"modes: {', '.join(f'{mode} {number}' for mode, number in facts['modes'].items())}"
        yield from self._problems(facts)
        yield from self.table.notes

    def _problems(self, facts: dict[str, Any]) -> Iterator[str]:
        unreadable, copies = facts["unreadable"], facts["duplicates"]
        remedy = "; remove them, or set data.on_corrupt to skip" if unreadable else ""
        yield f"unreadable: {len(unreadable)}{remedy}"
        for name, problem in list(unreadable.items())[:SHOWN_PROBLEMS]:
            yield f"  {name}: {problem}"
        if len(unreadable) > SHOWN_PROBLEMS:
            yield f"  and {len(unreadable) - SHOWN_PROBLEMS} more; --json lists them"
        groups = (
            f" (groups of equal files: {copies['groups']}; of them in several classes: "
            f"{copies['groups_across_classes']}, in training and held out: {copies['groups_across_split']})"
        )
        yield f"files equal to another one: {copies['images']}{groups if copies['images'] else ''}"
        for names in copies["examples"]:
            yield f"  {' = '.join(names)}"


def equal_files(examined: Sequence[Examined]) -> list[tuple[int, ...]]:
    """Groups of at least two files with equal contents, by index."""
    groups: dict[bytes, list[int]] = defaultdict(list)
    for index, found in enumerate(examined):
        if found.sha256:
            groups[found.sha256].append(index)
    return [tuple(group) for group in groups.values() if len(group) > 1]
