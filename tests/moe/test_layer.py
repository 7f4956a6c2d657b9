"""The whole layer: what every token gets beside its experts, what the router looks at, and what a forward touches."""

import pytest
import torch
from router_context import with_context
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from diffusion_moe.benchmarks.measure import saved_bytes
from diffusion_moe.moe import (
    FeedForward,
    MoEFeedForward,
    RouterConfig,
    experts_loop,
    merge_reports,
    ops,
    recompute_experts,
    routers_of,
    update_routing_state,
)
from diffusion_moe.moe.precision import VARIABLE
from diffusion_moe.routing_rules import RULES

KINDS = list(RULES)


def make_layer(kind="tc", shared="none", **settings) -> MoEFeedForward:
    config = RouterConfig(kind, 4, **settings)
    return with_context(MoEFeedForward(8, 16, config, shared=shared, shared_dim=24, bias=True, shared_bias=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shared", ["none", "identity", "gelu", "swiglu"])
def test_output_is_the_experts_plus_what_every_token_gets(kind, shared):
    layer, x_BND = make_layer(kind, shared), torch.randn(3, 8, 8)
    routed = experts_loop(layer.experts, x_BND.flatten(0, 1), layer.router(x_BND)).view_as(x_BND)
    if shared in ("gelu", "swiglu"):
        assert layer.shared.up_proj.out_features == 24 and layer.shared.up_proj.bias is not None
        extra = layer.shared(x_BND)
        assert extra.abs().mean() > 0.1
    else:
        assert layer.shared is None
        extra = {"none": 0, "identity": x_BND}[shared]
    out = layer(x_BND)
    torch.testing.assert_close(out.hidden_states, routed + extra)
    torch.testing.assert_close(out.report.counts_E, layer.router(x_BND).report.counts_E)


@pytest.mark.parametrize("settings", [{"shared": "magic"}, {"activation": "magic"}], ids=str)
def test_an_unknown_choice_is_refused_with_its_name(settings):
    """Else a misspelt shared expert would silently be none."""
    with pytest.raises(ValueError, match="magic"):
        MoEFeedForward(8, 16, RouterConfig("tc", 4), **settings)


@pytest.mark.parametrize("activation", ["gelu", "silu", "swiglu"])
def test_feed_forward_is_the_plain_formula(activation):
    ff, x = FeedForward(4, 6, activation), torch.randn(5, 4)
    for p in ff.parameters():
        torch.nn.init.normal_(p)
    up = x @ ff.up_proj.weight.T + ff.up_proj.bias
    if activation == "gelu":
        hidden = 0.5 * up * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (up + 0.044715 * up**3)))
    elif activation == "silu":
        hidden = up * torch.sigmoid(up)
    else:
        gate = x @ ff.gate_proj.weight.T + ff.gate_proj.bias
        hidden = gate * torch.sigmoid(gate) * up
    torch.testing.assert_close(ff(x), hidden @ ff.down_proj.weight.T + ff.down_proj.bias, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_two_dimensions_are_one_image(kind):
    layer, x_ND = make_layer(kind, "swiglu"), torch.randn(8, 8)
    flat, batched = layer(x_ND), layer(x_ND[None])
    assert flat.hidden_states.shape == x_ND.shape
    assert torch.equal(flat.hidden_states, batched.hidden_states[0])
    assert torch.equal(flat.report.counts_E, batched.report.counts_E)


@pytest.mark.parametrize("shape", [(2, 8, 8), (8, 8)])
def test_router_input_changes_the_routing_and_the_experts_still_see_x(shape):
    layer, x, other = make_layer("tc", "swiglu", top_k=1), torch.randn(shape), torch.randn(shape)
    seen = other if other.ndim == 3 else other[None]
    expected = experts_loop(layer.experts, x.reshape(-1, 8), layer.router(seen)).view(shape) + layer.shared(x)
    out = layer(x, router_input=other)
    torch.testing.assert_close(out.hidden_states, expected)
    assert (out.hidden_states - layer(x).hidden_states).abs().max() > 0.01
    torch.testing.assert_close(layer(x, router_input=x), layer(x))


def test_router_input_gets_the_routers_gradient_and_x_the_experts():
    layer = make_layer("dsmoe")
    x, other = torch.randn(2, 8, 8, requires_grad=True), torch.randn(2, 8, 8, requires_grad=True)
    layer(x, router_input=other).hidden_states.square().sum().backward()
    assert other.grad.abs().max() > 0 and x.grad.abs().max() > 0 and layer.router.weight.grad.abs().max() > 0


def test_micro_batches_merge_to_the_whole_batch():
    """Token choice treats each image by itself, so the merged counts are those of the whole batch."""
    layer, x_BND = make_layer("tc", balance="aux"), torch.randn(4, 8, 8)
    parts = [layer(x).report for x in x_BND.split(2)]
    merged = merge_reports(parts)
    assert torch.equal(merged.counts_E, layer(x_BND).report.counts_E)
    torch.testing.assert_close(merged.losses["balance"], (parts[0].losses["balance"] + parts[1].losses["balance"]) / 2)


def test_micro_batches_move_the_threshold_once_by_their_mean():
    layer, x_BND = make_layer("diffmoe", threshold_decay=0.5), torch.randn(4, 8, 8)
    parts = [layer(x).report for x in x_BND.split(2)]
    update_routing_state(routers_of(layer), [merge_reports(parts)])
    torch.testing.assert_close(layer.router.threshold, (parts[0].threshold_E + parts[1].threshold_E) / 4)


class Watch(TorchDispatchMode):
    """Names of all operators called, and the largest tensor that one of them made."""

    def __init__(self) -> None:
        super().__init__()
        self.called: set[str] = set()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.called.add(func.__name__.split(".")[0])
        outs = out if isinstance(out, tuple | list) else [out]
        self.largest = max([self.largest, *(t.numel() for t in outs if isinstance(t, torch.Tensor))])
        return out


WAITS_FOR_DEVICE = {
    "_local_scalar_dense", "nonzero", "item", "bincount", "masked_select", "is_nonzero", "equal",
    "_unique", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive",
}  # fmt: skip


@pytest.mark.parametrize(
    "settings",
    [{"kind": k} for k in KINDS if RULES[k].has_fixed_rows] + [{"kind": "tc", "balance": "aux"}],
    ids=str,
)
def test_training_never_waits_for_the_device_nor_widens_to_all_experts(settings, monkeypatch):
    """No operator whose answer the host needs, no tensor as large as every expert on every token."""
    for name in ("gmm_loop", "gmm_wgrad_loop"):  # would read the offsets inside our operators, out of the mode's sight
        monkeypatch.setattr(ops, name, None)
    monkeypatch.setattr("diffusion_moe.moe.expert_matmul._is_on_host", lambda offsets_E: False)  # as on a GPU
    B, N, D, E, F = 2, 64, 32, 8, 16
    layer = with_context(MoEFeedForward(D, F, RouterConfig(num_experts=E, **settings), bias=True))
    with Watch() as watch:
        out = layer(torch.randn(B, N, D, requires_grad=True))
        (out.hidden_states.sum() + sum(out.report.losses.values())).backward()
    assert not watch.called & WAITS_FOR_DEVICE
    matmuls = {"bmm", "baddbmm"} if settings["kind"] in ("ec", "diffmoe", "nucleus") else {"gmm", "gmm_wgrad"}
    assert matmuls | {"combine"} <= watch.called
    assignments = int(out.report.counts_E.sum())
    assert watch.largest == max(assignments * max(2 * F, D), E * D * 2 * F) < B * N * E * D / 2


FREE = ("empty", "new_empty", "empty_like", "empty_strided", "_unsafe_view", "detach", "device", "promote_types")


class Computing(TorchDispatchMode):
    """Counts the operators that compute: no views, no memory taken, no questions about a tensor."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not (func.is_view or func.__name__.split(".")[0] in FREE)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("kind", "operators"), [("dsmoe", 52), ("diffmoe", 74)])
def test_a_training_step_has_few_operators(kind, operators, monkeypatch):
    """Each is about a kernel on a GPU. Traced as there: without values, under autocast, matmuls as asked."""
    monkeypatch.setenv(VARIABLE, "low_precision")
    is_pool = kind == "diffmoe"
    config = RouterConfig(kind, num_experts=16, top_k=2)
    with FakeTensorMode():
        layer = MoEFeedForward(
            64, 32, config, "gelu" if is_pool else "swiglu", bias=is_pool, shared="none" if is_pool else "swiglu"
        ).train()
        x = torch.randn(8, 256, 64, requires_grad=True)
        with Computing() as computing:
            with torch.autocast("cpu", torch.bfloat16):
                out = layer(x)
            answers = [out.hidden_states, *out.report.losses.values()]
            torch.autograd.grad(answers, (x, *layer.parameters()), [torch.empty_like(y) for y in answers])
    assert computing.count <= operators


def test_the_watch_sees_a_wait_and_a_wide_tensor():
    layer = MoEFeedForward(32, 16, RouterConfig("diffmoe", 8)).eval()
    with Watch() as watch:
        layer(torch.randn(2, 64, 32))  # inference counts by threshold: one wait
    assert watch.called & WAITS_FOR_DEVICE == {"nonzero"}
    with Watch() as watch:
        torch.einsum("td,edh->eth", torch.randn(128, 32), layer.experts.w_in)
    assert watch.largest >= 8 * 128 * 32


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_a_layer_of_another_dtype_is_close_to_float32(kind, dtype):
    """As from_pretrained(torch_dtype=...) makes it; the routing itself may differ in rounding, so choose it once."""
    layer, x_BND = make_layer(kind, "swiglu").eval(), torch.randn(2, 8, 8).bfloat16().float()
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(p.bfloat16())
    expected = layer(x_BND)
    actual = layer.to(dtype)(x_BND.to(dtype))
    assert actual.hidden_states.dtype == dtype
    assert torch.equal(actual.report.counts_E, expected.report.counts_E)
    error = (actual.hidden_states.float() - expected.hidden_states).norm() / expected.hidden_states.norm()
    assert error < (2.0**-6 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_acts_on_the_hidden_layer_of_every_expert(kind):
    """Without biases the last projection is linear: what dropout passes on tripled comes out tripled."""
    router = RouterConfig(kind, 4, top_k=2, capacity=2)
    layer = with_context(MoEFeedForward(6, 8, router, shared="swiglu", dropout=0.25)).train()
    x = torch.randn(2, 6, 6)
    dropouts = (layer.experts.dropout, layer.shared.dropout)
    assert {dropout.p for dropout in dropouts} == {0.25}
    assert not torch.equal(layer(x).hidden_states, layer(x).hidden_states)
    routing = layer.router(x)
    parts = (lambda: layer.experts(x.flatten(0, 1), routing), lambda: layer.shared(x))
    layer.eval()
    plain = [part() for part in parts]
    layer.train()
    for part, dropout, expected in zip(parts, dropouts, plain):
        assert not torch.equal(part(), part())
        dropout.forward = lambda hidden: 3 * hidden
        torch.testing.assert_close(part(), 3 * expected)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("kind", ["tc", "diffmoe", "dsmoe"])
def test_recomputing_hidden_layers_changes_no_gradient(kind, dropout):
    layer = MoEFeedForward(6, 8, RouterConfig(kind, 4, top_k=2, capacity=2), shared="swiglu", dropout=dropout).train()
    x = torch.randn(2, 5, 6, requires_grad=True)
    results, kept = [], []
    for recompute in (False, True):
        recompute_experts(layer, recompute)
        torch.manual_seed(3)
        kept.append(saved_bytes(lambda: layer(x), tuple(layer.parameters())))
        torch.manual_seed(3)
        out = layer(x)
        loss = out.hidden_states.square().sum() + sum(out.report.losses.values())
        results.append([out.hidden_states, *torch.autograd.grad(loss, [x, *layer.parameters()])])
    for plain, again in zip(*results):
        torch.testing.assert_close(again, plain, rtol=1e-6, atol=1e-7)
    if not dropout:
        assert kept[1] < kept[0] - 4 * 10 * 2 * 8  # at least the shared expert's gate and value
