"""The options that a call of any pipeline takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor

StepCallback = Callable[[Any, int, Tensor, dict[str, Any]], dict[str, Any]]
Call = TypeVar("Call", bound=Callable[..., Any])


@dataclass(frozen=True, kw_only=True)
class Request:
    """Further options, by name.

    Args:
        num_inference_steps: steps of the scheduler.
        guidance_scale: s in uncond + s * (cond - uncond); 1 for none.
        guidance_interval: times t strictly between which there is guidance; 0 is noise, 1 is data. The whole interval
            includes both ends.
        guidance_channels: number of first channels that are guided; None: all.
        height: height of the images, in pixels; None: the model's own.
        width: width of the images, in pixels; None: the model's own.
        generator: one for the whole batch, or one per image, which makes each image independent of its batch.
        latents: initial noise of standard deviation 1, (B, C, H, W).
        threshold_scale: factor on the routers' thresholds during the call (`moe.scale_thresholds`); below 1 more
            experts for each token, above 1 fewer.
        output_type: pil; np, (B, H, W, C) in [0, 1]; pt, (B, C, H, W) in [0, 1]; or latent, the model's own output.
        callback_on_step_end: called with the pipeline, the index of the step, the scheduler's timestep, and the
            tensors of callback_on_step_end_tensor_inputs, which its return value replaces.
        callback_on_step_end_tensor_inputs: names of those tensors; only latents exist.
    """

    num_inference_steps: int = 50
    guidance_scale: float = 1.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_channels: int | None = None
    height: int | None = None
    width: int | None = None
    generator: torch.Generator | list[torch.Generator] | None = None
    latents: Tensor | None = None
    threshold_scale: float = 1.0
    output_type: str = "pil"
    callback_on_step_end: StepCallback | PipelineCallback | MultiPipelineCallbacks | None = None
    callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",)


def takes_request(call: Call) -> Call:
    """Show the fields of `Request` in the signature and docstring of a call that takes them as `**options`."""
    signature = inspect.signature(call)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    names = {parameter.name for parameter in own}
    further = [
        inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
        for field in fields(Request)
        if field.name not in names
    ]
    call.__signature__ = signature.replace(parameters=[*own, *further])  # type: ignore[attr-defined]
    call.__doc__ = f"{inspect.getdoc(call)}\n\n{inspect.getdoc(Request)}"
    return call
