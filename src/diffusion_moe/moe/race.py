"""Expert Race (arXiv 2503.16057): one top-k over all tokens and experts of the batch.

Shape suffixes: B images, N tokens of one image, T tokens of the batch (B * N), D width, E experts, A assignments, P
values of a token's target.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..routing_rules import RaceRule
from .feed_forward import CastingLinear
from .logit_threshold import LogitThresholdRouter
from .parallel import all_gather_rows
from .router import RouterConfig
from .routing import Routing, route_by_mask, route_by_pair

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Race(NamedTuple):
    """Outcome of one top-k over tokens and experts."""

    routing: Routing
    """Winners among this process' tokens."""
    taken_EE: Tensor
    """Number of tokens of the pool that both of two experts take; on the diagonal, that one takes."""
    lowest: Tensor
    """Lowest logit that won."""


def similarity_loss(logits_TE: Tensor, taken_EE: Tensor) -> Tensor:
    """Router similarity loss: 1 for equal scores, more where experts score and take the same tokens.

    Args:
        logits_TE: scores; the gradient flows through their softmax.
        taken_EE: number of tokens that both of two experts take; on the diagonal, that one takes.
    """
    # Expert Race eqs. 9-11, as public implementations write and number them: sum over i, j of W_ij (P^T P)_ij / T. W is
    # `taken_EE`, scaled so that its diagonal sums to E and the rest to E^2 - E.
    E = len(taken_EE)
    taken_EE = taken_EE.to(logits_TE.dtype)
    alone_E = taken_EE.diagonal()
    alone, together = alone_E.sum(), taken_EE.sum() - alone_E.sum()
    # With one expert a token no two experts share one: then `together` is 0.
    scale_EE = torch.full_like(taken_EE, (E * E - E)) / together.clamp(min=1)
    scale_EE = torch.where(torch.eye(E, dtype=torch.bool, device=taken_EE.device), E / alone.clamp(min=1), scale_EE)
    share_TE = logits_TE.softmax(dim=-1)
    return (scale_EE * taken_EE * (share_TE.T @ share_TE)).sum() / len(share_TE)


class RaceRouter(RaceRule, LogitThresholdRouter):
    """While training, the K highest logits of all tokens and experts win, K = int(T * capacity); at inference all that
    reach a threshold, which follows the K-th logit by a moving average (Expert Race, arXiv 2503.16057).

    The pool in training is that of DiffMoE: the micro-batch of this process, or with `group` of all processes. Weights
    are the logits themselves (table 1, identity gating). Scores come from a hidden layer with GELU, from which a second
    head predicts the training target (figure 12, per-layer regularization). The paper's decay of the threshold and
    initial weights were not found; here they are `threshold_decay` and Xavier-uniform. The weights of the two losses
    are those of a public implementation.
    """

    def __init__(self, dim: int, config: RouterConfig) -> None:
        super().__init__(dim, config, num_thresholds=1)
        self.hidden = CastingLinear(dim, dim)
        self.target = CastingLinear(dim, config.target_dim) if config.target_dim else None
        for linear in (self.hidden, self.target):
            if linear is not None:
                nn.init.xavier_uniform_(linear.weight)
                nn.init.zeros_(linear.bias)

    def features(self, x_BND: Tensor) -> Tensor:
        """The hidden layer."""
        return F.gelu(self.hidden(x_BND))

    def route(self, x_BND: Tensor, logits_BNE: Tensor) -> Routing:
        """Route by the best pairs of the batch, with losses; at inference, by the threshold."""
        logits_TE = logits_BNE.flatten(0, 1)
        if not self.training:
            return self.route_by_threshold(logits_TE, logits_TE)
        race = self.race(logits_TE) if self.group is None else self.race_over_processes(logits_TE, self.group)
        report = race.routing.report._replace(
            losses={"similarity": self.config.similarity_loss_weight * similarity_loss(logits_TE, race.taken_EE)},
            threshold_E=race.lowest.view(1),
            predicted_BNP=None if self.target is None else self.target(x_BND),
        )
        return race.routing._replace(report=report)

    def race(self, logits_TE: Tensor) -> Race:
        """The race of this process' tokens."""
        all_ET = logits_TE.detach().T
        best_A, pair_A = all_ET.flatten().topk(self.num_assignments(self.config, len(logits_TE)), sorted=False)
        won_ET = torch.zeros_like(all_ET).flatten().scatter(0, pair_A, 1.0).view_as(all_ET)
        return Race(route_by_pair(pair_A.sort().values, logits_TE), won_ET @ won_ET.T, best_A.min())

    def race_over_processes(self, logits_TE: Tensor, group: ProcessGroup) -> Race:
        """The race of the tokens of all processes, each of which serves its own.

        Costs one all-gather of logits, and one host synchronisation for the number of choices.
        """
        all_TE = all_gather_rows(logits_TE, group)
        best_A, pair_A = all_TE.flatten().topk(self.num_assignments(self.config, len(all_TE)), sorted=False)
        won_TE = torch.zeros_like(all_TE).flatten().scatter(0, pair_A, 1.0).view_as(all_TE)
        routing = route_by_mask(won_TE.chunk(group.size())[group.rank()].bool(), logits_TE)
        return Race(routing, won_TE.T @ won_TE, best_A.min())
