"""Recording what routers do."""

import subprocess
import sys
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from router_context import with_context
from torch.utils._python_dispatch import TorchDispatchMode

from diffusion_moe import record_routing
from diffusion_moe.analysis.recorder import pairs_of, tally
from diffusion_moe.config import EvaluationConfig, read_recipe
from diffusion_moe.models import make_model
from diffusion_moe.moe import MoEFeedForward, Router, RouterConfig, Routing, route_by_token
from diffusion_moe.routing_rules import RULES
from diffusion_moe.sampling.generate import SamplingStats, class_schedule, generate

KINDS = list(RULES)


class ByPosition(Router):
    """Token n of every image goes to expert n mod E and, from the second layer on, to the next one too."""

    experts_a_token = 1

    def route(self, x_BND, logits_BNE):
        B, N, E = logits_BNE.shape
        first = torch.arange(B * N) % N % E
        chosen = torch.stack([(first + i) % E for i in range(self.experts_a_token)], dim=1)
        return route_by_token(chosen, torch.ones_like(chosen, dtype=torch.float), E)


def known_model(tiny, *options):
    """Two MoE layers of four experts: one expert a token in the first, two in the second."""
    recipe = read_recipe("digits", [*tiny, "--model.depth=4", *options])
    model = make_model(recipe.model).eval()
    for i, block in enumerate(model.blocks[1::2]):
        router = ByPosition(recipe.model.hidden_size, RouterConfig("tc", num_experts=4))
        router.experts_a_token = i + 1
        block.mlp.router = router
    return model


def some_model(tiny, kind, *options):
    model = make_model(read_recipe("digits", [*tiny, f"--model.router={kind}", *options]).model).eval()
    for name, parameter in model.named_parameters():
        if "adaln" in name or "final" in name:
            torch.nn.init.normal_(parameter, std=0.2)  # or routers see no time and no class
    for name, buffer in model.named_buffers():
        if name.endswith("threshold"):
            buffer.fill_(0.5)
    return model


def call(model, batch=3):
    return model(torch.randn(batch, 1, 8, 8), torch.rand(batch), torch.arange(batch))


@pytest.mark.parametrize("kind", KINDS)
def test_counts_are_those_of_a_plain_loop(kind):
    layer = with_context(MoEFeedForward(8, 4, RouterConfig(kind, num_experts=4, top_k=2, capacity=2.0)))
    x = torch.randn(3, 6, 8)
    routing = layer.router(x)
    served, compute, positions = np.zeros(4), np.zeros(6), np.zeros((4, 6))
    of_token = [set() for _ in range(18)]
    for token, expert in zip(routing.token_A.tolist(), routing.expert_A().tolist(), strict=True):
        served[expert] += 1
        compute[token % 6] += 1
        positions[expert, token % 6] += 1
        of_token[token].add(expert)
    pairs = [[sum({a, b} <= experts for experts in of_token) for b in range(4)] for a in range(4)]
    with record_routing(layer, time_bins=1, pairs=True, positions=True) as record:
        layer(x)
        layer(x)
    counts = record.counts()
    np.testing.assert_array_equal(counts.served_LSKE, 2 * served[None, None, None])
    np.testing.assert_array_equal(counts.tokens_LSK, [[[36]]])
    np.testing.assert_array_equal(counts.images_SK, [[6]])
    np.testing.assert_array_equal(counts.pairs_LEE, 2 * np.array(pairs)[None])
    np.testing.assert_array_equal(counts.compute_SKP, 2 * compute[None, None])
    np.testing.assert_array_equal(counts.positions_LEP, 2 * positions[None])


def test_known_routing_falls_into_its_layer_time_class_expert_and_position(tiny):
    """16 tokens, four to an expert; with two experts a token each serves the tokens of its neighbour too."""
    model = known_model(tiny)
    with record_routing(model, time_bins=4, pairs=True, positions=True) as record, torch.no_grad():
        model(torch.zeros(3, 1, 8, 8), torch.tensor([0.0, 0.3, 1.0]), torch.tensor([2, 2, 10]))
        model(torch.zeros(2, 1, 8, 8), torch.tensor(0.25), torch.tensor([0, 2]))
    counts = record.counts()
    images = np.zeros((4, 11), dtype=int)
    for s, k in ((0, 2), (1, 2), (3, 10), (1, 0), (1, 2)):
        images[s, k] += 1
    np.testing.assert_array_equal(counts.images_SK, images)
    np.testing.assert_array_equal(counts.tokens_LSK, np.broadcast_to(16 * images, (2, 4, 11)))
    for layer in (0, 1):
        expected = np.broadcast_to(4 * (layer + 1) * images[..., None], (4, 11, 4))
        np.testing.assert_array_equal(counts.served_LSKE[layer], expected)
    np.testing.assert_array_equal(counts.pairs_LEE[0], 20 * np.eye(4))
    ring = np.roll(np.eye(4), 1, axis=0) + np.roll(np.eye(4), 1, axis=1)
    np.testing.assert_array_equal(counts.pairs_LEE[1], 20 * (2 * np.eye(4) + ring))
    np.testing.assert_array_equal(counts.compute_SKP, np.broadcast_to(3 * images[..., None], (4, 11, 16)))
    own = np.arange(16) % 4 == np.arange(4)[:, None]
    np.testing.assert_array_equal(counts.positions_LEP, [5 * own, 5 * (own | np.roll(own, 1, axis=0))])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grad", [False, True])
