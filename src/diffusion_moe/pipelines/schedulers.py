"""The schedulers of diffusers that fit a model, and its default one."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ..config import ModelConfig, Process

# DDPM section 4: the schedule that models of process ddpm are trained on.
STEPS, BETA_START, BETA_END = 1000, 1e-4, 0.02

MULTISTEP = (DPMSolverMultistepScheduler, UniPCMultistepScheduler)
FITTING: dict[Process, tuple[type, ...]] = {
    "flow": (FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, *MULTISTEP),
    "ddpm": (DDIMScheduler, DDPMScheduler, *MULTISTEP),
}
"""Classes that the pipelines are tested with, by the model's process."""


def default_scheduler(settings: ModelConfig) -> SchedulerMixin:
    """Scheduler that a model is saved with.

    Flow models get Euler's method in equal steps. DDPM models get DDIM, which is deterministic, good in few steps, and
    independent of a learned variance. It starts at the noisiest step ("trailing") and does not clip, as in the papers.
    """
    if settings.process == "flow":
        return FlowMatchEulerDiscreteScheduler(shift=1.0)
    return DDIMScheduler(STEPS, BETA_START, BETA_END, "linear", clip_sample=False, timestep_spacing="trailing")


def check_scheduler(scheduler: SchedulerMixin, settings: ModelConfig) -> None:
    """Refuse a scheduler whose result would be wrong.

    Raises:
        ValueError: names the class, what is wrong with it, and the classes that fit.
    """
    fitting = FITTING[settings.process]
    problem = _problem(scheduler, settings) if isinstance(scheduler, fitting) else "is for another process"
    if problem:
        raise ValueError(
            f"{type(scheduler).__name__} does not fit: it {problem}. A model of process {settings.process} takes "
            f"{', '.join(kind.__name__ for kind in fitting)}"
        )


def _problem(scheduler: SchedulerMixin, settings: ModelConfig) -> str:
    """Problem of a scheduler of a fitting class; empty if there is none."""
    config = scheduler.config
    if settings.process == "ddpm":
        return _ddpm_problem(scheduler, settings)
    if isinstance(scheduler, MULTISTEP) and (config.prediction_type != "flow_prediction" or not config.use_flow_sigmas):
        return "must be made with prediction_type='flow_prediction' and use_flow_sigmas=True"
    adds_noise = config.get("stochastic_sampling", False) or "sde" in config.get("algorithm_type", "")
    if adds_noise and settings.noise_scale != 1:
        return f"draws noise of standard deviation 1, but the model's noise_scale is {settings.noise_scale}"
    return ""


def _ddpm_problem(scheduler: SchedulerMixin, settings: ModelConfig) -> str:
    config: Any = scheduler.config
    if config.prediction_type != "epsilon" or config.get("use_flow_sigmas", False):
        return f"must be made with prediction_type='epsilon', not {config.prediction_type!r}, and without flow sigmas"
    trained = torch.linspace(BETA_START, BETA_END, STEPS)
    if scheduler.betas.shape != trained.shape or not torch.allclose(scheduler.betas, trained):
        return f"must have {STEPS} betas from {BETA_START} to {BETA_END} (beta_schedule='linear')"
    variance = config.get("variance_type") or "fixed"
    if variance.startswith("learned"):
        if not isinstance(scheduler, DDPMScheduler):
            return f"does not support variance_type={variance!r}; make it with variance_type=None"
        if variance != "learned_range" or not settings.learn_sigma:
            return f"has variance_type={variance!r}, which the model does not predict (learn_sigma learns a range)"
    return ""
