"""AdamW over what a process holds of a model, clipping, and the learning rate as a function of the step."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..config import OptimizerConfig
from ..distributed import all_reduce_sum
from ..moe import GroupedExperts
from ..moe.parallel import local_part


class LocalAdamW(torch.optim.AdamW):
    """AdamW over this process' part of every parameter: plain tensors, so that one kernel updates them all.

    Attributes:
        held: those parts, in the order of `model.parameters()`; they share the parameters' memory.
    """

    def __init__(self, model: nn.Module, config: OptimizerConfig) -> None:
        matrices = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
        matrices |= {id(p) for name, p in model.named_parameters() if name.endswith((".w_in", ".w_out"))}
        self.model = model
        self.held = [_held(parameter) for parameter in model.parameters()]
        self.summed = self._summed_gradients()
        decayed = [id(parameter) in matrices for parameter in model.parameters()]
        groups = [
            {"params": [p for p, yes in zip(self.held, decayed) if yes == wanted], "weight_decay": decay}
            for wanted, decay in ((True, config.weight_decay), (False, 0.0))
        ]
        super().__init__(
            [group for group in groups if group["params"]],
            lr=config.learning_rate,
            betas=config.betas,
            eps=config.eps,
            fused=self.held[0].device.type in ("cuda", "cpu"),
        )

    def _summed_gradients(self) -> dict[int, list[Tensor]]:
        """By number of processes, the parts whose gradients are sums over so many: those of spread experts."""
        part_of = {id(parameter): part for part, parameter in zip(self.held, self.model.parameters())}
        summed: dict[int, list[Tensor]] = {}
        for experts in [module for module in self.model.modules() if isinstance(module, GroupedExperts)]:
            if experts.group is not None:
                summed.setdefault(experts.group.size(), []).extend(part_of[id(p)] for p in experts.parameters())
        return summed

    def take_gradients(self) -> list[Tensor]:
        """Take over the model's gradients, all as means over the processes; returns those there are."""
        for part, parameter in zip(self.held, self.model.parameters()):
            part.grad = local_part(parameter.grad)
        for processes, parts in self.summed.items():
            torch._foreach_div_([part.grad for part in parts if part.grad is not None], processes)
        return [part.grad for part in self.held if part.grad is not None]

    def step_if(self, finite: Tensor) -> None:
        """Take a step, or where the scalar is False leave weights, moments and step counts as they are."""
        self.found_inf = (~finite).float()  # what gradient scalers tell the fused kernel
        self.step()

    def named_moments(self) -> dict[str, Tensor]:
        """`MOMENT.NAME` of every parameter that learns, sharing memory; laid out over processes as the parameter is."""
        moments: dict[str, Tensor] = {}
        for (name, parameter), part in zip(self.model.named_parameters(), self.held):
            if not part.requires_grad:
                continue
            state = self.state[part]
            if not state:  # as the first step would
                state["step"] = torch.zeros((), dtype=torch.float32, device=part.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(part), torch.zeros_like(part)
            moments[f"step.{name}"] = state["step"]
            moments |= {f"{moment}.{name}": _laid_out(state[moment], parameter) for moment in ("exp_avg", "exp_avg_sq")}
        return moments


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> LocalAdamW:
    """AdamW; weight decay on linear and expert matrices only. Frozen parameters never move."""
    return LocalAdamW(model, config)


def _held(parameter: nn.Parameter) -> nn.Parameter:
    part = local_part(parameter)
    return parameter if part is parameter else nn.Parameter(part.detach(), parameter.requires_grad)  # type: ignore[union-attr]


def _laid_out(part: Tensor, parameter: nn.Parameter) -> Tensor:
    """A part as the tensor whose other parts the other processes hold."""
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
    """The norm of all processes' gradients together, of which each part stands on so many processes."""
    squares = torch.stack(torch._foreach_norm(gradients)).float().square().sum()
    return (all_reduce_sum(squares) / replicas).sqrt()


def clip_(gradients: list[Tensor], norm: Tensor, limit: float | None) -> None:
    """Scale gradients of that norm down to the limit, in place; None: leave them."""
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