def test_recording_changes_no_bit(tiny, kind, grad):
    model = some_model(tiny, kind).train(grad)
    x, t, labels = torch.randn(4, 1, 8, 8), torch.rand(4), torch.tensor([0, 3, 9, 10])

    def answer():
        with torch.set_grad_enabled(grad):
            out = model(x, t, labels)
        loss = out.sample.square().sum() + sum(loss for report in out.routing for loss in report.losses.values())
        loss = loss + sum(r.predicted_BNP.square().sum() for r in out.routing if r.predicted_BNP is not None)
        gradients = torch.autograd.grad(loss, list(model.parameters())) if grad else ()
        return [out.sample, *gradients]

    plain = answer()
    with record_routing(model, pairs=True, positions=True):
        recorded = answer()
    assert all(torch.equal(a, b) for a, b in zip(plain, recorded, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(plain, answer(), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_counts_sum_to_what_the_reports_and_usage_say(tiny, kind):
    model = some_model(tiny, kind)
    stats = SamplingStats()
    with record_routing(model, time_bins=4, pairs=True, positions=True) as record:
        generate(model, class_schedule(5, 10), 5, EvaluationConfig(batch_size=2, steps=4), stats=stats)
    counts = record.counts()
    assert counts.served_LSKE.sum() == stats.served
    assert counts.tokens_LSK.sum() == stats.offered
    assert counts.served_LSKE.sum() / counts.tokens_LSK.sum() == pytest.approx(stats.summary()["average_capacity"])
    # Each view of the same assignments has the same sum.
    np.testing.assert_array_equal(counts.compute_SKP.sum(-1), counts.served_LSK.sum(0))
    np.testing.assert_array_equal(counts.positions_LEP.sum(-1), counts.served_LSKE.sum((1, 2)))
    np.testing.assert_array_equal(np.diagonal(counts.pairs_LEE, axis1=1, axis2=2), counts.served_LSKE.sum((1, 2)))
    # Five images at each of four times, with class and without.
    np.testing.assert_array_equal(counts.images_SK.sum(1), [10] * 4)
    np.testing.assert_array_equal(counts.images_SK[:, 10], [5] * 4)


def test_rows_that_fill_up_a_shape_are_not_counted():
    """A routing with room to spare: two rows of weight 0 that only pad it."""

    class Report(NamedTuple):
        counts_E: torch.Tensor
        losses: dict
        threshold_E: None = None
        num_tokens: int = 0
        dropped: torch.Tensor | None = None

    class Roomy(Router):
        def route(self, x_BND, logits_BNE):
            report = Report(torch.tensor([1, 2]), {}, dropped=torch.tensor(0))
            token_A, weight_A = torch.tensor([0, 2, 1, 2, 3]), torch.tensor([0.5, 0, 1, 1, 0])
            return Routing(token_A, weight_A, torch.tensor([2, 5]).int(), report, padded=True)

    layer = MoEFeedForward(8, 4, RouterConfig("tc", num_experts=2))
    layer.router = Roomy(8, RouterConfig("tc", num_experts=2))
    with record_routing(layer, time_bins=1, pairs=True, positions=True) as record, torch.no_grad():
        layer(torch.randn(1, 4, 8))
    counts = record.counts()
    np.testing.assert_array_equal(counts.served_LSKE, [[[[1, 2]]]])
    np.testing.assert_array_equal(counts.pairs_LEE, [[[1, 0], [0, 2]]])
    np.testing.assert_array_equal(counts.compute_SKP, [[[1, 1, 1, 0]]])
    np.testing.assert_array_equal(counts.positions_LEP, [[[1, 0, 0, 0], [0, 1, 1, 0]]])


def test_class_tokens_are_counted_but_have_no_position(tiny):
    """From the second block on there are three more tokens before the image's sixteen."""
    options = ["--model.backbone=jit", "--model.prediction=x", "--model.bottleneck_dim=6", "--model.class_tokens=3"]
    model = known_model(tiny, *options, "--model.class_tokens_from=2")
    with record_routing(model, time_bins=1, positions=True) as record, torch.no_grad():
        call(model, 2)
    counts = record.counts()
    np.testing.assert_array_equal(counts.tokens_LSK.sum((1, 2)), [2 * 16, 2 * 19])
    np.testing.assert_array_equal(counts.served_LSK.sum((1, 2)), [2 * 16, 2 * 2 * 19])
    own = np.arange(16) % 4 == np.arange(4)[:, None]
    np.testing.assert_array_equal(counts.positions_LEP[0], 2 * own)
    shifted = (np.arange(16) + 3) % 4 == np.arange(4)[:, None]
    np.testing.assert_array_equal(counts.positions_LEP[1], 2 * (shifted | np.roll(shifted, 1, axis=0)))


def test_time_runs_from_noise_to_data_for_ddpm_too(tiny):
    model = known_model(tiny, "--model.process=ddpm", "--model.prediction=epsilon")
    with record_routing(model, time_bins=5) as record, torch.no_grad():
        for step in (999, 800, 799, 0):
            model(torch.zeros(1, 1, 8, 8), torch.tensor([step]), torch.tensor([0]))
    np.testing.assert_array_equal(record.counts().images_SK[:, 0], [1, 2, 0, 0, 1])


@pytest.mark.parametrize("steps", [7, 10, 20, 50])
def test_the_steps_of_a_solver_fall_into_a_bin_each(tiny, steps):
    """Also where rounding leaves k / S just under the edge."""
    model = known_model(tiny)
    with record_routing(model, time_bins=steps) as record:
        generate(model, class_schedule(1, 10), 1, EvaluationConfig(steps=steps, guidance_scale=1.0))
    np.testing.assert_array_equal(record.counts().images_SK[:, 0], [1] * steps)


def test_unconditional_models_have_one_row(tiny):
    model = known_model(tiny, "--model.num_classes=0")
    with record_routing(model, time_bins=2) as record, torch.no_grad():
        model(torch.zeros(3, 1, 8, 8), torch.tensor(0.9))
    np.testing.assert_array_equal(record.counts().images_SK, [[0], [3]])


def test_recorders_may_be_nested_and_are_removed_also_after_errors(tiny):
    model = known_model(tiny)
    with record_routing(model) as outer:
        call(model)
        with pytest.raises(RuntimeError, match="stop"), record_routing(model) as inner:
            call(model)
            raise RuntimeError("stop")
        call(model)
    call(model)
    assert outer.counts().images_SK.sum() == 9
    assert inner.counts().images_SK.sum() == 3
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_failed_pass_leaves_the_recorder_in_order(tiny):
    model = known_model(tiny)
    with record_routing(model) as record:
        with pytest.raises(ValueError, match="class_labels are missing"):
            model(torch.zeros(1, 1, 8, 8), torch.zeros(1))
        model.blocks[1].mlp(torch.zeros(1, 16, model.settings.hidden_size))  # no pass of the model
        call(model)
    assert record.counts().tokens_LSK.sum() == 2 * 3 * 16


def test_gradient_checkpointing_counts_no_pass_twice(tiny):
    model = known_model(tiny).train()
    model.enable_gradient_checkpointing()
    with record_routing(model) as record:
        call(model).sample.sum().backward()
    assert record.counts().tokens_LSK.sum() == 2 * 3 * 16


def test_clear_forgets_and_memory_does_not_grow(tiny):
    model = some_model(tiny, "dsmoe")
    with record_routing(model, pairs=True, positions=True) as record, torch.no_grad():
        call(model)
        before = [tensor.data_ptr() for sums in record.sums for tensor in sums.values()]
        first = record.counts()
        for _ in range(3):
            call(model)
        assert [tensor.data_ptr() for sums in record.sums for tensor in sums.values()] == before
        assert record.counts().images_SK.sum() == 12
        assert first.images_SK.sum() == 3  # what was read stays as it was
        record.clear()
        call(model, 2)
    assert record.counts().images_SK.sum() == 2


def test_recording_in_and_out_of_inference_mode(tiny):
    model = known_model(tiny)
    with record_routing(model, pairs=True, positions=True) as record:
        with torch.inference_mode():
            call(model)
        call(model)
    assert record.counts().tokens_LSK.sum() == 2 * 6 * 16


def test_autocast_does_not_round_counts():
    """Sums beyond 256 are not exact in bfloat16."""
    layer = MoEFeedForward(8, 4, RouterConfig("dsmoe", num_experts=2, top_k=2))
    with record_routing(layer, pairs=True) as record, torch.autocast("cpu", torch.bfloat16):
        layer(torch.randn(1, 1001, 8))
    np.testing.assert_array_equal(record.counts().pairs_LEE, np.full((1, 2, 2), 1001))


class Operators(TorchDispatchMode):
    """Names of the operators that run inside."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        self.names.append("to device" if name == "_to_copy" and (kwargs or {}).get("device") else name)
        return function(*args, **(kwargs or {}))


WAITING = {"_local_scalar_dense", "nonzero", "bincount", "masked_select", "unique_consecutive", "to device", "equal"}
"""Operators that need a number on the host, or bring one there."""


@pytest.mark.parametrize("options", [{}, {"pairs": True, "positions": True}])
def test_recording_adds_a_few_small_operators_and_none_that_waits(options):
    layer = MoEFeedForward(32, 16, RouterConfig("dsmoe", num_experts=8, top_k=2))
    x = torch.randn(2, 16, 32)
    with torch.no_grad(), Operators() as plain:
        layer(x)
    with torch.no_grad(), record_routing(layer, **options) as record:
        layer(x)
        with Operators() as recorded:
            layer(x)
    added = list(recorded.names)
    for name in plain.names:
        added.remove(name)
    assert not WAITING & set(added)
    assert 0 < len([name for name in added if name not in ("view", "t", "transpose")]) <= (40 if options else 16)
    assert record.counts().tokens_LSK.sum() == 64


def test_hooks_that_were_compiled_away_are_an_error_and_not_zeros(tiny):
    model = some_model(tiny, "dsmoe")
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        call(compiled)
        with record_routing(compiled) as record:
            call(compiled)
    with pytest.raises(ValueError, match=r"no pass of .* was recorded.*torch\.compile"):
        record.counts()
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("model", "options", "expected"),
    [
        (object(), {}, "got a object"),
        (torch.nn.Linear(1, 1), {"time_bins": 0}, "time_bins is 0"),
        (
            torch.nn.ModuleList(MoEFeedForward(4, 4, RouterConfig("tc", num_experts=E)) for E in (2, 3)),
            {},
            r"\[2, 3\] experts",
        ),
    ],
)
def test_mistakes_are_one_line(model, options, expected):
    with pytest.raises(ValueError, match=expected), record_routing(model, **options):
        pass


def test_a_record_of_no_pass_is_an_error(tiny):
    with record_routing(known_model(tiny)) as record:
        pass
    with pytest.raises(ValueError, match="no pass of the model was recorded"):
        record.counts()


def test_recording_needs_neither_diffusers_nor_figures():
    code = "from diffusion_moe import record_routing; import sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "diffusion_moe.analysis.recorder" in loaded
    assert not {"diffusers", "matplotlib", "datasets", "sklearn", "torchdiffeq"} & set(loaded)


def test_dense_models_have_empty_counts(tiny):
    model = make_model(read_recipe("digits", [*tiny, "--model.router=dense"]).model).eval()
    with record_routing(model, time_bins=3, pairs=True, positions=True) as record, torch.no_grad():
        call(model)
    counts = record.counts()
    assert counts.served_LSKE.shape == (0, 3, 11, 0)
    assert counts.images_SK.sum() == 3


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 2)), max_size=30))
@settings(deadline=None, max_examples=50)
def test_tallies_are_those_of_a_loop(assignments):
    table = np.zeros((5, 3), dtype=int)
    for row, column in assignments:
        table[row, column] += 1
    rows, columns = (torch.tensor([pair[i] for pair in assignments], dtype=torch.long) for i in (0, 1))
    np.testing.assert_array_equal(tally(rows, columns, 5, 3, torch.ones_like(rows)), table)


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 2), st.integers(0, 1)), max_size=15, unique_by=lambda a: a[:2])
)
@settings(deadline=None, max_examples=50)
def test_pairs_are_those_of_a_loop(assignments):
    chosen = np.zeros((5, 3), dtype=int)
    for token, expert, times in assignments:
        chosen[token, expert] = times
    tokens, experts, times = (torch.tensor([a[i] for a in assignments], dtype=torch.long) for i in range(3))
    np.testing.assert_array_equal(pairs_of(tokens, experts, 5, 3, times), chosen.T @ chosen)
