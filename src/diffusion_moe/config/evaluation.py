"""Settings of sampling and evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .fields import NOT_NEGATIVE, POSITIVE, SEED, Settings, require, setting

FLOW_SOLVERS = ("euler", "heun", "heun_euler", "dopri5", "sde")
DDPM_SOLVERS = ("ddpm", "ddim")
Solver = Literal["euler", "heun", "heun_euler", "dopri5", "sde", "ddpm", "ddim"]


@dataclass(frozen=True)
class EvaluationConfig(Settings):
    """Generation and evaluation of images."""

    num_samples: int = setting(1000, change="always", valid=POSITIVE)
    """Images generated for the scores, divided evenly over the classes, or over the prompts; for coloured shapes over
    their categories, seen and held out, so a multiple of 12."""
    batch_size: int = setting(250, change="always", valid=POSITIVE)
    """Images generated at a time; the images are the same for any number (except with model.inference_pool batch)."""
    solver: Solver = setting("euler", change="always")
    """Solver of flow models: euler, heun, heun_euler (the last step an Euler step, as JiT), dopri5 (adaptive) or sde;
    of ddpm models: ddpm (ancestral) or ddim."""
    steps: int = setting(50, change="always", common=True, valid=POSITIVE)
    """Solver steps (Heun evaluates the model twice a step); dopri5 chooses its own."""
    rtol: float = setting(1e-3, change="always", valid=POSITIVE)
    """Relative tolerance (solver: dopri5)."""
    atol: float = setting(1e-6, change="always", valid=POSITIVE)
    """Absolute tolerance (solver: dopri5)."""
    guidance_scale: float = setting(
        1.5, change="always", common=True, valid=NOT_NEGATIVE._replace(remedy="use 1 for no guidance")
    )
    """Guidance scale of classifier-free guidance; 1: no guidance."""
    guidance_interval: tuple[float, float] = setting((0.0, 1.0), change="always")
    """Times t between which guidance is on (0 is noise, 1 is data)."""
    guidance_channels: int | None = setting(None, change="always", valid=POSITIVE._replace(remedy="use null for all"))
    """Number of first channels that are guided; null: all. The papers' DDPM scores guided three of four."""
    path_drop_guidance: bool = setting(False, change="always")
    """The prediction that guidance leads away from has no class or prompt and skips the middle blocks (SPRINT;
    model.fusion)."""
    threshold_scale: float = setting(1.0, change="always", valid=POSITIVE)
    """Factor on the thresholds (router: diffmoe, race, threshold): below 1 more compute a token, above 1 less."""
    capacity_limit: float | None = setting(None, change="always", valid=POSITIVE._replace(remedy="use null for none"))
    """Maximum number of experts per token, on average over the batch (router: diffmoe, race, threshold); null: no
    limit.
    With a limit the shapes are fixed and nothing waits for the device; assignments of least weight beyond it are
    dropped and counted."""
    precision: Literal["auto", "bf16", "fp32"] = setting("auto", change="always")
    """bf16: autocast; routers always compute in float32. auto: bf16 on GPUs that have it and processors that are fast
    in it, else fp32."""
    acceleration: Literal["none", "compile", "graph"] = setting("none", change="always")
    """compile: every block by torch.compile, slow at the first call; graph: replay a CUDA graph."""
    seed: int = setting(0, change="always", valid=SEED)
    """Seed of the noise; image i is a function of this seed and i."""

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.guidance_interval
        require(0 <= low <= high <= 1, f"evaluation.guidance_interval is {low}, {high}; give 0 <= low <= high <= 1")
