"""The order of training is a function of (seed, position)."""

from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_moe.data.order import batches_from, epoch_order


@settings(max_examples=50, deadline=None)
@given(size=st.integers(1, 40), batch_size=st.integers(1, 50), steps=st.integers(1, 8), cut=st.integers(0, 8))
def test_a_resumed_order_continues_the_first_and_no_image_is_dropped(size, batch_size, steps, cut):
    whole = list(batches_from(0, steps, size, batch_size, seed=3))
    cut = min(cut, steps)
    assert list(batches_from(cut, steps, size, batch_size, seed=3)) == whole[cut:]
    stream = [draw for batch in whole for draw in batch]
    assert len(stream) == steps * batch_size
    for epoch in range(len(stream) // size):
        part = stream[epoch * size : (epoch + 1) * size]
        assert sorted(draw.image for draw in part) == list(range(size))
        assert {draw.epoch for draw in part} == {epoch}


def test_batches_of_other_sizes_cut_the_same_stream():
    small = [draw for batch in batches_from(0, 12, 17, 4, seed=1) for draw in batch]
    large = [draw for batch in batches_from(0, 4, 17, 12, seed=1) for draw in batch]
    assert [draw[:2] for draw in small] == [draw[:2] for draw in large]


def test_seeds_and_epochs_give_other_orders():
    orders = {tuple(epoch_order(50, seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4
