"""The adapter to SonicMoE, against a stand-in that keeps the contract written beside its functions."""

import sys
import types

import pytest
import torch

from diffusion_moe.moe import GroupedExperts, backend, experts_loop, route_by_mask, route_by_token, sonic

CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def probe_again():
    """The import is probed once a process."""
    sonic._import_error.cache_clear()
    yield
    sonic._import_error.cache_clear()


@pytest.fixture
def stand_in(monkeypatch):
    """A package with the published signature and layouts, that computes on any device and counts its calls.

    w1 is (2I, H, E) with gate and value rows in turn, w2 (H, I, E), both with the last axis outermost in memory;
    assignments come token by token as int32, scores as float32.
    """
    calls = []

    def moe_general_routing_inputs(
        x, router_scores, token_indices, expert_indices, w1, b1, w2, b2, E, stream_id, activation_type, is_inference
    ):
        calls.append(is_inference)
        assert b1 is None and b2 is None and activation_type == "swiglu" and isinstance(stream_id, int)
        assert token_indices.dtype == expert_indices.dtype == torch.int32 and router_scores.dtype == torch.float32
        assert torch.all(token_indices.diff() >= 0) and w1.shape[2] == w2.shape[2] == E
        assert w1.permute(2, 0, 1).is_contiguous() and w2.permute(2, 0, 1).is_contiguous()
        h = torch.einsum("ah,iha->ai", x[token_indices], w1[:, :, expert_indices])
        y = torch.einsum("ai,hia->ah", torch.nn.functional.silu(h[:, ::2]) * h[:, 1::2], w2[:, :, expert_indices])
        return x.new_zeros(x.shape).index_add(0, token_indices, router_scores[:, None] * y), None

    package, enums = types.ModuleType("sonicmoe"), types.ModuleType("sonicmoe.enums")
    package.moe_general_routing_inputs = moe_general_routing_inputs
    enums.ActivationType = types.SimpleNamespace(SWIGLU="swiglu")
    monkeypatch.setitem(sys.modules, "sonicmoe", package)
    monkeypatch.setitem(sys.modules, "sonicmoe.enums", enums)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=7))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return calls


def why_not(dim=512, expert_dim=64, dtype=torch.bfloat16, device=CUDA, token_choice=True, bias=False, **more):
    return sonic.why_not(dim, expert_dim, dtype, device, token_choice, bias, **more)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"token_choice": False}, "token choice alone"),
        ({"bias": True}, "without biases"),
        ({"activation": "gelu"}, "SwiGLU"),
        ({"dropout": 0.1}, "without dropout"),
        ({"dtype": torch.float32}, "bfloat16, not float32"),
        ({"dim": 384}, "from 512 up; these are 384 and 64"),
        ({"dim": 544}, "multiples of 64"),
        ({"expert_dim": 96}, "512 and 96"),
        ({"device": torch.device("cpu")}, "the device is cpu"),
    ],
)
def test_says_in_one_line_why_not(stand_in, settings, reason):
    assert why_not() is None
    assert reason in why_not(**settings) and "\n" not in why_not(**settings)


def test_needs_hopper_and_the_package(stand_in, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert "Hopper" in why_not()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setitem(sys.modules, "sonicmoe", None)
    assert why_not().startswith("SonicMoE cannot be imported (ModuleNotFoundError")


def test_output_and_gradients_are_those_of_the_loop(stand_in, monkeypatch):
    """In float32 on this machine, so only the layouts are compared: the probe is told to let it pass."""
    monkeypatch.setattr(sonic, "why_not", lambda *settings: None)
    experts = GroupedExperts(8, 12, 5, "swiglu")
    x_TD, weight_TK = torch.randn(23, 8, requires_grad=True), torch.rand(23, 2, requires_grad=True)
    routing = route_by_token(torch.rand(23, 5).argsort(1)[:, :2], weight_TK, 5)
    inputs, direction = (x_TD, weight_TK, *experts.parameters()), torch.randn(23, 8)
    with backend.use("sonic"):
        y_TD = experts(x_TD, routing)
        with torch.no_grad():
            experts(x_TD, routing)
    expected_TD = experts_loop(experts, x_TD, routing)
    torch.testing.assert_close(y_TD, expected_TD)
    grads = (torch.autograd.grad(y, inputs, direction, retain_graph=True) for y in (y_TD, expected_TD))
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)
    experts(x_TD, routing)
    assert stand_in == [False, True], "called twice, the second time without gradients, and never unasked"


def test_is_refused_where_it_cannot_serve(stand_in):
    experts, x_TD = GroupedExperts(8, 12, 2, "swiglu"), torch.randn(3, 8)
    routing = route_by_mask(torch.ones(3, 2, dtype=torch.bool), torch.rand(3, 2))
    with (
        backend.use("sonic"),
        pytest.raises(ValueError, match=r"token choice alone.*; set DIFFUSION_MOE_KERNELS to auto"),
    ):
        experts(x_TD, routing)
    assert stand_in == []
