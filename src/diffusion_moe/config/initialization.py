"""Settings of the model that training starts from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .require import require


@dataclass(frozen=True)
class InitConfig:
    """The model that training begins from, and which of its weights learn; see docs/training.md."""

    from_checkpoint: str | None = None
    """A run, a folder that `diffusion-moe convert` made, a model's folder, or a published checkpoint (file, folder or
    hub id); null: fresh weights. The model section then need only name what differs from it."""
    weights: Literal["ema", "ema2", "model"] = "ema"
    """Which of a run's or a published file's: an average (JiT's files have two), or the last weights."""
    freeze: tuple[str, ...] = ()
    """Parameters that stay as they are, by name with * and ? as for files: blocks.0.*, *.attn.*, *.mlp.router.*"""
    lora_rank: int | None = None
    """Train adapters of this rank and nothing else (LoRA; needs the package peft); null: the weights themselves."""
    lora_alpha: float | None = None
    """Adapters are multiplied by alpha / rank; null: alpha is the rank."""
    lora_targets: tuple[str, ...] = ("attn.qkv", "attn.proj")
    """Layers that get adapters, by the ends of their names; mlp.experts.w_in and mlp.experts.w_out are the stacked
    experts. y_embedder, the label table, has none and is trained whole."""
    upcycle: bool = False
    """Make experts of a dense model's feed-forward layers."""
    upcycle_noise: float = 0.0
    """Noise on upcycled experts, in standard deviations of their weights."""

    def __post_init__(self) -> None:
        fields = type(self).__dataclass_fields__
        for name in (name for name in fields if name != "from_checkpoint"):
            value = getattr(self, name)
            require(
                self.from_checkpoint is not None or value == fields[name].default,
                f"init.{name} is {value}, but init.from_checkpoint is missing; give the model to start from",
            )
        rank, alpha, noise = self.lora_rank, self.lora_alpha, self.upcycle_noise
        require(rank is None or rank > 0, f"init.lora_rank is {rank}; it must be positive, or null")
        require(alpha is None or alpha > 0, f"init.lora_alpha is {alpha}; it must be positive, or null")
        require(noise >= 0, f"init.upcycle_noise is {noise}; use 0 for none")
        for name in ("lora_alpha", "lora_targets"):
            value = getattr(self, name)
            require(
                rank is not None or value == fields[name].default,
                f"init.{name} is {value}, but init.lora_rank is null; give a rank",
            )
        require(bool(self.lora_targets), "init.lora_targets are empty; name layers, or set init.lora_rank to null")
        require(
            rank is None or not self.freeze,
            f"init.freeze is {self.freeze}, but with init.lora_rank only adapters learn; leave it out",
        )
        require(
            rank is None or not self.upcycle,
            "init.upcycle is true, but adapters cannot train its new routers; set init.lora_rank to null",
        )
        require(self.upcycle or not noise, f"init.upcycle_noise is {noise}, but init.upcycle is false; leave it out")
