"""Data of the figures as parquet files, with metadata on how they were made."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from .findings import Findings, Sampling

Columns = dict[str, np.ndarray]
TABLES = ("routing", "pairs", "places", "maps", "weights", "curves", "held_out")
"""Names of all possible files; docs/analysis.md explains their columns."""


def tables(findings: Findings) -> dict[str, Columns]:
    """Columns of each table that has data."""
    found: dict[str, Columns] = {}
    if findings.sampling is not None:
        found |= _routing_tables(findings, findings.sampling)
    if findings.weights is not None:
        layer, a, b = _indices(findings.weights.experts_LEE.shape)
        experts, routers = findings.weights
        found["weights"] = _flat(layer=layer + 1, expert=a, other=b, experts_cosine=experts, routers_cosine=routers)
    if findings.curves:
        parts = []
        for curves in findings.curves:
            names = np.full(len(curves.steps_W), curves.run)
            parts.append({"run": names, "step": curves.steps_W, "loss": curves.loss_W, "imbalance": curves.imbalance_W})
        found["curves"] = _joined(parts)
    if findings.held_out:
        parts = []
        for run in findings.held_out:
            image, s = _indices(run.loss_IS.shape)
            label = np.broadcast_to(run.labels_I[:, None], image.shape)
            names = np.full(image.shape, run.run)
            parts.append(_flat(run=names, image=image, label=label, t=run.times_S[s], loss=run.loss_IS))
        found["held_out"] = _joined(parts)
    return found


def _routing_tables(findings: Findings, sampling: Sampling) -> dict[str, Columns]:
    counts, found = sampling.counts, dict[str, Columns]()
    assert counts.pairs_LEE is not None and counts.positions_LEP is not None
    served_LSKE, tokens_LSK = counts.served_LSKE, counts.tokens_LSK
    if sampling.null_served_LSE is not None and sampling.null_tokens_LS is not None:
        served_LSKE = np.concatenate((served_LSKE, sampling.null_served_LSE[:, :, None]), axis=2)
        tokens_LSK = np.concatenate((tokens_LSK, sampling.null_tokens_LS[:, :, None]), axis=2)
    layer, s, k, e = np.nonzero(np.broadcast_to(tokens_LSK[..., None], served_LSKE.shape))
    S, K = counts.tokens_LSK.shape[1:]
    found["routing"] = {
        "layer": layer + 1,
        "t": s / S,
        "class": np.where(k < K, k, -1),
        "class_name": np.array([*findings.class_names, f"no {findings.condition}"])[k],
        "expert": e,
        "served": served_LSKE[layer, s, k, e],
        "tokens": tokens_LSK[layer, s, k],
    }
    layer, a, b = _indices(counts.pairs_LEE.shape)
    found["pairs"] = _flat(layer=layer + 1, expert=a, other=b, tokens=counts.pairs_LEE)
    side = round(counts.positions_LEP.shape[2] ** 0.5)
    layer, e, p = _indices(counts.positions_LEP.shape)
    found["places"] = _flat(layer=layer + 1, expert=e, row=p // side, column=p % side, served=counts.positions_LEP)
    examples = sampling.examples
    i, s, p = _indices(examples.compute_ISP.shape)
    label = np.array(examples.classes_I)[i] if len(findings.class_names) > 1 else np.full(i.shape, -1)
    S = examples.compute_ISP.shape[1]
    maps = _flat(image=i, label=label, t=s / S, row=p // side, column=p % side, experts=examples.compute_ISP)
    return found | {"maps": maps}


def _joined(parts: list[Columns]) -> Columns:
    """Tables of equal columns, one below the other."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _indices(shape: tuple[int, ...]) -> list[np.ndarray]:
    """Indices along each axis of a shape, an array of that shape for each axis."""
    return list(np.indices(shape))


def _flat(**columns: np.ndarray) -> Columns:
    return {name: np.asarray(column).ravel() for name, column in columns.items()}


def to_parquet(columns: Columns, about: Mapping[str, Any]) -> bytes:
    """A parquet file; `about` becomes JSON under the key "diffusion_moe" of its metadata. NaN becomes null."""
    import pyarrow
    from pyarrow import parquet

    arrays = {name: pyarrow.array(column, from_pandas=True) for name, column in columns.items()}
    table = pyarrow.table(arrays).replace_schema_metadata({"diffusion_moe": json.dumps(about)})
    file = io.BytesIO()
    parquet.write_table(table, file, compression="zstd")
    return file.getvalue()
