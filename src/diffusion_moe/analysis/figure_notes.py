"""Notes under every figure: weights, images, steps, guidance and seed."""

from __future__ import annotations

from collections.abc import Sequence

from .findings import Findings, Sampling
from .losses import HeldOut


def weights_note(findings: Findings) -> str:
    """Origin of the weights."""
    origin = findings.origin
    if "training_steps" in origin:
        std = origin.get("ema_std")
        length = f"decay {origin['ema_decay']:g}" if std is None else f"relative width {std:g}"
        return f"averaged weights ({length}) after {origin['training_steps']:,} training steps"
    if "source" in origin:
        chosen = f", {origin['weights']}" if origin.get("weights") else ""
        return f"weights converted from {origin['source']}{chosen}"
    return f"the weights in {findings.name}"


def sampling_note(findings: Findings, sampling: Sampling) -> str:
    """Settings of the images whose routing a figure shows."""
    about = sampling.about
    count = about["num_samples"]
    many = "1 image" if count == 1 else f"{count} images"
    if about["num_classes"]:
        each = count / about["num_classes"]
        many += f", {each:.3g} of each of {about['num_classes']} {findings.kinds}" if each >= 1 else ""
        known = len(findings.class_names)
        many += f" of {known}" * (about["num_classes"] != known)
    if "prompts" in about:
        many += f", prompts: {about['prompts']['origin']}"
    if findings.model.pools_batch:
        many += f", routed in batches of {about['batch_size']}"
    return f"{many}; {examples_note(findings, sampling)}"


def text_note(findings: Findings, sampling: Sampling) -> str:
    """Note on text tokens, where they are counted too."""
    if not sampling.tokens:
        return ""
    return (
        f"Tokens are those of the image and the {findings.model.text_length} of the text, which are routed with them; "
        "maps and positions show those of the image alone. "
    )


def examples_note(findings: Findings, sampling: Sampling) -> str:
    """Settings of the images without their number."""
    about = sampling.about
    adaptive = f"{about['function_evaluations']:.3g} evaluations"
    solver = f"{about['solver']}, {adaptive if about['steps'] is None else str(about['steps']) + ' steps'}"
    guidance = "no guidance" if about["guidance_scale"] == 1 else f"guidance {about['guidance_scale']:g}"
    if about["guidance_scale"] != 1 and about["guidance_interval"] != [0.0, 1.0]:
        guidance += " for t from {:g} to {:g}".format(*about["guidance_interval"])
    parts = [solver, guidance, f"seed {about['seed']}"]
    if about.get("dtype", "fp32") != "fp32":
        parts.append(about["dtype"])
    if about["threshold_scale"] != 1:
        parts.append(f"thresholds times {about['threshold_scale']:g}")
    if about.get("dropped_share"):
        parts.append(f"{100 * about['dropped_share']:.2g} % of the choices were dropped")
    return f"{'; '.join(parts)}; {weights_note(findings)}."


def held_out_note(findings: Findings, runs: Sequence[HeldOut]) -> str:
    """Settings of the held-out loss of some runs."""
    loss = runs[0]
    images, bins = loss.loss_IS.shape
    names = [f"{run.run}: {run.training_steps:,} training steps" for run in runs if run.training_steps]
    return (
        f"{images} held-out images of {findings.data}, each at the middle of {bins} bins of t with the same noise "
        f"(seed {loss.seed}) for every model; averaged weights in float32, with "
        f"{'first captions' if findings.model.text_dim else 'labels'}, no dropout; {'; '.join(names)}."
    )
