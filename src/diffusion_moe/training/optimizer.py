"""AdamW over a process' part of a model, gradient clipping, and the learning rate as a function of the step.

`muon` has the other optimizer.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..config import OptimizerConfig
from ..distributed import all_reduce_sum
from ..moe import GroupedExperts
from ..storage.shards import local_tensor


class LocalAdamW(torch.optim.AdamW):
    """AdamW over this process' part of every parameter: plain tensors, so that one kernel updates them all.

    Weight decay is applied to linear and expert matrices only. Frozen parameters do not change.

    Attributes:
        local: the parts, in the order of `model.parameters()`; they share the parameters' memory.
    """

    def __init__(self, model: nn.Module, config: OptimizerConfig) -> None:
        matrices = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
        matrices |= {id(p) for name, p in model.named_parameters() if name.endswith((".w_in", ".w_out"))}
        self.model = model
        self.local = [_local_parameter(parameter) for parameter in model.parameters()]
        self.summed_gradients = self._summed_gradients()
        decayed = [id(parameter) in matrices for parameter in model.parameters()]
        groups = [
            {"params": [p for p, yes in zip(self.local, decayed) if yes == wanted], "weight_decay": decay}
            for wanted, decay in ((True, config.weight_decay), (False, 0.0))
        ]
        super().__init__(
            [group for group in groups if group["params"]],
            lr=config.learning_rate,
            betas=config.betas,
            eps=config.eps,
            fused=True,  # the other implementations know no `found_inf`
        )

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

    def step_if(self, finite: Tensor) -> None:
        """Take a step if the scalar is True, else leave weights, moments and step counts; free the gradients."""
        self.found_inf = (~finite).float()  # the fused kernel reads it, as with a gradient scaler
        self.step()
        # Both refer to the gradients: the next forward pass needs their memory.
        self.zero_grad()
        self.model.zero_grad()

    def moments_of(self, part: nn.Parameter) -> dict[str, Tensor]:
        """The moments of a part, initialized as the first step would."""
        state = self.state[part]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=part.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(part), torch.zeros_like(part)
        return state

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
    from torch.distributed.tensor import DTensor

    if not isinstance(parameter, DTensor):
        return parameter
    return nn.Parameter(local_tensor(parameter), parameter.requires_grad)


def sharded_like(parameter: nn.Parameter, part: Tensor) -> Tensor:
    """The DTensor with this process' part, if the parameter is one; else the part itself."""
    from torch.distributed.tensor import DTensor

    if not isinstance(parameter, DTensor):
        return part
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
