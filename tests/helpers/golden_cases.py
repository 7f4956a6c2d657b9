"""Recorded cases of models, and our models held against their answers: see golden/cases/README.md."""

from __future__ import annotations

import json
import re
import zlib
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from diffusion_moe.checkpoint_formats.formats import make_layout
from diffusion_moe.checkpoint_formats.layout import Layout, from_reference, to_reference
from diffusion_moe.checkpoint_formats.settings import read_settings, write_settings
from diffusion_moe.config import ModelConfig
from diffusion_moe.diffusion.ddpm import ddpm_ancestral, ddpm_losses, linear_schedule, noised, respaced
from diffusion_moe.diffusion.guidance import guided
from diffusion_moe.diffusion.loss import flow_loss
from diffusion_moe.diffusion.path import rectified_flow
from diffusion_moe.diffusion.prediction import convert
from diffusion_moe.diffusion.solvers import SOLVERS, dopri5, even_times
from diffusion_moe.models import Backbone, DiTOutput, make_model
from diffusion_moe.moe import MoEFeedForward, Routing

FORWARD, REST = 1e-5, 1e-4  # relative errors, as the README of the cases expects


class Case(NamedTuple):
    kind: str
    about: dict[str, Any]
    published: dict[str, torch.Tensor]
    answers: dict[str, torch.Tensor]
    config: ModelConfig
    layout: Layout


