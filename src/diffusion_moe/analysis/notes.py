"""How many images, steps, which weights, guidance and seed: the sentences that stand under every figure."""

from __future__ import annotations

from collections.abc import Sequence

from .losses import HeldOut
from .record import Findings, Sampling


def weights_note(findings: Findings) -> str:
    """Which weights."""
    origin = findings.origin
    if "training_steps" in origin:
        return f"averaged weights (decay {origin['ema_decay']:g}) after {origin['training_steps']:,} training steps"
    if "source" in origin:
        chosen = f", {origin['weights']}" if origin.get("weights") else ""
        return f"weights converted from {origin['source']}{chosen}"
    return f"the weights in {findings.name}"


def sampling_note(findings: Findings, sampling: Sampling) -> str:
    """How the images were drawn whose routing a figure shows."""
    about = sampling.about
    count = about["num_samples"]
    many = f"{count} image{'s' * (count != 1)}"
    if about["num_classes"]:
        each = count / about["num_classes"]
        many += f", {each:.3g} of each of {about['num_classes']} {findings.kinds}" if each >= 1 else ""
        known = len(findings.class_names)
        many += f" of {known}" * (about["num_classes"] != known)
    if "prompts" in about:
        many += f", prompts: {about['prompts']['origin']}"
    if findings.model.pools_batch:
        many += f", routed in pools of {about['batch_size']}"
    return f"{many}; {examples_note(findings, sampling)}"


def text_note(findings: Findings, sampling: Sampling) -> str:
    """Whether text tokens are among those that are counted."""
    if sampling.text is None:
        return ""
    return (
        f"Tokens are those of the image and the {findings.model.text_length} of the text, which are routed with them; "
        "maps and places show the image's alone. "
    )


def examples_note(findings: Findings, sampling: Sampling) -> str:
    """The same but for the number of images."""
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
        parts.append(f"{100 * about['dropped_share']:.2g} % of the choices found no room")
    return f"{'; '.join(parts)}; {weights_note(findings)}."


def held_out_note(findings: Findings, runs: Sequence[HeldOut]) -> str:
    """How the held-out loss of some runs was computed."""
    loss = runs[0]
    images, bins = loss.loss_IS.shape
    names = [f"{run.run}: {run.training_steps:,} training steps" for run in runs if run.training_steps]
    return (
        f"{images} held-out images of {findings.data}, each at the middle of {bins} bins of t with the same noise "
        f"(seed {loss.seed}) for every model; averaged weights in float32, with "
        f"{'first captions' if findings.model.text_dim else 'labels'}, no dropout; {'; '.join(names)}."
    )
