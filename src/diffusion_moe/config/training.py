"""Settings of the training loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .fields import require, setting


@dataclass(frozen=True)
class TrainingConfig:
    """The training loop."""

    steps: int = setting(10000, change="constant", common=True)
    """Optimizer steps."""
    batch_size: int = setting(256, common=True)
    """Images of one optimizer step, over all processes and micro-batches."""
    accumulation: int = setting(1)
    """Micro-batches a step is split into; batch_size must be divisible by it."""
    ema_decay: float = setting(0.9999, common=True)
    """Decay of the EMA of weights and routing state; the EMA is the model that the run publishes."""
    extra_ema_decays: tuple[float, ...] = setting(())
    """Decays of further EMAs."""
    ema_warmup: bool = setting(True, before=False)
    """Warm up the EMAs: at update n their decay is at most (1 + n) / (10 + n)."""
    precision: Literal["auto", "bf16", "fp32"] = setting("auto", common=True)
    """bf16: autocast with float32 weights; routers always compute in float32. auto: as a resumed run began, else bf16
    on GPUs that have it and processors that are fast in it, else fp32."""
    recompute: Literal["none", "experts", "blocks"] = setting("none", change="always")
    """Activations that the backward pass recomputes instead of keeping: none, the hidden layers of routed and shared
    experts (a fifth more expert FLOPs), or whole blocks (a third more of all FLOPs)."""
    compile: bool = setting(False, change="always")
    """Compile each block by torch.compile."""
    max_nonfinite_steps: int = setting(3, change="always")
    """Consecutive steps whose loss or gradient may be non-finite; each is skipped. One more returns to the last
    checkpoint and skips their batches; if that does not help, the run stops and names the images."""
    seed: int = setting(0, common=True)
    """Seed of the initial weights, the order, the noise and every other random number."""
    checkpoint_every: int = setting(1000, change="always")
    """Steps between checkpoints; the last step always saves one."""
    keep_checkpoints: int = setting(2, change="always")
    """Number of newest checkpoints to keep."""
    keep_every: int = setting(0, change="always")
    """Steps whose multiples keep their checkpoints for good; 0: none."""
    stop_seconds: int = setting(600, change="always")
    """Seconds that SIGTERM or Ctrl-C leaves for the current step and a checkpoint; after them the run ends without
    one."""
    device: Literal["auto", "cpu", "cuda"] = setting("auto")
    """auto: the GPU if there is one."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "checkpoint_every", "keep_checkpoints", "stop_seconds"):
            require(getattr(self, name) > 0, f"training.{name} is {getattr(self, name)}; it must be positive")
        require(
            self.batch_size % self.accumulation == 0,
            f"training.batch_size {self.batch_size} is not divisible by training.accumulation {self.accumulation}",
        )
        require(0 <= self.ema_decay < 1, f"training.ema_decay is {self.ema_decay}; choose from 0 to below 1")
        decays = self.extra_ema_decays
        require(all(0 <= d < 1 for d in decays), f"training.extra_ema_decays are {decays}; choose from 0 to below 1")
        require(
            len({self.ema_decay, *decays}) == 1 + len(decays),
            f"training.extra_ema_decays are {decays}; they must differ from each other and from ema_decay",
        )
        require(self.keep_every >= 0, f"training.keep_every is {self.keep_every}; use 0 for none")
        require(
            self.max_nonfinite_steps >= 0, f"training.max_nonfinite_steps is {self.max_nonfinite_steps}; use 0 for none"
        )
        require(0 <= self.seed < 2**63, f"training.seed is {self.seed}; choose from 0 to 2^63 - 1")
