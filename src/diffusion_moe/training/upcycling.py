"""Experts out of a dense model's feed-forward layers (sparse upcycling, arXiv 2212.05055).

The first hidden units of a dense layer go to the shared expert, the others to the routed experts, as whole copies or in
slices (arXiv 2410.07524). Experts without units start with an output of zero. Shape suffixes: D
width, F hidden units, E experts, H columns of the first projection (see `moe.experts`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..config import ModelConfig
from ..models import Backbone
from ..moe import FeedForward, MoEFeedForward
from ..randomness import derive_seed


@dataclass(frozen=True)
class Division:
    """Division of a dense layer's hidden units into experts."""

    shared: int
    """Number of units of the shared expert, the first ones."""
    slices: int
    """Number of slices of the other units; expert e takes slice e modulo slices. 0: no units are left."""
    weight: float
    """Sum of the weights of a token's routed experts: always, or with an untrained router."""
    exact: bool
    """The MoE layer computes what the dense layer did, except for biases; see `loses_biases`."""

    def describe(self, config: ModelConfig) -> str:
        """Description for the user."""
        parts, rest = [], "the other units" if self.shared else "the layer"
        if self.shared:
            parts.append(f"the shared expert takes {self.shared} of {config.mlp_width} hidden units")
        elif config.shared in ("gelu", "swiglu"):
            parts.append("the shared expert starts at zero")
        if not self.slices:
            parts.append("the routed ones start at zero")
        elif self.slices == 1:
            parts.append(f"{config.num_experts} routed ones are copies of {rest}")
        else:
            copies = config.num_experts // self.slices
            parts.append(f"the routed ones are {copies} copies of {rest} in {self.slices} slices each")
        return ", ".join(parts)