def sincos(side: int, dim: int) -> np.ndarray:
    """The published table by the formula of ViT and MAE, in NumPy."""
    rows, columns = np.mgrid[:side, :side].reshape(2, -1)
    angles = [np.outer(axis, 10000.0 ** (-np.arange(dim // 4) / (dim / 4))) for axis in (columns, rows)]
    return np.concatenate([f(angle) for angle in angles for f in (np.sin, np.cos)], axis=1)[None]


def draw(name: str, shape: tuple[int, ...], kind: str, seed: int) -> torch.Tensor:
    random = np.random.RandomState((zlib.crc32(name.encode()) + seed) % 2**32)
    kinds = {
        "normal": lambda: 0.08 * random.standard_normal(shape),
        "gate": lambda: 0.24 * random.standard_normal(shape),
        "norm": lambda: 1 + 0.1 * random.standard_normal(shape),
        "correction": lambda: 0.05 * random.standard_normal(shape),
        "threshold": lambda: 0.35 + 0.3 * random.random_sample(shape),
        "sincos": lambda: sincos(round(shape[-2] ** 0.5), shape[-1]),
    }
    value = kinds[kind]() if kind in kinds else np.full(shape, float(kind))
    return torch.tensor(np.asarray(value, dtype=np.float32))


@cache
def load(folder: Path) -> Case:
    about = json.loads((folder / "case.json").read_text())
    published = {}
    for entry in about["state"]:
        key, shape, kind = entry.split()
        published[key] = draw(key, tuple(int(size) for size in shape.split("x")), kind, about["seed"])
    kind = {"jitmoe": "jit"}.get(about["family"], about["family"])
    process = "ddpm" if "integer" in about.get("timestep", "") else "flow"
    settings = read_settings(kind, about["params"], about["moe"], process)
    denoiser = about.get("denoiser") or {}
    if "t_eps" in denoiser:
        settings |= {"min_gap": denoiser["t_eps"], "noise_scale": denoiser["noise_scale"]}
    if about["family"] == "diffmoe":
        settings["inference_pool"] = "batch"
        decay = next((float(value) for key, value in published.items() if key.endswith(".ema_decay")), 0.95)
        settings["threshold_decay"] = float(f"{decay:.6g}")  # kept there in float32
    config = ModelConfig(**settings)
    return Case(
        kind,
        about,
        published,
        load_file(folder / "tensors.safetensors"),
        config,
        make_layout(kind, config),
    )


def model_of(case: Case) -> Backbone:
    model = make_model(case.config)
    model.load_state_dict(from_reference(case.layout, case.published))
    return model


def need(case: Case, *keys: str) -> None:
    if not all(any(key.startswith(wanted) for key in case.answers) for wanted in keys):
        pytest.skip(f"this case has no {', '.join(keys)}")
    if case.config.attention_sinks:
        pytest.skip("the published attention sinks attend across the batch, ours do not")


def assert_near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape
    error = float((actual.detach().double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))
    assert error < tolerance, f"relative error {error:.2e}"


def check_weights_and_settings_go_over_and_back_unchanged(case: Case) -> None:
    back = to_reference(case.layout, model_of(case).state_dict())
    assert back.keys() == case.published.keys()
    assert all(torch.equal(back[key], case.published[key]) for key in back)
    settings = read_settings(case.kind, *write_settings(case.kind, case.config), case.config.process)
    again = make_model(ModelConfig(**settings | {"inference_pool": case.config.inference_pool})).eval()
    again.load_state_dict(model_of(case).state_dict())
    x, t, y = (case.answers[key] for key in ("x", "t", "y"))
    with torch.no_grad():
        assert torch.equal(again(x, t, y).sample, model_of(case).eval()(x, t, y).sample)


def check_outputs(case: Case) -> None:
    need(case, "eval.output")
    model = model_of(case)
    x, t, y = (case.answers[key] for key in ("x", "t", "y"))
    with torch.no_grad():
        assert_near(model.eval()(x, t, y).sample, case.answers["eval.output"], FORWARD)
        if "train.output" in case.answers:
            assert_near(model.train()(x, t, y).sample, case.answers["train.output"], FORWARD)


def check_selections_and_thresholds(case: Case) -> None:
    need(case, "train.selected")
    model = model_of(case).train()
    E, decay = case.config.num_experts, case.config.threshold_decay
    routings: dict[int, Routing] = {}
    predictions: dict[int, torch.Tensor] = {}
    for n, block in enumerate(model.blocks):
        if isinstance(block.mlp, MoEFeedForward):
            router = block.mlp.router
            router.register_forward_hook(lambda router, inputs, out, n=n: routings.update({n: out}))
            router.predictor.register_forward_hook(lambda module, inputs, out, n=n: predictions.update({n: out}))
    with torch.no_grad():
        model(*(case.answers[key] for key in ("x", "t", "y")))
    layers = [int(key.rsplit(".", 1)[1]) for key in case.answers if key.startswith("train.selected")]
    assert layers and routings.keys() == predictions.keys() >= set(layers)
    for n in layers:
        expected = case.answers[f"train.selected.{n}"].flatten(0, 1)
        routing, logits_TE = routings[n], case.answers[f"train.capacity_logits.{n}"].flatten(0, 1)
        chosen = torch.zeros(len(expected), E)
        chosen[routing.token_A, routing.expert_A()] = 1
        assert torch.equal(chosen, expected)
        assert_near(predictions[n].reshape(-1, E), logits_TE, FORWARD)
        router = model.blocks[n].mlp.router
        before, recorded = router.threshold.clone(), case.answers[f"train.threshold_after.{n}"]
        if torch.equal(before, recorded):  # recorded before the published code's step: a forward pass moves nothing
            recorded = before
        else:
            recorded = (recorded - before) / (1 - decay) + before  # what was observed
        with torch.no_grad():
            router.update_state(routing.report)
        capacity = int(expected[:, 0].sum())
        observed = torch.sigmoid(logits_TE).sort(dim=0, descending=True).values[capacity - 1]
        torch.testing.assert_close(router.threshold, decay * before + (1 - decay) * observed, rtol=1e-5, atol=1e-6)
        if not torch.equal(before, recorded):
            torch.testing.assert_close(observed, recorded, rtol=1e-4, atol=1e-5)


def router_loss(out: DiTOutput) -> torch.Tensor:
    """Sum of the routers' losses; 0 without."""
    parts = [value for report in out.routing for value in report.losses.values()]
    return torch.stack(parts).sum() if parts else torch.zeros(())


def gradient_norms(case: Case, model: Backbone, loss: torch.Tensor) -> torch.Tensor:
    loss.backward()
    ours = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    ours |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    theirs = to_reference(case.layout, ours)
    return torch.tensor([float(theirs[name].norm()) for name in case.about["grad_norm_names"]])


def check_flow_losses_and_gradients(case: Case) -> None:
    need(case, "rf.loss")
    answers, model = case.answers, model_of(case).train()
    point = rectified_flow(answers["x"], answers["rf.noise"], answers["rf.t"])
    out = model(point.x_t, point.t, answers["y"])
    mse = flow_loss(out.sample, point)
    assert_near(mse, answers["rf.mse"], REST)
    routers = router_loss(out)
    total = mse.mean() + routers
    counted = total if case.about["family"] == "diffmoe" else mse.mean()  # see the README for tc
    assert_near(counted.detach().view(1), answers["rf.loss"], REST)
    if "rf.capacity_loss" in answers:
        assert_near(routers.detach().view(1), answers["rf.capacity_loss"], REST)
    if "rf.grad_norms" in answers:
        assert_near(gradient_norms(case, model, total), answers["rf.grad_norms"], REST)


def check_pixel_losses_and_gradients(case: Case) -> None:
    need(case, "loss.value")
    answers, about, model = case.answers, case.about["denoiser"], model_of(case).train()
    t = torch.sigmoid(about["P_std"] * answers["loss.normal_for_t"] + about["P_mean"])
    point = rectified_flow(answers["x"], answers["loss.noise"] * case.config.noise_scale, t)
    out = model(point.x_t, t, answers["y"])
    loss = flow_loss(out.sample, point, "x", "velocity", case.config.min_gap).mean()
    assert_near(loss.detach().view(1), answers["loss.value"], REST)
    assert_near(gradient_norms(case, model, loss), answers["loss.grad_norms"], REST)


SAMPLE = re.compile(
    r"sample\.(?P<solver>\w+)\.cfg(?P<scale>[\d.]+?)(\.interval(?P<low>[\d.]+)-(?P<high>[\d.]+?))?(\.steps(?P<steps>\d+))?$"
)


def check_flow_samples(case: Case) -> None:
    need(case, "sample.")
    config, answers, model = case.config, case.answers, model_of(case).eval()

    def velocity(labels):
        def of(x, t):
            out = model(x, t, labels).sample[:, : config.in_channels]
            return convert(out, x, t, config.prediction, "velocity", config.min_gap)

        return of

    conditional, unconditional = velocity(answers["sample.y"]), None
    if config.null_class:
        unconditional = velocity(torch.full_like(answers["sample.y"], config.num_classes))
    tried = 0
    for key, expected in answers.items():
        match = SAMPLE.match(key)
        if match is None:
            continue
        interval = (float(match["low"] or 0), float(match["high"] or 1))
        guide = guided(conditional, unconditional, float(match["scale"]), interval)
        with torch.no_grad():
            if match["solver"] == "dopri5":
                result = dopri5(guide, answers["sample.z"], rtol=1e-3, atol=1e-6)
            else:
                solver = "heun_euler" if (case.kind, match["solver"]) == ("jit", "heun") else match["solver"]
                result = SOLVERS[solver](guide, answers["sample.z"], even_times(int(match["steps"])))
        assert_near(result, expected, REST)
        tried += 1
    assert tried == sum(key.startswith("sample.") for key in answers) - 2  # but sample.y and sample.z


def check_ddpm_losses_and_samples(case: Case) -> None:
    need(case, "ddpm.loss")
    answers, schedule = case.answers, linear_schedule(1000)
    step, model = answers["ddpm.t"], model_of(case)
    with torch.no_grad():
        out = model.train()(noised(schedule, answers["x"], answers["ddpm.noise"], step), step, answers["y"])
        losses = ddpm_losses(out.sample, answers["x"], answers["ddpm.noise"], step, schedule)
        assert_near(losses.mse, answers["ddpm.mse"], REST)
        assert_near(losses.vb, answers["ddpm.vb"], REST)
        total = losses.mse.mean() + losses.vb.mean()
        if case.about["family"] == "diffmoe":  # tc's auxiliary loss is in the gradients alone
            total = total + router_loss(out)
        assert_near(total.view(1), answers["ddpm.loss"], REST)
        model.eval()
        result = ddpm_ancestral(
            lambda x, t: model(x, t, answers["ddpm.sample.y"]).sample,
            answers["ddpm.sample.z"],
            respaced(schedule, len(answers["ddpm.sample.noises"])),
            lambda k: answers["ddpm.sample.noises"][k],
        )
    assert_near(result, answers["ddpm.sample.output"], REST)
