"""Facts of each routing rule that the rest of the project uses, without torch.

A router class inherits from its rule (see `moe.routers`), so that one class holds all facts of a rule. Sizes, plans,
benchmarks, checks of a recipe, sampling and reports ask the rule and never compare names.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import ClassVar, Protocol


class RoutingSettings(Protocol):
    """The settings that rules read; `ModelConfig` and `RouterConfig` have them."""

    @property
    def num_experts(self) -> int: ...
    @property
    def top_k(self) -> int: ...
    @property
    def capacity(self) -> float: ...
    @property
    def balance(self) -> str: ...
    @property
    def inference_pool(self) -> str: ...
    @property
    def routed_scaling_factor(self) -> float: ...
    @property
    def n_group(self) -> int: ...
    @property
    def topk_group(self) -> int: ...
    @property
    def time_boundaries(self) -> tuple[float, ...] | None: ...


CHOICES = {"balance": ("none", "aux", "bias"), "inference_pool": ("image", "batch")}
"""Values of settings that are words."""


class RoutingRule:
    """Facts of one routing rule. Subclasses override what differs."""

    reads: ClassVar[frozenset[str]] = frozenset()
    """Names of the settings in `ModelConfig` that the rule reads, num_experts aside."""
    sees_unmodulated: ClassVar[bool] = False
    """The router looks at a block's tokens before adaLN modulates them; the experts take them modulated."""
    sees: ClassVar[frozenset[str]] = frozenset()
    """Fields of `moe.RoutingContext` that the router looks at beside the tokens."""
    has_thresholds: ClassVar[bool] = False
    """Thresholds decide at inference how many experts a token gets."""
    has_equal_loads: ClassVar[bool] = False
    """Every expert serves the same number of tokens at inference, so that its matmuls are batched, not grouped."""

    @classmethod
    def check(cls, settings: RoutingSettings, section: str = "") -> None:
        """Check the settings that the rule reads.

        Args:
            section: prefix of the settings' names in messages, as "model.".

        Raises:
            ValueError: a setting has an impossible value.
        """
        if settings.num_experts < 1:
            raise ValueError(f"{section}num_experts is {settings.num_experts}; it must be positive")
        for name in sorted({"top_k", "capacity"} & cls.reads):
            value = getattr(settings, name)
            if value <= 0:
                raise ValueError(f"{section}{name} is {value}; it must be positive")
            if value > settings.num_experts:
                raise ValueError(f"{section}{name} is {value}, more than {section}num_experts {settings.num_experts}")
        for name, choices in CHOICES.items():
            if name in cls.reads and getattr(settings, name) not in choices:
                raise ValueError(f"{section}{name} is {getattr(settings, name)!r}; choose one of {', '.join(choices)}")

    @staticmethod
    def experts_per_token(settings: RoutingSettings) -> float:
        """Experts that serve a token, on average."""
        raise NotImplementedError

    @staticmethod
    def pools_batch(settings: RoutingSettings) -> bool:
        """True where images of a batch depend on each other at inference."""
        return False

    @classmethod
    def initial_weight(cls, settings: RoutingSettings) -> float:
        """Sum of the weights of a token's experts while all logits are 0: softmax gives each expert 1 / E."""
        return cls.experts_per_token(settings) / settings.num_experts

    @classmethod
    def num_assignments(cls, settings: RoutingSettings, tokens: int, images: int = 1) -> int:
        """Pairs of token and expert in training, for images of so many tokens."""
        return round(images * tokens * cls.experts_per_token(settings))

    @staticmethod
    def parameter_shapes(settings: RoutingSettings, dim: int) -> dict[str, tuple[int, ...]]:
        """Shapes of a router's parameters by name, for tokens of width `dim`."""
        return {"weight": (settings.num_experts, dim)}

    @classmethod
    def kept_bytes(cls, settings: RoutingSettings, dim: int, tokens: int, rows: int) -> int:
        """Bytes that autograd keeps of a router in training beside its input, for so many tokens and assignments.

        A rule that is not among the library's own is taken to keep its scores and the indices of its choices.
        """
        return 4 * tokens * settings.num_experts + 16 * rows

    @staticmethod
    def has_fixed_weight(settings: RoutingSettings) -> bool:
        """True where the weights of a token's experts sum to `initial_weight` whatever the logits."""
        return False

    @staticmethod
    def buffer_shapes(settings: RoutingSettings) -> dict[str, tuple[int, ...]]:
        """Shapes of a router's state by name."""
        return {}


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


RULES: dict[str, type[RoutingRule]] = {
    "tc": TokenChoiceRule,
    "ec": ExpertChoiceRule,
    "diffmoe": DiffMoERule,
    "dsmoe": DSMoERule,
    "nucleus": NucleusRule,
    "time": TimeRule,
}
"""Rules by the value of `ModelConfig.router`; `moe.routers.register_router` adds to them."""


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
