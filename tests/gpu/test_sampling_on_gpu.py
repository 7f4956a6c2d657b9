"""Sampling with CUDA graphs, and float32 whatever TensorFloat-32 setting the process has."""

import dataclasses

import pytest
import torch

from diffusion_moe.config import EvaluationConfig
from diffusion_moe.models import DiT
from diffusion_moe.moe import MoEFeedForward, RouterConfig, precision, routers_of
from diffusion_moe.routing_rules import RULES
from diffusion_moe.sampling.acceleration import MOST_GRAPHS, accelerated
from diffusion_moe.sampling.generate import generate

pytestmark = pytest.mark.gpu
SETTINGS = EvaluationConfig(steps=4, solver="heun", guidance_interval=(0.0, 0.6), precision="bf16", batch_size=4)


def make_model(router):
    model = DiT(
        sample_size=8, in_channels=1, hidden_size=64, depth=2, num_heads=2, num_classes=10, router=router,
        num_experts=4, expert_dim=64,
    ).cuda().eval()  # fmt: skip
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    for module in routers_of(model):
        if module.has_thresholds:
            module.threshold.fill_(0.5)
    return model


@pytest.mark.parametrize("router", ["dense", *RULES])
def test_graphs_sample_the_same_images(router):
    """Two shapes of a batch, with and without guidance; and one network under several thresholds."""
    model, labels = make_model(router), torch.arange(6)
    settings = dataclasses.replace(SETTINGS, capacity_limit=4.0 if router == "diffmoe" else None)
    network = accelerated(model, dataclasses.replace(settings, acceleration="graph"))
    changes = [{}, {"threshold_scale": 1.2}, {"capacity_limit": 0.5}, {}] if router == "diffmoe" else [{}, {}]
    for change in changes:
        chosen = dataclasses.replace(settings, **change)
        expected = generate(model, labels, 6, chosen)
        torch.testing.assert_close(generate(model, labels, 6, chosen, network=network), expected, rtol=0, atol=1e-2)


def test_memory_of_graphs_that_are_no_longer_kept_is_freed():
    model = make_model("dense")
    network = accelerated(model, dataclasses.replace(SETTINGS, acceleration="graph"))

    def reserved_after(sizes):
        for images in sizes:
            network(torch.zeros(images, 1, 8, 8, device="cuda"), torch.tensor(0.5, device="cuda"), None)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    with torch.no_grad():
        first = reserved_after(range(1, MOST_GRAPHS + 1))
        assert reserved_after(range(MOST_GRAPHS + 1, 4 * MOST_GRAPHS)) < 2 * first


@pytest.mark.parametrize("allowed", ["ieee", "tf32"])
def test_routers_compute_in_float32(allowed, monkeypatch):
    """TensorFloat-32 would err by about 1e-2 here. The operator is what compiled routers call."""
    router, seen = MoEFeedForward(512, 64, RouterConfig("tc", num_experts=16, top_k=2)).router.cuda(), []
    torch.nn.init.normal_(router.weight)
    x, route = torch.randn(4, 256, 512, device="cuda"), router.route
    monkeypatch.setattr(router, "route", lambda x, logits: (seen.append(logits), route(x, logits))[1])
    matmul, expected = torch.backends.cuda.matmul, x.double() @ router.weight.double().T
    before = matmul.fp32_precision
    matmul.fp32_precision = allowed
    try:
        router(x)
        of_operator = precision._exact_linear(x, router.weight, None)
        assert matmul.fp32_precision == allowed
    finally:
        matmul.fp32_precision = before
    for logits in (seen[0], of_operator):
        assert (logits - expected).abs().max() < 1e-3
