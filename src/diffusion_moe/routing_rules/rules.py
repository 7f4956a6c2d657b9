"""The library's own routing rules, and the table of all rules."""

from __future__ import annotations

import math
from itertools import pairwise

from .rule import RoutingRule, RoutingSettings


class TokenChoiceRule(RoutingRule):
    """TC-DiT, DiT-MoE: each token takes its K best experts."""

    reads = frozenset({"top_k", "balance", "balance_weight", "balance_rate"})

    @staticmethod
    def experts_per_token(settings: RoutingSettings) -> float:
        return settings.top_k

    @classmethod
    def kept_bytes(cls, settings: RoutingSettings, dim: int, tokens: int, rows: int) -> int:
        loads = 4 * settings.num_experts if settings.balance == "aux" else 0
        return super().kept_bytes(settings, dim, tokens, rows) + loads

    @staticmethod
    def buffer_shapes(settings: RoutingSettings) -> dict[str, tuple[int, ...]]:
        return {"e_score_correction_bias": (settings.num_experts,)} if settings.balance == "bias" else {}


class DSMoERule(TokenChoiceRule):
    """DSMoE: each token takes the K best experts of its best groups."""

    reads = TokenChoiceRule.reads | {"n_group", "topk_group", "routed_scaling_factor"}

    @classmethod
    def check(cls, settings: RoutingSettings, section: str = "") -> None:
        super().check(settings, section)
        experts, groups, kept = settings.num_experts, settings.n_group, settings.topk_group
        if groups < 1 or experts % groups:
            raise ValueError(f"{section}num_experts {experts} is not divisible by {section}n_group {groups}")
        if not 0 < kept <= groups:
            raise ValueError(f"{section}topk_group is {kept}; choose 1 to {section}n_group {groups}")
        reachable = kept * experts // groups
        if settings.top_k > reachable:
            reason = f"but {section}topk_group {kept} leaves {reachable} experts"
            raise ValueError(f"{section}top_k is {settings.top_k}, {reason}")

    @classmethod
    def initial_weight(cls, settings: RoutingSettings) -> float:
        # Weights are normalised over the K; a single expert has its sigmoid, 0.5 at logit 0.
        return settings.routed_scaling_factor * (1.0 if settings.top_k > 1 else 0.5)

    @classmethod
    def kept_bytes(cls, settings: RoutingSettings, dim: int, tokens: int, rows: int) -> int:
        experts = settings.num_experts
        shares = 4 * (tokens * experts + tokens + experts) if settings.balance == "aux" else 0
        return 20 * rows + shares  # scores, experts and rows of the choices

    @staticmethod
    def has_fixed_weight(settings: RoutingSettings) -> bool:
        return settings.top_k > 1

    @staticmethod
    def buffer_shapes(settings: RoutingSettings) -> dict[str, tuple[int, ...]]:
        return {"e_score_correction_bias": (settings.num_experts,)}


class TimeRule(TokenChoiceRule):
    """Experts by time: all tokens of an image go to the expert of its range of t."""

    reads = frozenset({"time_boundaries"})
    sees = frozenset({"time_B"})

    @classmethod
    def check(cls, settings: RoutingSettings, section: str = "") -> None:
        super().check(settings, section)
        boundaries = settings.time_boundaries
        if boundaries is None:
            return
        if len(boundaries) != settings.num_experts - 1:
            reason = f"but {section}num_experts is {settings.num_experts}; give one fewer than experts, or null"
            raise ValueError(f"{section}time_boundaries are {len(boundaries)}, {reason}")
        if any(low >= high for low, high in pairwise((0.0, *boundaries, 1.0))):
            listed = ", ".join(map(str, boundaries))
            raise ValueError(f"{section}time_boundaries are {listed}; give ascending times between 0 and 1")

    @staticmethod
    def experts_per_token(settings: RoutingSettings) -> float:
        return 1

    @classmethod
    def initial_weight(cls, settings: RoutingSettings) -> float:
        return 1.0

    @staticmethod
    def has_fixed_weight(settings: RoutingSettings) -> bool:
        return True

    @classmethod
    def kept_bytes(cls, settings: RoutingSettings, dim: int, tokens: int, rows: int) -> int:
        return 8 * rows  # rows of the tokens

    @staticmethod
    def parameter_shapes(settings: RoutingSettings, dim: int) -> dict[str, tuple[int, ...]]:
        return {}

    @staticmethod
    def buffer_shapes(settings: RoutingSettings) -> dict[str, tuple[int, ...]]:
        return {}


