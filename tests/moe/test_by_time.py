"""Experts by time: the range of an image's t is its expert, in a layer, a model, a run and a pipeline."""

import dataclasses

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

from diffusion_moe import ClassToImagePipeline, default_scheduler
from diffusion_moe.config import ModelConfig
from diffusion_moe.models import load_model, make_model, save_model
from diffusion_moe.moe import ROUTERS, MoEFeedForward, RouterConfig, RoutingContext, routers_of
from diffusion_moe.moe.activation import activate
from diffusion_moe.training.upcycling import divide, upcycled

SMALL = {
    "sample_size": 8, "patch_size": 2, "in_channels": 1, "hidden_size": 32, "num_heads": 2, "num_classes": 3,
    "depth": 2, "router": "time", "num_experts": 2, "expert_dim": 16, "time_boundaries": (0.125,),
}  # fmt: skip
"""Settings of a small model with the boundary of Wan 2.2's text-to-video models, whose time 0.875 is our t 0.125."""


@pytest.mark.parametrize(
    ("settings", "times", "experts"),
    [
        ({"num_experts": 2, "time_boundaries": (0.125,)}, [0.0, 0.1, 0.125, 0.126, 1.0], [0, 0, 0, 1, 1]),
        ({"num_experts": 4}, [0.0, 0.25, 0.26, 0.5, 0.75, 0.76, 1.0], [0, 0, 1, 1, 2, 3, 3]),
        ({"num_experts": 3, "time_boundaries": (0.1, 0.2)}, [1 - 0.9, 0.15, 0.2, 0.5], [0, 1, 1, 2]),
        ({"num_experts": 1}, [0.0, 1.0], [0, 0]),
    ],
    ids=str,
)
def test_the_range_of_t_is_the_expert(settings, times, experts):
    router = ROUTERS["time"](6, RouterConfig("time", **settings))
    routing = router(torch.randn(len(times), 3, 6), RoutingContext(time_B=torch.tensor(times)))
    expert_T = torch.empty(3 * len(times), dtype=torch.long).index_copy(0, routing.token_A, routing.expert_A())
    assert expert_T.view(-1, 3).tolist() == [[expert] * 3 for expert in experts]
    assert routing.weight_A.tolist() == [1.0] * 3 * len(times) and routing.weight_A.dtype == torch.float32
    assert not list(router.parameters()) and not list(router.buffers())


@pytest.mark.parametrize("shared", ["none", "swiglu"])
def test_a_layer_and_its_gradients_are_those_of_a_plain_loop(shared):
    layer = MoEFeedForward(6, 8, RouterConfig("time", 2), bias=True, shared=shared)
    nn.init.normal_(layer.experts.b_in), nn.init.normal_(layer.experts.b_out)
    x, times = torch.randn(3, 4, 6, requires_grad=True), torch.tensor([0.9, 0.1, 0.3])
    out = layer(x, context=RoutingContext(time_B=times))
    w_in, w_out, b_in, b_out = layer.experts.w_in, layer.experts.w_out, layer.experts.b_in, layer.experts.b_out
    expected = torch.stack(
        [activate(x[b] @ w_in[e] + b_in[e], "swiglu") @ w_out[e] + b_out[e] for b, e in enumerate([1, 0, 0])]
    )
    expected = expected + (layer.shared(x) if shared == "swiglu" else 0)
    torch.testing.assert_close(out.hidden_states, expected)
    assert out.report.counts_E.tolist() == [8, 4] and not out.report.losses
    direction, inputs = torch.randn_like(expected), (x, *layer.parameters())
    both = (torch.autograd.grad((y * direction).sum(), inputs) for y in (out.hidden_states, expected))
    for ours, theirs in zip(*both):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_an_expert_without_images_has_a_gradient_of_zero():
    layer = MoEFeedForward(6, 8, RouterConfig("time", 2))
    layer(torch.randn(2, 4, 6), context=RoutingContext(time_B=torch.tensor([0.9, 0.8]))).hidden_states.sum().backward()
    assert not layer.experts.w_in.grad[0].any() and layer.experts.w_in.grad[1].any()


