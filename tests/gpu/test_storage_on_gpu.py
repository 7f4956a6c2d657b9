"""Checkpoints of tensors on a GPU."""

import pytest
import torch
from checkpoints import write

from diffusion_moe.storage import AsyncWriter, read

pytestmark = pytest.mark.gpu


def test_the_state_at_the_call_is_written_while_the_gpu_goes_on(tmp_path):
    tensors = {"w": torch.randn(4096, 1024, device="cuda"), "b": torch.arange(7, device="cuda"), "c": torch.ones(3)}
    expected = {name: tensor.clone() for name, tensor in tensors.items()}
    with AsyncWriter(tmp_path, keep=2) as writer:
        for step in (1, 2):  # the second into the same memory
            writer.save(step, tensors, {})
            for tensor in tensors.values():
                tensor.mul_(2)
        assert all(buffer.is_pinned() for buffer in writer._buffers)
    for step, factor in ((1, 1), (2, 2)):
        found = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
        read(tmp_path / f"step-{step:08d}", found)
        assert all(torch.equal(found[name], expected[name] * factor) for name in found)
    path = write(tmp_path, 3, tensors, {})
    read(path, found)
    assert all(torch.equal(found[name], expected[name] * 4) for name in found)
