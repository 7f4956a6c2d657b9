"""Figures of experts: classes, times and positions they serve, coactivation, similarity and the effect of guidance.

Shape suffixes: L MoE layers, S bins of time, K classes or kinds of prompts, E experts, P positions in the image.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from . import style
from .figure_notes import sampling_note, text_note, weights_note
from .findings import Findings, Sampling
from .plot_compute import constant, mosaic, present, tile_centres
from .plot_training import SHOWN_LAYERS
from .routing_metrics import coactivation, evenly_spaced, ratio, shares, total_variation, varies
from .style import Panel


def experts_of_classes_and_times(findings: Findings, sampling: Sampling) -> Panel:
    """Experts against classes and against time, a row for each layer."""
    counts, rows, kind = sampling.counts, present(sampling), findings.kind
    by_kind = not findings.model.text_dim or len(rows) > 1
    title = f"Which expert serves which {f'{kind} and time' if by_kind else 'time'}"
    by_class_LKE = ratio(counts.served_LSKE.sum(1), counts.tokens_LSK.sum(1)[..., None])[:, rows]
    by_time_LSE = ratio(counts.served_LSKE.sum(2), counts.tokens_LSK.sum(2)[..., None])
    if not varies(by_class_LKE) and not varies(by_time_LSE):
        nothing = f"every expert serves as many tokens of every {kind} and time"
        return Panel(title, constant(findings, nothing))
    layers = evenly_spaced(len(by_class_LKE), SHOWN_LAYERS)
    E = findings.model.num_experts
    top = max(np.nanmax(by_class_LKE[layers]), np.nanmax(by_time_LSE[layers]))
    names = style.column_names([findings.class_names[k] for k in rows], room=20)
    figure = style.new_figure(names.height + 1.3 + len(layers) * (0.3 + 0.13 * min(E, 16)))
    panes = figure.subplots(len(layers), 1 + by_kind, squeeze=False, sharey=True, sharex="col")
    for layer, row in zip(layers, panes):
        if by_kind:
            style.heat_map(row[0], by_class_LKE[layer].T, vmin=0, vmax=top)
            style.name_columns(row[0], names, "")
        image = style.heat_map(row[-1], by_time_LSE[layer].T, vmin=0, vmax=top, extent=(0, 1, E - 0.5, -0.5))
        row[0].set_ylabel(f"MoE layer {layer + 1}\nexpert")
        style.expert_ticks(row[0], E)
    if by_kind:
        panes[0, 0].set_title(f"by {kind}")
        panes[-1, 0].set_xlabel(kind)
    panes[0, -1].set_title("by time")
    panes[-1, -1].set_xlabel("t (0 is noise, 1 is data)")
    style.color_scale(figure, image, panes, "times a token is served by the expert")
    notes = text_note(findings, sampling) + sampling_note(findings, sampling)
    caption = f"How often a token meets each expert.{_shown(layers, sampling)} {notes}"
    return Panel(title, caption, figure)


def activation_frequency(findings: Findings, sampling: Sampling) -> Panel:
    """Load of each expert of each layer."""
    load_LE = shares(sampling.counts.served_LSKE.sum((1, 2))) * findings.model.num_experts
    title, (L, E) = "Expert activation frequency per layer", load_LE.shape
    if not varies(load_LE):
        return Panel(title, constant(findings, "all experts of a layer serve as many tokens"))
    figure, axes = style.new_axes(0.95 + 0.24 * min(L, 24))
    image = style.heat_map(axes, load_LE, cmap=style.DIVERGING, norm=TwoSlopeNorm(1.0, 0.0, max(2.0, load_LE.max())))
    figure.colorbar(image, ax=axes, pad=0.01)
    axes.set(title="load / even load", xlabel="expert", ylabel="MoE layer")
    style.layer_ticks(axes, L)
    style.expert_ticks(axes, E, "x")
    if L <= 12 and E <= 12:
        style.write_numbers(axes, load_LE, image)
    caption = (
        f"Share of the layer's assignments that each expert got, times {E}: 1 is an even load, 0 a dead expert. "
        f"{sampling_note(findings, sampling)}"
    )
    return Panel(title, caption, figure)


def positions_of_experts(findings: Findings, sampling: Sampling) -> Panel:
    """Positions in the image that each expert serves."""
    positions_LEP = sampling.counts.positions_LEP
    assert positions_LEP is not None
    E, side = findings.model.num_experts, round(positions_LEP.shape[2] ** 0.5)
    columns = min(E, 8)
    lines = -(-E // columns)
    layers = evenly_spaced(len(positions_LEP), max(2, min(SHOWN_LAYERS, 12 // lines)))
    tiles = np.full((len(layers), lines * columns, side, side, 1), np.nan)
    tiles[:, :E] = (positions_LEP[layers] / sampling.evaluations).reshape(-1, E, side, side, 1)
    picture = mosaic(tiles.reshape(-1, columns, side, side, 1))[..., 0]
    figure, axes = style.new_axes(1.05 + 3.75 * picture.shape[0] / picture.shape[1])
    image = style.heat_map(axes, picture, aspect="equal", vmin=0)
    axes.set_xticks(tile_centres(side, columns), [str(e) for e in range(columns)])
    starts = [f"layer {layer + 1}" if line == 0 else f"+{line * columns}" for layer in layers for line in range(lines)]
    axes.set_yticks(tile_centres(side, len(starts)), starts)
    axes.set_xlabel("expert")
    axes.tick_params(length=0)
    style.color_scale(figure, image, axes, "times a token is served by the expert")
    caption = (
        "A map over the image for each expert, averaged over times and images, evaluations with no "
        f"{findings.condition} included."
        f"{_shown(layers, sampling)} {sampling_note(findings, sampling)}"
    )
    return Panel("Where in the image each expert works", caption, figure)


def together(findings: Findings, sampling: Sampling) -> Panel:
    """Pairs of experts that serve the same tokens."""
    title = "Experts that serve the same tokens"
    pairs_LEE = sampling.counts.pairs_LEE
    assert pairs_LEE is not None
    if not pairs_LEE[:, ~np.eye(pairs_LEE.shape[1], dtype=bool)].any():
        return Panel(title, "No token was served by more than one expert.")
    values_LEE = coactivation(pairs_LEE)
    layers = evenly_spaced(len(values_LEE), SHOWN_LAYERS)
    limits = (0.0, float(np.nanmax(values_LEE)))
    figure = _squares(
        values_LEE[layers], layers, "viridis", limits, "share of the row's tokens", "served too by expert"
    )
    caption = (
        "Of the tokens that the row's expert served, the share that the column's expert served too; over all pairs "
        f"{np.nanmean(values_LEE):.2g} on average.{_shown(layers, sampling)} {sampling_note(findings, sampling)}"
    )
    return Panel(title, caption, figure)


def similarity(findings: Findings, sampling: Sampling) -> Panel:
    """Similarity of experts and of router vectors."""
    weights = findings.weights
    assert weights is not None
    layers = evenly_spaced(len(weights.experts_LEE), SHOWN_LAYERS)
    E = weights.experts_LEE.shape[1]
    above = np.triu(np.ones((E, E), dtype=bool), 1)
    cosines_LEE = np.where(above, weights.experts_LEE, weights.routers_LEE)[layers]
    cosines_LEE[:, range(E), range(E)] = np.nan
    figure = _squares(cosines_LEE, layers, style.DIVERGING, (-1.0, 1.0), "cosine", "expert")
    below = "Below: cosine of the router's vectors. " if np.isfinite(weights.routers_LEE).any() else ""
    caption = (
        "Above the diagonal: cosine of the experts' weights, taken as input times output projection (gates and "
        f"values), which does not depend on the order of hidden units. {below}1 is a "
        f"duplicate, 0 unrelated.{_shown(layers, sampling)} Of {weights_note(findings)}."
    )
    return Panel("Similarity of the experts' weights", caption, figure)


def guidance_effect(findings: Findings, sampling: Sampling) -> Panel:
    """Routing of the same images with and without their class or prompt."""
    what = findings.condition
    title = f"Routing with and without the {what}"
    null_LSE, null_tokens_LS = sampling.null_served_LSE, sampling.null_tokens_LS
    if null_LSE is None or null_tokens_LS is None:
        return Panel(title, f"The images were sampled without guidance, so the model never ran without the {what}.")
    counts = sampling.counts
    with_LSE = counts.served_LSKE.sum(2)
    distance_LS = total_variation(shares(with_LSE), shares(null_LSE))
    if not np.nanmax(distance_LS):
        return Panel(title, constant(findings, f"every expert serves as many tokens with the {what} as without"))
    change_LSE = ratio(with_LSE, counts.tokens_LSK.sum(2)[..., None]) - ratio(null_LSE, null_tokens_LS[..., None])
    L, S, E = change_LSE.shape
    layers = evenly_spaced(L, SHOWN_LAYERS)
    height = 0.3 + 0.11 * min(E, 16)
    figure = style.new_figure(2.8 + len(layers) * height)
    lines, *maps = figure.subplots(1 + len(layers), 1, height_ratios=[1.6, *[height] * len(layers)], sharex=True)
    for i, layer in enumerate(layers):
        times_S = (np.arange(S) + 0.5) / S
        lines.plot(times_S, 100 * distance_LS[layer], label=f"MoE layer {layer + 1}", **style.line(i))
    lines.set(ylabel="assignments that\nmove (%)", ylim=(0, None))
    lines.grid(True)
    style.legend_above(lines)
    limit = max(float(np.nanmax(np.abs(change_LSE[layers]))), 1e-6)
    for layer, axes in zip(layers, maps):
        image = style.heat_map(
            axes, change_LSE[layer].T, cmap=style.DIVERGING, vmin=-limit, vmax=limit, extent=(0, 1, E - 0.5, -0.5)
        )
        axes.set_ylabel(f"layer {layer + 1}\nexpert")
        style.expert_ticks(axes, E)
    maps[-1].set(xlabel="t (0 is noise, 1 is data)", xlim=(0, 1))
    style.color_scale(figure, image, maps, f"experts a token, with − without {what}")
    caption = (
        f"What guidance sees: the same noisy images run with their {what} and with no {what}. Above: the share of "
        "assignments that would have to move between experts to make the two loads equal, within a layer and a bin of "
        f"t. Below: which experts serve more tokens with the {what} (orange) or without (blue)."
        f"{_shown(layers, sampling)} {sampling_note(findings, sampling)}"
    )
    return Panel(title, caption, figure)


def _squares(
    values: np.ndarray, layers: list[int], cmap: Any, limits: tuple[float, float], label: str, across: str
) -> Figure:
    """Square heat maps of experts against experts, two in a row."""
    columns = min(2, len(values))
    rows = -(-len(values) // columns)
    figure = style.new_figure(0.75 + rows * (0.55 + 3.4 / 2))
    panes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, layer, value in zip(panes, layers, values):
        image = style.heat_map(axes, value, cmap=cmap, vmin=limits[0], vmax=limits[1], aspect="equal")
        axes.set(title=f"MoE layer {layer + 1}", xlabel=across, ylabel="expert")
        style.expert_ticks(axes, len(value), "x", room=8)
        style.expert_ticks(axes, len(value), "y", room=8)
    for axes in panes[len(values) :]:
        axes.remove()
    style.color_scale(figure, image, list(panes[: len(values)]), label)
    return figure


def _shown(layers: list[int], sampling: Sampling) -> str:
    count = len(sampling.counts.tokens_LSK)
    return f" {len(layers)} of {count} MoE layers." if len(layers) < count else ""
