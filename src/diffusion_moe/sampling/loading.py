"""Weights, VAE and text encoder of a source, read from disk."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..log import Log
from ..models import Backbone, load_model
from ..models.trained import last_weights
from ..run_folder import RunFolder
from ..text import TextEncoder, load_encoder
from .source import WEIGHTS, Source

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


def best_device() -> torch.device:
    """The GPU if there is one: where models are sampled and texts are encoded."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_weights(source: Source) -> Backbone:
    """The model in eval mode, on the CPU.

    Raises:
        ValueError: its weights are missing or damaged.
    """
    if source.weights == "model":
        return last_weights(RunFolder(source.path), WEIGHTS)
    return load_model(source.weights_folder())


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
