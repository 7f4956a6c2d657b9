"""Numbers of token dropping that its settings imply."""

from __future__ import annotations


def num_kept(tokens: int, rate: float) -> int:
    """Tokens of an image that the middle blocks see; dropped ones are rounded down, as in TREAD's published code."""
    return tokens - int(tokens * rate)


def square_of(rate: float, *sides: int) -> tuple[int, int]:
    """Side of the squares of token_selection: squares, 2 or 4, and how many tokens of each are kept.

    SPRINT's published code has squares of 2 for drop rates of 0.5 and 0.75, and of 4 for 0.625 and 0.875.

    Args:
        rate: share of the tokens that is dropped.
        sides: rows and columns of an image's tokens, or one number if they are equal.

    Raises:
        ValueError: no square has a whole number of kept tokens, or the sides are not multiples of it.
    """
    kept = {side: side * side * (1 - rate) for side in (2, 4)}
    whole = [side for side, count in kept.items() if count == int(count)]
    if not whole:
        raise ValueError(
            f"training.token_drop_rate is {rate}, no multiple of 1/16, as training.token_selection squares needs; "
            "choose another, or random"
        )
    square = whole[0]
    if any(side % square for side in sides):
        shape = " x ".join(map(str, sides if len(sides) > 1 else sides * 2))
        raise ValueError(
            f"training.token_selection is squares of {square} x {square} tokens, but an image has {shape}; use random"
        )
    return square, int(kept[square])
