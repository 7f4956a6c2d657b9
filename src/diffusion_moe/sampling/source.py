"""What a folder to sample from holds: a run, a pipeline folder (of `diffusion-moe convert`) or a model's own folder.

Nothing here loads weights; see `loading` and `sampler`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import EvaluationConfig, ModelConfig, Recipe, current_names
from ..run_folder import DATA, EMA_MODEL, ORIGIN, RunFolder
from .options import Weights

if TYPE_CHECKING:
    from ..data.latent_space import LatentSpace
    from ..text import TextSpace

CONVERSION = "conversion.json"
"""File of a converted folder: where its weights came from."""
WEIGHTS = "--weights"
"""The option that chooses among a run's weights, for messages."""
MODEL_CLASSES = {"DiT": "dit", "JiT": "jit"}
"""Classes that a model's config.json may name, and their `ModelConfig.backbone`."""


@dataclass(frozen=True)
class Source:
    """A folder to sample from, without its weights."""

    path: Path
    model_folder: Path
    config: ModelConfig
    settings: EvaluationConfig
    """Sampling settings, where the options do not say otherwise."""
    vae: str | None = None
    """Folder or hub id of the VAE that decodes latents."""
    class_names: tuple[str, ...] = ()
    """Name of each class, where they are known."""
    text_space: TextSpace | None = None
    """The text features that a run was trained on."""
    latent_space: LatentSpace | None = None
    """The latents that a run was trained on: the VAE must have their encoder and scale them alike."""
    recipe: Recipe | None = None
    """A run's recipe."""
    weights: Weights = "ema"
    """See `options.Weights`."""

    def with_vae(self, vae: str | None) -> Source:
        """The same source with another VAE, if one is given; a ValueError if the folder has its own."""
        if vae is None:
            return self
        if self.vae is not None and self.latent_space is None:
            raise ValueError(f"--vae is {vae}, but {self.path} has a VAE of its own; remove the option")
        return replace(self, vae=vae)

    def check_images(self) -> None:
        """Raise a ValueError for a model of latents without a VAE to decode them."""
        if self.vae is None and self.config.in_channels not in (1, 3):
            raise ValueError(
                f"{self.path} generates latents of {self.config.in_channels} channels and has no VAE to decode them; "
                "give one with --vae (the papers' is stabilityai/sd-vae-ft-mse)"
            )

    def weights_metadata(self) -> dict[str, Any]:
        """Training steps and EMA decay of the weights, or the checkpoint that they were converted from.

        Raises:
            ValueError: the run has no such weights.
        """
        if self.weights == "model":
            from ..models.trained import newest_checkpoint

            checkpoint = newest_checkpoint(RunFolder(self.path), WEIGHTS)
            return {"training_steps": int(checkpoint.name.removeprefix("step-")), "ema_decay": None}
        for file in (self.weights_folder() / ORIGIN, self.path / CONVERSION):
            if file.is_file():
                return json.loads(file.read_text())
        return {}

    def weights_folder(self) -> Path:
        """Folder of the EMA weights, or of those of another decay.

        Raises:
            ValueError: the run keeps no EMA of this decay.
        """
        if self.weights in ("ema", "model"):
            return self.model_folder
        remedy = "choose ema or model"
        try:
            folder = RunFolder(self.path).ema_model(float(self.weights))
        except ValueError as error:
            raise ValueError(f"weights is {self.weights}; {remedy}, or the decay of a further EMA") from error
        if not folder.is_dir():
            kept = sorted(found.name.removeprefix(EMA_MODEL) for found in self.path.glob(f"{EMA_MODEL}*"))
            more = f", or the decay {' or '.join(kept)}" if kept else ": it has no further EMA"
            raise ValueError(f"weights is {self.weights}, but {self.path} has no such EMA; {remedy}{more}")
        return folder


def is_model(path: Path) -> bool:
    """Recognise a run, a pipeline folder or a model's folder."""
    return any((path / name).is_file() for name in ("recipe.yaml", "model_index.json", "config.json"))


