"""Models that training may begin from: runs, pipeline and model folders, published checkpoints."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from .config import InitConfig, ModelConfig
from .conversion import is_ours
from .parsing import as_text, read_recipe
from .run_folder import RunFolder
from .sampling.source import Source, read_source

if TYPE_CHECKING:
    from .models import Backbone
    from .training.initialization import Origin


class PretrainedModel:
    """The model that `init.from_checkpoint` names; its weights are read when `origin` is called."""

    def __init__(self, init: InitConfig) -> None:
        assert init.from_checkpoint is not None
        self.init, self.path = init, Path(init.from_checkpoint)

    @cached_property
    def source(self) -> Source | None:
        """The folder, if it is one of this library's; None for a published checkpoint.

        Raises:
            ValueError: it has no weights of the kind that is asked for.
        """
        if not is_ours(self.path):
            return None
        source, weights = read_source(self.path), self.init.weights
        if weights != "ema" and (weights != "model" or not RunFolder(self.path).recipe.is_file()):
            choice = "ema or model" if RunFolder(self.path).recipe.is_file() else "one set of weights; leave it out"
            raise ValueError(f"init.weights is {weights}, but {self.path} has {choice}")
        return source

    @cached_property
    def settings(self) -> ModelConfig:
        """Its architecture.

        Raises:
            ValueError: it cannot be read.
        """
        return self._published.settings if self.source is None else self.source.config

    @cached_property
    def _published(self) -> Backbone:
        from .checkpoint_formats import read_reference_checkpoint

        try:
            return read_reference_checkpoint(str(self.path), weights=self.init.weights).model
        except ValueError as error:
            options = " (`diffusion-moe convert` takes such options and makes a folder to start from)"
            raise ValueError(f"init.from_checkpoint: {error}{options if ' --' in str(error) else ''}") from error

    def origin(self) -> Origin:
        """Read it.

        Raises:
            ValueError: the weights are missing or damaged.
        """
        from .models import load_model
        from .models.trained import last_weights
        from .training.initialization import Origin

        name = f"{self.path} ({self.init.weights} weights)"
        if self.source is None:
            return Origin(name, self._published)
        if self.init.weights == "model":
            model = last_weights(RunFolder(self.path), "init.weights")
        else:
            model = load_model(self.source.model_folder)
        space = None if self.source.latent_space is None else self.source.latent_space.to_dict()
        return Origin(name, model, self.source.class_names, space)


def model_options(init: InitConfig, point: PretrainedModel, run: RunFolder | None = None) -> list[str]:
    """The model section that a recipe with a source need not write, as options; those it does write come after these.

    Args:
        run: the folder to train in; if it holds a run from this source its record is taken, so that the source may be
            gone by then.
    """
    if run is not None and run.recipe.is_file():
        recorded = read_recipe(run.recipe)
        if recorded.init.from_checkpoint == init.from_checkpoint:
            return _options(recorded.model, set())
    from .training.initialization import EXPERTS

    config = point.settings
    if not init.upcycle:
        return _options(config, set())
    own = {
        "expert_dim": config.mlp_width,
        "expert_activation": config.mlp_activation,
        "expert_bias": config.mlp_bias,
        "shared": "none",
    }
    if config.mlp_activation == "silu":
        del own["expert_activation"]  # there are no such experts
    return [*_options(config, EXPERTS), *(f"--model.{name}={as_text(value)}" for name, value in own.items())]


def _options(config: ModelConfig, without: set[str]) -> list[str]:
    return [f"--model.{name}={as_text(value)}" for name, value in vars(config).items() if name not in without]
