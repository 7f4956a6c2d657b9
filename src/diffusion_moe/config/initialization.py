"""Settings of the checkpoint that training starts from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .fields import require, setting


@dataclass(frozen=True)
class InitConfig:
    """The checkpoint to start from, and which weights are trained; see docs/training.md."""

    from_checkpoint: str | None = setting(None, change="never", common=True)
    """Run, folder of `diffusion-moe convert`, model folder, or reference checkpoint (file, folder or hub id) to start
    from; null: random weights. The model section then need only have what differs from it."""
    weights: Literal["ema", "ema2", "model"] = setting("ema", change="never")
    """Weights of a run or a reference file to read: an EMA (JiT's files have two), or the last weights."""
    freeze: tuple[str, ...] = setting((), change="never")
    """Parameters that are not trained, by name with * and ? as for files: blocks.0.*, *.attn.*, *.mlp.router.*"""
    lora_rank: int | None = setting(None, change="never")
    """Rank of adapters, which alone are trained (LoRA; needs the package peft); null: train the weights themselves."""
    lora_alpha: float | None = setting(None, change="never")
    """Adapters are multiplied by alpha / rank; null: alpha is the rank."""
    lora_targets: tuple[str, ...] = setting(("attn.qkv", "attn.proj"), change="never")
    """Layers that get adapters, by the ends of their names; mlp.experts.w_in and mlp.experts.w_out are the stacked
    experts. y_embedder, the label table, gets no adapter and is trained whole."""
    upcycle: bool = setting(False, change="never")
    """Make experts of a dense model's feed-forward layers."""
    upcycle_noise: float = setting(0.0, change="never")
    """Noise on upcycled experts, in standard deviations of their weights."""

    def __post_init__(self) -> None:
        fields = type(self).__dataclass_fields__
        for name in fields.keys() - {"from_checkpoint"}:
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
            f"init.freeze is {self.freeze}, but with init.lora_rank only adapters are trained; remove it",
        )
        require(
            rank is None or not self.upcycle,
            "init.upcycle is true, but adapters cannot train its new routers; set init.lora_rank to null",
        )
        require(self.upcycle or not noise, f"init.upcycle_noise is {noise}, but init.upcycle is false; remove it")
