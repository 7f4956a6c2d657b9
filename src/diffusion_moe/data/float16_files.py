"""Raw float16 files, little endian, read by memory map: latents and caption features."""

from __future__ import annotations

from pathlib import Path

import numpy as np

DTYPE = np.dtype("<f2")


class Float16Files:
    """Memory maps by path, opened on first use. Another process opens its own: a pickled map would be a copy."""

    def __init__(self) -> None:
        self._maps: dict[Path, np.ndarray] = {}

    def __call__(self, path: Path, shape: tuple[int, ...]) -> np.ndarray:
        """A file's content, (-1, *shape)."""
        if path not in self._maps:
            self._maps[path] = np.memmap(path, dtype=DTYPE, mode="r").reshape(-1, *shape)
        return self._maps[path]

    def __reduce__(self) -> tuple[type[Float16Files], tuple[()]]:
        return Float16Files, ()
