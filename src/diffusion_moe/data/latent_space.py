"""Which latents a model works on: the VAE they are of, and how they are scaled."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LatentScaling:
    """How a model sees latents: (latent - shift) * scale. One number for all channels, or one a channel."""

    shift: tuple[float, ...]
    scale: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.shift or len(self.shift) != len(self.scale) or 0.0 in self.scale:
            raise ValueError(f"shift is {self.shift} and scale {self.scale}; give as many of each, none of scale 0")

    @classmethod
    def of_vae(cls, config: Mapping[str, Any]) -> LatentScaling:
        """The scaling that an AutoencoderKL's config asks for.

        With `latents_mean` and `latents_std` (SDXL's convention) a channel's latents become
        (z - mean) * scaling_factor / std, else (z - shift_factor) * scaling_factor.
        """
        factor, mean, std = config["scaling_factor"], config.get("latents_mean"), config.get("latents_std")
        if mean is not None and std is not None:
            return cls(tuple(map(float, mean)), tuple(factor / float(s) for s in std))
        return cls((float(config.get("shift_factor") or 0.0),), (float(factor),))

    def vae_settings(self) -> dict[str, Any]:
        """The fields of an AutoencoderKL's config that ask for this scaling."""
        if len(self.scale) == 1:
            own = {"scaling_factor": self.scale[0], "shift_factor": self.shift[0] or None}
            return own | {"latents_mean": None, "latents_std": None}
        std = [1 / scale for scale in self.scale]
        return {"scaling_factor": 1.0, "shift_factor": None, "latents_mean": list(self.shift), "latents_std": std}

    def scaled(self, latents: Tensor) -> Tensor:
        """A VAE's latents, (B, C, H, W), as a model sees them."""
        return (latents - _channels(self.shift, latents)) * _channels(self.scale, latents)

    def unscaled(self, x: Tensor) -> Tensor:
        """The way back: what a VAE decodes."""
        return x / _channels(self.scale, x) + _channels(self.shift, x)


def _channels(values: tuple[float, ...], like: Tensor) -> Tensor | float:
    if len(values) == 1:
        return values[0]
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None, None]


@dataclass(frozen=True)
class LatentSpace:
    """The space that a VAE encodes into, with the scaling in which a model sees it."""

    vae: str
    """Hub id or folder of the AutoencoderKL."""
    encoder_sha256: str
    """Of the weights that make the latents; VAEs that differ in their decoders alone share it."""
    scaling: LatentScaling

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> LatentSpace:
        """From what `to_dict` gave; KeyError, TypeError or ValueError where that is damaged."""
        shift, scale = (tuple(map(float, content["scaling"][name])) for name in ("shift", "scale"))
        return cls(str(content["vae"]), str(content["encoder_sha256"]), LatentScaling(shift, scale))

    def claim(self, vae: nn.Module, name: str) -> None:
        """Make a loaded AutoencoderKL scale its latents as this space does.

        Raises:
            ValueError: it encodes into another space.
        """
        if encoder_sha256(vae) != self.encoder_sha256:
            raise ValueError(
                f"the VAE {name} has another encoder than {self.vae}, whose latents the model was trained on; give "
                "that one, or one with the same encoder, with --vae"
            )
        vae.register_to_config(**self.scaling.vae_settings())  # type: ignore[operator]  # a method of diffusers


def encoder_sha256(vae: nn.Module) -> str:
    """A hash of the weights that decide the latents, in float32."""
    digest = hashlib.sha256()
    for name, tensor in sorted(vae.state_dict().items()):
        if name.startswith(("encoder.", "quant_conv.")):
            digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
