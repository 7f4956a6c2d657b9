"""Other libraries' experts answer as ours do; what is missing or unsuited is refused with its reason."""

import sys
from enum import Enum
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diffusion_moe.benchmarks.rivals import UNSUITED, make_rival, rival_version
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
    monkeypatch.setitem(UNSUITED, "scattermoe", lambda layer, device, dtype: None)


@pytest.fixture
def sonicmoe(monkeypatch):
    """A stand-in for SonicMoE that computes what its moe_general_routing_inputs does, assignment by assignment."""

    class ActivationType(Enum):
        SWIGLU = "swiglu"

    def moe_general_routing_inputs(
        x, router_scores, token_indices, expert_indices, w1, b1, w2, b2, E, stream_id, activation_type,
        is_inference_mode_enabled=False,
    ):  # fmt: skip
        assert b1 is None and b2 is None and activation_type is ActivationType.SWIGLU
        assert router_scores.dtype == torch.float32 and token_indices.dtype == expert_indices.dtype == torch.int32
        assert (token_indices.diff() >= 0).all()
        assert w1.shape[1:] == (x.shape[1], E) and w2.shape == (x.shape[1], w1.shape[0] // 2, E)
        assert w1.permute(2, 0, 1).is_contiguous() and w2.permute(2, 0, 1).is_contiguous()
        h_AH = torch.einsum("ad,hda->ah", x[token_indices], w1[..., expert_indices])
        a_AF = F.silu(h_AH[:, 0::2]) * h_AH[:, 1::2]
        y_AD = torch.einsum("af,dfa->ad", a_AF, w2[..., expert_indices])
        out = torch.zeros_like(x).index_add(0, token_indices, router_scores[:, None].to(x.dtype) * y_AD)
        return out, expert_indices.bincount(minlength=E)

    package, enums = ModuleType("sonicmoe"), ModuleType("sonicmoe.enums")
    package.moe_general_routing_inputs, enums.ActivationType = moe_general_routing_inputs, ActivationType
    monkeypatch.setitem(sys.modules, "sonicmoe", package)
    monkeypatch.setitem(sys.modules, "sonicmoe.enums", enums)
    monkeypatch.setitem(UNSUITED, "sonicmoe", lambda layer, device, dtype: None)


@pytest.mark.parametrize("kind", ["tc", "dsmoe"])
@pytest.mark.parametrize("shared", ["swiglu", "identity"])
@pytest.mark.parametrize("against", ["transformers", "scattermoe", "sonicmoe"])
def test_rivals_answer_as_the_layer_does(kind, shared, against, request):
    if against == "transformers":
        pytest.importorskip("transformers")
    else:
        request.getfixturevalue(against)
    layer = make_layer(kind, shared).train()
    rival = make_rival(against, layer, 2, CPU, torch.float32).train()
    x = torch.randn(3, 8, 16, requires_grad=True)
    (ours, loss), (theirs, their_loss) = results(layer, x), results(rival, x)
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
    # The experts' gradients: the same norm, whatever the layout.
    theirs = torch.autograd.grad(their_loss, tuple(rival.experts.parameters()))
    ours = torch.autograd.grad(loss, tuple(layer.experts.parameters()))
    torch.testing.assert_close([g.norm() for g in theirs], [g.norm() for g in ours], rtol=1e-5, atol=1e-6)


def test_a_rival_has_weights_of_its_own():
    pytest.importorskip("transformers")
    layer = make_layer()
    rival = make_rival("transformers", layer, 2, CPU, torch.float32)
    places = {p.data_ptr() for p in layer.parameters()}
    assert not places & {p.data_ptr() for p in rival.parameters()}
    assert sum(p.numel() for p in rival.parameters()) == sum(p.numel() for p in layer.parameters())


def test_the_libraries_version_is_told():
    transformers = pytest.importorskip("transformers")
    assert rival_version("transformers") == transformers.__version__
    assert rival_version("loop") is None


@pytest.mark.parametrize(
    ("against", "layer", "dtype", "expected"),
    [
        ("transformers", {"kind": "diffmoe"}, torch.float32, "which is for token choice, but the router is diffmoe"),
        ("transformers", {"kind": "ec"}, torch.float32, "which is for token choice, but the router is ec"),
        ("transformers", {"activation": "gelu"}, torch.float32, "but the experts are gelu; it is for swiglu without"),
        ("transformers", {"bias": True}, torch.float32, "but the experts are swiglu with biases"),
        ("transformers", {"dim": 12}, torch.bfloat16, "a width of 12 is not a multiple of 8"),
        ("scattermoe", {}, torch.float32, "it needs a CUDA device"),
        ("sonicmoe", {}, torch.bfloat16, "it needs a Hopper GPU"),
    ],
)
def test_what_does_not_suit_is_refused(against, layer, dtype, expected):
    with pytest.raises(ValueError, match=expected):
        make_rival(against, make_layer(**layer), 2, CPU, dtype)


@pytest.mark.parametrize("against", ["transformers", "scattermoe", "sonicmoe"])
def test_what_is_not_installed_is_named(against, monkeypatch):
    monkeypatch.setitem(UNSUITED, against, lambda layer, device, dtype: None)
    for name in ("transformers.models.qwen3_moe.modeling_qwen3_moe", "scattermoe", "scattermoe.mlp", "sonicmoe"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=f"against is {against}, which cannot be imported") as caught:
        make_rival(against, make_layer(), 2, CPU, torch.float32)
    assert "\n" not in str(caught.value)
