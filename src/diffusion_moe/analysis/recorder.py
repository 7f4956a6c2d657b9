"""The recorder: counts of routing, collected by hooks on routers without changing the model.

Counts are summed on the model's device and copied to the host when they are read. So recording never waits for the
device, and its memory does not grow with the number of passes.

Shape suffixes: L MoE layers, S bins of time, K rows of classes, E experts, B images of a pass, N tokens of one image,
P positions in the image (its tokens without class tokens), T tokens of a pass (B * N), A assignments.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..config import ModelConfig
from ..diffusion.ddpm import linear_schedule
from ..models.token_drop import NOTHING_DROPPED
from ..moe import Router, Routing, routers_of
from ..moe.precision import full_precision

BIN_SLACK = 1e-4
"""Tolerance, as a share of a bin's width: times that rounding put just below a bin count in it."""


class RoutingCounts(NamedTuple):
    """Recorded counts on the host, int64.

    Row k of a class axis is class k; the last row is "no class" for models that have it; unconditional models have one
    row. For a model with text and no classes, row k is a kind of prompt and the last row is "no prompt".
    Bin s of a time axis has t from s / S to (s + 1) / S; 0 is noise and 1 is data for every process.
    """

    served_LSKE: np.ndarray
    """Assignments: tokens of class k at time s that expert e of layer l served."""
    tokens_LSK: np.ndarray
    """Tokens that the router of layer l saw; served / tokens is the number of experts a token."""
    images_SK: np.ndarray
    """Evaluations of the network, one per image."""
    pairs_LEE: np.ndarray | None = None
    """Tokens that both experts served; on the diagonal those of one expert. Needs `pairs`."""
    compute_SKP: np.ndarray | None = None
    """Assignments of the token at position p (row by row), summed over layers. Needs `positions`."""
    positions_LEP: np.ndarray | None = None
    """Assignments of the tokens at position p, summed over times and classes. Needs `positions`."""
    others_SK: np.ndarray | None = None
    """Assignments of the tokens before those of the image (its text's, class tokens), summed over layers. Needs
    `positions`."""

    @property
    def served_LSK(self) -> np.ndarray:
        """Assignments, summed over experts."""
        return self.served_LSKE.sum(-1)

    def plus(self, other: RoutingCounts) -> RoutingCounts:
        """Sum of both counts."""
        return RoutingCounts(*(None if a is None or b is None else a + b for a, b in zip(self, other)))  # type: ignore[arg-type]


