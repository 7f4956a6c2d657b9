"""Muon for the matrices of the blocks, AdamW for all other parameters.

Muon (Keller Jordan, kellerjordan.github.io/posts/muon) makes each update of a matrix nearly orthogonal, so that all its
singular values are about 1. It is meant for hidden matrices. So AdamW keeps what its authors leave to it, and what is
like it:

- biases, norms and other vectors;
- input layers: patches, time, class, text and positions;
- the final layer;
- the modulation (adaLN) of each block: it takes the condition and no tokens, so it is an input layer too;
- routers, whose outputs are scores of experts, as a classifier's are of classes. We know of no source for these two.

A parameter that holds several matrices is orthogonalised as several: each expert, queries, keys and values, and the
gates and values of SwiGLU.

`torch.optim.Muon` is the same update, and the oracle of the tests. It is not used here: it takes no stacked experts,
and it cannot leave out a step without reading the device.

Shape suffixes: E experts, M rows and N columns of one matrix.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..config import OptimizerConfig, Recipe
from ..counts import is_hidden_matrix
from ..moe import GroupedExperts
from ..moe.precision import choose_precision, matmul_dtype
from ..nn.attention import CrossAttention, SelfAttention
from .optimizer import LocalAdamW, sharded_like

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the polynomial a x + b x^3 + c x^5 that Newton-Schulz applies to singular values (Keller Jordan)."""
ITERATIONS = 5
EPS = 1e-7
"""Smallest norm that an update is divided by."""


class Split(NamedTuple):
    """Matrices side by side in one parameter."""

    axis: int
    sizes: list[int]


def make_optimizer(model: nn.Module, recipe: Recipe, device: torch.device) -> LocalAdamW:
    """The optimizer of a recipe."""
    if recipe.optimizer.kind == "adamw":
        return LocalAdamW(model, recipe.optimizer)
    bf16 = choose_precision(recipe.training.precision, device).precision == "bf16"
    return LocalMuon(model, recipe.optimizer, torch.bfloat16 if bf16 else torch.float32)


class LocalMuon(LocalAdamW):
    """Muon and AdamW over this process' part of every parameter.

    Matrices that are sharded over processes are gathered for their update, which every process computes whole. Experts
    are not: each process updates those that it holds.

    Args:
        dtype: the dtype that Newton-Schulz computes in.
    """

    def __init__(self, model: nn.Module, config: OptimizerConfig, dtype: torch.dtype) -> None:
        super().__init__(model, config)
        self.config, self.dtype = config, dtype
        splits = _splits(model)
        self.matrices = {
            part: (parameter, splits.get(id(parameter)))
            for (name, parameter), part in zip(model.named_parameters(), self.local)
            if is_hidden_matrix(name, parameter.shape)
        }

    def moments_of(self, part: nn.Parameter) -> dict[str, Tensor]:
        """The momentum of a matrix, or AdamW's moments."""
        if part not in self.matrices:
            return super().moments_of(part)
        state = self.state[part]
        if not state:
            state["momentum"] = torch.zeros_like(part)
        return state

    def step_if(self, finite: Tensor) -> None:
        """Take a step if the scalar is True, else leave weights, moments and step counts; free the gradients."""
        for part in self.matrices:
            if part.grad is not None:
                self._step_matrices(part, finite)
                part.grad = None  # AdamW leaves out what has no gradient
        super().step_if(finite)

    @torch.no_grad()
    def _step_matrices(self, part: nn.Parameter, finite: Tensor) -> None:
        assert part.grad is not None
        momentum, lr = self.moments_of(part)["momentum"], self.param_groups[0]["lr"]
        new_momentum = momentum.lerp(part.grad, 1 - self.config.momentum)
        update = part.grad.lerp(new_momentum, self.config.momentum)  # Nesterov's
        update = self._scaled_and_orthogonal(part, update).to(part.dtype)
        weights = (part * (1 - lr * self.config.weight_decay)).sub_(update, alpha=lr)
        momentum.copy_(torch.where(finite, new_momentum, momentum))
        part.copy_(torch.where(finite, weights, part))

    def _scaled_and_orthogonal(self, part: nn.Parameter, update: Tensor) -> Tensor:
        """This process' part of the orthogonalised update, scaled to the size of AdamW's."""
        from torch.distributed.tensor import DTensor, Replicate, Shard

        parameter, split = self.matrices[part]
        whole = sharded_like(parameter, update.to(matmul_dtype(update, self.dtype)))
        if not isinstance(whole, DTensor):
            return _of_each_matrix(whole, split)
        expert_axes = parameter.ndim - 2  # a matrix is whole if it is sharded over experts alone
        placements = [
            Replicate() if isinstance(place, Shard) and place.dim >= expert_axes and size > 1 else place
            for place, size in zip(whole.placements, whole.device_mesh.shape)
        ]
        gathered = whole.redistribute(placements=placements)
        result = DTensor.from_local(
            _of_each_matrix(gathered.to_local(), split),
            gathered.device_mesh,
            placements,
            run_check=False,
            shape=gathered.shape,
            stride=gathered.stride(),
        )
        return result.redistribute(placements=whole.placements).to_local()


def _splits(model: nn.Module) -> dict[int, Split]:
    """The matrices side by side in one parameter, by its id."""
    splits = {}
    for module in model.modules():
        if isinstance(module, SelfAttention):
            heads, kv_heads, width = module.num_heads, module.num_kv_heads, module.head_dim
            splits[id(module.qkv.weight)] = Split(-2, [heads * width, kv_heads * width, kv_heads * width])
        elif isinstance(module, CrossAttention):
            splits[id(module.kv.weight)] = Split(-2, [module.num_kv_heads * module.head_dim] * 2)
        elif isinstance(module, GroupedExperts) and module.activation == "swiglu":
            splits[id(module.w_in)] = Split(-1, [module.w_in.shape[-1] // 2] * 2)
    return splits


def _of_each_matrix(update: Tensor, split: Split | None) -> Tensor:
    axis, sizes = split or Split(-1, [update.shape[-1]])
    parts = [scale(*part.shape[-2:]) * orthogonalize(part) for part in update.split(sizes, axis)]
    return torch.cat(parts, axis)


def scale(rows: int, columns: int) -> float:
    """Factor that gives an orthogonal update the root mean square 0.2, which AdamW's updates have.

    So AdamW's learning rate and weight decay serve Muon too (Muon is Scalable for LLM Training, arXiv 2502.16982;
    `match_rms_adamw` of `torch.optim.Muon`). It is the same for a matrix and its transpose.
    """
    return 0.2 * math.sqrt(max(rows, columns))


def orthogonalize(x_EMN: Tensor) -> Tensor:
    """Matrices of the same singular vectors with singular values from 0.68 to 1.21, by Newton-Schulz.

    Those below 0.002 of a matrix' norm stay smaller; zero stays zero.

    Args:
        x_EMN: one matrix (M, N), or several (E, M, N), each orthogonalised by itself.
    """
    a, b, c = COEFFICIENTS
    tall = x_EMN.shape[-2] > x_EMN.shape[-1]
    x = (x_EMN.mT if tall else x_EMN).view(-1, *sorted(x_EMN.shape[-2:]))
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=EPS)
    for _ in range(ITERATIONS):
        gram_EMM = x @ x.mT
        polynomial_EMM = torch.baddbmm(gram_EMM, gram_EMM, gram_EMM, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial_EMM, x, beta=a)
    return (x.mT if tall else x).view(x_EMN.shape)
