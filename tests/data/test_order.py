"""The order of training is a function of (seed, position)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_moe.data import positions_of
from diffusion_moe.data.order import Segment, batch_size_at, batches_from, epoch_order


@settings(max_examples=50, deadline=None)
@given(size=st.integers(1, 40), batch_size=st.integers(1, 50), steps=st.integers(1, 8), cut=st.integers(0, 8))
def test_a_resumed_order_continues_the_first_and_no_image_is_dropped(size, batch_size, steps, cut):
    whole = list(batches_from(0, steps, size, batch_size, seed=3))
    cut = min(cut, steps)
    assert list(batches_from(cut, steps, size, batch_size, seed=3)) == whole[cut:]
    assert all([sample.position for sample in batch] == list(range(batch_size)) for batch in whole)
    stream = [sample for batch in whole for sample in batch]
    assert len(stream) == steps * batch_size
    for epoch in range(len(stream) // size):
        part = stream[epoch * size : (epoch + 1) * size]
        assert sorted(sample.image for sample in part) == list(range(size))
        assert {sample.epoch for sample in part} == {epoch}


def test_batches_of_other_sizes_cut_the_same_stream():
    small = [sample[:2] for batch in batches_from(0, 12, 17, 4, seed=1) for sample in batch]
    large = [sample[:2] for batch in batches_from(0, 4, 17, 12, seed=1) for sample in batch]
    assert small == large


def test_seeds_and_epochs_give_other_orders():
    orders = {tuple(epoch_order(50, seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4


@settings(max_examples=50, deadline=None)
@given(micro=st.integers(1, 4), accumulation=st.integers(1, 4), world=st.integers(1, 5))
def test_the_ranks_shares_of_a_micro_batch_make_that_of_one_process(micro, accumulation, world):
    batch_size = micro * accumulation * world
    alone = positions_of(batch_size, accumulation)
    assert torch.cat(alone).tolist() == list(range(batch_size))
    shares = [positions_of(batch_size, accumulation, rank, world) for rank in range(world)]
    assert all(len(share) == accumulation for share in shares)
    for m, whole in enumerate(alone):
        assert torch.equal(torch.cat([share[m] for share in shares]), whole)
        assert {len(share[m]) for share in shares} == {micro}


def test_positions_are_these():
    assert [part.tolist() for part in positions_of(12, accumulation=2, rank=1, world=3)] == [[2, 3], [8, 9]]


def test_a_batch_that_cannot_be_divided_is_refused_with_the_arithmetic():
    with pytest.raises(ValueError, match=r"batch_size 12 is not divisible by .*accumulation 2 x 4 processes = 8"):
        positions_of(12, accumulation=2, rank=0, world=4)


@pytest.mark.parametrize("size", [5, 17, 100])
def test_a_rank_reads_its_part_of_every_batch_across_epochs(size):
    whole = list(batches_from(2, 9, size, 12, seed=4))
    for rank in range(3):
        positions = torch.cat(positions_of(12, 2, rank, 3))
        part = list(batches_from(2, 9, size, 12, seed=4, positions=positions))
        assert part == [[batch[position] for position in positions.tolist()] for batch in whole]


SEGMENTS = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 9)), min_size=1, max_size=4)
"""Steps and batch size of each."""


def segments_of(parts):
    firsts = [sum(steps for steps, _ in parts[:i]) for i in range(len(parts))]
    return [Segment(first, size) for first, (_, size) in zip(firsts, parts)]


@settings(max_examples=50, deadline=None)
@given(size=st.integers(1, 40), parts=SEGMENTS, cut=st.integers(0, 16))
def test_batches_of_changing_sizes_drop_no_image_and_give_none_twice(size, parts, cut):
    steps, total = sum(steps for steps, _ in parts), sum(steps * size for steps, size in parts)
    segments = segments_of(parts)
    whole = list(batches_from(0, steps, size, segments, seed=3))
    assert [len(batch) for batch in whole] == [size for steps, size in parts for _ in range(steps)]
    assert [sample[:2] for batch in whole for sample in batch] == [
        sample[:2] for (sample,) in batches_from(0, total, size, 1, seed=3)
    ]
    cut = min(cut, steps)
    assert list(batches_from(cut, steps, size, segments, seed=3)) == whole[cut:]


def test_the_size_of_a_step_is_that_of_its_segment():
    segments = [Segment(0, 8), Segment(3, 2), Segment(5, 4)]
    assert [batch_size_at(segments, step) for step in range(1, 8)] == [8, 8, 8, 2, 2, 4, 4]
    assert [len(batch) for batch in batches_from(0, 7, 10, segments, seed=0)] == [8, 8, 8, 2, 2, 4, 4]
