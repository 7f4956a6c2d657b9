"""DiffMoE's predictor, its loss, and the thresholds, against plain loops."""

import math

import torch

from diffusion_moe.moe.capacity import (
    CapacityPredictor,
    capacity_loss,
    chosen_by_threshold,
    chosen_from_pool,
    observed_threshold,
)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_predictor_is_linear_silu_linear():
    predictor = CapacityPredictor(3, 2)
    x = torch.randn(5, 3)
    h = x @ predictor[0].weight.T + predictor[0].bias
    expected = (h * torch.sigmoid(h)) @ predictor[2].weight.T + predictor[2].bias
    torch.testing.assert_close(predictor(x), expected)


def test_capacity_loss_is_binary_cross_entropy_against_who_was_chosen():
    logits_TE, token_EC = torch.randn(5, 3), torch.tensor([[0, 4], [1, 2], [4, 3]])
    total = 0.0
    for t in range(5):
        for e in range(3):
            p = sigmoid(float(logits_TE[t, e]))
            total -= math.log(p if t in token_EC[e].tolist() else 1 - p)
    chosen_TE = chosen_from_pool(token_EC, 5)
    torch.testing.assert_close(capacity_loss(logits_TE, chosen_TE), torch.tensor(total / 15))


def test_observed_threshold_is_the_kth_highest_probability():
    logits_TE = torch.randn(9, 4, requires_grad=True)
    for k in (1, 3, 9):
        actual = observed_threshold(logits_TE, k)
        expected = [sorted((sigmoid(v) for v in logits_TE[:, e].tolist()), reverse=True)[k - 1] for e in range(4)]
        torch.testing.assert_close(actual, torch.tensor(expected))
        assert not actual.requires_grad


def test_as_many_as_pass_the_threshold_are_taken_by_gate():
    """Against a plain loop: the count comes from the probabilities, the choice from the gate."""
    P, M, E = 3, 7, 4
    logits, gate, threshold = torch.randn(P, M, E), torch.rand(P, M, E), torch.tensor([0.0, 0.3, 0.6, 1.0])
    chosen = chosen_by_threshold(logits, gate, threshold)
    for p in range(P):
        for e in range(E):
            count = sum(sigmoid(v) > float(threshold[e]) for v in logits[p, :, e].tolist())
            best = sorted(range(M), key=lambda m: -float(gate[p, m, e]))[:count]
            assert chosen[p, :, e].nonzero().flatten().tolist() == sorted(best)
    assert chosen[..., 0].all() and not chosen[..., 3].any()


def test_ties_in_the_gate_go_to_the_first_tokens():
    logits = torch.tensor([[[1.0], [1.0], [-1.0]]])
    chosen = chosen_by_threshold(logits, torch.ones(1, 3, 1), torch.tensor([0.5]))
    assert chosen.flatten().tolist() == [True, True, False]