def divide(config: ModelConfig) -> Division | str:
    """Division of dense layers of this configuration into its experts; or the reason why it is impossible."""
    if config.expert_activation != config.mlp_activation:
        return f"the dense layers use {config.mlp_activation} and the experts {config.expert_activation}"
    assert config.rule is not None
    units, shared = config.mlp_width, 0
    if config.shared == config.mlp_activation:
        shared = min(units, config.shared_dim or config.expert_dim)
    left, weight = units - shared, config.rule.initial_weight(config)
    if not weight:
        return f"the weights of {config.router}'s experts are scores around 0"
    if not left:
        return Division(shared, 0, weight, exact=True)
    if config.expert_dim < left and left % config.expert_dim:
        return f"{left} hidden units cannot be cut into experts of {config.expert_dim}"
    slices = max(1, left // config.expert_dim)
    if config.num_experts % slices:
        return f"{config.num_experts} experts cannot be copies in {slices} slices each"
    normalised = config.rule.has_fixed_weight(config)
    whole_copies = config.experts_per_token % slices == 0 and (config.num_experts // config.n_group) % slices == 0
    return Division(shared, slices, weight, exact=normalised and whole_copies and config.shared != "identity")


def loses_biases(config: ModelConfig, division: Division) -> bool:
    """True if dense layers have biases and their experts have none."""
    shared_lacks, routed_lack = not config.shared_bias, not config.expert_bias
    return config.mlp_bias and ((division.shared > 0 and shared_lacks) or (division.slices > 0 and routed_lack))


def upcycled(dense: Backbone, model: Backbone, noise: float, seed: int) -> tuple[dict[str, Tensor], list[str]]:
    """A dense model's weights under the names of a model with MoE layers.

    Args:
        model: a fresh model with MoE layers.
        noise: noise added to the experts' weights, in standard deviations of each matrix.

    Returns:
        The state, without tensors that cannot be upcycled, and lines for the user.
    """
    config, state, notes = model.settings, dict(dense.state_dict()), []
    assert config.rule is not None
    division = divide(config)  # of all layers, but for the weight of those with a capacity of their own
    moe_blocks = [index for index, block in enumerate(model.blocks) if isinstance(block.mlp, MoEFeedForward)]
    for index in moe_blocks:
        prefix = f"blocks.{index}.mlp."
        state = {name: tensor for name, tensor in state.items() if not name.startswith(prefix)}
        if isinstance(division, Division):
            weight = config.rule.initial_weight(config.of_moe_block(index))
            own = replace(division, weight=weight)
            layer = _moe_layer(dense.blocks[index].mlp, model.blocks[index].mlp, own)  # type: ignore[arg-type]
            _add_noise(layer, noise, derive_seed(seed, "upcycling", index))
            state |= {prefix + name: tensor for name, tensor in layer.items()}
    if not isinstance(division, Division):
        return state, [f"the dense layers cannot be upcycled: {division}"]
    lost = loses_biases(config, division)
    equality = "exactly" if division.exact and not lost and not noise else "approximately"
    routers = ", and their routers are new" if config.rule.parameter_shapes(config, config.hidden_size) else ""
    notes.append(
        f"experts of {len(moe_blocks)} blocks: {division.describe(config)}; they start {equality} equal to the dense "
        f"layers{routers}"
    )
    if lost:
        notes.append("biases of the dense layers are dropped where experts have none (model.expert_bias, shared_bias)")
    return state, notes


@torch.no_grad()
def _moe_layer(dense: FeedForward, fresh: MoEFeedForward, division: Division) -> dict[str, Tensor]:
    """Tensors of an MoE layer from a dense layer and a fresh MoE layer."""
    tensors = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    down = dense.down_proj
    if fresh.shared is not None:
        rows = slice(division.shared)
        for name in _inputs(dense) if division.shared else ():
            _copy_rows(tensors, f"shared.{name}", dense.get_submodule(name), rows)  # type: ignore[arg-type]
        tensors["shared.down_proj.weight"].zero_()[:, rows] = down.weight[:, rows]
    for expert in range(len(tensors["experts.w_in"])):
        _copy_slice(tensors, expert, dense, division)
    if down.bias is not None:
        if division.shared and "shared.down_proj.bias" in tensors:
            tensors["shared.down_proj.bias"].copy_(down.bias)
        elif "experts.b_out" in tensors:
            tensors["experts.b_out"][:] = down.bias / division.weight
    if (
        division.slices > 1
    ):  # equal rows for the slices of a copy, so that a token is routed to all of them with equal weights
        for name in ("router.weight", "router.time_weight"):
            if name in tensors:
                rows_ED = tensors[name][:: division.slices]
                tensors[name] = rows_ED.repeat_interleave(division.slices, dim=0)[: len(tensors[name])]
    return tensors


def _inputs(dense: FeedForward) -> list[str]:
    """Names of a dense layer's first projections, in the order of an expert's columns."""
    return ["up_proj"] if dense.gate_proj is None else ["gate_proj", "up_proj"]


def _copy_rows(tensors: dict[str, Tensor], name: str, linear: torch.nn.Linear, rows: slice) -> None:
    tensors[f"{name}.weight"][rows] = linear.weight[rows]
    if f"{name}.bias" in tensors and linear.bias is not None:
        tensors[f"{name}.bias"][rows] = linear.bias[rows]


def _copy_slice(tensors: dict[str, Tensor], expert: int, dense: FeedForward, division: Division) -> None:
    """Copy an expert's slice of the hidden units; the sum over the experts of a token equals the dense layer."""
    w_out_FD = tensors["experts.w_out"][expert].zero_()
    if not division.slices:
        return
    units = dense.down_proj.in_features
    size = (units - division.shared) // division.slices
    start = division.shared + expert % division.slices * size
    rows = slice(start, start + size)
    w_out_FD[:size] = dense.down_proj.weight[:, rows].T * (division.slices / division.weight)
    for part, name in enumerate(_inputs(dense)):
        linear, columns = dense.get_submodule(name), slice(part * len(w_out_FD), part * len(w_out_FD) + size)
        tensors["experts.w_in"][expert][:, columns] = linear.weight[rows].T  # type: ignore[index, union-attr]
        if "experts.b_in" in tensors and linear.bias is not None:
            tensors["experts.b_in"][expert][columns] = linear.bias[rows]  # type: ignore[index]


def _add_noise(layer: dict[str, Tensor], noise: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name in ("experts.w_in", "experts.w_out") if noise else ():
        for w in layer[name]:
            w += noise * w.std() * torch.randn(w.shape, generator=generator)
