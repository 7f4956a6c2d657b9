"""Latent space of a model: the VAE, and the scaling of its latents."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LatentScaling:
    """Scaling of latents for a model: (latent - shift) * scale. One number for all channels, or one a channel."""

    shift: tuple[float, ...]
    scale: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.shift or len(self.shift) != len(self.scale) or 0.0 in self.scale:
            raise ValueError(f"shift is {self.shift} and scale {self.scale}; give as many of each, and no scale of 0")

    @classmethod
    def of_vae(cls, config: Mapping[str, Any]) -> LatentScaling:
        """Scaling from an AutoencoderKL's config.

        With `latents_mean` and `latents_std` (SDXL's convention) a channel's latents become
        (z - mean) * scaling_factor / std, else (z - shift_factor) * scaling_factor.
        """
        factor = config["scaling_factor"]
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is not None and std is not None:
            return cls(tuple(map(float, mean)), tuple(factor / float(s) for s in std))
        return cls((float(config.get("shift_factor") or 0.0),), (float(factor),))

    def vae_settings(self) -> dict[str, Any]:
        """Fields of an AutoencoderKL's config for this scaling."""
        fields = {"scaling_factor": 1.0, "shift_factor": None, "latents_mean": None, "latents_std": None}
        if len(self.scale) == 1:
            return fields | {"scaling_factor": self.scale[0], "shift_factor": self.shift[0] or None}
        return fields | {"latents_mean": list(self.shift), "latents_std": [1 / scale for scale in self.scale]}

    def scaled(self, latents: Tensor) -> Tensor:
        """Scale a VAE's latents, (B, C, H, W), for the model."""
        return (latents - _channels(self.shift, latents)) * _channels(self.scale, latents)

    def unscaled(self, x: Tensor) -> Tensor:
        """Undo `scaled`, for the VAE's decoder."""
        return x / _channels(self.scale, x) + _channels(self.shift, x)


def _channels(values: tuple[float, ...], like: Tensor) -> Tensor | float:
    if len(values) == 1:
        return values[0]
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None, None]


@dataclass(frozen=True)
class LatentSpace:
    """Latent space of a VAE, with the scaling for the model."""

    vae: str
    """Hub id or folder of the AutoencoderKL."""
    encoder_sha256: str
    """Hash of the encoder's weights; VAEs that differ only in their decoders share it."""
    scaling: LatentScaling

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> LatentSpace:
        """The space from `dataclasses.asdict`; KeyError, TypeError or ValueError if it is damaged."""
        shift, scale = (tuple(map(float, content["scaling"][name])) for name in ("shift", "scale"))
        return cls(str(content["vae"]), str(content["encoder_sha256"]), LatentScaling(shift, scale))

    def claim(self, vae: nn.Module, name: str) -> None:
        """Set a loaded AutoencoderKL's scaling to this one.

        Raises:
            ValueError: the VAE has another encoder.
        """
        if encoder_sha256(vae) != self.encoder_sha256:
            raise ValueError(
                f"the VAE {name} has another encoder than {self.vae}, whose latents the model was trained on; give "
                "that one, or one with the same encoder, with --vae"
            )
        vae.register_to_config(**self.scaling.vae_settings())  # type: ignore[operator]  # a method of diffusers


def encoder_sha256(vae: nn.Module) -> str:
    """A hash of the weights that determine the latents, in float32."""
    digest = hashlib.sha256()
    for name, tensor in sorted(vae.state_dict().items()):
        if name.startswith(("encoder.", "quant_conv.")):
            digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
