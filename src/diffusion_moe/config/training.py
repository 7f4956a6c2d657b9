"""Settings of the training loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .require import require


@dataclass(frozen=True)
class TrainingConfig:
    """The training loop."""

    steps: int = 10000
    """Optimizer steps."""
    batch_size: int = 256
    """Images of one optimizer step, over all processes and micro-batches."""
    accumulation: int = 1
    """Micro-batches a step is split into; batch_size must be divisible by it."""
    ema_decay: float = 0.9999
    """Decay of the moving average of weights and routing state: the model that the run gives."""
    extra_ema_decays: tuple[float, ...] = ()
    """Further averages to keep beside it."""
    ema_warmup: bool = True
    """Let averages forget the first weights sooner: at update n their decay is at most (1 + n) / (10 + n)."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """bf16: autocast, weights in float32; routers always compute in float32. auto: as a run that is resumed has begun,
    else bf16 on GPUs that have it and processors that are fast in it, else fp32."""
    recompute: Literal["none", "experts", "blocks"] = "none"
    """What the backward pass makes again instead of keeping: nothing, the hidden layers of routed and shared experts (a
    fifth more of their products), or whole blocks (a third more of everything)."""
    compile: bool = False
    """Compile each block by torch.compile."""
    max_nonfinite_steps: int = 3
    """Steps in a row whose loss or gradient may be not finite; each is left out. One more goes back to the last
    checkpoint and leaves their batches out; if that does not help, the run stops and names the images."""
    seed: int = 0
    """Seed of the initial weights, the order, the noise and every other draw."""
    checkpoint_every: int = 1000
    """Steps between checkpoints; there is always one after the last step."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay."""
    keep_every: int = 0
    """Steps whose multiples keep their checkpoints for good; 0: none."""
    stop_seconds: int = 600
    """Time that SIGTERM or Ctrl-C leaves for the step in progress and a checkpoint; after it the run ends as it is."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
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
