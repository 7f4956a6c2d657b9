"""Figures of compute: experts a token by time, class and position in the image.

Shape suffixes: L MoE layers, S bins of time, K classes or kinds of prompts, P positions in the image, I example images.
"""

from __future__ import annotations

import numpy as np

from . import style
from .figure_notes import examples_note, held_out_note, sampling_note, text_note
from .findings import Findings, HeldOut, Sampling
from .plot_training import SHOWN_LAYERS
from .routing_metrics import Estimate, effective_experts, estimate, evenly_spaced, ratio, shares, varies
from .style import Panel

EXTREMES, SHOWN_TIMES = 10, 6
"""Classes shown from either end where there are more than `style.MANY`, and number of times with maps."""


def capacity_by_time(findings: Findings, sampling: Sampling) -> Panel:
    """Experts a token on average, against time."""
    title = "Average capacity against time"
    counts, groups = sampling.counts, sampling.groups
    capacity_LS = ratio(counts.served_LSK.sum(2), counts.tokens_LSK.sum(2))
    parts = {f"{name} tokens": ratio(*tokens) for name, tokens in sampling.tokens.items()}
    if not varies(capacity_LS) and not any(varies(part_S) for part_S in parts.values()):
        return Panel(title, constant(findings, fixed(capacity_LS) + "at every time, in every layer"))
    S = capacity_LS.shape[1]
    times_S = (np.arange(S) + 0.5) / S
    figure, axes = style.new_axes(3.4)
    for i, layer in enumerate(evenly_spaced(len(capacity_LS), SHOWN_LAYERS)):
        axes.plot(times_S, capacity_LS[layer], linewidth=1.1, label=f"MoE layer {layer + 1}", **style.line(i))
    mean = estimate(groups.served_RS, groups.tokens_RS)
    axes.plot(times_S, mean.mean, color=style.INK, linewidth=2.2, label="all layers")
    axes.fill_between(times_S, mean.mean - mean.error, mean.mean + mean.error, color="#7f7f7f", alpha=0.3, linewidth=0)
    if sampling.null_served_LSE is not None and sampling.null_tokens_LS is not None:
        null_S = ratio(sampling.null_served_LSE.sum((0, 2)), sampling.null_tokens_LS.sum(0))
        label = f"all layers, no {findings.condition}"
        axes.plot(times_S, null_S, color="#7f7f7f", linewidth=1.6, ls=":", label=label)
    for (label, part_S), dashes in zip(parts.items(), ("--", "-.")):
        axes.plot(times_S, part_S, color=style.INK, linewidth=1.2, ls=dashes, label=label)
    axes.set(xlabel="t (0 is noise, 1 is data)", ylabel="experts a token", xlim=(0, 1))
    axes.grid(True)
    style.legend_above(axes)
    caption = (
        f"Routed experts that served a token, averaged over tokens, in {S} bins of t; the band is one standard error "
        f"over {len(groups.served_RS)} groups of images. {text_note(findings, sampling)}"
        f"{sampling_note(findings, sampling)}"
    )
    return Panel(title, caption, figure)


