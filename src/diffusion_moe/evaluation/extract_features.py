"""Features of many images, shared among processes and resumed after a kill.

The images are read in parts of about 250, by each process every n-th of those still missing. A finished part is a file
of features in a folder that all processes see. At the end the main process joins the parts in their order, so the
result is the same, bit for bit, for any number of processes and of interruptions.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..distributed import barrier, from_main, is_main, rank, world_size
from ..log import Log, ProgressLog
from ..run_folder import replace_atomically, write_atomically
from ..sampling.generate import SamplingStats
from .features import Extractor, digest_of
from .images import Images, digest_of_all, digests_of, split
from .metrics import FeatureSums, Moments

PART = 250
"""Images in a part, rounded down to whole batches."""


@dataclass(frozen=True)
class Features:
    """Features of all images in their order, and what they cost."""

    pool_SD: Tensor
    spatial: Moments | None
    others: dict[str, Tensor]
    """Further outputs of the extractor, a row an image."""
    stats: SamplingStats
    images_sha256: str
    """Over all pixels: equal for equal images, whatever the batches and processes."""
    seconds_per_image: float
    """Time of one process to read or generate an image, without its features."""


@contextmanager
def extract_features(
    images: Images, extractor: Extractor, batch_size: int, parent: Path, log: Log
) -> Iterator[Features | None]:
    """All images' features on the main process; None on the others, which extract a share of them.

    Finished parts are kept until the block has ended without an error, as the result is then saved.

    Args:
        parent: folder of the folder of unfinished work.
        log: receives the main process's lines.

    Raises:
        ValueError: an image or a part cannot be read.
    """
    parts = parts_of(images.count, batch_size)
    begun = _begin(images, extractor, batch_size, parent, parts) if is_main() else None
    folder, missing = from_main(begun)
    done = images.count - sum(map(len, missing))
    if done and is_main():
        log(f"resuming: {done} of {images.count} images are done")
    progress = ProgressLog(images.count, log, done)
    for part in missing[rank() :: world_size()]:
        _extract_part(images, extractor, part, batch_size, folder)
        if is_main():
            progress.update(sum(len(part) for part in parts if _path(folder, part).is_file()))
    barrier()
    yield _joined(folder, parts) if is_main() else None
    if is_main():
        shutil.rmtree(folder, ignore_errors=True)


def parts_of(count: int, batch_size: int) -> list[range]:
    """Ranges of about 250 images, in whole batches."""
    return split(range(count), max(1, PART // batch_size) * batch_size)


def _begin(
    images: Images, extractor: Extractor, batch_size: int, parent: Path, parts: list[range]
) -> tuple[Path, list[range]]:
    """Folder of the parts, under a name that other work does not share, and the parts that it lacks."""
    identity = {
        "images": images.identity(),
        "count": images.count,
        "extractor": asdict(extractor.identity),
        "batch_size": batch_size,
    }
    folder = parent / f".progress-{digest_of(identity)}"
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "about.json", json.dumps({"images": images.name, "count": images.count}) + "\n")
    return folder, [part for part in parts if not _is_whole(folder, part)]


def _extract_part(images: Images, extractor: Extractor, part: range, batch_size: int, folder: Path) -> None:
    stats, seconds, rows = SamplingStats(), 0.0, []
    began = time.perf_counter()
    for batch in images.read(part, batch_size, stats):
        seconds += time.perf_counter() - began
        if tuple(batch.shape[-2:]) != tuple(images.size):
            raise ValueError(f"{images.name} gave images of {tuple(batch.shape[-2:])} pixels instead of {images.size}")
        rows.append({**extractor(batch), "sha256": digests_of(batch)})
        began = time.perf_counter()
    tensors = {name: torch.cat([row[name] for row in rows]).contiguous() for name in rows[0]}
    metadata = {"usage": json.dumps(stats.totals()), "seconds": str(seconds)}
    with replace_atomically(_path(folder, part)) as file:
        file.write(save(tensors, metadata=metadata))


def _path(folder: Path, part: range) -> Path:
    return folder / f"part-{part.start:08d}-{part.stop:08d}.safetensors"


def _is_whole(folder: Path, part: range) -> bool:
    try:
        tensors, _ = _read(folder, part)
    except ValueError:
        return False
    return all(len(tensor) == len(part) for tensor in tensors.values())


def _read(folder: Path, part: range) -> tuple[dict[str, Tensor], dict[str, str]]:
    path = _path(folder, part)
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata())  # noqa: SIM118
    except (OSError, SafetensorError, TypeError) as error:
        raise ValueError(
            f"the part {path} is missing or damaged; run the same command again, in a folder that all processes see"
        ) from error


def _joined(folder: Path, parts: list[range]) -> Features:
    columns: dict[str, list[Tensor]] = {}
    spatial, stats, seconds = None, SamplingStats(), 0.0
    for part in parts:
        tensors, metadata = _read(folder, part)
        if "spatial" in tensors:
            sums = FeatureSums.of(tensors.pop("spatial"))
            spatial = sums if spatial is None else spatial + sums
        for name, tensor in tensors.items():
            columns.setdefault(name, []).append(tensor)
        stats.add(json.loads(metadata["usage"]))
        seconds += float(metadata["seconds"])
    whole: dict[str, Any] = {name: torch.cat(rows) for name, rows in columns.items()}
    count = parts[-1].stop
    return Features(
        pool_SD=whole.pop("pool"),
        images_sha256=digest_of_all(whole.pop("sha256")),
        spatial=None if spatial is None or count < 2 else spatial.moments(),
        others=whole,
        stats=stats,
        seconds_per_image=seconds / count,
    )
