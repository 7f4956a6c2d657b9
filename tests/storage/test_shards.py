"""What checkpoint files are made of: boxes, who writes which, and the files."""

import tracemalloc
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from diffusion_moe.storage import CheckpointError, files, plan, shards
from diffusion_moe.storage.shards import Block


def test_a_file_is_written_with_one_tensor_in_memory(tmp_path):
    made = []

    def make(value):
        assert all(memory() is None for memory in made)
        memory = np.full(5, value, dtype=np.float32)
        made.append(weakref.ref(memory))
        return torch.from_numpy(memory)

    entries = [files.Entry(str(i), torch.float32, (5,), lambda i=i: make(float(i))) for i in range(4)]
    files.write_safetensors(tmp_path / "x", entries)
    assert {name: t.tolist() for name, t in load_file(tmp_path / "x").items()} == {str(i): [i] * 5 for i in range(4)}


blocks = st.lists(st.tuples(st.integers(0, 4), st.integers(1, 4)), min_size=2, max_size=2).map(
    lambda pairs: Block(*zip(*pairs))
)


def _mask(block, shape=(8, 8)):
    mask = torch.zeros(shape, dtype=torch.int32)
    mask[block.within(shards.whole(shape))] += 1
    return mask


@given(blocks, blocks)
def test_overlaps_are_what_two_masks_share(a, b):
    common = shards.overlap(a, b)
    both = _mask(a) * _mask(b)
    assert torch.equal(both, torch.zeros_like(both) if common is None else _mask(common))


@given(st.lists(blocks, max_size=4))
def test_tiles_cover_each_element_once(boxes):
    """Random boxes hardly ever do, so what they leave open is filled up element by element."""
    count = sum((_mask(box) for box in boxes), torch.zeros(8, 8, dtype=torch.int32))
    rest = [Block((int(i), int(j)), (1, 1)) for i, j in torch.nonzero(count == 0)]
    assert shards.tiles((8, 8), boxes + rest) == bool((count <= 1).all())
    assert not rest or not shards.tiles((8, 8), (boxes + rest)[:-1])
    assert shards.tiles((), [Block((), ())]) and not shards.tiles((), [])


def test_many_blocks_are_compared_in_little_memory():
    """All pairs at once would be 64 million."""
    boxes = [Block((i, 0), (1, 4)) for i in range(8000)]
    tracemalloc.start()
    try:
        assert shards.tiles((8000, 4), boxes)
        assert not shards.tiles((8000, 4), [*boxes[:-1], boxes[0]])
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()


def test_a_tensor_of_ranks_is_shared_out_evenly_and_once():
    layouts = [
        {
            "split": plan.TensorLayout(torch.float32, (8, 4), (Block((rank * 2, 0), (2, 4)),)),
            "in pairs": plan.TensorLayout(torch.float32, (8, 4), (Block((rank // 2 * 4, 0), (4, 4)),)),
        }
        | {f"plain {i}": plan.TensorLayout(torch.int64, (i,), (Block((0,), (i,)),)) for i in range(10)}
        for rank in range(4)
    ]
    shares = plan.assign_writes(layouts)
    everything = [(share.name, share.block) for own in shares for share in own]
    assert len(everything) == len(set(everything)) == 4 + 2 + 10
    sizes = [sum(share.bytes for share in own) for own in shares]
    assert sum(sizes) == 128 + 128 + 8 * 45 and max(sizes) - min(sizes) <= 16
    assert all(share.block in layouts[rank][share.name].blocks for rank in range(4) for share in shares[rank])
    del layouts[2]["plain 3"]
    with pytest.raises(CheckpointError, match="ranks 0 and 2 save different tensors: one of them lacks plain 3"):
        plan.assign_writes(layouts)
    layouts[2]["plain 3"] = plan.TensorLayout(torch.int64, (4,), (Block((0,), (4,)),))
    with pytest.raises(CheckpointError, match=r"plain 3 is .* on rank 2"):
        plan.assign_writes(layouts)
    with pytest.raises(CheckpointError, match="split: the processes hold"):
        plan.assign_writes([{"split": layout["split"]} for layout in layouts[:3]])


def test_a_strange_layout_is_refused_by_name():
    class Partial:
        def is_replicate(self):
            return False

        def is_partial(self):
            return True

        def __repr__(self):
            return "Partial(sum)"

    class Mesh:
        shape = (2,)

        def get_coordinate(self):
            return [0]

    tensor = torch.zeros(2)
    tensor.device_mesh, tensor.placements = Mesh(), [Partial()]
    with pytest.raises(CheckpointError, match=r"grad: its placement is Partial\(sum\)"):
        plan.layouts_of({"grad": tensor})
