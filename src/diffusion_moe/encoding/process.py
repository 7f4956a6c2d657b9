"""Rank, shards and device of this process among those that encode."""

from __future__ import annotations

import os
from typing import Literal, NamedTuple

import torch

from ..data.latents import CachePlan
from ..distributed import choose_device


class Process(NamedTuple):
    """One of the processes that encode, by torchrun's variables."""

    rank: int
    world: int
    local_rank: int

    @classmethod
    def here(cls) -> Process:
        """This process, from RANK, WORLD_SIZE and LOCAL_RANK.

        Raises:
            ValueError: a variable is not a number, or the rank is too large.
        """
        numbers = []
        for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
            text = os.environ.get(name, default)
            if not text.isdecimal():
                raise ValueError(f"the variable {name} is {text!r}; expected a number, as torchrun sets it")
            numbers.append(int(text))
        process = cls(*numbers)
        if process.rank >= process.world:
            raise ValueError(f"the variable RANK is {process.rank}; expected less than WORLD_SIZE {process.world}")
        return process

    def shards(self, plan: CachePlan) -> range:
        """Shards of a cache that this process encodes."""
        return range(self.rank, plan.shards, self.world)

    def device(self, name: Literal["auto", "cpu", "cuda"]) -> torch.device:
        """This process' device for an option; each process gets a GPU of its own."""
        if torch.cuda.is_available():
            torch.cuda.set_device(self.local_rank % torch.cuda.device_count())
        return choose_device(name)
