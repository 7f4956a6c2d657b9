"""Reading of checkpoints: checked first, then copied into tensors of any layout or exported into one file."""

from __future__ import annotations

import functools
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
from .manifest import NAME, Manifest, SavedShard, check_digests, shard_key
from .plan import TensorLayout, layouts_of
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

    All files are checked first, each by one process; then each process reads its own shards. The number of processes
    and the layouts may differ from those at saving.

    Args:
        tensors: plain or DTensors: all that the checkpoint holds, with the same shapes and dtypes.
        group: the reading processes, see `Collective`.
        optional: returns whether the tensor of a name may be missing on one side; it is then unchanged, or ignored.

    Returns:
        The metadata that it was saved with.

    Raises:
        CheckpointError: on every process: the checkpoint is damaged, or of other tensors; `tensors` are unchanged.
        LostProcess: another process ended or hangs.
    """
    collective = Collective(path, group)
    try:
        manifest = collective.run_on_all("reading a manifest", lambda: Manifest.read(path))
        if len(set(collective.gather("comparing manifests", lambda: sha256(path / NAME)))) > 1:
            raise CheckpointError(f"the processes see different checkpoints at {path}; they must share one folder")
        collective.run_on_all("checking a checkpoint", lambda: _check_own_files(path, manifest, collective))
        collective.run_on_all(
            "comparing with a checkpoint", lambda: _check_tensors(path, manifest, layouts_of(tensors), optional)
        )
        common = {name: tensor for name, tensor in tensors.items() if name in manifest.tensors}
        collective.run_on_all("reading a checkpoint", lambda: _fill(path, manifest, common))
    except LostProcess:
        raise
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be read ({error.strerror or error})") from error
    return manifest.metadata


class LoadedCheckpoint(NamedTuple, Generic[T]):
    """The newest checkpoint that could be loaded."""

    path: Path | None
    """None if no checkpoint could be loaded."""
    loaded: T | None
    """Result of `load`."""
    problems: list[str]
    """A line for each newer one that could not be loaded."""


def latest(folder: Path, load: Callable[[Path], T], *, group: dist.ProcessGroup | None = None) -> LoadedCheckpoint[T]:
    """Load the newest good checkpoint; every process calls it, and all load the same one.

    Args:
        load: loads one, with `read` on all processes; if it raises CheckpointError on any of them, all try the next
            older one.
    """
    collective = Collective(folder, group)
    problems: list[str] = []
    for path in collective.run_on_main("looking for checkpoints", lambda: checkpoints_in(folder)):
        try:
            loaded = collective.run_on_all("loading a checkpoint", functools.partial(load, path))
        except CheckpointError as error:
            problems.append(str(error))
        else:
            return LoadedCheckpoint(path, loaded, problems)
    return LoadedCheckpoint(None, None, problems)


def export(path: Path, prefix: str, output: Path) -> None:
    """Write the tensors whose names begin with `prefix` into one safetensors file, without the prefix; one process.

    Takes the memory of the largest tensor. The checkpoint is checked first; the file appears when it is complete.

    Raises:
        CheckpointError: the checkpoint is damaged.
        ValueError: no name has the prefix.
        OSError: the file cannot be written.
    """
    manifest = Manifest.read(path)
    chosen = {name: tensor for name, tensor in manifest.tensors.items() if name.startswith(prefix)}
    if not chosen:
        names = sorted({name.split(".")[0] for name in manifest.tensors})
        raise ValueError(f"no tensor of {path} begins with {prefix}; its names begin with {', '.join(names)}")
    check_digests(path, manifest.files)
    partial = output.with_name(f".{output.name}.partial")
    with _ShardReader(path, manifest) as reader:
        entries = [
            Entry(name.removeprefix(prefix), tensor.dtype, tensor.shape, functools.partial(reader.load, name))
            for name, tensor in chosen.items()
        ]
        try:
            write_safetensors(partial, entries)
            partial.replace(output)
        finally:
            partial.unlink(missing_ok=True)
    flush_folder(output.parent)


def _check_own_files(path: Path, manifest: Manifest, collective: Collective) -> None:
    by_size = sorted(manifest.files, key=lambda file: (-file.bytes, file.name))
    check_digests(path, tuple(by_size[collective.rank :: collective.size]))


def _check_tensors(
    path: Path, manifest: Manifest, layouts: Mapping[str, TensorLayout], optional: Callable[[str], bool]
) -> None:
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
    with _ShardReader(path, manifest) as reader:
        for name, tensor in tensors.items():
            reader.fill(name, tensor)


class _ShardReader:
    """Reader of a checkpoint's shards; files are mapped into memory when first used."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest
        self._files: dict[int, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *reason: object) -> None:
        self._stack.close()

    def load(self, name: str) -> Tensor:
        """A whole tensor, on the CPU."""
        saved = self.manifest.tensors[name]
        tensor = torch.empty(saved.shape, dtype=saved.dtype, device="cpu")
        self.fill(name, tensor)
        return tensor

    def fill(self, name: str, tensor: Tensor) -> None:
        """Fill this process' blocks of a tensor."""
        saved, local = self.manifest.tensors[name], local_tensor(tensor)
        for block, slices in held_blocks(tensor).items():
            for shard in saved.shards:
                common = overlap(block, shard.block)
                if common is not None:
                    source = self._read(shard, shard_key(name, saved.shape, shard.block), common, saved.dtype)
                    local[slices][common.within(block)].copy_(source)

    def _read(self, shard: SavedShard, key: str, block: Block, dtype: torch.dtype) -> Tensor:
        index, name = shard.file, self.manifest.files[shard.file].name
        try:
            if index not in self._files:
                self._files[index] = self._stack.enter_context(safe_open(self.path / name, framework="pt"))
            file = self._files[index]
            found = file.get_tensor(key) if block == shard.block else file.get_slice(key)[block.within(shard.block)]
        except SafetensorError as error:
            raise CheckpointError(f"checkpoint {self.path}: {name} cannot be read ({error})") from error
        if (tuple(found.shape), found.dtype) != (block.sizes, dtype):
            raise CheckpointError(f"checkpoint {self.path}: shape or dtype of {key} in {name} is not the manifest's")
        return found