@pytest.mark.parametrize(
    ("boundaries", "message"),
    [((0.1, 0.2), "are 2, but model.num_experts is 2"), ((1.0,), r"are 1\.0; give ascending"), ((), "are 0, but")],
)
def test_boundaries_that_do_not_fit_are_refused(boundaries, message):
    with pytest.raises(ValueError, match=rf"model\.time_boundaries {message}"):
        ModelConfig(**SMALL | {"time_boundaries": boundaries})


def counts_at(model, timestep):
    return model(torch.randn(2, 1, 8, 8), timestep, torch.tensor([0, 1])).routing[0].counts_E.tolist()


def test_time_counts_from_noise_to_data_for_either_process():
    flow = make_model(ModelConfig(**SMALL))
    assert counts_at(flow, torch.tensor([0.1, 0.9])) == [16, 16] and counts_at(flow, torch.tensor(0.1)) == [32, 0]
    ddpm = make_model(ModelConfig(**SMALL, process="ddpm", prediction="epsilon"))
    assert counts_at(ddpm, torch.tensor([999, 100])) == [16, 16] and counts_at(ddpm, torch.tensor(875)) == [32, 0]


def test_both_sets_start_from_one_trained_dense_model():
    """Each expert is a copy of the dense layer, so the model computes the same at every time."""
    dense = make_model(ModelConfig(**SMALL | {"router": "dense", "mlp_dim": 48, "time_boundaries": None})).eval()
    for parameter in dense.parameters():
        if parameter.std() == 0 or parameter.ndim == 1:
            nn.init.normal_(parameter, std=0.1)
    settings = {"expert_dim": 48, "expert_activation": "gelu", "expert_bias": True, "shared": "none"}
    model = make_model(dataclasses.replace(dense.settings, router="time", num_experts=3, **settings)).eval()
    state, notes = upcycled(dense, model, noise=0.0, seed=0)
    model.load_state_dict(state)
    assert notes[0].endswith("they start exactly equal to the dense layers")
    inputs = torch.randn(4, 1, 8, 8), torch.tensor([0.1, 0.4, 0.6, 0.9]), torch.tensor([0, 1, 2, 3])
    with torch.no_grad():
        before, after = dense(*inputs).sample, model(*inputs).sample
    assert before.std() > 0.05
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)


def test_slices_of_a_dense_layer_are_no_exact_copy():
    settings = {"mlp_dim": 48, "expert_dim": 24, "expert_activation": "gelu", "shared": "none", "top_k": 2}
    assert not divide(ModelConfig(**SMALL | settings)).exact


def test_a_saved_model_keeps_its_boundaries(tmp_path):
    model = make_model(ModelConfig(**SMALL)).eval()
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.settings == model.settings and routers_of(loaded)[0].boundaries == (0.125,)


def test_a_pipeline_samples_with_the_expert_of_each_step(tmp_path):
    model = make_model(ModelConfig(**SMALL | {"time_boundaries": (0.5,)})).eval()
    nn.init.normal_(model.final_layer.linear.weight)
    ClassToImagePipeline(transformer=model, scheduler=default_scheduler(model.settings)).save_pretrained(tmp_path)
    pipeline, served = DiffusionPipeline.from_pretrained(tmp_path), []
    pipeline.set_progress_bar_config(disable=True)
    (router,) = routers_of(pipeline.transformer)
    router.register_forward_hook(lambda *call: served.append(call[2].report.counts_E.tolist()))
    image = pipeline([0, 1], num_inference_steps=4, output_type="latent").images
    assert torch.isfinite(image).all() and served == [[32, 0], [32, 0], [32, 0], [0, 32]]  # t: 0, 0.25, 0.5, 0.75
