"""Counter-based random numbers: functions of (seed, stream, step, sample), not of batch size, world size or workers.

The generator is Philox4x32-10 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011), vectorised over
samples: the noise of a whole batch is computed on the device at once, and each sample's depends on that sample alone.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Four 32-bit random words for each counter; words are int64 tensors holding values in [0, 2^32)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # int64 products wrap to the same bits as unsigned ones; the mask makes the shift a logical one.
        product0 = c0 * _MULTIPLIERS[0]
        product1 = c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (product1 >> 32) & _MASK ^ c1 ^ k0,
            product1 & _MASK,
            (product0 >> 32) & _MASK ^ c3 ^ k1,
            product0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def derive_seed(seed: int, stream: str, index: int = 0) -> int:
    """A 63-bit seed for one named stream."""
    digest = hashlib.blake2b(f"{seed}/{stream}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _words(seed: int, stream: str, step: int | Tensor, samples: Tensor, count: int) -> Tensor:
    """(S, count) words, count rounded up to a multiple of 4."""
    key = derive_seed(seed, stream)
    blocks = torch.arange(math.ceil(count / 4), device=samples.device)
    # A number is written by a kernel: the copy of a host tensor would wait for the device.
    steps = torch.full((1,), step, device=samples.device) if isinstance(step, int) else step.to(samples.device)
    block, sample, time = torch.broadcast_tensors(blocks[None, :], samples.long()[:, None], steps.view(-1, 1))
    counter = (block, sample & _MASK, sample >> 32, time)
    return torch.stack(philox4x32(counter, (key & _MASK, key >> 32)), dim=-1).flatten(1)


def _open_unit(words: Tensor) -> Tensor:
    """The upper 23 bits as the middle of their interval: strictly between 0 and 1, exact in float32."""
    return ((words >> 9).double() + 0.5) * 2.0**-23


def uniform(seed: int, stream: str, step: int | Tensor, samples: Tensor) -> Tensor:
    """A uniform number in (0, 1) for each sample, float32, (S,).

    Args:
        seed: seed of the run.
        stream: name of the purpose; each has independent numbers.
        step: training step, or 0; one for all samples or one each.
        samples: sample numbers, int64, (S,); the result is on their device.
    """
    return _open_unit(_words(seed, stream, step, samples, 1)[:, 0]).float()


def uniforms(seed: int, stream: str, step: int | Tensor, samples: Tensor, count: int) -> Tensor:
    """Uniform numbers in (0, 1), (S, count), float32, as `uniform`, whose numbers are the first column."""
    return _open_unit(_words(seed, stream, step, samples, count))[:, :count].float()


def normal(seed: int, stream: str, step: int | Tensor, samples: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard normal numbers, (S, *shape), float32, by the Box-Muller transform. Arguments as for `uniform`."""
    count = math.prod(shape)
    unit = _open_unit(_words(seed, stream, step, samples, count))
    radius = (-2 * unit[:, 0::2].log()).sqrt()
    angle = 2 * math.pi * unit[:, 1::2]
    numbers = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1).flatten(1)
    return numbers[:, :count].float().view(len(samples), *shape)
