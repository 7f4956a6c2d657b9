"""The width of a variant at which it has given activated parameters."""

from __future__ import annotations

from ..config import ModelConfig, require
from ..config.build import build
from ..config.reading import Sections, merge
from ..counts import model_size

MATCHED = ("model.expert_dim", "model.mlp_dim", "model.shared_dim")
"""Fields that may be chosen so."""
WIDEST = 2**20


def with_matched_width(sections: Sections, field: str, activated: float, name: str) -> Sections:
    """Sections whose width `field` makes the activated parameters nearest to a number.

    Args:
        sections: the variant's.
        field: one of `MATCHED`.
        activated: the number wanted.
        name: of the variant, for messages.

    Raises:
        ValueError: no width has nearly so many.
    """
    key = field.removeprefix("model.")

    def count(width: int) -> float:
        return model_size(build(ModelConfig, {**sections.get("model", {}), key: width}, "model.")).activated

    require(
        count(1) <= activated < count(WIDEST),
        f"variant {name} has {count(1):,.0f} activated parameters with {field} 1 and {count(WIDEST):,.0f} with "
        f"{WIDEST:,}, and cannot match {activated:,.0f}; match another width",
    )
    low, high = 1, WIDEST  # count(low) <= activated < count(high)
    while high - low > 1:
        middle = (low + high) // 2
        if count(middle) <= activated:
            low = middle
        else:
            high = middle
    nearest = min(low, high, key=lambda width: abs(count(width) - activated))
    return merge(sections, {"model": {key: nearest}})
