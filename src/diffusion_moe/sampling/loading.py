"""Weights, VAE and text encoder of a source, read from disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..log import Log
from ..models import Backbone, load_model
from ..models.trained import last_weights, newest_checkpoint
from ..run_folder import EMA_MODEL, ORIGIN, RunFolder, ema_name
from ..storage import step_of
from ..text import TextEncoder, load_encoder
from .source import Source

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

CONVERSION = "conversion.json"
"""File of a converted folder: where its weights came from."""
WEIGHTS = "--weights"
"""The option that chooses among a run's weights, for messages."""


def best_device() -> torch.device:
    """The GPU if there is one: where models are sampled and texts are encoded."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def weights_metadata(source: Source) -> dict[str, Any]:
    """Training steps and EMA decay of the weights, or the checkpoint that they were converted from.

    Raises:
        ValueError: the run has no such weights.
    """
    if source.weights == "model":
        checkpoint = newest_checkpoint(RunFolder(source.path), WEIGHTS)
        return {"training_steps": step_of(checkpoint), "ema_decay": None}
    for file in (_weights_folder(source) / ORIGIN, source.path / CONVERSION):
        if file.is_file():
            return json.loads(file.read_text())
    return {}


def load_weights(source: Source) -> Backbone:
    """The model in eval mode, on the CPU."""
    if source.weights == "model":
        return last_weights(RunFolder(source.path), WEIGHTS)
    return load_model(_weights_folder(source))


def _weights_folder(source: Source) -> Path:
    """Folder of the EMA weights, or of those of another decay."""
    weights, remedy = source.weights, "choose ema or model"
    if weights == "ema":
        return source.model_folder
    try:
        folder = RunFolder(source.path).ema_model(ema_name(weights))
    except ValueError as error:
        raise ValueError(f"weights is {weights}; {remedy}, or the decay of a further EMA") from error
    if not folder.is_dir():
        kept = sorted(found.name.removeprefix(EMA_MODEL) for found in source.path.glob(f"{EMA_MODEL}*"))
        more = f", or the further EMA {' or '.join(kept)}" if kept else ": it has no further EMA"
        if weights.startswith("std"):
            more += f"; `diffusion-moe ema {source.path} --std {weights[3:]}` makes it of snapshots"
        raise ValueError(f"weights is {weights}, but {source.path} has no such EMA; {remedy}{more}")
    return folder


def load_decoder(source: Source) -> AutoencoderKL | None:
    """The VAE that decodes the model's latents, in eval mode on the CPU; None without one.

    Raises:
        ValueError: it cannot be loaded, or does not fit the model's latents.
    """
    name, space = source.vae, source.latent_space
    if name is None:
        return None
    try:
        vae = load_vae(name)
    except ValueError as error:
        if space is None or name != space.vae:
            raise
        raise ValueError(f"{error}; if it was moved, give its folder with --vae") from error
    if space is not None:
        space.claim(vae, name)
    if vae.config.latent_channels != source.config.in_channels:
        raise ValueError(
            f"the VAE {name} has {vae.config.latent_channels} latent channels, but the model "
            f"{source.config.in_channels}; give the VAE that encoded its latents"
        )
    return vae


def load_text_encoder(source: Source, name: str | None = None, warn: Log | None = None) -> TextEncoder:
    """The encoder for the model's prompts, on the best device.

    Args:
        name: folder or hub id of the encoder; None: where training or conversion left it.
        warn: called when prompts are cut.

    Raises:
        ValueError: there is none, or it is not the one the model was trained with.
    """
    space = source.text_space
    name = name or (str(source.path) if space is None else space.encoder)
    options: dict[str, Any] = {} if warn is None else {"warn": warn}
    try:
        if space is None:
            encoder = load_encoder(name, source.config.text_length, **options)
        else:
            encoder = load_encoder(name, space.length, space.precision, **options)
    except ValueError as error:
        raise ValueError(f"{error}; if it was moved, give its folder with --text_encoder") from error
    if space is not None and encoder.sha256() != space.sha256:
        raise ValueError(
            f"the text encoder {name} is not the one of {space.encoder} that the model was trained with; give that "
            "one with --text_encoder"
        )
    return encoder.to(best_device())


def load_vae(name: str) -> AutoencoderKL:
    """An AutoencoderKL by folder, hub id, or hub id and folder in it (OWNER/NAME/vae), in eval mode on the CPU.

    Raises:
        ValueError: there is none, or its weights are no safetensors.
    """
    from diffusers import AutoencoderKL

    owner, _, rest = name.partition("/")
    repository, _, folder = rest.partition("/")
    inside = {"subfolder": folder} if folder and owner and not Path(name).exists() else {}
    place = f"{owner}/{repository}" if inside else name
    try:
        return AutoencoderKL.from_pretrained(place, use_safetensors=True, **inside).eval()
    except (OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        if ".safetensors" in reason:  # there may be a pickled file, which could run code
            reason += "; only safetensors are read: load another file with diffusers and save it by save_pretrained"
        raise ValueError(f"cannot load the VAE {name}: {reason}") from error
