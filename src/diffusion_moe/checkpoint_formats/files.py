"""Files of reference checkpoints: finding, reading without running code, and writing."""

from __future__ import annotations

import argparse
import os
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .layout import State
from .refusals import refusal

Weights = Literal["ema", "ema2", "model"]
ENDINGS = (".pt", ".pth", ".safetensors", ".bin", ".ckpt")
KEYS: dict[str, tuple[str, ...]] = {"ema": ("ema", "model_ema1"), "ema2": ("model_ema2",), "model": ("model",)}
"""Keys of each set of weights in reference files."""
SAVE = "save the model's state_dict() with torch.save"
FORBIDDEN = ("Unsupported global", "unsupported GLOBAL")
"""Beginnings of torch.load's errors on classes and functions that it does not trust."""
WRAPPERS = ("module.", "_orig_mod.", "net.")
"""Prefixes of every name from DistributedDataParallel, torch.compile and JiT's denoiser."""


class Checkpoint(NamedTuple):
    """Content of a reference file."""

    state: State
    weights: str
    """Key of the weights; "all" if the file has nothing else."""
    arguments: dict[str, Any]
    """Arguments of the training command; empty if they were not saved."""


def find_file(source: str, name: str | None = None) -> Path:
    """Path of a checkpoint file.

    Args:
        source: the file, a folder that contains it, or a hub id, which is downloaded with its YAML files.
        name: name of the file in the folder or repository.

    Raises:
        ValueError: there is none, or there are several.
    """
    path = Path(source)
    if path.is_file():
        return path
    if name is not None and (Path(name).is_absolute() or ".." in Path(name).parts):
        raise ValueError(f"--file is {name}; give a name inside {source}")
    folder = path if path.is_dir() else _download(source, name)
    files = sorted(file for file in folder.rglob(name or "*") if file.suffix in ENDINGS and file.is_file())
    if not files:
        remedy = f"give a file, or a folder with a file, that ends in {', '.join(ENDINGS)}"
        raise ValueError(f"{source} holds no checkpoint file{f' {name}' if name else ''}; {remedy}")
    if len(files) != 1:
        found = ", ".join(str(file.relative_to(folder)) for file in files[:8])
        raise ValueError(f"{source} holds {len(files)} checkpoint files ({found}); name one of them with --file")
    return files[0]


def _download(source: str, name: str | None) -> Path:
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise ValueError(f"there is no file or folder {source}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.yaml", "*.yml", name] if name else ["*.yaml", "*.yml", *(f"*{ending}" for ending in ENDINGS)]
    try:
        return Path(snapshot_download(source, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"there is no folder {source}, and it cannot be downloaded from the hub: {reason}") from error


def read_checkpoint(path: Path, weights: Weights = "ema", trust_pickle: bool = False) -> Checkpoint:
    """Read one set of weights.

    Args:
        trust_pickle: read a file with more than tensors, which can run any code.

    Raises:
        ValueError: the file is damaged, lacks these weights, or needs pickle and is not trusted.
    """
    content = _read(path, trust_pickle)
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a value of type {type(content).__name__}, no dictionary of tensors; {SAVE}")
    if _is_state(content):
        if weights == "ema2":
            raise ValueError(f"{path} holds one set of weights; remove --weights {weights}")
        return Checkpoint(_unwrapped(content), "all", {})
    key = next((key for key in KEYS[weights] if key in content), None)
    if key is None:
        there = [name for name, keys in KEYS.items() if any(key in content for key in keys)]
        if not there:
            found = ", ".join(str(name) for name in list(content)[:5])
            raise ValueError(f"{path} holds {f'no weights, only {found[:100]}' if found else 'nothing'}; {SAVE}")
        raise ValueError(f"{path} has no {weights} weights; choose with --weights from {', '.join(there)}")
    state, arguments = content[key], content.get("args", {})
    if not _is_state(state):
        raise ValueError(f"{path}: {key} is no dictionary of tensors; {SAVE}")
    arguments = vars(arguments) if isinstance(arguments, argparse.Namespace) else arguments
    return Checkpoint(_unwrapped(state), key, dict(arguments) if isinstance(arguments, Mapping) else {})


def _read(path: Path, trust_pickle: bool) -> Any:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # Mapped, not read: the weights may be a quarter of a file with optimizer and EMA.
        mapped = zipfile.is_zipfile(path)  # torch's format since 1.6
        # Reference files contain their arguments as a Namespace.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about formats that are refused below
            return torch.load(path, map_location="cpu", weights_only=not trust_pickle, mmap=mapped)
    except Exception as error:  # torch may raise anything for a file that is no checkpoint
        if not trust_pickle and any(text in str(error) for text in FORBIDDEN):
            raise ValueError(
                f"{path} holds more than tensors, and reading it could run code; add --trust-pickle if you trust its "
                "author"
            ) from error
        raise ValueError(refusal(path, error)) from error


def _is_state(content: Any) -> bool:
    """True for a dictionary of tensors by name."""
    if not isinstance(content, Mapping) or not content:
        return False
    return all(isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items())


def _unwrapped(state: Mapping[str, Tensor]) -> State:
    names = list(state)
    for wrapper in WRAPPERS:
        if all(name.startswith(wrapper) for name in names):
            return _unwrapped({name.removeprefix(wrapper): value for name, value in state.items()})
    return dict(state)


def write_checkpoint(path: Path, kind: str, state: State) -> None:
    """Write weights as the reference code of a format reads them; a `.safetensors` file has the tensors alone.

    The same weights are written under every key that the code reads.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        if path.suffix == ".safetensors":
            save_file(state, partial)
        elif kind in ("dit", "sit", "dit-moe"):
            torch.save(state, partial)
        elif kind == "jit":
            named = {f"net.{name}": value for name, value in state.items()}
            torch.save(dict.fromkeys(("model", "model_ema1", "model_ema2"), named), partial)
        else:
            torch.save(dict.fromkeys(("model", "ema"), state), partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
