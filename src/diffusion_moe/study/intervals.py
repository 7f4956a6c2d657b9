"""Mean paired differences with their intervals, and verdicts."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Literal, NamedTuple

Verdict = Literal["holds", "does not hold", "cannot be told"]
CONFIDENCE = 0.95


class Interval(NamedTuple):
    """A mean and the bounds that it lies between with the confidence; infinite bounds for a single value."""

    mean: float
    low: float
    high: float
    pairs: int

    @property
    def verdict(self) -> Verdict:
        """The verdict on "this difference is negative": told only if the interval excludes zero."""
        if self.high < 0:
            return "holds"
        return "does not hold" if self.low > 0 else "cannot be told"


def t_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's t distribution."""
    from scipy.special import stdtrit

    return float(stdtrit(degrees, probability))


def interval(values: Sequence[float]) -> Interval:
    """Mean of the values with its t-interval: mean +- t s / sqrt(n).

    Args:
        values: at least one.
    """
    mean, count = statistics.fmean(values), len(values)
    if count == 1:
        return Interval(mean, -math.inf, math.inf, 1)
    half = t_quantile((1 + CONFIDENCE) / 2, count - 1) * statistics.stdev(values) / math.sqrt(count)
    return Interval(mean, mean - half, mean + half, count)


def paired_difference(better: Sequence[float], worse: Sequence[float], margin: float = 0.0) -> Interval:
    """Interval of `better` - (1 + margin) * `worse`, pair by pair.

    Args:
        better: values of the variant that should have the lower ones.
        worse: values of the other variant on the same seeds, in the same order.
        margin: share by which the first may be worse.
    """
    assert len(better) == len(worse)
    return interval([a - (1 + margin) * b for a, b in zip(better, worse)])


def all_of(verdicts: Sequence[Verdict]) -> Verdict:
    """The verdict on several statements at once."""
    if "does not hold" in verdicts:
        return "does not hold"
    return "holds" if verdicts and set(verdicts) == {"holds"} else "cannot be told"