def experts_of_classes(findings: Findings, sampling: Sampling) -> Panel:
    """Average number of experts activated per class across MoE layers."""
    kind, rows, counts = findings.kind, present(sampling), sampling.counts
    title = f"Experts activated per {kind} across MoE layers"
    if findings.model.text_dim and len(rows) < 2:
        return Panel(title, "")
    served_LKE = counts.served_LSKE.sum(1)[:, rows]
    capacity_LK = ratio(served_LKE.sum(2), counts.tokens_LSK.sum(1)[:, rows])
    L, K = capacity_LK.shape
    effective_LK = effective_experts(shares(served_LKE))
    both = {"experts a token": capacity_LK, f"effective experts of the {kind}": effective_LK}
    maps = [(label, values_LK) for label, values_LK in both.items() if varies(values_LK)]
    if not maps:
        what = f"every {kind} gets {capacity_LK.mean():.4g} experts a token in every layer, and all experts equally"
        return Panel(title, constant(findings, what))
    notes = [
        "Effective experts: the number of equally busy experts with the same entropy of assignments, from 1 (all "
        f"tokens of the {kind} meet one expert) to {findings.model.num_experts}."
    ]
    if not varies(capacity_LK):
        notes.append(constant(findings, fixed(capacity_LK) + f"of every {kind}, in every layer"))
    names = style.column_names([findings.class_names[k] for k in rows])
    figure = style.new_figure(names.height + 0.45 + len(maps) * (0.6 + 0.22 * min(L, 16)))
    for axes, (label, values_LK) in zip(np.atleast_1d(figure.subplots(len(maps), sharex=True)), maps):
        image = style.heat_map(axes, values_LK)
        figure.colorbar(image, ax=axes, pad=0.01)
        axes.set(title=label, ylabel="MoE layer")
        style.layer_ticks(axes, L)
        if L * K <= 60:
            style.write_numbers(axes, values_LK, image)
    style.name_columns(axes, names, kind)
    caption = " ".join([*notes, sampling_note(findings, sampling)])
    return Panel(title, caption, figure)


def hard_to_easy(findings: Findings, sampling: Sampling) -> Panel:
    """Classes sorted by compute, or by loss where the rule fixes the compute."""
    title = f"{findings.kinds.capitalize()} from hard to easy"
    groups, rows = sampling.groups, present(sampling)
    compute = estimate(groups.served_RK[:, rows], groups.tokens_RK[:, rows])
    differs = varies(compute.mean)
    loss = _loss_of_classes(findings.held_out[0], rows) if findings.held_out and findings.model.num_classes else None
    parts, notes = [], []
    if differs:
        parts.append(("experts a token", compute))
        notes.append(f"Bars of compute are one standard error over {len(groups.served_RK)} groups of images.")
    else:
        notes.append(constant(findings, fixed(compute.mean) + f"of every {findings.kind}"))
    if loss is not None:
        parts.append((f"held-out {findings.loss} loss", loss))
        own = held_out_note(findings, findings.held_out[:1])
        notes.append(f"Loss is averaged over times, with one standard error over images: {own}")
    if len(rows) < 2 or not parts:
        return Panel(title, _nothing_to_compare(findings) if len(rows) < 2 else notes[0])
    order = np.argsort(-np.nan_to_num(parts[0][1].mean), kind="stable")
    if len(order) > style.MANY:
        order = np.concatenate((order[:EXTREMES], order[-EXTREMES:]))
        notes.append(f"{EXTREMES} of {len(rows)} {findings.kinds} from either end.")
    notes.append("Where bars overlap the order may be chance.")
    if sampling.tokens:
        notes.append("Text tokens are counted too.")
    names = style.column_names([findings.class_names[rows[k]] for k in order])
    figure = style.new_figure(names.height + 0.6 + 1.7 * len(parts))
    for i, axes in enumerate(np.atleast_1d(figure.subplots(len(parts), sharex=True))):
        label, (mean, error) = parts[i]
        axes.errorbar(range(len(order)), mean[order], error[order], fmt="o", ms=4, capsize=2, color=style.LINES[i])
        axes.set_ylabel(label)
        axes.grid(True, axis="y")
    style.name_columns(axes, names, f"{findings.kind}, most {'compute' if differs else 'loss'} first")
    return Panel(title, " ".join([*notes, sampling_note(findings, sampling)]), figure)


def _nothing_to_compare(findings: Findings) -> str:
    if findings.model.text_dim:
        return f"All prompts are of one kind here. Give --prompts FILE with 2 to {style.MANY} prompts to compare them."
    return "The model has no classes to compare."


