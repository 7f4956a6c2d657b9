"""Writing checkpoints: by all processes, atomically, and dropping old ones."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..storage import manifest as manifests
from .collective import CheckpointError, Collective, LostProcess
from .files import Entry, FileRecord, flush_folder, write_safetensors
from .manifest import Manifest, SavedPiece, SavedTensor, check_about, check_sizes, piece_key
from .plan import Plan, layouts_of, make_plan
from .shards import Block, held_blocks, local_tensor

PARTIAL, REPLACED = ".partial", ".replaced"


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return folder / f"step-{step:08d}"


def checkpoints_in(folder: Path) -> list[Path]:
    """Checkpoints under their final names, the newest first."""
    return sorted((path for path in folder.glob("step-*") if path.name[5:].isdigit()), key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """The step that a checkpoint's name tells."""
    return int(path.name[5:])


def write(
    folder: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    about: Mapping[str, Any],
    *,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Write a checkpoint; every process calls it with the same names.

    The checkpoint appears under its name when all of it is on the disk, or not at all; an older one of the same step is
    replaced then. What earlier attempts left unfinished in the folder is removed.

    Args:
        folder: must be the same for all processes; on many nodes, a shared file system.
        tensors: plain ones (the same on all processes, written once) and DTensors (each piece is written once).
        about: what else is to be remembered, as JSON; rank 0's counts.
        group: who takes part, see `Collective`.

    Returns:
        Where it is.

    Raises:
        OSError, CheckpointError: on every process, if any fails; nothing is left of the checkpoint.
        LostProcess: an OSError: another process died or hangs.
    """
    peers = Collective(checkpoint_path(folder, step), group)
    said = peers.run_on_all("describing a checkpoint", lambda: check_about(about))
    plan = make_plan(peers.gather("planning a checkpoint", lambda: layouts_of(tensors)), peers.rank)
    if any(tensor.is_cuda for tensor in tensors.values()):
        torch.cuda.synchronize()  # other threads read them
    return commit(peers, step, plan, pieces_of(plan, peers.rank, tensors), said)


class Piece(NamedTuple):
    """A box that this process writes."""

    key: str
    tensor: Tensor
    """Of the box's size, on any device."""

    def entry(self) -> Entry:
        return Entry(self.key, self.tensor.dtype, tuple(self.tensor.shape), lambda: self.tensor)


def pieces_of(plan: Plan, rank: int, tensors: Mapping[str, Tensor]) -> list[list[Piece]]:
    """What a process writes, by file, as views of its tensors."""

    def piece(name: str, block: Block) -> Piece:
        place = held_blocks(tensors[name])[block]
        view = local_tensor(tensors[name])[place].reshape(block.sizes)
        return Piece(piece_key(name, plan.layouts[name].shape, block), view)

    return [[piece(share.name, share.block) for share in part] for part in plan.parts[rank]]


def commit(peers: Collective, step: int, plan: Plan, parts: Sequence[Sequence[Piece]], about: dict[str, Any]) -> Path:
    """Write the pieces of a plan and publish them as a checkpoint (see `write`)."""
    target = peers.path
    partial = target.with_suffix(PARTIAL)
    try:
        peers.first("making room for a checkpoint", lambda: _prepare(partial))
        files = peers.gather("writing a checkpoint", lambda: _write_parts(partial, peers.rank, parts))
        # Every process but the first has nothing left to do, and waits for its answer.
        peers.first("publishing a checkpoint", lambda: _publish(target, partial, _manifest(step, about, plan, files)))
    except Exception as error:
        _clear_away(peers, partial, lost=isinstance(error, LostProcess))
        if isinstance(error, OSError):
            kind = LostProcess if isinstance(error, LostProcess) else OSError
            reason = f"cannot write the checkpoint ({error.strerror or error})"
            raise kind(error.errno or errno.EIO, reason, str(target)) from error
        raise
    return target


def prune(folder: Path, keep: int, keep_every: int = 0, newest: Path | None = None) -> None:
    """Drop old checkpoints: the newest `keep` stay, and those whose step is a multiple of `keep_every`; one process.

    Checkpoints that are visibly damaged take no good one's place.

    Args:
        keep_every: 0 keeps none for its step.
        newest: where to count from; later ones stay and do not count. After training went back to this one they are
            damaged, or of a way not taken.
    """
    if keep < 1 or keep_every < 0:
        raise ValueError(f"keep is {keep} and keep_every {keep_every}; keep at least 1, and every 0th or more")
    good = 0
    for path in checkpoints_in(folder):
        step = step_of(path)
        if newest is not None and step > step_of(newest):
            continue
        if good < keep:
            good += _looks_whole(path)
        elif not (keep_every and step % keep_every == 0):
            # Under a name that the next save clears away, should this be interrupted.
            doomed = path.with_suffix(PARTIAL)
            _remove(doomed)
            _remove(path.rename(doomed))


def _looks_whole(path: Path) -> bool:
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
        else:  # interrupted between the two renamings of `_publish`
            aside.rename(aside.with_suffix(""))
    partial.mkdir()


def _write_parts(partial: Path, rank: int, parts: Sequence[Sequence[Piece]]) -> list[FileRecord]:
    def write_part(index: int) -> FileRecord:
        path = partial / f"tensors-{rank:05d}-{index:03d}.safetensors"
        return write_safetensors(path, [piece.entry() for piece in parts[index]])

    if not partial.is_dir():
        reason = "rank 0 made this folder, but it is not here; all processes must share one"
        raise OSError(errno.ENOENT, reason, str(partial))
    with ThreadPoolExecutor(manifests.THREADS) as pool:
        return list(pool.map(write_part, range(len(parts))))


def _manifest(step: int, about: dict[str, Any], plan: Plan, files: list[list[FileRecord]]) -> Manifest:
    pieces: dict[str, list[SavedPiece]] = {name: [] for name in plan.layouts}
    for index, part in enumerate(part for parts in plan.parts for part in parts):
        for share in part:
            pieces[share.name].append(SavedPiece(index, share.block))
    tensors = {
        name: SavedTensor(layout.dtype, layout.shape, tuple(pieces[name])) for name, layout in plan.layouts.items()
    }
    return Manifest(step, about, tuple(record for records in files for record in records), tensors)


def _publish(target: Path, partial: Path, manifest: Manifest) -> None:
    try:
        check_sizes(partial, manifest.files)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; all processes must share one folder") from error
    with (partial / manifests.NAME).open("w") as file:
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


def _clear_away(peers: Collective, partial: Path, lost: bool) -> None:
    """Remove a checkpoint that failed; nobody goes on before it is gone, unless a process is lost."""
    if not lost:
        peers.first("clearing away a failed checkpoint", lambda: shutil.rmtree(partial, ignore_errors=True))
    elif peers.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
