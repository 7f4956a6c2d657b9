"""`grouped_topk` in one pass: sigmoid, correction bias, the best groups, the best experts in them, their weights.

The best are selected one after another; of equal ones that of the lowest index. NaN counts as the highest score, as in
torch, so that expert indices stay in range whatever the logits. Shape suffixes: T tokens, E experts, K experts a token;
X tokens of a program, and G groups of M experts, both padded to powers of two, with S = G * M slots.
"""

# mypy: ignore-errors
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import on_device

TILE = 2048
"""Slots of experts, over all tokens of a program."""
LOWEST = tl.constexpr(-3.4028234663852886e38)
NEVER = tl.constexpr(-float("inf"))


@triton.jit
def _best_of_groups(score_XGM, WIDTH: tl.constexpr, M: tl.constexpr):
    """Sum of each group's two best scores, (X, G)."""
    best_XG = tl.max(score_XGM, axis=2)
    if WIDTH > 1:
        at_XG = tl.argmax(score_XGM, axis=2)
        rest_XGM = tl.where(tl.arange(0, M)[None, None, :] == at_XG[:, :, None], NEVER, score_XGM)
        best_XG += tl.max(rest_XGM, axis=2)
    return best_XG


@triton.jit(do_not_specialize=["T"])
def _choose_experts(
    logits, correction, expert, score, weight, T, scale,
    E: tl.constexpr, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, TOP_K: tl.constexpr, STRICT: tl.constexpr,
    X: tl.constexpr, G: tl.constexpr, M: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    width: tl.constexpr = E // GROUPS
    token_X = tl.program_id(0).to(tl.int64) * X + tl.arange(0, X)
    index_S = tl.arange(0, G * M)
    group_S, inside_S = index_S // M, index_S % M
    expert_S = group_S * width + inside_S
    real_S = (group_S < GROUPS) & (inside_S < width)
    logits_XS = tl.load(
        logits + token_X[:, None] * E + expert_S[None, :], mask=(token_X < T)[:, None] & real_S[None, :], other=0.0
    )
    score_XS = tl.sigmoid(logits_XS)
    corrected_XS = score_XS + tl.load(correction + expert_S, mask=real_S, other=0.0)[None, :]
    corrected_XS = tl.where(corrected_XS == corrected_XS, tl.maximum(corrected_XS, LOWEST), -NEVER)
    corrected_XS = tl.where(real_S[None, :], corrected_XS, NEVER)
    if TOP_GROUPS < GROUPS:
        best_XG = _best_of_groups(tl.reshape(corrected_XS, (X, G, M)), width, M)
        group_G = tl.arange(0, G)
        left_XG = tl.where((group_G < GROUPS)[None, :], tl.maximum(best_XG, LOWEST), NEVER)
        for _ in tl.static_range(TOP_GROUPS):
            left_XG = tl.where(group_G[None, :] == tl.argmax(left_XG, axis=1)[:, None], NEVER, left_XG)
        dropped_XG = (left_XG > NEVER).to(tl.int32)
        dropped_XS = tl.reshape(tl.broadcast_to(dropped_XG[:, :, None], (X, G, M)), (X, G * M))
        floor: tl.constexpr = LOWEST if STRICT else 0.0
        corrected_XS = tl.where((dropped_XS > 0) & real_S[None, :], floor, corrected_XS)
    slot_K = tl.arange(0, K)
    expert_XK, score_XK = tl.zeros((X, K), dtype=tl.int32), tl.zeros((X, K), dtype=tl.float32)
    for k in tl.static_range(TOP_K):
        at_X = tl.argmax(corrected_XS, axis=1)
        here_XS = index_S[None, :] == at_X[:, None]
        corrected_XS = tl.where(here_XS, NEVER, corrected_XS)
        expert_XK = tl.where(slot_K[None, :] == k, ((at_X // M) * width + at_X % M)[:, None], expert_XK)
        best_X = tl.sum(tl.where(here_XS, score_XS, 0.0), axis=1)
        score_XK = tl.where(slot_K[None, :] == k, best_X[:, None], score_XK)
    weight_XK = score_XK
    if TOP_K > 1:
        weight_XK = score_XK / (tl.sum(score_XK, axis=1)[:, None] + 1e-20)
    to_XK = token_X[:, None] * TOP_K + slot_K[None, :]
    mask_XK = (token_X < T)[:, None] & (slot_K < TOP_K)[None, :]
    tl.store(expert + to_XK, expert_XK, mask=mask_XK)
    tl.store(score + to_XK, score_XK, mask=mask_XK)
    tl.store(weight + to_XK, weight_XK * scale, mask=mask_XK)


@triton.jit(do_not_specialize=["T"])
def _router_backward(
    expert, score, dweight, dlogits, T, scale,
    E: tl.constexpr, TOP_K: tl.constexpr, X: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    token_X = tl.program_id(0).to(tl.int64) * X + tl.arange(0, X)
    slot_K, expert_N = tl.arange(0, K), tl.arange(0, N)
    from_XK = token_X[:, None] * TOP_K + slot_K[None, :]
    mask_XK = (token_X < T)[:, None] & (slot_K < TOP_K)[None, :]
    score_XK = tl.load(score + from_XK, mask=mask_XK, other=0.0)
    grad_XK = tl.load(dweight + from_XK, mask=mask_XK, other=0.0) * scale
    expert_XK = tl.load(expert + from_XK, mask=mask_XK, other=-1)
    if TOP_K > 1:
        sum_X = tl.sum(score_XK, axis=1) + 1e-20
        grad_XK = (grad_XK - (tl.sum(grad_XK * score_XK, axis=1) / sum_X)[:, None]) / sum_X[:, None]
    grad_XK *= score_XK * (1 - score_XK)
    out_XN = tl.zeros((X, N), dtype=tl.float32)
    for k in tl.static_range(TOP_K):
        expert_X = tl.sum(tl.where(slot_K[None, :] == k, expert_XK, 0), axis=1)
        grad_X = tl.sum(tl.where(slot_K[None, :] == k, grad_XK, 0.0), axis=1)
        out_XN = tl.where(expert_N[None, :] == expert_X[:, None], grad_X[:, None], out_XN)
    to_XN = token_X[:, None] * E + expert_N[None, :]
    tl.store(dlogits + to_XN, out_XN, mask=(token_X < T)[:, None] & (expert_N < E)[None, :])


def grouped_topk(
    logits_TE: Tensor, correction_E: Tensor, top_k: int, n_group: int, topk_group: int, scale: float, strict: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """weight_TK, expert_TK and score_TK; see `grouped_topk.grouped_topk`."""
    T, E = logits_TE.shape
    expert_TK = torch.empty(T, top_k, dtype=torch.int64, device=logits_TE.device)
    score_TK, weight_TK = (torch.empty(T, top_k, device=logits_TE.device) for _ in range(2))
    if T:
        sizes = constants(E, top_k, n_group, topk_group, strict)
        inputs = (logits_TE.contiguous(), correction_E.float().contiguous())
        with on_device(logits_TE):
            _choose_experts[(triton.cdiv(T, sizes["X"]),)](*inputs, expert_TK, score_TK, weight_TK, T, scale, **sizes)
    return weight_TK, expert_TK, score_TK


def grouped_topk_backward(
    expert_TK: Tensor, score_TK: Tensor, dweight_TK: Tensor, num_experts: int, scale: float
) -> Tensor:
    """The gradient in the logits; see `grouped_topk.grouped_topk_backward`."""
    T, top_k = expert_TK.shape
    dlogits_TE = torch.empty(T, num_experts, device=expert_TK.device)
    if T:
        sizes = backward_constants(num_experts, top_k)
        inputs = (expert_TK.contiguous(), score_TK.contiguous(), dweight_TK.contiguous())
        with on_device(expert_TK):
            _router_backward[(triton.cdiv(T, sizes["X"]),)](*inputs, dlogits_TE, T, scale, **sizes)
    return dlogits_TE


def constants(num_experts: int, top_k: int, n_group: int, topk_group: int, strict: bool) -> dict[str, int]:
    """The constants that the kernel is compiled for: the rule, never the number of tokens."""
    groups, members = _padded(n_group), _padded(num_experts // n_group)
    rule = {"E": num_experts, "GROUPS": n_group, "TOP_GROUPS": topk_group, "TOP_K": top_k, "STRICT": strict}
    return rule | {"X": max(1, TILE // (groups * members)), "G": groups, "M": members, "K": _padded(top_k)}


def backward_constants(num_experts: int, top_k: int) -> dict[str, int]:
    """The constants of the backward kernel."""
    padded = _padded(num_experts)
    return {"E": num_experts, "TOP_K": top_k, "X": max(1, TILE // padded), "N": padded, "K": _padded(top_k)}


def _padded(size: int) -> int:
    return triton.next_power_of_2(size)