def compute_maps(findings: Findings, sampling: Sampling) -> Panel:
    """Experts of each token of some images at some times."""
    title = "Compute over the image"
    examples = sampling.examples
    count, S, P = examples.compute_ISP.shape
    if not varies(examples.compute_ISP):
        return Panel(title, constant(findings, fixed(examples.compute_ISP) + "at every position of the image"))
    side = round(P**0.5)
    known = [s for s in range(S) if np.isfinite(examples.compute_ISP[:, s]).all()]
    times = [known[i] for i in evenly_spaced(len(known), SHOWN_TIMES)]
    named = len(findings.class_names) > 1
    letters = 8 if findings.kind == "class" else 13
    rows = [style.shorten(findings.class_names[k], letters) if named else str(k) for k in examples.classes_I]
    figure = style.new_figure(1.0 + 0.53 * count)
    pictures, axes = figure.subplots(1, 2, width_ratios=(1, len(times)))
    tiles = examples.compute_ISP[:, times].reshape(count, len(times), side, side, 1)
    image = style.heat_map(axes, mosaic(tiles)[..., 0], aspect="equal")
    axes.set_xticks(tile_centres(side, len(times)), [f"{s / S:.2f}" for s in times])
    axes.set_yticks([])
    axes.set_xlabel("t (0 is noise, 1 is data)")
    if examples.pictures is None:
        pictures.remove()
        axes.set_yticks(tile_centres(side, count), rows)
    else:
        pixels = mosaic(examples.pictures[:, None] / 255)
        if pixels.shape[-1] == 3:  # gaps are transparent
            pixels = np.nan_to_num(np.concatenate((pixels, np.isfinite(pixels[..., :1])), axis=-1))
        pictures.imshow(pixels[..., 0] if pixels.shape[-1] == 1 else pixels, cmap="gray", vmin=0, vmax=1)
        pictures.set_xticks([])
        pictures.set_yticks(tile_centres(examples.pictures.shape[1], count), rows)
        pictures.set_xlabel("image")
        pictures.spines[:].set_visible(False)
        pictures.tick_params(length=0)
    axes.tick_params(length=0)
    style.color_scale(figure, image, axes, "experts a token")
    texts = f"Prompts from above: {'; '.join(examples.texts)}. " if examples.texts else ""
    caption = (
        f"Experts that each token of {count} images got, averaged over MoE layers, in the evaluation with the image's "
        f"{findings.condition}; t is the start of a bin of width {1 / S:.2g}. {texts}{text_note(findings, sampling)}"
        f"{examples_note(findings, sampling)}"
    )
    return Panel(title, caption, figure)


def gap_of(side: int) -> int:
    """Gap between the tiles of a mosaic in pixels."""
    return max(1, side // 8)


def tile_centres(side: int, count: int) -> np.ndarray:
    """Centres of a mosaic's tiles in pixels."""
    return side / 2 - 0.5 + (side + gap_of(side)) * np.arange(count)


def mosaic(tiles: np.ndarray) -> np.ndarray:
    """Tiles (rows, columns, side, side, C) as one picture with gaps of NaN."""
    rows, columns, side = tiles.shape[:3]
    gap = gap_of(side)
    padded = np.pad(tiles.astype(float), ((0, 0), (0, 0), (0, gap), (0, gap), (0, 0)), constant_values=np.nan)
    picture = padded.transpose(0, 2, 1, 3, 4).reshape(rows * (side + gap), columns * (side + gap), -1)
    return picture[:-gap, :-gap]


def present(sampling: Sampling) -> np.ndarray:
    """Classes that have images."""
    return np.flatnonzero(sampling.counts.tokens_LSK.sum((0, 1)))


def _loss_of_classes(held_out: HeldOut, rows: np.ndarray) -> Estimate:
    """Mean over times and images of each class, and its standard error over images."""
    loss_I = held_out.loss_IS.mean(1)
    of_classes = [loss_I[held_out.labels_I == k] for k in rows]
    mean = np.array([x.mean() if len(x) else np.nan for x in of_classes])
    return Estimate(mean, np.array([x.std(ddof=1) / len(x) ** 0.5 if len(x) > 1 else np.nan for x in of_classes]))


def fixed(values: np.ndarray) -> str:
    """Beginning of a sentence about a constant number of experts."""
    return f"a token gets {values[np.isfinite(values)].mean():.4g} experts "


def constant(findings: Findings, what: str) -> str:
    """Reason why there is no figure where the rule leaves no differences."""
    return f"With {findings.model.router} routing {what}: there is no difference to show."
