"""AdamW over a process' part of a model, gradient clipping, and the learning rate as a function of the step.

`muon` has the other optimizer.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from ..config import OptimizerConfig
from ..distributed import all_reduce_sum
from ..moe import GroupedExperts
from ..storage.shards import local_tensor


class LocalAdamW:
    """AdamW over this process' part of every parameter: plain tensors, so that one kernel updates them all.

    Weight decay is applied to linear and expert matrices only. Frozen parameters do not change. It is no
    `torch.optim.Optimizer`, which loads the compiler (a second) before the first step.

    Attributes:
        local: the parts, in the order of `model.parameters()`; they share the parameters' memory.
        param_groups: the parts with their learning rate and weight decay.
        state: the moments of each part.
    """

    def __init__(self, model: nn.Module, config: OptimizerConfig) -> None:
        matrices = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
        matrices |= {id(p) for name, p in model.named_parameters() if name.endswith((".w_in", ".w_out"))}
        self.model, self.config = model, config
        self.local = [_local_parameter(parameter) for parameter in model.parameters()]
        self.summed_gradients = self._summed_gradients()
        decayed = [id(parameter) in matrices for parameter in model.parameters()]
        self.param_groups: list[dict[str, Any]] = []
        for wanted, decay in ((True, config.weight_decay), (False, 0.0)):
            params = [part for part, yes in zip(self.local, decayed) if yes == wanted]
            self.param_groups.append({"params": params, "lr": config.learning_rate, "weight_decay": decay})
        self.state: dict[nn.Parameter, dict[str, Tensor]] = defaultdict(dict)

    def _summed_gradients(self) -> dict[int, list[Tensor]]:
        """Parts of sharded experts, whose gradients are sums over several processes, by number of processes."""
        part_of = {id(parameter): part for part, parameter in zip(self.local, self.model.parameters())}
        summed: dict[int, list[Tensor]] = {}
        for experts in [module for module in self.model.modules() if isinstance(module, GroupedExperts)]:
            if experts.group is not None:
                summed.setdefault(experts.group.size(), []).extend(part_of[id(p)] for p in experts.parameters())
        return summed

    def take_gradients(self) -> list[Tensor]:
        """Take the model's gradients, as means over the processes, and return those that are not None."""
        for part, parameter in zip(self.local, self.model.parameters()):
            part.grad = None if parameter.grad is None else local_tensor(parameter.grad)
        for processes, parts in self.summed_gradients.items():
            gradients = [part.grad for part in parts if part.grad is not None]
            if gradients:  # frozen experts have none
                torch._foreach_div_(gradients, processes)
        return [part.grad for part in self.local if part.grad is not None]

    @torch.no_grad()
    def step_if(self, finite: Tensor) -> None:
        """Take a step if the scalar is True, else leave weights, moments and step counts; free the gradients."""
        found_inf, (beta1, beta2) = (~finite).float(), self.config.betas
        for group in self.param_groups:
            gradients = {part: part.grad for part in group["params"] if part.grad is not None}
            moments = [self.moments_of(part) for part in gradients]
            adamw(
                list(gradients),
                list(gradients.values()),
                [of_part["exp_avg"] for of_part in moments],
                [of_part["exp_avg_sq"] for of_part in moments],
                [],
                [of_part["step"] for of_part in moments],
                fused=True,  # the other implementations know no `found_inf`
                found_inf=found_inf,
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=self.config.eps,
                maximize=False,
            )
        # Both refer to the gradients: the next forward pass needs their memory.
        for part in self.local:
            part.grad = None
        self.model.zero_grad()

    def moments_of(self, part: nn.Parameter) -> dict[str, Tensor]:
        """The moments of a part; zeros before its first step."""
        moments = self.state[part]
        if not moments:
            moments["step"] = torch.zeros((), dtype=torch.float32, device=part.device)
            moments["exp_avg"], moments["exp_avg_sq"] = torch.zeros_like(part), torch.zeros_like(part)
        return moments

    def named_moments(self) -> dict[str, Tensor]:
        """`MOMENT.NAME` of every parameter that learns, sharing memory; sharded as the parameter is."""
        moments: dict[str, Tensor] = {}
        for (name, parameter), part in zip(self.model.named_parameters(), self.local):
            if not part.requires_grad:
                continue
            for moment, tensor in self.moments_of(part).items():
                moments[f"{moment}.{name}"] = tensor if moment == "step" else sharded_like(parameter, tensor)
        return moments


def _local_parameter(parameter: nn.Parameter) -> nn.Parameter:
    """This process' part of a DTensor; a plain parameter itself."""
    if not hasattr(parameter, "to_local"):
        return parameter
    return nn.Parameter(local_tensor(parameter), parameter.requires_grad)


def sharded_like(parameter: nn.Parameter, part: Tensor) -> Tensor:
    """The DTensor with this process' part, if the parameter is one; else the part itself."""
    if not hasattr(parameter, "to_local"):
        return part
    from torch.distributed.tensor import DTensor

    assert isinstance(parameter, DTensor)
    return DTensor.from_local(
        part,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def global_norm(gradients: list[Tensor], replicas: int = 1) -> Tensor:
    """Norm of the gradients of all processes together; `replicas` processes hold each part."""
    squares = torch.stack(torch._foreach_norm(gradients)).float().square().sum()
    return (all_reduce_sum(squares) / replicas).sqrt()


def clip_(gradients: list[Tensor], norm: Tensor, limit: float | None) -> None:
    """Scale gradients of norm `norm` down to the limit, in place; None: no limit."""
    if limit is not None:
        torch._foreach_mul_(gradients, (limit / (norm + 1e-6)).clamp(max=1.0))


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Learning rate of step number `step` (from 1) of `steps`: linear warm-up, then constant or half a cosine to 0."""
    if step <= config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
