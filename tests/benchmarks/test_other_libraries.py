"""Other libraries' experts compute as ours do; what is missing or unsupported is refused with its reason."""

import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from other_libraries import with_library
from torch import nn

from diffusion_moe.moe import MoEFeedForward, RouterConfig

CPU = torch.device("cpu")


def make_layer(kind="dsmoe", shared="swiglu", activation="swiglu", bias=False, dim=16, **settings):
    torch.manual_seed(0)
    settings = {"top_k": 2, "capacity": 2.0, "balance": "aux", "n_group": 2, "topk_group": 1, **settings}
    return MoEFeedForward(dim, 32, RouterConfig(kind, 4, **settings), activation, bias, shared)


def results(module, x):
    """Output, loss of the router, and gradients of tokens and router."""
    out = module(x)
    loss = out.hidden_states.square().sum() + sum(out.report.losses.values())
    gradients = torch.autograd.grad(loss, (x, module.router.weight), retain_graph=True)
    return (out.hidden_states, *out.report.losses.values(), out.report.counts_E, *gradients), loss


@pytest.fixture
def scattermoe(monkeypatch):
    """A stand-in for ScatterMoE that computes what its GLUMLP does, token by token."""

    class ParallelExperts(nn.Module):
        def __init__(self, num_experts, inputs, outputs):
            super().__init__()
            self.weight = nn.Parameter(torch.empty(num_experts, outputs, inputs))

    class GLUMLP(nn.Module):
        def __init__(self, input_size, hidden_size, num_experts, top_k):
            super().__init__()
            self.top_k = top_k
            self.experts = ParallelExperts(num_experts, input_size, 2 * hidden_size)
            self.output_experts = ParallelExperts(num_experts, hidden_size, input_size)

        def forward(self, x, expert_p, expert_idxs):
            assert expert_idxs.shape[1] == self.top_k and x.dtype == expert_p.dtype == self.experts.weight.dtype
            h, gates = torch.einsum("td,tkfd->tkf", x, self.experts.weight[expert_idxs]).chunk(2, dim=-1)
            y = torch.einsum("tkf,tkdf->tkd", F.silu(gates) * h, self.output_experts.weight[expert_idxs])
            return (expert_p[..., None] * y).sum(1)

    package, module = ModuleType("scattermoe"), ModuleType("scattermoe.mlp")
    module.GLUMLP = GLUMLP
    monkeypatch.setitem(sys.modules, "scattermoe", package)
    monkeypatch.setitem(sys.modules, "scattermoe.mlp", module)
    monkeypatch.setattr("other_libraries.unsupported", lambda *_: None)


@pytest.mark.parametrize("kind", ["tc", "dsmoe"])
@pytest.mark.parametrize("shared", ["swiglu", "identity"])
@pytest.mark.parametrize("against", ["transformers", "scattermoe"])
def test_libraries_compute_as_the_layer_does(kind, shared, against, request):
    if against == "transformers":
        pytest.importorskip("transformers")
    else:
        request.getfixturevalue(against)
    layer = make_layer(kind, shared).train()
    other = with_library(against, layer, CPU, torch.float32).train()
    x = torch.randn(3, 8, 16, requires_grad=True)
    (ours, loss), (theirs, their_loss) = results(layer, x), results(other, x)
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
    # The experts' gradients: the same norm, whatever the layout.
    theirs = torch.autograd.grad(their_loss, tuple(other.experts.parameters()))
    ours = torch.autograd.grad(loss, tuple(layer.experts.parameters()))
    torch.testing.assert_close([g.norm() for g in theirs], [g.norm() for g in ours], rtol=1e-5, atol=1e-6)


def test_a_library_has_copies_of_the_weights():
    pytest.importorskip("transformers")
    layer = make_layer()
    other = with_library("transformers", layer, CPU, torch.float32)
    places = {p.data_ptr() for p in layer.parameters()}
    assert not places & {p.data_ptr() for p in other.parameters()}
    assert sum(p.numel() for p in other.parameters()) == sum(p.numel() for p in layer.parameters())


@pytest.mark.parametrize(
    ("against", "layer", "dtype", "expected"),
    [
        (
            "transformers",
            {"kind": "diffmoe"},
            torch.float32,
            "supports token choice alone, but the router is diffmoe",
        ),
        ("transformers", {"kind": "ec"}, torch.float32, "supports token choice alone, but the router is ec"),
        ("transformers", {"activation": "gelu"}, torch.float32, "but the experts are gelu; choose loop"),
        ("transformers", {"bias": True}, torch.float32, "but the experts are swiglu with biases"),
        ("transformers", {"dim": 12}, torch.bfloat16, "a width of 12 is not a multiple of 8"),
        ("scattermoe", {}, torch.float32, "it needs a CUDA device"),
    ],
)
def test_what_is_not_supported_is_refused(against, layer, dtype, expected):
    with pytest.raises(ValueError, match=expected):
        with_library(against, make_layer(**layer), CPU, dtype)


@pytest.mark.parametrize("against", ["transformers", "scattermoe"])
def test_what_is_not_installed_is_named(against, monkeypatch):
    monkeypatch.setattr("other_libraries.unsupported", lambda *_: None)
    for name in ("transformers.models.qwen3_moe.modeling_qwen3_moe", "scattermoe", "scattermoe.mlp"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=f"against is {against}, which cannot be imported") as caught:
        with_library(against, make_layer(), CPU, torch.float32)
    assert "\n" not in str(caught.value)
