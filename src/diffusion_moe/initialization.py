"""Checkpoints that training may start from: runs, pipeline and model folders, reference checkpoints."""

from __future__ import annotations

from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import InitConfig, ModelConfig
from .conversion import is_ours
from .run_folder import RunFolder
from .sampling.source import Source, read_source

if TYPE_CHECKING:
    from .models import Backbone
    from .training.initialization import Pretrained


class PretrainedSource:
    """The checkpoint that `init.from_checkpoint` names; `load` reads its weights.

    Raises:
        ValueError: it cannot be read, or lacks the weights that are asked for; by each of its methods.
    """

    def __init__(self, init: InitConfig) -> None:
        assert init.from_checkpoint is not None
        self.init, self.path = init, Path(init.from_checkpoint)

    @cached_property
    def source(self) -> Source | None:
        """The folder, if it is one of this library's; None for a reference checkpoint."""
        if not is_ours(self.path):
            return None
        source, weights = read_source(self.path), self.init.weights
        is_run = RunFolder(self.path).recipe.is_file()
        if weights == "ema2" or (weights == "model" and not is_run):
            choice = "ema or model" if is_run else "one set of weights; remove it"
            raise ValueError(f"init.weights is {weights}, but {self.path} has {choice}")
        return source

    @cached_property
    def config(self) -> ModelConfig:
        """Its architecture."""
        return self._reference.settings if self.source is None else self.source.config

    @cached_property
    def _reference(self) -> Backbone:
        from .checkpoint_formats.convert import read_reference_checkpoint

        try:
            return read_reference_checkpoint(str(self.path), weights=self.init.weights).model
        except ValueError as error:
            options = " (`diffusion-moe convert` takes such options and makes a folder to start from)"
            raise ValueError(f"init.from_checkpoint: {error}{options if ' --' in str(error) else ''}") from error

    def load(self) -> Pretrained:
        """Read its weights."""
        from .models import load_model
        from .models.trained import last_weights
        from .training.initialization import Pretrained

        name = f"{self.path} ({self.init.weights} weights)"
        if self.source is None:
            return Pretrained(name, self._reference)
        if self.init.weights == "model":
            model = last_weights(RunFolder(self.path), "init.weights")
        else:
            model = load_model(self.source.model_folder)
        space = self.source.latent_space
        return Pretrained(name, model, self.source.class_names, None if space is None else asdict(space))


def model_settings(pretrained: PretrainedSource, run: RunFolder | None = None) -> dict[str, Any]:
    """The values of the model section that a recipe with a checkpoint to start from need not have.

    Args:
        run: the folder to train in; if it holds a run from this checkpoint its recipe is read instead, so that the
            checkpoint may be deleted by then.
    """
    init = pretrained.init
    if run is not None and run.recipe.is_file():
        recipe = run.read_recipe()
        if recipe.init.from_checkpoint == init.from_checkpoint:
            return vars(recipe.model)
    from .training.initialization import UPCYCLED

    config = pretrained.config
    if not init.upcycle:
        return vars(config)
    own = {"expert_dim": config.mlp_width, "expert_bias": config.mlp_bias, "shared": "none"}
    if config.mlp_activation != "silu":  # there are no SiLU experts
        own["expert_activation"] = config.mlp_activation
    return {name: value for name, value in vars(config).items() if name not in UPCYCLED} | own
