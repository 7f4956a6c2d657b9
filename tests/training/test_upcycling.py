"""Experts out of dense layers: the same function at first, or as near as the routing rule allows."""

import dataclasses

import pytest
import torch
from torch import nn

from diffusion_moe.config import ModelConfig
from diffusion_moe.models import make_model
from diffusion_moe.training.upcycling import Division, divide, upcycled

DENSE = ModelConfig(
    sample_size=8, patch_size=2, in_channels=1, hidden_size=32, depth=4, num_heads=2, num_classes=3, router="dense"
)


def dense_model(**settings):
    """A dense model none of whose weights is zero."""
    torch.manual_seed(1)
    model = make_model(dataclasses.replace(DENSE, **settings)).eval()
    for parameter in model.parameters():
        if parameter.std() == 0 or parameter.ndim == 1:
            nn.init.normal_(parameter, std=0.1)
    return model


def experts_of(dense, noise=0.0, **settings):
    """The mixture that becomes of it, and the lines for the user."""
    torch.manual_seed(2)
    model = make_model(dataclasses.replace(dense.settings, **settings)).eval()
    state, notes = upcycled(dense, model, noise, seed=0)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    return model, notes, missing


def answers(*models):
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(4, 1, 8, 8, generator=generator), torch.rand(4, generator=generator)
    with torch.no_grad():
        return [model(x, t, torch.tensor([0, 1, 2, 3])).sample for model in models]


COPIES = {"router": "dsmoe", "num_experts": 6, "top_k": 2, "shared": "none", "expert_bias": True}
GELU = {"mlp_dim": 48, "mlp_activation": "gelu"}
SWIGLU = {"mlp_dim": 72, "mlp_activation": "swiglu", "mlp_bias": False}
EXACT = {
    "copies": (GELU, COPIES | {"expert_dim": 48}),
    "copies, scaled weights, groups": (GELU, COPIES | {"expert_dim": 48, "routed_scaling_factor": 2.5, "n_group": 3}),
    "copies that are wider": (GELU, COPIES | {"expert_dim": 50}),
    "two slices": (GELU, COPIES | {"expert_dim": 24}),
    "two slices of four experts": (GELU, COPIES | {"expert_dim": 24, "top_k": 4, "routed_scaling_factor": 2.0}),
    "three slices": (GELU, COPIES | {"expert_dim": 16, "top_k": 3}),
    "a shared expert and two slices": (
        SWIGLU, COPIES | {"expert_dim": 24, "shared": "swiglu", "expert_bias": False, "moe_layer_freq": 1}),
    "a shared expert and copies": (
        SWIGLU, COPIES | {"expert_dim": 60, "shared": "swiglu", "shared_dim": 12, "expert_bias": False}),
    "a shared expert of another kind": (GELU, COPIES | {"expert_dim": 48, "shared": "swiglu"}),
    "a shared expert with biases": (
        GELU, COPIES | {"expert_dim": 36, "shared": "gelu", "shared_dim": 12, "shared_bias": True}),
    "all to the shared expert": (SWIGLU, {"router": "ec", "shared": "swiglu", "shared_dim": 72, "expert_dim": 10}),
    "a wider shared expert, experts of another width": (
        SWIGLU, {"router": "tc", "top_k": 1, "shared": "swiglu", "shared_dim": 80, "expert_dim": 24}),
    "DiffMoE beside a shared expert": (
        GELU, {"router": "diffmoe", "shared": "gelu", "shared_dim": 64, "shared_bias": True, "expert_dim": 32}),
}  # fmt: skip


@pytest.mark.parametrize("case", EXACT)
def test_the_mixture_begins_as_the_dense_model(case):
    dense, mixture = EXACT[case]
    dense = dense_model(**dense)
    expert_activation = dense.settings.mlp_activation
    model, notes, missing = experts_of(dense, **{"num_experts": 8, "expert_activation": expert_activation} | mixture)
    assert not missing and "start exactly equal to the dense" in notes[0] and len(notes) == 1
    before, after = answers(dense, model)
    assert before.std() > 0.05
    torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-6)


