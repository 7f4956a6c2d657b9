"""Claims of a study: pairs of variants, of which the first should have the lower metric."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple

from ..config import require
from ..config.build import build

Metric = Literal["val_loss", "gap", "fd", "kid", "seconds"]
"""Numbers of a record that are better when lower."""


class Pair(NamedTuple):
    """Two variants."""

    better: str
    worse: str


@dataclass(frozen=True)
class _ClaimFields:
    """Fields of a claim in the file, its variants aside."""

    text: str
    metric: Metric = "val_loss"
    margin: float = 0.0
    note: str = ""


@dataclass(frozen=True)
class Claim:
    """A sentence, and the pairs of variants by which it holds or does not."""

    text: str
    pairs: tuple[Pair, ...]
    metric: Metric = "val_loss"
    margin: float = 0.0
    """Share by which the first variant of a pair may be worse: "costs nothing" is a margin of 0.01."""
    note: str = ""
    """The author's explanation, which the page repeats."""

    def variants(self) -> list[str]:
        """All variants of the pairs, each once."""
        return list(dict.fromkeys(name for pair in self.pairs for name in pair))


def read_claim(values: Any, known: Container[str], where: str) -> Claim:
    """A claim of a study's file: `better` and `worse`, each one variant or a list, or a `chain` of them.

    Args:
        values: the mapping in the file.
        known: names of the variants.
        where: file and number of the claim, for messages.

    Raises:
        ValueError: a field or variant is unknown or missing.
    """
    require(isinstance(values, dict), f"{where} is {values!r}; give text, better and worse")
    rest = {name: value for name, value in values.items() if name not in ("better", "worse", "chain")}
    fields = build(_ClaimFields, rest, f"{where}: ")
    require(fields.margin >= 0, f"{where}: margin is {fields.margin}; use 0 for none")
    pairs = _pairs(values, where)
    for name in (name for pair in pairs for name in pair):
        require(name in known, f"{where} names the variant {name!r}, which the study does not have")
    return Claim(fields.text, pairs, fields.metric, fields.margin, fields.note)


def _pairs(values: Mapping[str, Any], where: str) -> tuple[Pair, ...]:
    if "chain" in values:
        require("better" not in values and "worse" not in values, f"{where} has a chain and pairs; give one of them")
        levels = [_names(level) for level in values["chain"]]
    else:
        require("better" in values and "worse" in values, f"{where} lacks better or worse; give both, or a chain")
        levels = [_names(values["better"]), _names(values["worse"])]
    pairs = [Pair(better, worse) for upper, lower in pairwise(levels) for better in upper for worse in lower]
    require(bool(pairs), f"{where} compares nothing; name at least two variants")
    return tuple(pairs)


def _names(level: Any) -> list[str]:
    return [str(name) for name in level] if isinstance(level, list) else [str(level)]
