"""Recording what routers do."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_moe.analysis import record_routing
from diffusion_moe.analysis.figures import draw_experts, draw_loss, expert_use
from diffusion_moe.moe import MoEFeedForward, RouterConfig
from diffusion_moe.parsing import read_recipe
from diffusion_moe.training.step import make_state


@pytest.mark.parametrize("kind", ["tc", "ec", "diffmoe", "dsmoe"])
def test_counts_are_those_of_a_plain_loop(kind):
    layer = MoEFeedForward(8, 4, RouterConfig(kind, num_experts=4, top_k=2, capacity=2.0))
    x = torch.randn(3, 6, 8)
    expected = torch.zeros(3, 4, dtype=torch.long)
    routing = layer.router(x)
    for token, expert in zip(routing.token_A.tolist(), routing.expert_A().tolist(), strict=True):
        expected[token // 6, expert] += 1
    plain = layer(x).hidden_states
    with record_routing(layer) as record:
        recorded = layer(x).hidden_states
        layer(x)
    layer(x)
    assert torch.equal(record.counts_LBE(), 2 * expected[None])
    assert torch.equal(recorded, plain)
    assert not layer.router._forward_hooks


def test_expert_use_sums_to_the_experts_a_token_takes(tiny):
    model = make_state(read_recipe("digits", [*tiny, "--model.top_k=3"]), torch.device("cpu")).model.eval()
    use = expert_use(model)
    assert use.share_LSKE.shape == (1, 20, 10, 4)
    np.testing.assert_allclose(use.share_LSKE.sum(-1), 3, rtol=1e-6)
    np.testing.assert_allclose(use.times_S, np.arange(20) / 20, atol=1e-6)


def test_expert_use_of_ddpm_models_and_of_class_tokens(tiny):
    """Time runs from noise to data for both; class tokens are tokens like others."""
    jit = ["--model.backbone=jit", "--model.prediction=x", "--model.bottleneck_dim=6", "--model.class_tokens=3"]
    ddpm = ["--model.process=ddpm", "--model.prediction=epsilon"]
    for options, first, last in ((jit, 0.0, 0.95), (ddpm, 0.001, 1.0)):
        model = make_state(read_recipe("digits", [*tiny, *options]), torch.device("cpu")).model.eval()
        use = expert_use(model)
        np.testing.assert_allclose(use.share_LSKE.sum(-1), model.settings.top_k, rtol=1e-6)
        assert use.times_S[0] == pytest.approx(first) and use.times_S[-1] == pytest.approx(last)
        assert (np.diff(use.times_S) > 0).all() and len(use.times_S) == 20


def test_figures_are_pictures_that_are_not_blank(tmp_path, tiny):
    model = make_state(read_recipe("digits", tiny), torch.device("cpu")).model.eval()
    draw_experts(expert_use(model), [str(i) for i in range(10)], tmp_path / "experts.png")
    rows = [json.dumps({"step": i, "loss": 1 / i}) for i in range(1, 40)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows))
    draw_loss(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    for name in ("experts.png", "loss.png"):
        assert np.array(Image.open(tmp_path / name)).std() > 5
