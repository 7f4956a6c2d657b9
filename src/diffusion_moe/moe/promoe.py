"""ProMoE's routing rule: an expert of its own for images without a class, prototypes for the others.

Shape suffixes: B images, N tokens of one image, T tokens of the batch (B * N), D width, E experts, R experts with a
prototype (all but the last), K experts a token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..routing_rules import ProMoERule
from .parallel import all_reduce_sum
from .router import Router
from .routing import Routing, route_by_token

EPS = 1e-6
"""Smallest norm that a cosine divides by."""


class ProMoERouter(ProMoERule, Router):
    """Each token takes the K experts whose prototypes have the highest cosine with it, weighted by the cosine times
    `routed_scaling_factor`; tokens of images without class and prompt take the last expert, weighted by 1 (ProMoE,
    arXiv 2510.24711, section 4.1, algorithm 1).

    The contrastive loss is nonlinear in the tokens of the batch, so accumulation cannot have it exactly in one pass: as
    the balance loss, it is computed of each micro-batch and averaged. Over processes it is exact with
    `parallel.pool: global`: they sum their tokens by expert, and each computes the loss of all tokens; else each
    computes that of its own, as the published code does.
    """

    def reset_parameters(self) -> None:
        """Draw prototypes from a normal of standard deviation 0.02, as the published code does."""
        nn.init.normal_(self.weight, std=0.02)

    def route(self, x_BND: Tensor, logits_BNE: Tensor, unconditional_B: Tensor | None = None) -> Routing:
        """Route by condition, then by prototypes; the logits are those of the R prototypes."""
        config, logits_TR, x_TD = self.config, logits_BNE.flatten(0, 1), x_BND.flatten(0, 1)
        norm_T = torch.linalg.vector_norm(x_TD, dim=-1).clamp_min(EPS)
        norm_R = torch.linalg.vector_norm(self.weight.to(x_TD.dtype), dim=-1).clamp_min(EPS)
        # The norm of a token does not change its order of experts.
        expert_TK = (logits_TR.detach() / norm_R.detach()).topk(config.top_k, dim=-1).indices
        # ProMoE eq. 4, with the identity as activation
        cosine_TK = logits_TR.gather(-1, expert_TK) / (norm_T[:, None] * norm_R[expert_TK])
        weight_TK = config.routed_scaling_factor * cosine_TK
        conditional_T = None
        if unconditional_B is not None:
            conditional_T = ~unconditional_B.repeat_interleave(x_BND.shape[1])
        routing = self.grouped(expert_TK, weight_TK, conditional_T)
        if not (self.training and config.contrastive_weight):
            return routing
        loss = config.contrastive_weight * self.loss(x_TD, expert_TK, conditional_T)
        return routing._replace(report=routing.report._replace(losses={"contrastive": loss}))

    def grouped(self, expert_TK: Tensor, weight_TK: Tensor, conditional_T: Tensor | None) -> Routing:
        """Group the choices by expert. Every token has K rows, so that shapes do not depend on the classes; the last
        K - 1 rows of tokens without a class go to other experts with weight 0."""
        E, K = self.config.num_experts, self.config.top_k
        if conditional_T is None:
            return route_by_token(expert_TK, weight_TK, E)
        own_T1 = torch.full_like(expert_TK[:, :1], E - 1)
        first_K = F.one_hot(expert_TK.new_zeros(()), K).to(weight_TK.dtype)
        conditional_T1 = conditional_T[:, None]
        expert_TK = torch.where(conditional_T1, expert_TK, torch.cat((own_T1, expert_TK[:, :-1]), dim=1))
        routing = route_by_token(expert_TK, torch.where(conditional_T1, weight_TK, first_K), E)
        if K == 1:
            return routing
        served_TK = conditional_T1 | (first_K > 0)
        counts_E = torch.zeros_like(routing.report.counts_E)
        counts_E = counts_E.scatter_add(0, expert_TK.flatten(), served_TK.flatten().long())
        return routing._replace(report=routing.report._replace(counts_E=counts_E), padded=True)

    def loss(self, x_TD: Tensor, expert_TK: Tensor, conditional_T: Tensor | None) -> Tensor:
        """The contrastive loss of the batch, or with `group` of the batches of all processes."""
        prototype_RD = self.weight.to(x_TD.dtype)
        chosen_TR = x_TD.new_zeros(len(x_TD), len(prototype_RD)).scatter(1, expert_TK, 1.0)
        if conditional_T is not None:
            chosen_TR = chosen_TR * conditional_T[:, None]
        sum_RD, count_R = chosen_TR.T @ x_TD, chosen_TR.sum(0)
        if self.group is not None:
            total = all_reduce_sum(torch.cat((sum_RD, count_R[:, None]), dim=1), self.group)
            # All processes compute the same loss, and training averages their gradients: each gradient of its own sum
            # must count as often as there are processes. The second summand is 0.
            sum_RD = total[:, :-1] + self.group.size() * (sum_RD - sum_RD.detach())
            count_R = total[:, -1]
        return contrastive_loss(prototype_RD, sum_RD, count_R > 0, self.config.contrastive_temperature)


def contrastive_loss(prototype_RD: Tensor, sum_RD: Tensor, served_R: Tensor, temperature: float) -> Tensor:
    """Mean over the experts with tokens of the cross-entropy of choosing their own tokens' mean by the cosine with
    their prototype (ProMoE eq. 6); 0 with fewer than two such experts.

    Args:
        sum_RD: sum of each expert's tokens, whose cosines are those of the mean.
        served_R: experts with tokens.
        temperature: what cosines are divided by.
    """
    cosine_RR = F.normalize(prototype_RD, dim=-1) @ F.normalize(sum_RD, dim=-1).T
    logits_RR = (cosine_RR / temperature).masked_fill(~served_R, torch.finfo(cosine_RR.dtype).min)
    log_share_R = logits_RR.log_softmax(dim=-1).diagonal()
    return -torch.where(served_R, log_share_R, 0.0).sum() / served_R.sum().clamp_min(1)
