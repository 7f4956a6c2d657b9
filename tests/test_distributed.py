"""Processes that start again find each other, and none of those before them."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from diffusion_moe.distributed import meet

SOON, NEVER = timedelta(seconds=0.2), timedelta(minutes=1)


def all_meet(store, numbers, world=3, timeout=NEVER):
    with ThreadPoolExecutor(world) as pool:
        return [result.result() for result in [pool.submit(meet, store, n, world, timeout) for n in numbers]]


def test_every_start_has_a_name_of_its_own():
    store = dist.HashStore()
    names = [all_meet(store, order) for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2))]
    assert [len(set(start)) for start in names] == [1, 1, 1]
    assert len({start[0] for start in names}) == 3


def test_what_a_broken_start_left_does_not_matter():
    """Some had called, one died over its call, and process 0 died when it had answered."""
    store = dist.HashStore()
    with pytest.raises(dist.DistStoreError):
        all_meet(store, (1, 2), timeout=SOON)
    with pytest.raises(TimeoutError, match="only 2 of 3 processes have started"):
        all_meet(store, (1, 0), timeout=SOON)
    store.add("meet/calls", 1)
    assert len(set(all_meet(store, (0, 1, 2)))) == 1
