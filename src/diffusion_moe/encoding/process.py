"""Which of the processes that encode this one is."""

from __future__ import annotations

import os
from typing import NamedTuple

from ..data.latents import CachePlan


class Process(NamedTuple):
    """This process among those that encode, as torchrun's variables tell."""

    rank: int
    world: int
    local_rank: int

    @classmethod
    def here(cls) -> Process:
        """From RANK, WORLD_SIZE and LOCAL_RANK.

        Raises:
            ValueError: they make no sense.
        """
        texts = [os.environ.get(name, usual) for name, usual in _VARIABLES]
        for (name, _), text in zip(_VARIABLES, texts):
            if not text.isdecimal():
                raise ValueError(f"the variable {name} is {text!r}; expected a number, as torchrun sets it")
        process = cls(*map(int, texts))
        if process.rank >= process.world:
            raise ValueError(f"the variable RANK is {process.rank}; expected less than WORLD_SIZE {process.world}")
        return process

    def shards(self, plan: CachePlan) -> range:
        """Those of a cache that this process encodes."""
        return range(self.rank, plan.shards, self.world)


_VARIABLES = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))