def read_source(path: Path) -> Source:
    """Read what a folder holds, without its weights.

    Raises:
        ValueError: it holds nothing to sample from.
    """
    if not path.is_dir():
        raise ValueError(f"there is no folder {path}; give a run, or a folder that `diffusion-moe convert` made")
    if RunFolder(path).recipe.is_file():
        return _read_run(RunFolder(path))
    if (path / "model_index.json").is_file():
        return _read_pipeline(path)
    if (path / "config.json").is_file():
        config = _read_config(path)
        return with_data(Source(path, path, config, default_settings(config)), _read_data(path), path / DATA)
    raise ValueError(
        f"{path} has no recipe.yaml (a run), model_index.json (a pipeline) or config.json (a model); give such a folder"
    )


def with_data(source: Source, data: dict[str, Any], file: Path) -> Source:
    """Add the content of a file that `ImageDataset.metadata` made: class names, and the spaces of latents and texts.

    Raises:
        ValueError: the values cannot be read.
    """
    from ..data.latent_space import LatentSpace
    from ..text import TextSpace

    config = source.config
    try:
        names = tuple(map(str, data.get("class_names", ()))) if config.num_classes else ()
        latents = LatentSpace.from_dict(data["latent_space"]) if "latent_space" in data else None
        text = TextSpace.from_dict(data["text"]) if "text" in data and config.text_dim else None
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is damaged ({error!r}); remove it to sample without names and VAE") from error
    vae = None if latents is None else latents.vae
    return replace(source, vae=vae, class_names=names, latent_space=latents, text_space=text)


def default_settings(config: ModelConfig) -> EvaluationConfig:
    """How the papers sample such a model, with fewer steps than their 250 where a solver allows it."""
    settings: dict[str, Any] = {"batch_size": 16}
    if config.process == "ddpm":
        settings |= {"solver": "ddpm", "steps": 250}
    elif config.backbone == "jit":
        settings |= {"solver": "heun_euler", "guidance_scale": 2.9, "guidance_interval": (0.1, 1.0)}
    return EvaluationConfig(**settings)


def _read_run(run: RunFolder) -> Source:
    recipe = run.read_recipe()
    if not (run.model / ORIGIN).is_file():
        raise ValueError(f"{run.path} has no trained model yet; finish it with the same `diffusion-moe train` command")
    source = Source(run.path, run.model, recipe.model, recipe.evaluation, recipe=recipe)
    return with_data(source, _read_data(run.model), run.model / DATA)


def _read_pipeline(path: Path) -> Source:
    names = _read_json(path / "model_index.json").get("id2label") or {}
    folder, vae = path / "transformer", path / "vae"
    config = _read_config(folder)
    class_names = tuple(str(names.get(str(number), "")) for number in range(config.num_classes)) if names else ()
    decoder = str(vae) if vae.is_dir() else None
    return Source(path, folder, config, default_settings(config), decoder, class_names)


def _read_data(model_folder: Path) -> dict[str, Any]:
    """What the model remembers of its data; empty for runs of older versions."""
    file = model_folder / DATA
    return _read_json(file) if file.is_file() else {}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} cannot be read")
    return content


def _read_config(folder: Path) -> ModelConfig:
    content = _read_json(folder / "config.json")
    backbone = MODEL_CLASSES.get(str(content.get("_class_name")))
    if backbone is None:
        raise ValueError(
            f"{folder} holds a model of class {content.get('_class_name')}; this library reads DiT and JiT"
        )
    settings = current_names({name: value for name, value in content.items() if not name.startswith("_")})
    unknown = sorted(settings.keys() - ModelConfig.__dataclass_fields__.keys())
    if unknown:
        raise ValueError(f"{folder / 'config.json'} has unknown {', '.join(unknown)}")
    return ModelConfig(**settings | {"backbone": backbone})
