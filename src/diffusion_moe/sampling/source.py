"""What can be sampled from: a run, a pipeline folder (`diffusion-moe convert` writes one), or a model's own folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..config import EvaluationConfig, ModelConfig, current_names
from ..run_folder import AVERAGE, DATA, ORIGIN, RunFolder
from .options import Weights

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

    from ..data.latent_space import LatentSpace
    from ..models import Backbone
    from ..text import TextEncoder, TextSpace

CONVERSION = "conversion.json"
"""In a converted folder: where the weights came from."""
WEIGHTS = "--weights"
"""The option that chooses among a run's weights, for messages."""
MODEL_CLASSES = {"DiT": "dit", "JiT": "jit"}
"""Classes that a model's config.json may name, and their `ModelConfig.backbone`."""


class Loaded(NamedTuple):
    """A model ready to sample, in eval mode on the best device there is."""

    model: Backbone
    vae: AutoencoderKL | None


@dataclass(frozen=True)
class Source:
    """A folder to sample from; its weights are read by `load`."""

    path: Path
    model_folder: Path
    vae: str | None
    """Folder or hub id of the VAE that decodes latents."""
    config: ModelConfig
    settings: EvaluationConfig
    """Where the options leave something open."""
    samples: Path
    """Where samples go."""
    class_names: tuple[str, ...] = ()
    """Name of each class, where they are known."""
    text_space: TextSpace | None = None
    """Of a run with text: whose features it was trained on."""
    latent_space: LatentSpace | None = None
    """Of a run on a latent cache: whatever VAE decodes has to have its encoder, and scales latents as it says."""
    weights: Weights = "ema"
    """See `options.Weights`."""

    def with_vae(self, vae: str | None) -> Source:
        """With a VAE from elsewhere, if one is given.

        Raises:
            ValueError: the folder has a VAE of its own.
        """
        if vae is None:
            return self
        if self.vae is not None and self.latent_space is None:
            raise ValueError(f"--vae is {vae}, but {self.path} has a VAE of its own; leave it out")
        return replace(self, vae=vae)

    def check_images(self) -> None:
        """Whether images come out.

        Raises:
            ValueError: latents come out, and there is no VAE to decode them.
        """
        if self.vae is None and self.config.in_channels not in (1, 3):
            raise ValueError(
                f"{self.path} generates latents of {self.config.in_channels} channels and has no VAE to decode them; "
                "give one with --vae (the papers' is stabilityai/sd-vae-ft-mse)"
            )

    def load(self) -> Loaded:
        """Read the weights.

        Raises:
            ValueError: they are missing or damaged.
        """
        import torch

        from ..models import load_model
        from ..models.trained import last_weights

        device = "cuda" if torch.cuda.is_available() else "cpu"
        if self.weights == "model":
            model = last_weights(RunFolder(self.path), WEIGHTS).to(device)
        else:
            model = load_model(self._weights_folder()).to(device)
        if self.vae is None:
            return Loaded(model, None)
        vae = self._load_vae(self.vae).to(device)
        if vae.config.latent_channels != self.config.in_channels:
            raise ValueError(
                f"the VAE {self.vae} has {vae.config.latent_channels} latent channels, but the model "
                f"{self.config.in_channels}; take the one its latents are of"
            )
        return Loaded(model, vae)

    def load_text_encoder(self, place: str | None = None, warn: Callable[[str], None] | None = None) -> TextEncoder:
        """The encoder for the model's prompts, on the best device there is.

        Args:
            place: where it is, if not where training or conversion left it. warn: told when prompts are cut.

        Raises:
            ValueError: it is not there, or is not the one the model was trained with.
        """
        import torch

        from ..text import load_encoder

        space, length = self.text_space, self.config.text_length
        name = place or (str(self.path) if space is None else space.encoder)
        options: dict[str, Any] = {} if warn is None else {"warn": warn}
        try:
            encoder = load_encoder(
                name, length if space is None else space.length, "fp32" if space is None else space.precision, **options
            )
        except ValueError as error:
            raise ValueError(f"{error}; if it is elsewhere, give the place with --text_encoder") from error
        if space is not None and encoder.sha256() != space.sha256:
            raise ValueError(
                f"the text encoder {name} is not the one of {space.encoder} that the model was trained with; give that "
                "one with --text_encoder"
            )
        return encoder.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))

    def _load_vae(self, name: str) -> AutoencoderKL:
        space = self.latent_space
        try:
            vae = load_vae(name)
        except ValueError as error:
            if space is None or name != space.vae:
                raise
            raise ValueError(f"{error}; if it is elsewhere, give the place with --vae") from error
        if space is not None:
            space.claim(vae, name)
        return vae

    def origin(self) -> dict[str, Any]:
        """How the weights came to be: training steps and average, or the published file they were converted from."""
        if self.weights == "model":
            from ..models.trained import newest_checkpoint

            checkpoint = newest_checkpoint(RunFolder(self.path), WEIGHTS)
            return {"training_steps": int(checkpoint.name.removeprefix("step-")), "ema_decay": None}
        for file in (self._weights_folder() / ORIGIN, self.path / CONVERSION):
            if file.is_file():
                return json.loads(file.read_text())
        return {}

    def _weights_folder(self) -> Path:
        """The model's, or that of a further average; not of the newest checkpoint."""
        if self.weights in ("ema", "model"):
            return self.model_folder
        run, remedy = RunFolder(self.path), "choose ema or model"
        try:
            folder = run.average(float(self.weights))
        except ValueError as error:
            raise ValueError(f"weights is {self.weights}; {remedy}, or the decay of a further average") from error
        if not folder.is_dir():
            kept = sorted(found.name.removeprefix(AVERAGE) for found in self.path.glob(f"{AVERAGE}*"))
            more = f", or of its further averages {' or '.join(kept)}" if kept else ": it has no further averages"
            raise ValueError(f"weights is {self.weights}, but {self.path} has no such average; {remedy}{more}")
        return folder


