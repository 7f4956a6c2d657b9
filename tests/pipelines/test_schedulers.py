"""Schedulers of diffusers on models whose answers are known in closed form, and the ones that are refused.

The data are normal numbers of standard deviation C, so the best prediction is linear in x_t, and the exact flow carries
the noise z to C * z (over its own standard deviation).
"""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from diffusion_moe import ClassToImagePipeline, DiT, default_scheduler
from diffusion_moe.config import ModelConfig
from diffusion_moe.diffusion.ddpm import linear_schedule
from diffusion_moe.models import DiTOutput
from diffusion_moe.pipelines.schedulers import check_scheduler

C = 0.5
SMALL = {"sample_size": 16, "patch_size": 4, "in_channels": 4, "hidden_size": 8, "depth": 1, "num_heads": 1,
         "router": "dense", "num_classes": 0}  # fmt: skip
FLOW_SIGMAS = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


class NormalData(DiT):
    """Answers with the mean of what is to be predicted, given x_t."""

    def forward(self, hidden_states, timestep, class_labels=None, return_dict=True):
        x, config = hidden_states, self.settings
        if config.process == "ddpm":
            alpha_bar = linear_schedule().alpha_bars_S[timestep]
            epsilon = ((1 - alpha_bar).sqrt() / (alpha_bar * C**2 + 1 - alpha_bar)).float() * x
            # The posterior's variance, the least of the learned range, is the right one for certain data only.
            return (torch.cat((epsilon, -torch.ones_like(x)), dim=1) if config.learn_sigma else epsilon,)
        t, s = timestep, config.noise_scale
        variance = t**2 * C**2 + (1 - t) ** 2 * s**2
        share = {"x": t * C**2, "epsilon": (1 - t) * s**2, "velocity": t * C**2 - (1 - t) * s**2}[config.prediction]
        return DiTOutput(sample=share / variance * x) if return_dict else (share / variance * x,)


