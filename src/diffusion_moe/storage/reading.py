"""Reading checkpoints: checked first, then filled into tensors of any layout; and one file of some of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Generic, NamedTuple, Self, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .collective import CheckpointError, Collective, LostProcess, listed
from .files import Entry, flush_folder, sha256, write_safetensors
from .manifest import NAME, Manifest, SavedPiece, SavedTensor, check_digests, piece_key
from .plan import Layout, layouts_of
from .shards import Block, held_blocks, local_tensor, overlap
from .writing import checkpoints_in

T = TypeVar("T")


def read(
    path: Path,
    tensors: Mapping[str, Tensor],
    *,
    group: dist.ProcessGroup | None = None,
    optional: Callable[[str], bool] = lambda name: False,
) -> dict[str, Any]:
    """Fill tensors in place from a checkpoint; every process calls it with the same names.

    All files are checked first, each by one process; then each process reads what it holds of every tensor. The number
    of processes and the layouts may differ from those at saving.

    Args:
        tensors: plain or DTensors; all that the checkpoint holds, of the same shapes and dtypes.
        group: who takes part, see `Collective`.
        optional: of a tensor's name, whether it may be on one side alone: it then stays as it is, or is left out.

    Returns:
        What `write` was told about it.

    Raises:
        CheckpointError: on every process: the checkpoint is damaged, or not of these tensors, which are then untouched.
        LostProcess: another process died or hangs.
    """
    peers = Collective(path, group)
    try:
        manifest = peers.run_on_all("reading a manifest", lambda: Manifest.read(path))
        if len(set(peers.gather("comparing manifests", lambda: sha256(path / NAME)))) > 1:
            raise CheckpointError(f"the processes see different checkpoints at {path}; they must share one folder")
        peers.run_on_all("checking a checkpoint", lambda: _check_share(path, manifest, peers))
        peers.run_on_all(
            "comparing with a checkpoint", lambda: _check_fit(path, manifest, layouts_of(tensors), optional)
        )
        common = {name: tensor for name, tensor in tensors.items() if name in manifest.tensors}
        peers.run_on_all("reading a checkpoint", lambda: _fill(path, manifest, common))
    except LostProcess:
        raise
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be read ({error.strerror or error})") from error
    return manifest.about


class Found(NamedTuple, Generic[T]):
    """The newest checkpoint that could be used."""

    path: Path | None
    """None if there is none."""
    loaded: T | None
    """What loading it answered."""
    problems: list[str]
    """A line for each newer one that could not be used."""


def latest(folder: Path, load: Callable[[Path], T], *, group: dist.ProcessGroup | None = None) -> Found[T]:
    """Load the newest good checkpoint; every process calls it, and all come to the same one.

    Args:
        load: loads one, with `read` on all processes; what it raises as CheckpointError on one of them turns all to the
            next older.
    """
    peers = Collective(folder, group)
    problems: list[str] = []
    for path in peers.first("looking for checkpoints", lambda: checkpoints_in(folder)):
        try:
            return Found(path, peers.run_on_all("loading a checkpoint", lambda path=path: load(path)), problems)  # type: ignore[misc]
        except CheckpointError as error:
            problems.append(str(error))
    return Found(None, None, problems)


def export(path: Path, prefix: str, output: Path) -> None:
    """Write the tensors whose names begin with `prefix` into one safetensors file, without it; one process.

    It takes the memory of the largest tensor, appears under its name when it is whole, and is checked as in `read`.

    Raises:
        CheckpointError: the checkpoint is damaged. ValueError: no name begins so. OSError: the file cannot be written.
    """
    manifest = Manifest.read(path)
    chosen = {name: tensor for name, tensor in manifest.tensors.items() if name.startswith(prefix)}
    if not chosen:
        names = sorted({name.split(".")[0] for name in manifest.tensors})
        raise ValueError(f"no tensor of {path} begins with {prefix}; its names begin with {', '.join(names)}")
    check_digests(path, manifest.files)
    partial = output.with_name(f".{output.name}.partial")
    with _Pieces(path, manifest) as pieces:

        def entry(name: str, tensor: SavedTensor) -> Entry:
            def assemble() -> Tensor:
                full = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                pieces.fill(name, full)
                return full

            return Entry(name.removeprefix(prefix), tensor.dtype, tensor.shape, assemble)

        try:
            write_safetensors(partial, [entry(name, tensor) for name, tensor in chosen.items()])
            partial.replace(output)
        finally:
            partial.unlink(missing_ok=True)
    flush_folder(output.parent)


def _check_share(path: Path, manifest: Manifest, peers: Collective) -> None:
    by_size = sorted(manifest.files, key=lambda file: (-file.bytes, file.name))
    check_digests(path, tuple(by_size[peers.rank :: peers.size]))


def _check_fit(path: Path, manifest: Manifest, layouts: Mapping[str, Layout], optional: Callable[[str], bool]) -> None:
    problems = []
    lacking = sorted(name for name in layouts.keys() - manifest.tensors.keys() if not optional(name))
    excess = sorted(name for name in manifest.tensors.keys() - layouts.keys() if not optional(name))
    other = [
        name for name in layouts.keys() & manifest.tensors.keys() if layouts[name][:2] != manifest.tensors[name][:2]
    ]
    if lacking:
        problems.append(f"it lacks {listed(lacking)}")
    if excess:
        problems.append(f"it also holds {listed(excess)}")
    problems += [
        f"its {name} is {_kind(manifest.tensors[name])}, not {_kind(layouts[name])}" for name in sorted(other)[:3]
    ]
    if problems:
        raise CheckpointError(f"checkpoint {path} is of other tensors: {'; '.join(problems)}")


def _kind(tensor: Any) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tensor.shape}"


def _fill(path: Path, manifest: Manifest, tensors: Mapping[str, Tensor]) -> None:
    with _Pieces(path, manifest) as pieces:
        for name, tensor in tensors.items():
            pieces.fill(name, tensor)


class _Pieces:
    """The pieces of a checkpoint; files are mapped into memory when first used."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest
        self._files: dict[int, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *reason: object) -> None:
        self._stack.close()

    def fill(self, name: str, tensor: Tensor) -> None:
        """Copy what this process holds of a tensor into it."""
        saved, local = self.manifest.tensors[name], local_tensor(tensor)
        for block, place in held_blocks(tensor).items():
            for piece in saved.pieces:
                common = overlap(block, piece.block)
                if common is not None:
                    source = self._part(piece, piece_key(name, saved.shape, piece.block), common, saved.dtype)
                    local[place][common.within(block)].copy_(source)

    def _part(self, piece: SavedPiece, key: str, part: Block, dtype: torch.dtype) -> Tensor:
        index, name = piece.file, self.manifest.files[piece.file].name
        try:
            if index not in self._files:
                self._files[index] = self._stack.enter_context(safe_open(self.path / name, framework="pt"))
            file = self._files[index]
            found = file.get_tensor(key) if part == piece.block else file.get_slice(key)[part.within(piece.block)]
        except SafetensorError as error:
            raise CheckpointError(f"checkpoint {self.path}: {name} cannot be read ({error})") from error
        if (tuple(found.shape), found.dtype) != (part.sizes, dtype):
            raise CheckpointError(f"checkpoint {self.path}: {key} in {name} is not what the manifest says")
        return found