def load_vae(name: str) -> AutoencoderKL:
    """An AutoencoderKL by folder, hub id, or hub id and folder in it (OWNER/NAME/vae), in eval mode on the CPU.

    Raises:
        ValueError: there is none.
    """
    from diffusers import AutoencoderKL

    owner, _, rest = name.partition("/")
    repository, _, folder = rest.partition("/")
    inside = {"subfolder": folder} if folder and owner and not Path(name).exists() else {}
    try:
        return AutoencoderKL.from_pretrained(f"{owner}/{repository}" if inside else name, **inside).eval()
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"cannot load the VAE {name}: {' '.join(str(error).split())[:300]}") from error


def is_model(path: Path) -> bool:
    """Whether a folder is a run, a pipeline or a model's own."""
    return any((path / name).is_file() for name in ("recipe.yaml", "model_index.json", "config.json"))


def read_source(path: Path) -> Source:
    """What a folder holds, without its weights.

    Raises:
        ValueError: it holds nothing to sample from.
    """
    if not path.is_dir():
        raise ValueError(f"there is no folder {path}; give a run, or a folder that `diffusion-moe convert` made")
    run = RunFolder(path)
    if run.recipe.is_file():
        recipe = run.read_recipe()
        if not (run.model / ORIGIN).is_file():
            raise ValueError(f"{path} has no trained model yet; finish it with the same `diffusion-moe train` command")
        return _trained(path, run.model, recipe.model, recipe.evaluation, run.samples)
    if (path / "model_index.json").is_file():
        index = _read_json(path / "model_index.json")
        folder, vae = path / "transformer", path / "vae"
        config, names = _read_config(folder), index.get("id2label") or {}
        class_names = tuple(str(names.get(str(number), "")) for number in range(config.num_classes)) if names else ()
        return Source(
            path,
            folder,
            str(vae) if vae.is_dir() else None,
            config,
            usual_settings(config),
            path / "samples",
            class_names,
        )
    if (path / "config.json").is_file():
        return _trained(path, path, _read_config(path), None, path / "samples")
    raise ValueError(
        f"{path} has no recipe.yaml (a run), model_index.json (a pipeline) or config.json (a model); give such a folder"
    )


def _trained(
    path: Path, model_folder: Path, config: ModelConfig, settings: EvaluationConfig | None, samples: Path
) -> Source:
    """A run's model, with what it has kept of its data: class names, and the space of its latents."""
    from ..data.latent_space import LatentSpace
    from ..text import TextSpace

    file = model_folder / DATA
    record = _read_json(file) if file.is_file() else {}  # runs of older versions have none
    try:
        names = tuple(map(str, record.get("class_names", ()))) if config.num_classes else ()
        space = LatentSpace.from_dict(record["latent_space"]) if "latent_space" in record else None
        text = TextSpace.from_dict(record["text"]) if "text" in record and config.text_dim else None
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is damaged ({error!r}); remove it to go on without names and VAE") from error
    vae = None if space is None else space.vae
    usual = settings or usual_settings(config)
    return Source(path, model_folder, vae, config, usual, samples, names, latent_space=space, text_space=text)


def usual_settings(config: ModelConfig) -> EvaluationConfig:
    """How the papers sample such a model, with fewer steps than their 250 where a solver allows it."""
    settings: dict[str, Any] = {"batch_size": 16}
    if config.process == "ddpm":
        settings |= {"solver": "ddpm", "steps": 250}
    elif config.backbone == "jit":
        settings |= {"solver": "heun_euler", "guidance_scale": 2.9, "guidance_interval": (0.1, 1.0)}
    return EvaluationConfig(**settings)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
        if isinstance(content, dict):
            return content
    except (OSError, ValueError):
        pass
    raise ValueError(f"{path} cannot be read")


def _read_config(folder: Path) -> ModelConfig:
    content = _read_json(folder / "config.json")
    backbone = MODEL_CLASSES.get(str(content.get("_class_name")))
    if backbone is None:
        raise ValueError(
            f"{folder} holds a model of class {content.get('_class_name')}; this library reads DiT and JiT"
        )
    known = ModelConfig.__dataclass_fields__
    settings = current_names({name: value for name, value in content.items() if not name.startswith("_")})
    unknown = sorted(settings.keys() - known.keys())
    if unknown:
        raise ValueError(f"{folder / 'config.json'} has unknown {', '.join(unknown)}")
    return ModelConfig(**settings | {"backbone": backbone})
