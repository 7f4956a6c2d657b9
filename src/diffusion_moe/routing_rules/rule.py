"""The base of all routing rules: the facts that a rule states, with their defaults, and the settings it reads."""

from __future__ import annotations

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
    def target_dim(self) -> int: ...
    @property
    def contrastive_weight(self) -> float: ...
    @property
    def contrastive_temperature(self) -> float: ...
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
    """Fields of `moe.RoutingContext` that the router looks at beside the tokens; `route` is given them by name."""
    has_thresholds: ClassVar[bool] = False
    """Thresholds decide at inference how many experts a token gets."""
    has_fixed_rows: ClassVar[bool] = True
    """The number of assignments in training depends on settings alone, so that a block compiles to one graph."""
    has_equal_loads: ClassVar[bool] = False
    """Every expert serves the same number of tokens at inference, so that its matmuls are batched, not grouped."""
    has_capacity_schedule: ClassVar[bool] = False
    """In training the router serves `Router.training_capacity` experts a token, where it is set."""

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

    @staticmethod
    def loss_flops(settings: RoutingSettings, dim: int, tokens: int) -> int:
        """Operations of the losses' matmuls in training, two a multiply-add."""
        return 0

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
