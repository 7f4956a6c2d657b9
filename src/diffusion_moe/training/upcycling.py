"""Experts out of a dense model's feed-forward layers (sparse upcycling, arXiv 2212.05055).

The hidden units of a dense layer are shared out: the first ones go to the shared expert, the others to the routed ones,
copied whole or cut into slices (arXiv 2410.07524). What no unit fills begins with an output of zero. Shape suffixes: D
width, F hidden units, E experts, H columns of the first projection (see `moe.experts`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import ModelConfig
from ..models import Backbone
from ..moe import FeedForward, MoEFeedForward
from ..randomness import derive_seed


@dataclass(frozen=True)
class Division:
    """How the hidden units of a dense layer become experts."""

    shared: int
    """Units that the shared expert takes, the first ones."""
    slices: int
    """Parts that the others are cut into; expert e takes part e modulo slices. 0: no units are left."""
    weight: float
    """What the weights of a token's routed experts add up to; exactly so, or under a router that knows nothing yet."""
    exact: bool
    """Whether the mixture computes what the layer did; biases aside, see `loses_biases`."""

    def describe(self, config: ModelConfig) -> str:
        """In words."""
        parts, what = [], "what is left" if self.shared else "the layer"
        if self.shared:
            parts.append(f"the shared expert takes {self.shared} of {config.mlp_width} hidden units")
        elif config.shared in ("gelu", "swiglu"):
            parts.append("the shared expert begins as nothing")
        if not self.slices:
            parts.append("the routed ones begin as nothing")
        elif self.slices == 1:
            parts.append(f"{config.num_experts} routed ones are copies of {what}")
        else:
            copies = config.num_experts // self.slices
            parts.append(f"the routed ones are {copies} copies of {what} in {self.slices} slices each")
        return ", ".join(parts)