class ExpertChoiceRule(RoutingRule):
    """EC-DiT: each expert takes the best tokens of each image."""

    reads = frozenset({"capacity"})
    has_equal_loads = True
    has_capacity_schedule = True

    @classmethod
    def kept_bytes(cls, settings: RoutingSettings, dim: int, tokens: int, rows: int) -> int:
        return 4 * tokens * settings.num_experts + 8 * rows

    @staticmethod
    def experts_per_token(settings: RoutingSettings) -> float:
        return settings.capacity

    @classmethod
    def num_assignments(cls, settings: RoutingSettings, tokens: int, images: int = 1) -> int:
        return images * settings.num_experts * cls.expert_capacity(settings, tokens)

    @staticmethod
    def expert_capacity(settings: RoutingSettings, tokens: int) -> int:
        """Tokens each expert takes out of a pool of `tokens`: the papers' int(T / E * capacity), at least one."""
        return max(1, int(tokens / settings.num_experts * settings.capacity))


class NucleusRule(ExpertChoiceRule):
    """Nucleus-Image: each expert takes the best tokens of each image; a token's weights are normalised over them."""

    reads = frozenset({"capacity", "routed_scaling_factor"})
    sees_unmodulated = True
    sees = frozenset({"time_embedding_BD"})

    @classmethod
    def initial_weight(cls, settings: RoutingSettings) -> float:
        return settings.routed_scaling_factor  # but 0 for a token that no expert took

    @staticmethod
    def expert_capacity(settings: RoutingSettings, tokens: int) -> int:
        """Tokens each expert takes of an image, rounded up."""
        return max(1, math.ceil(settings.capacity * tokens / settings.num_experts))

    @staticmethod
    def parameter_shapes(settings: RoutingSettings, dim: int) -> dict[str, tuple[int, ...]]:
        return {"weight": (settings.num_experts, dim), "time_weight": (settings.num_experts, dim)}

    @classmethod
    def kept_bytes(cls, settings: RoutingSettings, dim: int, tokens: int, rows: int) -> int:
        # Scores and which of them count, the tokens' sums; the choices, their scores and sums.
        return 5 * tokens * settings.num_experts + 4 * tokens + 16 * rows


class DiffMoERule(ExpertChoiceRule):
    """DiffMoE: each expert takes the best tokens of the whole batch; thresholds decide at inference."""

    reads = frozenset({"capacity", "capacity_loss_weight", "threshold_decay", "inference_pool"})
    has_thresholds = True
    has_equal_loads = False

    @staticmethod
    def pools_batch(settings: RoutingSettings) -> bool:
        return settings.inference_pool == "batch"

    @classmethod
    def num_assignments(cls, settings: RoutingSettings, tokens: int, images: int = 1) -> int:
        return settings.num_experts * cls.expert_capacity(settings, images * tokens)

    @classmethod
    def kept_bytes(cls, settings: RoutingSettings, dim: int, tokens: int, rows: int) -> int:
        # Scores, the predictor's hidden layer, its logits and their targets.
        return 4 * tokens * (3 * settings.num_experts + dim)

    @staticmethod
    def parameter_shapes(settings: RoutingSettings, dim: int) -> dict[str, tuple[int, ...]]:
        experts = settings.num_experts
        first = {"predictor.0.weight": (dim, dim), "predictor.0.bias": (dim,)}
        last = {"predictor.2.weight": (experts, dim), "predictor.2.bias": (experts,)}
        return {"weight": (experts, dim)} | first | last

    @staticmethod
    def buffer_shapes(settings: RoutingSettings) -> dict[str, tuple[int, ...]]:
        return {"threshold": (settings.num_experts,)}


class RaceRule(RoutingRule):
    """Expert Race: all tokens of the batch and all experts compete in one top-k; a threshold decides at inference."""

    reads = frozenset({"capacity", "threshold_decay", "similarity_loss_weight", "target_loss_weight"})
    has_thresholds = True

    @staticmethod
    def experts_per_token(settings: RoutingSettings) -> float:
        return settings.capacity

    @classmethod
    def num_assignments(cls, settings: RoutingSettings, tokens: int, images: int = 1) -> int:
        return max(1, int(images * tokens * settings.capacity))

    @classmethod
    def initial_weight(cls, settings: RoutingSettings) -> float:
        return 0.0  # weights are the logits

    @staticmethod
    def loss_flops(settings: RoutingSettings, dim: int, tokens: int) -> int:
        return 4 * tokens * settings.num_experts**2  # scores with scores, and choices with choices

    @classmethod
    def kept_bytes(cls, settings: RoutingSettings, dim: int, tokens: int, rows: int) -> int:
        # The hidden layer before and after its activation, probabilities, pairs, and the similarity loss' weights.
        experts = settings.num_experts
        return 4 * tokens * (2 * dim + experts) + 8 * rows + 4 * experts**2

    @staticmethod
    def parameter_shapes(settings: RoutingSettings, dim: int) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {"weight": (settings.num_experts, dim)}
        shapes |= {"hidden.weight": (dim, dim), "hidden.bias": (dim,)}
        if settings.target_dim:
            shapes |= {"target.weight": (settings.target_dim, dim), "target.bias": (settings.target_dim,)}
        return shapes

    @staticmethod
    def buffer_shapes(settings: RoutingSettings) -> dict[str, tuple[int, ...]]:
        return {"threshold": (1,), "num_updates": (1,)}


