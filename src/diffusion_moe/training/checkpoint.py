"""Checkpoints: the full state of training as safetensors, written atomically and verified when read.

checkpoints/step-00001000/
    model.safetensors      weights and routing state
    ema.safetensors        their moving average
    optimizer.safetensors  AdamW's moments and step counts, by parameter name
    state.json             step, and size and SHA-256 of each file
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .step import TrainState

FORMAT = 1


class CheckpointError(ValueError):
    """A checkpoint is truncated, corrupt or another model's."""


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return folder / f"step-{step:08d}"


def checkpoints_in(folder: Path) -> list[Path]:
    """Complete checkpoints, the newest first."""
    return sorted((path for path in folder.glob("step-*") if path.name[5:].isdigit()), reverse=True)


def save_checkpoint(folder: Path, state: TrainState, keep: int) -> Path:
    """Write the state beside the older checkpoints, then drop all but the newest `keep` up to this step.

    The folder of a checkpoint appears under its name only when all of it is on the disk.
    """
    target = checkpoint_path(folder, state.step)
    partial = target.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tensors = {
        "model.safetensors": state.model.state_dict(),
        "ema.safetensors": state.ema.state_dict(),
        "optimizer.safetensors": _optimizer_tensors(state),
    }
    for name, content in tensors.items():
        _write(content, partial / name)
    manifest = {
        "format": FORMAT,
        "step": state.step,
        "files": {
            name: {"bytes": (partial / name).stat().st_size, "sha256": _sha256(partial / name)} for name in tensors
        },
    }
    (partial / "state.json").write_text(json.dumps(manifest, indent=2))
    _flush(partial / "state.json")
    shutil.rmtree(target, ignore_errors=True)  # there only if it was found corrupt
    partial.rename(target)
    _flush(folder)
    # Later ones are damaged, else we would have resumed there: they stay, and take no good one's place.
    good = [path for path in checkpoints_in(folder) if path <= target]
    for old in good[keep:]:
        shutil.rmtree(old)
    for leftover in folder.glob("step-*.partial"):
        shutil.rmtree(leftover)
    return target


def load_checkpoint(path: Path, state: TrainState) -> None:
    """Fill `state` from a checkpoint.

    Raises:
        CheckpointError: says what is wrong; `state` may then be partly filled, if the files are whole but do not fit.
    """
    manifest = verify(path)
    try:
        model, ema, optimizer = (
            load_file(path / name) for name in ("model.safetensors", "ema.safetensors", "optimizer.safetensors")
        )
        state.model.load_state_dict(model)
        state.ema.load_state_dict(ema)
        _restore_optimizer(state, optimizer)
    except (RuntimeError, KeyError, OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"checkpoint {path} does not fit the recipe's model: {reason}") from error
    state.step = manifest["step"]


def verify(path: Path) -> dict:
    """The manifest of a checkpoint whose files are all as they were written.

    Raises:
        CheckpointError: a file is missing, truncated or changed.
    """
    try:
        manifest = json.loads((path / "state.json").read_text())
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
        if manifest["format"] != FORMAT or not isinstance(manifest["step"], int):
            raise CheckpointError(f"checkpoint {path} has format {manifest['format']}; this version reads {FORMAT}")
    except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"checkpoint {path} has no readable state.json ({type(error).__name__})") from error
    for name, (size, digest) in files.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"checkpoint {path} lacks {name}")
        if file.stat().st_size != size:
            raise CheckpointError(f"checkpoint {path}: {name} has {file.stat().st_size} bytes of {size}")
        if _sha256(file) != digest:
            raise CheckpointError(f"checkpoint {path}: {name} is corrupt")
    return manifest


def load_latest(folder: Path, state: TrainState) -> tuple[Path | None, list[str]]:
    """Fill `state` from the newest good checkpoint.

    Returns:
        Its path (None if there is none) and one line for each newer one that could not be used.
    """
    problems: list[str] = []
    for path in checkpoints_in(folder):
        try:
            load_checkpoint(path, state)
        except CheckpointError as error:
            problems.append(str(error))
        else:
            return path, problems
    return None, problems


def _optimizer_tensors(state: TrainState) -> dict[str, Tensor]:
    entries = state.optimizer.state
    return {
        f"{moment}.{name}": value
        for name, parameter in state.model.named_parameters()
        for moment, value in entries[parameter].items()
    }


def _restore_optimizer(state: TrainState, tensors: dict[str, Tensor]) -> None:
    optimizer = state.optimizer
    optimizer.state.clear()
    for name, parameter in state.model.named_parameters():
        optimizer.state[parameter] = {
            "step": tensors[f"step.{name}"].to(parameter.device),
            **{m: tensors[f"{m}.{name}"].to(parameter.device) for m in ("exp_avg", "exp_avg_sq")},
        }


def _write(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:  # a full disk, mostly
        raise OSError(errno.EIO, f"cannot write the checkpoint ({error})", str(path)) from error
    _flush(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
