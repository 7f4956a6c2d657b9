"""Metrics of routing: pure functions on arrays of counts. Where nothing was counted they are NaN.

Shape suffixes: L MoE layers, S bins of time, E experts, R groups of images, D width, F expert width; x any axes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

DEAD_SHARE = 0.01
"""Share of an even load below which an expert counts as dead."""
DUPLICATE_COSINE = 0.9
"""Cosine of their weights above which two experts count as duplicates."""


class Estimate(NamedTuple):
    """A mean with its standard error, arrays of one shape."""

    mean: np.ndarray
    error: np.ndarray
    """Standard error of the mean; NaN with fewer than two groups."""


def ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole, NaN where the whole is 0."""
    part, whole = np.broadcast_arrays(np.asarray(part, float), np.asarray(whole, float))
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole != 0)


def estimate(part_Rx: np.ndarray, whole_Rx: np.ndarray) -> Estimate:
    """A ratio of totals, and its standard error from the ratios of independent groups of equal weight."""
    groups_Rx = ratio(part_Rx, whole_Rx)
    known_x = np.isfinite(groups_Rx).sum(0)
    centre_x = ratio(np.nansum(groups_Rx, axis=0), known_x)
    squares_x = np.nansum((groups_Rx - centre_x) ** 2, axis=0)
    error_x = np.sqrt(ratio(squares_x, np.maximum(known_x - 1, 0) * known_x))
    return Estimate(ratio(np.sum(part_Rx, axis=0), np.sum(whole_Rx, axis=0)), error_x)


def shares(served_xE: np.ndarray) -> np.ndarray:
    """Share of the assignments that each expert got, summing to 1 over experts."""
    return ratio(served_xE, served_xE.sum(-1, keepdims=True))


def imbalance(share_xE: np.ndarray) -> np.ndarray:
    """Load of the busiest expert over the mean load; 1 is even, E is one expert alone."""
    return share_xE.max(-1) * share_xE.shape[-1]


def effective_experts(share_xE: np.ndarray) -> np.ndarray:
    """The number of equally busy experts of the same entropy, exp(-sum p log p): from 1 to E."""
    logarithm = np.log(share_xE, out=np.zeros_like(share_xE), where=share_xE > 0)
    return np.exp(-(share_xE * logarithm).sum(-1))


def dead_experts(share_LE: np.ndarray) -> list[tuple[int, int]]:
    """(layer, expert) of those with less than `DEAD_SHARE` of an even load."""
    return [(int(layer), int(e)) for layer, e in np.argwhere(share_LE * share_LE.shape[-1] < DEAD_SHARE)]


def coactivation(pairs_LEE: np.ndarray) -> np.ndarray:
    """Share of the tokens of expert a that expert b served too, (L, a, b); NaN on the diagonal."""
    own_LE = np.diagonal(pairs_LEE, axis1=1, axis2=2)
    together_LEE = ratio(pairs_LEE, own_LE[:, :, None])
    E = pairs_LEE.shape[-1]
    together_LEE[:, range(E), range(E)] = np.nan
    return together_LEE


def total_variation(p_xE: np.ndarray, q_xE: np.ndarray) -> np.ndarray:
    """Total variation distance, sum |p - q| / 2: the share of assignments that would have to move; 0 to 1."""
    return np.abs(p_xE - q_xE).sum(-1) / 2


def cosines(rows_ED: np.ndarray) -> np.ndarray:
    """Cosine of each pair of rows, (E, E); NaN for a row of zeros."""
    dot_EE = rows_ED @ rows_ED.T
    length_E = np.sqrt(np.diagonal(dot_EE))
    return ratio(dot_EE, length_E[:, None] * length_E[None])


def expert_maps(w_in_EDH: np.ndarray, w_out_EFD: np.ndarray) -> np.ndarray:
    """Each expert without its activation, w_in w_out, as a row, (E, D * D or twice that).

    Unlike the weights, it does not depend on the order of hidden units. Gates and values of SwiGLU give a map each.
    """
    E, F, _ = w_out_EFD.shape
    halves = np.split(w_in_EDH, w_in_EDH.shape[2] // F, axis=2)
    return np.concatenate([(half @ w_out_EFD).reshape(E, -1) for half in halves], axis=1)


def duplicate_experts(cosine_LEE: np.ndarray) -> list[tuple[int, int, int]]:
    """(layer, expert, expert) of pairs with a cosine above `DUPLICATE_COSINE`."""
    upper = np.triu(np.nan_to_num(cosine_LEE), k=1)
    return [(int(layer), int(a), int(b)) for layer, a, b in np.argwhere(upper > DUPLICATE_COSINE)]


def varies(values: np.ndarray, tolerance: float = 1e-9) -> bool:
    """True if the finite values differ: some rules give every token the same number of experts."""
    known = values[np.isfinite(values)]
    return known.size > 0 and bool(known.max() - known.min() > tolerance)


def moving_average(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of each `window` values in a row, len(values) - window + 1 of them."""
    return np.convolve(values, np.ones(window) / window, mode="valid") if len(values) else np.empty(0)


def evenly_spaced(count: int, wanted: int) -> list[int]:
    """At most `wanted` of the integers below `count`, evenly spaced, with the first and the last."""
    if count <= wanted:
        return list(range(count))
    return [round(i * (count - 1) / (wanted - 1)) for i in range(wanted)] if wanted > 1 else [0]