class ThresholdRule(RoutingRule):
    """Expert threshold: an expert takes the tokens above a threshold that follows its scores' quantile."""

    reads = frozenset({"capacity", "threshold_decay"})
    has_thresholds = True
    has_fixed_rows = False

    @staticmethod
    def experts_per_token(settings: RoutingSettings) -> float:
        return settings.capacity

    @classmethod
    def initial_weight(cls, settings: RoutingSettings) -> float:
        return settings.capacity / 2  # sigmoids

    @classmethod
    def kept_bytes(cls, settings: RoutingSettings, dim: int, tokens: int, rows: int) -> int:
        return 4 * tokens * settings.num_experts + 8 * rows  # sigmoids, and the expert of each row

    @staticmethod
    def buffer_shapes(settings: RoutingSettings) -> dict[str, tuple[int, ...]]:
        return {"threshold": (settings.num_experts,), "num_updates": (1,)}


class ProMoERule(TokenChoiceRule):
    """ProMoE: images without a class have the last expert; other tokens take the K prototypes of highest cosine."""

    reads = frozenset({"top_k", "routed_scaling_factor", "contrastive_weight", "contrastive_temperature"})
    sees = frozenset({"unconditional_B"})

    @classmethod
    def check(cls, settings: RoutingSettings, section: str = "") -> None:
        super().check(settings, section)
        experts, top_k, temperature = settings.num_experts, settings.top_k, settings.contrastive_temperature
        if top_k >= experts:
            reason = f"but of {section}num_experts {experts} the last is for images without a class"
            raise ValueError(f"{section}top_k is {top_k}, {reason}; choose at most {experts - 1}")
        if temperature <= 0:
            raise ValueError(f"{section}contrastive_temperature is {temperature}; it must be positive")

    @classmethod
    def initial_weight(cls, settings: RoutingSettings) -> float:
        """1, as for images without a class; what the cosines of the others sum to depends on the tokens."""
        return 1.0

    @staticmethod
    def parameter_shapes(settings: RoutingSettings, dim: int) -> dict[str, tuple[int, ...]]:
        return {"weight": (settings.num_experts - 1, dim)}

    @staticmethod
    def loss_flops(settings: RoutingSettings, dim: int, tokens: int) -> int:
        prototypes = settings.num_experts - 1
        # Sums of tokens by expert, and their cosines with the prototypes.
        return 2 * (tokens + prototypes) * prototypes * dim if settings.contrastive_weight else 0

    @classmethod
    def kept_bytes(cls, settings: RoutingSettings, dim: int, tokens: int, rows: int) -> int:
        prototypes = settings.num_experts - 1
        # Norms, logits, where the class is missing; logits, norms, experts and rows of the choices.
        kept = 9 * tokens + 4 * prototypes * (tokens + 1) + 28 * rows
        if settings.contrastive_weight:  # choices, sums and normalised vectors, their cosines, norms and masks
            kept += 4 * prototypes * (tokens + 3 * dim + prototypes) + 18 * prototypes + 8
        return kept

    @staticmethod
    def buffer_shapes(settings: RoutingSettings) -> dict[str, tuple[int, ...]]:
        return {}


RULES: dict[str, type[RoutingRule]] = {
    "tc": TokenChoiceRule,
    "ec": ExpertChoiceRule,
    "diffmoe": DiffMoERule,
    "dsmoe": DSMoERule,
    "race": RaceRule,
    "threshold": ThresholdRule,
    "promoe": ProMoERule,
    "nucleus": NucleusRule,
    "time": TimeRule,
}
"""Rules by the value of `ModelConfig.router`; `moe.routers.register_router` adds to them."""


def names_with_thresholds() -> str:
    """Names of the rules with thresholds, for messages."""
    return ", ".join(name for name, rule in RULES.items() if rule.has_thresholds)


def rule_of(router: str) -> type[RoutingRule] | None:
    """The rule of a value of `ModelConfig.router`; None for dense, which routes nothing.

    Raises:
        ValueError: no such rule is registered.
    """
    if router == "dense":
        return None
    if router not in RULES:
        raise ValueError(f"model.router is {router!r}; choose one of dense, {', '.join(RULES)}")
    return RULES[router]