def test_every_token_meets_each_slice_of_a_copy_once():
    """Slices of a copy have equal rows in the router: they are chosen together."""
    dense = dense_model(**GELU)
    model, _, _ = experts_of(dense, **COPIES | {"expert_dim": 24, "expert_activation": "gelu"})
    routing = model.blocks[1].mlp.router(torch.randn(2, 16, 32))
    expert_TK = routing.expert_A()[routing.row_TK].sort(dim=1).values
    assert torch.equal(expert_TK % 2, torch.tensor([0, 1]).expand(32, 2))
    assert torch.equal(expert_TK[:, 0] // 2, expert_TK[:, 1] // 2)
    torch.testing.assert_close(routing.weight_A, torch.full((64,), 0.5))


@pytest.mark.parametrize(
    ("router", "settings"),
    [("tc", {"top_k": 2}), ("dsmoe", {"top_k": 1}), ("dsmoe", {"top_k": 3, "expert_dim": 24})],
)
def test_other_rules_begin_near_the_dense_model(router, settings):
    """Their weights add up to what a router that knows nothing gives: with its logits at 0 it is the dense model."""
    dense = dense_model(**GELU)
    model, notes, _ = experts_of(
        dense, **COPIES | {"router": router, "expert_dim": 48, "expert_activation": "gelu"} | settings
    )
    assert "start approximately equal to the dense" in notes[0]
    before, after = answers(dense, model)
    assert (after - before).norm() < 0.3 * before.norm()
    for block in model.blocks[1::2]:
        block.mlp.router.weight.data.zero_()
    if settings.get("expert_dim") is None:
        torch.testing.assert_close(answers(model)[0], before, rtol=1e-5, atol=1e-5)


def test_expert_choice_serves_each_token_as_often_as_it_is_chosen():
    dense = dense_model(**GELU)
    model, notes, _ = experts_of(
        dense, **COPIES | {"router": "ec", "capacity": 6.0, "expert_dim": 48, "expert_activation": "gelu"}
    )
    for block in model.blocks[1::2]:
        block.mlp.router.weight.data.zero_()  # of capacity 6 of 6 experts all serve every token
    before, after = answers(dense, model)
    assert "approximately equal" in notes[0]
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


def test_biases_that_experts_lack_are_reported():
    dense = dense_model(**GELU)
    lacking = COPIES | {"expert_dim": 48, "expert_activation": "gelu", "expert_bias": False}
    model, notes, _ = experts_of(dense, **lacking)
    assert "approximately equal" in notes[0] and "biases of the dense layers are dropped" in notes[1]
    for block in dense.blocks[1::2]:
        for linear in (block.mlp.up_proj, block.mlp.down_proj):
            linear.bias.data.zero_()
    before, after = answers(dense, model)
    torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-6)


def test_noise_is_as_large_as_asked_for_and_a_function_of_the_seed():
    dense = dense_model(**GELU)
    settings = COPIES | {"expert_dim": 48, "expert_activation": "gelu"}
    clean, noisy, again = (experts_of(dense, noise, **settings)[0].blocks[1].mlp.experts for noise in (0.0, 0.1, 0.1))
    for name in ("w_in", "w_out"):
        w, moved, same = (getattr(experts, name) for experts in (clean, noisy, again))
        assert torch.equal(moved, same)
        noise = (moved - w).std(dim=(1, 2)) / w.std(dim=(1, 2))
        torch.testing.assert_close(noise, torch.full((6,), 0.1), rtol=0.1, atol=0)
        assert not torch.equal(moved[0] - w[0], moved[1] - w[1])
    assert torch.equal(clean.w_in[0], clean.w_in[5])


CANNOT = {
    "activation": ({"expert_activation": "swiglu"}, "the dense layers use gelu and the experts swiglu"),
    "slices": ({"expert_dim": 20}, "48 hidden units cannot be cut into experts of 20"),
    "copies": ({"expert_dim": 12}, "6 experts cannot be copies in 4 slices each"),
}


@pytest.mark.parametrize("case", CANNOT)
def test_what_cannot_be_made_is_left_to_be_drawn(case):
    settings, reason = CANNOT[case]
    dense = dense_model(**GELU)
    model, notes, missing = experts_of(dense, **COPIES | {"expert_dim": 48, "expert_activation": "gelu"} | settings)
    assert notes == [f"the dense layers cannot be upcycled: {reason}"]
    assert {name.split(".")[2] for name in missing} == {"mlp"} and {name.split(".")[1] for name in missing} == {
        "1",
        "3",
    }
    assert torch.equal(model.blocks[0].mlp.up_proj.weight, dense.blocks[0].mlp.up_proj.weight)
    assert torch.equal(model.blocks[1].attn.qkv.weight, dense.blocks[1].attn.qkv.weight)


def test_published_shapes():
    """What becomes of a dense SwiGLU layer of three experts' width in DSMoE-S: its first part is shared."""
    config = dataclasses.replace(
        DENSE, hidden_size=384, mlp_dim=2304, mlp_activation="swiglu", router="dsmoe", expert_dim=768, num_experts=16,
        routed_scaling_factor=2.0,
    )  # fmt: skip
    assert divide(config) == Division(shared=768, slices=2, weight=2.0, exact=True)
    assert not divide(dataclasses.replace(config, router="tc")).exact
    assert divide(dataclasses.replace(config, router="tc")).weight == 2 / 16