def divide(config: ModelConfig) -> Division | str:
    """How dense layers of this configuration become its experts; or why they cannot, in words."""
    if config.expert_activation != config.mlp_activation:
        return f"the dense layers use {config.mlp_activation} and the experts {config.expert_activation}"
    assert config.rule is not None
    units, shared = config.mlp_width, 0
    if config.shared == config.mlp_activation:
        shared = min(units, config.shared_dim or config.expert_dim)
    left, weight = units - shared, config.rule.initial_weight(config)
    if not left:
        return Division(shared, 0, weight, exact=True)
    if config.expert_dim < left and left % config.expert_dim:
        return f"{left} hidden units cannot be cut into experts of {config.expert_dim}"
    slices = max(1, left // config.expert_dim)
    if config.num_experts % slices:
        return f"{config.num_experts} experts cannot be copies in {slices} slices each"
    normalised = config.rule.has_fixed_weight(config)
    whole_copies = config.top_k % slices == 0 and (config.num_experts // config.n_group) % slices == 0
    return Division(shared, slices, weight, exact=normalised and whole_copies and config.shared != "identity")


def loses_biases(config: ModelConfig, division: Division) -> bool:
    """Whether biases of the dense layers find no place in the experts."""
    shared_lacks, routed_lack = not config.shared_bias, not config.expert_bias
    return config.mlp_bias and ((division.shared > 0 and shared_lacks) or (division.slices > 0 and routed_lack))


def upcycled(dense: Backbone, model: Backbone, noise: float, seed: int) -> tuple[dict[str, Tensor], list[str]]:
    """A dense model's weights under the names of one whose blocks are partly mixtures.

    Args:
        model: fresh; its settings say what becomes a mixture.
        noise: added to the experts' weights, in standard deviations of each matrix. seed: of that noise.

    Returns:
        The state, without what cannot be made, and lines for the user.
    """
    config, state, notes = model.settings, dict(dense.state_dict()), []
    division = divide(config)
    mixtures = [index for index, block in enumerate(model.blocks) if isinstance(block.mlp, MoEFeedForward)]
    for index in mixtures:
        prefix = f"blocks.{index}.mlp."
        state = {name: tensor for name, tensor in state.items() if not name.startswith(prefix)}
        if isinstance(division, Division):
            layer = _mixture(dense.blocks[index].mlp, model.blocks[index].mlp, division)  # type: ignore[arg-type]
            _add_noise(layer, noise, derive_seed(seed, "upcycling", index))
            state |= {prefix + name: tensor for name, tensor in layer.items()}
    if not isinstance(division, Division):
        return state, [f"no experts can be made of the dense layers, as {division}"]
    lost = loses_biases(config, division)
    begins = "as" if division.exact and not lost and not noise else "about as"
    notes.append(
        f"experts of {len(mixtures)} blocks: {division.describe(config)}; they begin {begins} the dense layers, and "
        "their routers are new"
    )
    if lost:
        notes.append("biases of the dense layers are left out where experts have none (model.expert_bias, shared_bias)")
    return state, notes


@torch.no_grad()
def _mixture(dense: FeedForward, fresh: MoEFeedForward, division: Division) -> dict[str, Tensor]:
    """The tensors of a mixture out of a dense layer and a fresh mixture."""
    made = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    down = dense.down_proj
    if fresh.shared is not None:
        rows = slice(division.shared)
        for name in _inputs(dense) if division.shared else ():
            _copy_rows(made, f"shared.{name}", dense.get_submodule(name), rows)  # type: ignore[arg-type]
        made["shared.down_proj.weight"].zero_()[:, rows] = down.weight[:, rows]
    for expert in range(len(made["experts.w_in"])):
        _fill_expert(made, expert, dense, division)
    if down.bias is not None:
        if division.shared and "shared.down_proj.bias" in made:
            made["shared.down_proj.bias"].copy_(down.bias)
        elif "experts.b_out" in made:
            made["experts.b_out"][:] = down.bias / division.weight
    if division.slices > 1:  # equal rows for the slices of a copy: a token is sent to all of them, with equal weights
        rows_ED = made["router.weight"][:: division.slices]
        made["router.weight"] = rows_ED.repeat_interleave(division.slices, dim=0)
    return made


def _inputs(dense: FeedForward) -> list[str]:
    """Names of its first projections, in the order of an expert's columns."""
    return ["up_proj"] if dense.gate_proj is None else ["gate_proj", "up_proj"]


def _copy_rows(made: dict[str, Tensor], name: str, linear: torch.nn.Linear, rows: slice) -> None:
    made[f"{name}.weight"][rows] = linear.weight[rows]
    if f"{name}.bias" in made and linear.bias is not None:
        made[f"{name}.bias"][rows] = linear.bias[rows]


def _fill_expert(made: dict[str, Tensor], expert: int, dense: FeedForward, division: Division) -> None:
    """Give an expert its slice of the hidden units; their sum over the experts of a token is to be the layer's."""
    w_out_FD = made["experts.w_out"][expert].zero_()
    if not division.slices:
        return
    units = dense.down_proj.in_features
    size = (units - division.shared) // division.slices
    start = division.shared + expert % division.slices * size
    rows = slice(start, start + size)
    w_out_FD[:size] = dense.down_proj.weight[:, rows].T * (division.slices / division.weight)
    for part, name in enumerate(_inputs(dense)):
        linear, columns = dense.get_submodule(name), slice(part * len(w_out_FD), part * len(w_out_FD) + size)
        made["experts.w_in"][expert][:, columns] = linear.weight[rows].T  # type: ignore[index, union-attr]
        if "experts.b_in" in made and linear.bias is not None:
            made["experts.b_in"][expert][columns] = linear.bias[rows]  # type: ignore[index]


def _add_noise(layer: dict[str, Tensor], noise: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name in ("experts.w_in", "experts.w_out") if noise else ():
        for w in layer[name]:
            w += noise * w.std() * torch.randn(w.shape, generator=generator)
