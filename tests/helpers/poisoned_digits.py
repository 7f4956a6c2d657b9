"""Digits with some images whose pixels are not finite."""

from __future__ import annotations

from collections.abc import Container

import torch

from diffusion_moe.data.digits import Digits


def poison_digits(monkeypatch, images: Container[int]) -> None:
    """Let reading the digits give NaN for these indices of the split."""
    read = Digits.read

    def read_some(self, indices):
        batch = read(self, indices)
        batch.images[[i for i, index in enumerate(indices) if index in images]] = torch.nan
        return batch

    monkeypatch.setattr(Digits, "read", read_some)