class RoutingRecord:
    """Running counts of routing. Made by `record_routing`."""

    def __init__(self, model: nn.Module, time_bins: int, pairs: bool, positions: bool, kinds: int = 1) -> None:
        self.time_bins, self.pairs, self.positions = time_bins, pairs, positions
        self.routers = routers_of(model)
        experts = {router.config.num_experts for router in self.routers}
        if len(experts) > 1:
            raise ValueError(f"the model's layers have {sorted(experts)} experts; record layers of equal number")
        self.num_experts = experts.pop() if experts else 0
        # The model itself may be inside wrappers (compilation, parallel training, adapters).
        self.root = next((module for module in model.modules() if _settings(module)), model)
        settings = _settings(self.root)
        self.rows = 1
        self.num_positions: int | None = None
        """None until the first pass, then all tokens of an image."""
        self.takes_prompts = settings is not None and settings.text_dim > 0 and settings.num_classes == 0
        if kinds != 1 and not self.takes_prompts:
            raise ValueError(f"kinds is {kinds}, but the model takes no prompts; leave it at 1")
        self.kinds_B: Tensor | None = None
        """Kind of prompt of each image of the next passes, int64, below `kinds`; a pass may have the images several
        times, one round after another. None: all are of kind 0."""
        if settings is not None:
            of_classes = max(1, settings.num_classes + int(settings.null_class and settings.num_classes > 0))
            self.rows = kinds + 1 if self.takes_prompts else of_classes
            self.num_positions = (settings.sample_size // settings.patch_size) ** 2
        self.is_ddpm = settings is not None and settings.process == "ddpm"
        self.clear()

    def clear(self) -> None:
        """Reset all counts."""
        self.sums: list[dict[str, Tensor]] = [{} for _ in self.routers]
        """Running sums of each layer; empty before its first pass."""
        self.images_R: Tensor | None = None
        self.passes = 0
        """Calls of the model."""
        self._row_B: Tensor | None = None
        self._inside = False

    def counts(self) -> RoutingCounts:
        """Counts since the start or the last `clear`. Waits for the device.

        Raises:
            ValueError: no pass of the model or of one of its routers was recorded.
        """
        silent = [f"MoE layer {layer + 1}" for layer, sums in enumerate(self.sums) if not sums]
        if not self.passes or silent:
            raise ValueError(
                f"no pass of {silent[0] if self.passes else 'the model'} was recorded; call the model while recording, "
                "and as it was before torch.compile, which leaves hooks out"
            )
        L, S, K, E = len(self.routers), self.time_bins, self.rows, self.num_experts
        zeros = self._zeros(torch.device("cpu"))

        def stacked(name: str) -> np.ndarray:
            # The zeros give a model without routers its shapes.
            return torch.stack([layer[name].cpu() for layer in [*self.sums, zeros]])[:L].numpy()

        images_R = torch.zeros(S * K, dtype=torch.long) if self.images_R is None else self.images_R.cpu().clone()
        return RoutingCounts(
            served_LSKE=stacked("served_RE").reshape(L, S, K, E),
            tokens_LSK=stacked("tokens_R").reshape(L, S, K),
            images_SK=images_R.numpy().reshape(S, K),
            pairs_LEE=stacked("pairs_EE") if self.pairs else None,
            compute_SKP=stacked("compute_RQ").sum(0).reshape(S, K, -1)[..., 1:] if self.positions else None,
            positions_LEP=stacked("positions_EQ")[..., 1:] if self.positions else None,
            others_SK=stacked("compute_RQ").sum(0).reshape(S, K, -1)[..., 0] if self.positions else None,
        )

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Start a pass of the model: note the row of each image, if its inputs have time and class."""
        # Recomputation by gradient checkpointing happens outside of a pass and is not counted.
        self._inside, self._row_B = True, None
        self.passes += 1
        given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        if _settings(module) is None:
            return
        if self.positions and given.get("token_drop", NOTHING_DROPPED).kept_BK is not None:
            raise ValueError("a pass keeps a part of the tokens, whose places are not recorded; leave positions out")
        t_B = given["timestep"].detach().float().expand(len(given["hidden_states"]))
        time_B = 1 - t_B / len(linear_schedule()) if self.is_ddpm else t_B
        bin_B = (time_B * self.time_bins + BIN_SLACK).long().clamp(0, self.time_bins - 1)
        labels = self._prompts_of(given) if self.takes_prompts else given.get("class_labels")
        self._row_B = bin_B if labels is None else bin_B * self.rows + labels.long()
        self._count_images(self._row_B)

    def _prompts_of(self, given: dict[str, Any]) -> Tensor:
        """Row of each image: the kind of its prompt, or the last row for no prompt, int64, (B,)."""
        features, mask = given["encoder_hidden_states"], given.get("encoder_attention_mask")
        kind_B = torch.zeros(len(features), dtype=torch.long, device=features.device)
        if self.kinds_B is not None:
            rounds, left = divmod(len(features), len(self.kinds_B))
            if left:
                raise ValueError(
                    f"kinds_B has {len(self.kinds_B)} kinds for a pass of {len(features)}; give one an image"
                )
            kind_B = self.kinds_B.to(features.device).repeat(rounds)
        return kind_B if mask is None else torch.where(mask.bool().any(dim=1), kind_B, self.rows - 1)

    def _count_images(self, row_B: Tensor) -> None:
        if self.images_R is None:
            with torch.inference_mode(False):  # an inference tensor could not be updated outside of it
                self.images_R = torch.zeros(self.time_bins * self.rows, dtype=torch.long, device=row_B.device)
        self.images_R.index_add_(0, row_B, torch.ones_like(row_B))

    def end(self, *_: Any) -> None:
        """End the pass, also after an error."""
        self._inside = False

    @torch.no_grad()
    def note(self, layer: int, router: Router, args: tuple[Any, ...], kwargs: dict[str, Any], routing: Routing) -> None:
        """Add the routing of one layer; but for the layer, the arguments of a forward hook."""
        if not self._inside:
            return
        x_BND: Tensor = args[0] if args else next(iter(kwargs.values()))
        B, N = x_BND.shape[:2]
        sums = self.sums[layer]
        if not sums:
            self.num_positions = self.num_positions or N
            with torch.inference_mode(False):
                sums = self.sums[layer] = self._zeros(x_BND.device)
        row_B = self._row_B
        if row_B is None:
            row_B = torch.zeros(B, dtype=torch.long, device=x_BND.device)
            if layer == 0:
                self._count_images(row_B)
        row_B = row_B.to(sums["tokens_R"].device, non_blocking=True)  # layers may be on several devices
        expert_A, image_A = routing.expert_A(), routing.token_A // N
        times_A = served_of(routing)
        sums["served_RE"].index_add_(0, row_B, tally(image_A, expert_A, B, self.num_experts, times_A))
        sums["tokens_R"].index_add_(0, row_B, torch.full_like(row_B, N))
        if self.pairs:
            sums["pairs_EE"].add_(pairs_of(routing.token_A, expert_A, B * N, self.num_experts, times_A))
        if self.positions:
            width = sums["compute_RQ"].shape[1]
            # Text and class tokens come first and share column 0.
            column_A = (routing.token_A - image_A * N - (N - width)).clamp(min=0)
            sums["compute_RQ"].index_add_(0, row_B, tally(image_A, column_A, B, width, times_A))
            sums["positions_EQ"].add_(tally(expert_A, column_A, self.num_experts, width, times_A))

    def _zeros(self, device: torch.device) -> dict[str, Tensor]:
        """Sums of a layer; see `RoutingCounts`.

        R are pairs of bin and class, s * K + k; of Q, column 0 is for text and class tokens, the others are positions.
        """
        R, E, Q = self.time_bins * self.rows, self.num_experts, (self.num_positions or 0) + 1
        shapes: dict[str, tuple[int, ...]] = {"served_RE": (R, E), "tokens_R": (R,)}
        shapes |= {"pairs_EE": (E, E)} if self.pairs else {}
        shapes |= {"compute_RQ": (R, Q), "positions_EQ": (E, Q)} if self.positions else {}
        return {name: torch.zeros(shape, dtype=torch.long, device=device) for name, shape in shapes.items()}


def served_of(routing: Routing) -> Tensor:
    """1 for each assignment, int64, (A,); 0 for rows that only pad a fixed shape, as a capacity limit makes them."""
    if not routing.padded:  # a weight of 0 is a weight
        return torch.ones_like(routing.token_A)
    return (routing.weight_A.detach() != 0).long()


def tally(row_A: Tensor, column_A: Tensor, rows: int, columns: int, times_A: Tensor) -> Tensor:
    """Counts of each pair of row and column, int64, (rows, columns); assignment a counts times_A[a] times."""
    key_A = row_A * columns + column_A
    # Not bincount, which waits for a GPU.
    return key_A.new_zeros(rows * columns).index_add_(0, key_A, times_A).view(rows, columns)


def pairs_of(token_A: Tensor, expert_A: Tensor, num_tokens: int, num_experts: int, times_A: Tensor) -> Tensor:
    """Tokens that both experts served, int64, (E, E); assignment a counts times_A[a] times, 0 or 1."""
    chosen_TE = torch.zeros(num_tokens, num_experts, device=token_A.device)
    chosen_TE.view(-1).index_copy_(0, token_A * num_experts + expert_A, times_A.float())
    with full_precision(chosen_TE):  # ones and zeros add up exactly in float32 to 2^24 tokens
        return (chosen_TE.T @ chosen_TE).round().long()


@contextmanager
def record_routing(
    model: nn.Module, time_bins: int = 20, pairs: bool = False, positions: bool = False, kinds: int = 1
) -> Iterator[RoutingRecord]:
    """Count what the routers of `model` do inside the block.

    Outputs are unchanged, bit for bit. Times and classes are those that a `DiT` or `JiT` is called with; any other
    model (a layer, your own transformer) has a single row. Recorders may be nested or overlap; each counts for itself.

    Args:
        model: a model or a layer.
        time_bins: number of equal bins of t from 0 (noise) to 1 (data).
        pairs: also count which experts serve the same tokens (one matmul of (E, T) and (T, E) a layer).
        positions: also count the positions of the served tokens in the image.
        kinds: number of kinds of prompts of a model with text; set `kinds_B` of the record before each pass.

    Raises:
        ValueError: `time_bins` is not positive, `kinds` does not fit the model, or layers differ in their experts.

    Example:
        >>> with record_routing(model) as record:
        ...     model(x, t, labels)
        >>> counts = record.counts()
        >>> counts.served_LSKE.sum((1, 2)) / counts.tokens_LSK.sum((1, 2))[:, None]  # how often a token meets an expert
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"record_routing got a {type(model).__name__}; give a model, such as a pipeline's transformer")
    if time_bins < 1:
        raise ValueError(f"time_bins is {time_bins}; it must be positive")
    record = RoutingRecord(model, time_bins, pairs, positions, kinds)

    handles = [record.root.register_forward_pre_hook(record.begin, with_kwargs=True)]
    try:
        for layer, router in enumerate(record.routers):
            handles.append(router.register_forward_hook(partial(record.note, layer), with_kwargs=True))
        handles.append(record.root.register_forward_hook(record.end, always_call=True))
        yield record
    finally:
        for handle in handles:
            handle.remove()


def _settings(module: nn.Module) -> ModelConfig | None:
    """The settings of a backbone; None for any other module."""
    settings = vars(module).get("settings")  # its own, not one that a wrapper forwards
    return settings if isinstance(settings, ModelConfig) else None
