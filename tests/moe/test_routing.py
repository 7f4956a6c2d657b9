"""The value object: grouping by expert, counts, and merging of micro-batches."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_moe.moe import Routing, RoutingReport, merge_reports, route_by_expert, route_by_mask, route_by_token
from diffusion_moe.moe.routing import sort_by_expert


def triples(routing: Routing) -> list[tuple[int, int, float]]:
    """(expert, token, weight) of each assignment."""
    return list(zip(routing.expert_A().tolist(), routing.token_A.tolist(), routing.weight_A.tolist()))


def test_route_by_token_groups_by_expert_and_keeps_the_tokens_order():
    routing = route_by_token(torch.tensor([[2, 0], [0, 3], [2, 3]]), torch.tensor([[1.0, 2], [3, 4], [5, 6]]), 4)
    assert triples(routing) == [(0, 0, 2.0), (0, 1, 3.0), (2, 0, 1.0), (2, 2, 5.0), (3, 1, 4.0), (3, 2, 6.0)]
    assert routing.offsets_E.tolist() == [2, 2, 4, 6] and routing.offsets_E.dtype == torch.int32
    assert routing.report.counts_E.tolist() == [2, 0, 2, 2] and routing.report.counts_E.dtype == torch.int64


@pytest.mark.parametrize("num_experts", [1, 255, 256, 257, 1000])
def test_route_by_token_counts_the_last_expert_too(num_experts):
    """Keys are sorted as bytes up to 256 experts: the last one must not wrap around."""
    expert_TK = torch.tensor([[num_experts - 1], [0], [num_experts - 1], [num_experts // 2]])
    routing = route_by_token(expert_TK, torch.ones(4, 1), num_experts)
    assert torch.equal(routing.report.counts_E, torch.bincount(expert_TK.flatten(), minlength=num_experts))
    assert torch.equal(routing.expert_A(), expert_TK.flatten().sort().values)
    assert torch.equal(expert_TK[routing.token_A, 0], routing.expert_A())


def test_route_by_expert_and_by_mask_agree_with_by_token():
    expert_TK, weight_TK = torch.tensor([[0, 1], [1, 2], [2, 0]]), torch.arange(6.0).view(3, 2)
    by_token = route_by_token(expert_TK, weight_TK, 3)
    weight_TE = torch.zeros(3, 3).scatter(1, expert_TK, weight_TK)
    chosen_TE = torch.zeros(3, 3, dtype=torch.bool).scatter(1, expert_TK, True)
    token_EC = torch.tensor([[0, 2], [0, 1], [1, 2]])
    by_expert = route_by_expert(token_EC, weight_TE.T.gather(1, token_EC))
    for other in (by_expert, route_by_mask(chosen_TE, weight_TE)):
        assert triples(other) == triples(by_token)
        assert torch.equal(other.offsets_E, by_token.offsets_E) and other.offsets_E.dtype == torch.int32
        assert torch.equal(other.report.counts_E, by_token.report.counts_E)


def test_route_by_mask_takes_experts_without_tokens_and_tokens_without_experts():
    chosen_TE = torch.tensor([[False, True, False], [False, False, False], [False, True, False]])
    routing = route_by_mask(chosen_TE, torch.full((3, 3), 0.5))
    assert triples(routing) == [(1, 0, 0.5), (1, 2, 0.5)]
    assert routing.offsets_E.tolist() == [0, 2, 2] and routing.report.counts_E.tolist() == [0, 2, 0]
    assert triples(route_by_mask(torch.zeros_like(chosen_TE), torch.ones(3, 3))) == []


def test_every_routing_carries_the_gradient_of_its_weights():
    weight = torch.rand(3, 2, requires_grad=True)
    expert_TK, token_EC = torch.tensor([[0, 1], [1, 0], [0, 1]]), torch.tensor([[0, 2], [1, 0], [2, 1]])
    mask = torch.tensor([[True, False], [True, True], [False, True]])
    for routing, expected in (
        (route_by_token(expert_TK, weight, 2), torch.ones(3, 2)),
        (route_by_expert(token_EC, weight), torch.ones(3, 2)),
        (route_by_mask(mask, weight), mask.float()),
    ):
        assert torch.equal(torch.autograd.grad(routing.weight_A.sum(), weight)[0], expected)


def test_merge_reports_adds_counts_and_averages_losses_and_thresholds():
    first = RoutingReport(torch.tensor([1, 2]), {"a": torch.tensor(1.0)}, torch.tensor([0.2, 0.4]))
    second = RoutingReport(torch.tensor([3, 5]), {"a": torch.tensor(4.0)}, torch.tensor([0.4, 0.8]))
    merged = merge_reports([first, second])
    assert merged.counts_E.tolist() == [4, 7]
    assert list(merged.losses) == ["a"] and merged.losses["a"] == 2.5 and merged.dropped is None
    limited = [report._replace(dropped=torch.tensor(number)) for report, number in ((first, 2), (second, 5))]
    assert merge_reports(limited).dropped == 7
    torch.testing.assert_close(merged.threshold_E, torch.tensor([0.3, 0.6]))
    assert merge_reports([first._replace(threshold_E=None)] * 2).threshold_E is None


@st.composite
def choices(draw):
    T, E = draw(st.integers(1, 12)), draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    chosen = torch.rand(T, E, generator=generator) < draw(st.floats(0, 1))
    return chosen, torch.rand(T, E, generator=generator) + 0.01, draw(st.integers(1, T * E + 3))


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(choices())
def test_room_for_rows_keeps_the_choices_of_most_weight_and_counts_the_rest(case):
    chosen_TE, weight_TE, room = case
    routing, rows = route_by_mask(chosen_TE, weight_TE, room), min(room, chosen_TE.numel())
    every = sorted(triples(route_by_mask(chosen_TE, weight_TE)), key=lambda triple: -triple[2])
    served = [triple for triple in triples(routing) if triple[2]]
    assert served == sorted(every[:rows]) and routing.report.dropped == max(0, len(every) - rows)
    assert torch.bincount(
        torch.tensor([e for e, _, _ in served], dtype=torch.int64), minlength=chosen_TE.shape[1]
    ).equal(routing.report.counts_E)
    # Every row lies inside its expert's bounds, so that no matmul leaves a row unwritten.
    assert len(routing.token_A) == rows == routing.offsets_E[-1] and routing.offsets_E.dtype == torch.int32
    pairs = {(e, t) for e, t, _ in triples(routing)}
    assert len(pairs) == rows


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_sort_by_expert_lists_each_experts_assignments_in_order(data):
    num_experts = data.draw(st.sampled_from([1, 3, 256, 300]))
    experts = data.draw(st.lists(st.integers(0, num_experts - 1), max_size=30))
    order_A, row_A, offsets_E, counts_E = sort_by_expert(torch.tensor(experts, dtype=torch.int64), num_experts)
    members = [[a for a, expert in enumerate(experts) if expert == e] for e in range(num_experts)]
    assert order_A.tolist() == [a for m in members for a in m]
    assert [order_A.tolist()[row] for row in row_A.tolist()] == list(range(len(experts)))
    assert counts_E.tolist() == [len(m) for m in members]
    assert offsets_E.tolist() == list(itertools.accumulate(counts_E.tolist()))


def test_sort_by_expert_keeps_an_operators_promises():
    for expert_A in (torch.tensor([2, 0, 0, 3]), torch.empty(0, dtype=torch.int64)):
        torch.library.opcheck(sort_by_expert, (expert_A, 4))


def test_weights_get_their_gradients_back_in_their_own_places():
    """Every assignment's gradient is that of its own choice; nothing is added up on the way."""
    expert_TK, weight_TK = torch.rand(9, 4).argsort(1)[:, :3], torch.rand(9, 3, dtype=torch.float64, requires_grad=True)
    routing = route_by_token(expert_TK, weight_TK, 4)
    value_TE = torch.randn(9, 4, dtype=torch.float64)
    (grad_TK,) = torch.autograd.grad(routing.weight_A, weight_TK, value_TE[routing.token_A, routing.expert_A()])
    assert torch.equal(grad_TK, value_TE.gather(1, expert_TK))
    assert torch.autograd.gradcheck(lambda weight: route_by_token(expert_TK, weight, 4).weight_A, weight_TK)
