"""Writing of checkpoints by all processes, atomically, and deletion of old ones."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from .collective import CheckpointError, Collective, LostProcess
from .files import Entry, FileRecord, flush_folder, write_safetensors
from .manifest import NAME, THREADS, Manifest, SavedShard, SavedTensor, check_sizes, shard_key
from .plan import WritePlan
from .shards import Block, held_blocks, local_tensor

PARTIAL, REPLACED = ".partial", ".replaced"


def checkpoint_path(folder: Path, step: int) -> Path:
    """Folder of the checkpoint of a step."""
    return folder / f"step-{step:08d}"


def checkpoints_in(folder: Path) -> list[Path]:
    """Complete checkpoints, the newest first.

    A checkpoint may be under the name that it has while another of its step replaces it: if that was interrupted, it
    is the only one of its step (see `_publish`).
    """
    final = [path for path in folder.glob("step-*") if path.name[5:].isdigit()]
    aside = [path for path in folder.glob(f"step-*{REPLACED}") if not path.with_suffix("").exists()]
    return sorted(final + [path for path in aside if path.stem[5:].isdigit()], key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """Step in a checkpoint's name."""
    return int(path.stem[5:])


class Shard(NamedTuple):
    """A block that this process writes."""

    key: str
    tensor: Tensor
    """Its values, on any device."""

    def entry(self) -> Entry:
        return Entry(self.key, self.tensor.dtype, tuple(self.tensor.shape), lambda: self.tensor)


def shards_of(plan: WritePlan, rank: int, tensors: Mapping[str, Tensor]) -> list[list[Shard]]:
    """The shards that a process writes, by file, as views of its tensors."""

    def shard(name: str, block: Block) -> Shard:
        slices = held_blocks(tensors[name])[block]
        view = local_tensor(tensors[name])[slices].reshape(block.sizes)
        return Shard(shard_key(name, plan.layouts[name].shape, block), view)

    return [[shard(item.name, item.block) for item in file] for file in plan.files[rank]]


def commit(
    collective: Collective, step: int, plan: WritePlan, files: Sequence[Sequence[Shard]], metadata: dict[str, Any]
) -> Path:
    """Write the shards of a plan and rename the folder to its final name.

    Raises:
        OSError, CheckpointError: on every process, if any fails; nothing is left of the checkpoint.
        LostProcess: an OSError: another process ended or hangs.
    """
    target = collective.path
    partial = target.with_suffix(PARTIAL)
    try:
        collective.run_on_main("making room for a checkpoint", lambda: _prepare(partial))
        records = collective.gather("writing a checkpoint", lambda: _write_files(partial, collective.rank, files))
        collective.run_on_main(
            "renaming a checkpoint", lambda: _publish(target, partial, _manifest(step, metadata, plan, records))
        )
    except Exception as error:
        _remove_failed(collective, partial, lost=isinstance(error, LostProcess))
        if isinstance(error, OSError):
            kind = LostProcess if isinstance(error, LostProcess) else OSError
            reason = f"cannot write the checkpoint ({error.strerror or error})"
            raise kind(error.errno or errno.EIO, reason, str(target)) from error
        raise
    return target


def prune(folder: Path, keep: int, keep_every: int = 0, newest: Path | None = None) -> None:
    """Delete old checkpoints, except the newest `keep` and those whose step is a multiple of `keep_every`; one process.

    Checkpoints that are visibly damaged do not count among the newest.

    Args:
        keep: number of the newest.
        keep_every: step interval; 0 keeps none for its step.
        newest: the checkpoint to count from; later ones are kept and do not count. They are damaged, or were written
            before training rolled back to this one.
    """
    if keep < 1 or keep_every < 0:
        raise ValueError(f"keep is {keep} and keep_every {keep_every}; they must be at least 1 and 0")
    good = 0
    for path in checkpoints_in(folder):
        step = step_of(path)
        if newest is not None and step > step_of(newest):
            continue
        if good < keep:
            good += _looks_complete(path)
        elif not (keep_every and step % keep_every == 0):
            # If this is interrupted, the next save removes the folder by its new name.
            doomed = path.with_suffix(PARTIAL)
            _remove(doomed)
            _remove(path.rename(doomed))


def _looks_complete(path: Path) -> bool:
    try:
        check_sizes(path, Manifest.read(path).files)
    except CheckpointError:
        return False
    return True


def _prepare(partial: Path) -> None:
    partial.parent.mkdir(parents=True, exist_ok=True)
    for leftover in partial.parent.glob(f"step-*{PARTIAL}"):
        _remove(leftover)
    for aside in partial.parent.glob(f"step-*{REPLACED}"):
        if aside.with_suffix("").exists():
            _remove(aside)
        else:  # interrupted between the two renames of `_publish`
            aside.rename(aside.with_suffix(""))
    partial.mkdir()


def _write_files(partial: Path, rank: int, files: Sequence[Sequence[Shard]]) -> list[FileRecord]:
    def write_file(index: int) -> FileRecord:
        path = partial / f"tensors-{rank:05d}-{index:03d}.safetensors"
        return write_safetensors(path, [shard.entry() for shard in files[index]])

    if not partial.is_dir():
        reason = "rank 0 created this folder, but it is missing here; all processes must share one"
        raise OSError(errno.ENOENT, reason, str(partial))
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(write_file, range(len(files))))


def _manifest(step: int, metadata: dict[str, Any], plan: WritePlan, records: list[list[FileRecord]]) -> Manifest:
    shards: dict[str, list[SavedShard]] = {name: [] for name in plan.layouts}
    for index, file in enumerate(itertools.chain.from_iterable(plan.files)):
        for item in file:
            shards[item.name].append(SavedShard(index, item.block))
    tensors = {
        name: SavedTensor(layout.dtype, layout.shape, tuple(shards[name])) for name, layout in plan.layouts.items()
    }
    return Manifest(step, metadata, tuple(itertools.chain.from_iterable(records)), tensors)


def _publish(target: Path, partial: Path, manifest: Manifest) -> None:
    try:
        check_sizes(partial, manifest.files)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; all processes must share one folder") from error
    with (partial / NAME).open("w") as file:
        file.write(manifest.to_text())
        file.flush()
        os.fsync(file.fileno())
    flush_folder(partial)
    aside = target.with_suffix(REPLACED)
    if target.exists():
        target.rename(aside)
    partial.rename(target)
    flush_folder(target.parent)
    _remove(aside)


def _remove_failed(collective: Collective, partial: Path, lost: bool) -> None:
    """Remove a checkpoint that failed; all processes wait for that, unless one is lost."""
    if not lost:
        collective.run_on_main("removing a failed checkpoint", lambda: shutil.rmtree(partial, ignore_errors=True))
    elif collective.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