def sample(scheduler, steps, count=4, seed=0, **settings):
    """Noise and latents, both (count, 4, 16, 16)."""
    model = NormalData(**{**SMALL, **settings})
    pipe = ClassToImagePipeline(model, scheduler or default_scheduler(model.settings))
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(count, 4, 16, 16, generator=torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(seed + 1)
    options = {"num_inference_steps": steps, "output_type": "latent", "generator": generator}
    return noise, pipe(num_images=count, latents=noise, **options).images


@pytest.mark.parametrize("prediction", ["velocity", "x", "epsilon"])
@pytest.mark.parametrize("noise_scale", [1.0, 2.0])
@pytest.mark.parametrize(
    ("scheduler", "steps"),
    [
        (FlowMatchEulerDiscreteScheduler(), 200),
        (FlowMatchEulerDiscreteScheduler(shift=2.0), 200),
        (FlowMatchHeunDiscreteScheduler(), 50),
        (DPMSolverMultistepScheduler(**FLOW_SIGMAS), 50),
        (DPMSolverMultistepScheduler(**FLOW_SIGMAS, solver_order=3, flow_shift=2.0), 50),
        (UniPCMultistepScheduler(**FLOW_SIGMAS), 50),
    ],
    ids=lambda value: type(value).__name__ if hasattr(value, "config") else str(value),
)
def test_flow_schedulers_follow_the_exact_flow(scheduler, steps, prediction, noise_scale):
    noise, x = sample(scheduler, steps, prediction=prediction, noise_scale=noise_scale, min_gap=1e-3)
    assert (x - C * noise).norm() / (C * noise).norm() < 0.02


@pytest.mark.parametrize(
    ("scheduler", "steps", "error"),
    [
        (None, 100, 0.03),
        (DDIMScheduler(clip_sample=False), 500, 0.03),
        (DPMSolverMultistepScheduler(), 50, 0.01),
        (UniPCMultistepScheduler(), 50, 0.01),
    ],
    ids=["default", "DDIM", "DPMSolver", "UniPC"],
)
@pytest.mark.parametrize("learn_sigma", [False, True])
def test_ddpm_schedulers_follow_the_exact_flow(scheduler, steps, error, learn_sigma):
    settings = {"process": "ddpm", "prediction": "epsilon", "learn_sigma": learn_sigma}
    noise, x = sample(scheduler, steps, **settings)
    assert (x - C * noise).norm() / (C * noise).norm() < error


@pytest.mark.parametrize("variance", ["fixed_small", "learned_range"])
def test_the_ddpm_scheduler_samples_the_data(variance):
    scheduler = DDPMScheduler(clip_sample=False, variance_type=variance)
    noise, x = sample(scheduler, 250, process="ddpm", prediction="epsilon", learn_sigma=True)
    assert float(x.std()) == pytest.approx(C, rel=0.03)
    assert abs(torch.corrcoef(torch.stack((x.flatten(), noise.flatten())))[0, 1]) < 0.1, "its noise is its own"


def test_stochastic_flow_samples_the_data():
    scheduler = DPMSolverMultistepScheduler(**FLOW_SIGMAS, algorithm_type="sde-dpmsolver++")
    noise, x = sample(scheduler, 100)
    assert float(x.std()) == pytest.approx(C, rel=0.05)
    assert abs(torch.corrcoef(torch.stack((x.flatten(), noise.flatten())))[0, 1]) < 0.1, "its noise is its own"


def test_default_schedulers():
    flow = default_scheduler(ModelConfig())
    assert isinstance(flow, FlowMatchEulerDiscreteScheduler) and flow.config.shift == 1.0
    ddpm = default_scheduler(ModelConfig(process="ddpm", prediction="epsilon"))
    assert isinstance(ddpm, DDIMScheduler) and not ddpm.config.clip_sample and not ddpm.config.thresholding
    torch.testing.assert_close(ddpm.alphas_cumprod.double(), linear_schedule().alpha_bars_S, rtol=1e-4, atol=0)
    ddpm.set_timesteps(4)
    assert ddpm.timesteps.tolist() == [999, 749, 499, 249]


@pytest.mark.parametrize(
    ("scheduler", "settings", "message"),
    [
        (DDIMScheduler(), {}, "DDIMScheduler does not fit: it is for another process.*FlowMatchEulerDiscreteScheduler"),
        (EulerDiscreteScheduler(), {}, "EulerDiscreteScheduler does not fit: it is for another process"),
        (DPMSolverMultistepScheduler(), {}, "DPMSolverMultistepScheduler .*prediction_type='flow_prediction'"),
        (DPMSolverMultistepScheduler(prediction_type="flow_prediction"), {}, "use_flow_sigmas=True"),
        (
            FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
            {"noise_scale": 2.0},
            "noise of standard deviation 1, but the model's noise_scale is 2.0",
        ),
        (
            DPMSolverMultistepScheduler(**FLOW_SIGMAS, algorithm_type="sde-dpmsolver++"),
            {"noise_scale": 2.0},
            "noise_scale is 2.0",
        ),
        (FlowMatchEulerDiscreteScheduler(), {"process": "ddpm"}, "is for another process.* DDIMScheduler, DDPMSched"),
        (DDIMScheduler(prediction_type="v_prediction"), {"process": "ddpm"}, "'epsilon', not 'v_prediction'"),
        (DDIMScheduler(beta_schedule="scaled_linear"), {"process": "ddpm"}, "1000 betas from 0.0001 to 0.02"),
        (DDIMScheduler(rescale_betas_zero_snr=True), {"process": "ddpm"}, "1000 betas"),
        (DPMSolverMultistepScheduler(**FLOW_SIGMAS), {"process": "ddpm"}, "without flow sigmas"),
        (DDPMScheduler(variance_type="learned_range"), {"process": "ddpm"}, "which the model does not predict"),
        (
            DDPMScheduler(variance_type="learned"),
            {"process": "ddpm", "learn_sigma": True},
            "variance_type='learned', which the model does not predict",
        ),
        (
            DPMSolverMultistepScheduler(variance_type="learned_range"),
            {"process": "ddpm", "learn_sigma": True},
            "not support variance_type='learned_range'; make it with variance_type=None",
        ),
    ],
    ids=lambda value: type(value).__name__ if hasattr(value, "config") else None,
)
def test_schedulers_that_do_not_fit(scheduler, settings, message):
    if settings.get("process") == "ddpm":
        settings = {"prediction": "epsilon", **settings}
    with pytest.raises(ValueError, match=message):
        check_scheduler(scheduler, ModelConfig(**settings))
    with pytest.raises(ValueError, match=message):
        ClassToImagePipeline(DiT(**SMALL, **settings), scheduler)
