"""The command `convert`: reference checkpoints and runs to pipeline folders, and back to the reference layout."""

from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .run_folder import RunFolder
from .sampling.loading import CONVERSION, load_decoder, load_text_encoder, load_vae, load_weights, weights_metadata
from .sampling.source import MODEL_CLASSES, read_source

if TYPE_CHECKING:
    from .pipelines.denoising import DenoisingPipeline

IMAGENET_NAMES = Path(__file__).parent / "data" / "names" / "imagenet.txt"
"""Names of ImageNet-1k's classes, one per line."""


@dataclass(frozen=True)
class ConvertOptions:
    """Format to write, and how to read the source."""

    output: Path
    """Folder of the pipeline; with --to published a file that ends in .pt, .pth or .safetensors."""
    to: Literal["diffusers", "published"] = "diffusers"
    """diffusers: a pipeline folder for DiffusionPipeline.from_pretrained and `diffusion-moe sample`. published: a
    checkpoint in the layout of the papers' code, from a run or such a folder."""
    config: str | None = None
    """YAML file a reference checkpoint was trained with, or a recipe; found or inferred unless given."""
    format: str | None = None
    """dense, tc, ec, diffmoe, dsmoe, jit, dit, sit or dit-moe; inferred from the names of the tensors unless given."""
    weights: Literal["ema", "ema2", "model"] = "ema"
    """Weights of a reference file to read: an EMA (JiT has two) or the last weights."""
    file: str | None = None
    """File to read in a folder or hub repository."""
    vae: str | None = None
    """Hub id or folder of the AutoencoderKL that decodes the latents; it is saved in the pipeline."""
    text_encoder: str | None = None
    """Hub id or folder of the text encoder, if it was moved since training; it is saved in the pipeline."""
    class_names: Path | None = None
    """Text file with the names of the classes, one per line; ImageNet's for 1000 classes unless given."""
    trust_pickle: bool = False
    """Read a file that has more than tensors. Such a file can run any code: only for files you trust."""


def to_pipeline(source: str, options: ConvertOptions) -> str:
    """Write a folder that `DiffusionPipeline.from_pretrained` loads; return one line for the user.

    Args:
        source: a reference checkpoint, a folder that contains one, a hub id, or a folder of this library.
        options: options of the command.

    Raises:
        ValueError: the source cannot be read, or the output is not empty.
    """
    from .checkpoint_formats.convert import read_reference_checkpoint

    output = options.output
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"output {output} is not empty; choose another folder")
    if is_ours(Path(source)):
        _refuse(options, ("config", "format", "file"), "a folder of this library")
        ours = read_source(Path(source))
        model, metadata = load_weights(ours), weights_metadata(ours) | {"source": source}
        vae = load_decoder(dataclasses.replace(ours, vae=options.vae or ours.vae))
        names = list(ours.class_names)
    else:
        model, metadata = read_reference_checkpoint(
            source, options.config, options.weights, options.format, options.file, options.trust_pickle
        )
        names, vae = [], None if options.vae is None else load_vae(options.vae)
    if options.class_names is not None:
        names = _read_names(options.class_names)
    elif not names and model.settings.num_classes == 1000:
        names = _read_names(IMAGENET_NAMES)
    if names and len(names) != model.settings.num_classes:
        raise ValueError(f"there are {len(names)} class names, but the model has {model.settings.num_classes} classes")
    encoder = None
    if model.settings.text_dim:  # never true of a reference checkpoint
        encoder = load_text_encoder(ours, options.text_encoder)
    elif options.text_encoder is not None:
        raise ValueError(f"--text_encoder is {options.text_encoder}, but the model takes no text; remove it")
    from .pipelines.class_to_image import ClassToImagePipeline
    from .pipelines.schedulers import default_scheduler
    from .pipelines.text_to_image import TextToImagePipeline

    model, vae, scheduler = model.cpu(), None if vae is None else vae.cpu(), default_scheduler(model.settings)
    if encoder is None:
        pipeline = ClassToImagePipeline(model, scheduler, vae, dict(enumerate(names)) or None)
    else:
        pipeline = TextToImagePipeline(model, scheduler, encoder.model.cpu(), encoder.tokenizer, vae)
    save_pipeline(pipeline, metadata, output)
    latents = model.settings.in_channels not in (1, 3) and vae is None
    hint = "; it generates latents: convert with --vae to get images" if latents else ""
    return f"wrote {output} ({metadata.get('format', 'diffusion-moe')}, {metadata.get('weights', 'ema')} weights){hint}"


def save_pipeline(pipeline: DenoisingPipeline, metadata: dict[str, Any], folder: Path) -> None:
    """Write a pipeline folder, complete or not at all, with the metadata of its source."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipeline.save_pretrained(partial)
    (partial / CONVERSION).write_text(json.dumps(metadata, indent=2) + "\n")
    if folder.is_dir():
        folder.rmdir()  # empty, or `to_pipeline` would have refused it
    partial.rename(folder)


def export_reference_checkpoint(source: str, options: ConvertOptions) -> str:
    """Write a reference checkpoint of a run, a pipeline folder or a model folder; return one line for the user.

    Raises:
        ValueError: the folder is none of these, or the reference code has no such model.
    """
    from .checkpoint_formats.convert import write_reference_checkpoint

    _refuse(options, ("config", "file", "vae", "class_names"), "--to published")
    if options.output.exists():
        raise ValueError(f"output {options.output} exists; choose another file")
    ours = read_source(Path(source))
    known = options.format or weights_metadata(ours).get("format")
    kind = write_reference_checkpoint(load_weights(ours), options.output, known)
    return f"wrote {options.output} in the layout of {kind}"


def is_ours(path: Path) -> bool:
    """True for the folder of a run, a pipeline or a model of this library."""
    if RunFolder(path).recipe.is_file() or (path / "model_index.json").is_file():
        return True
    try:
        return json.loads((path / "config.json").read_text()).get("_class_name") in MODEL_CLASSES
    except (OSError, ValueError, AttributeError):
        return False


def _refuse(options: ConvertOptions, names: tuple[str, ...], what: str) -> None:
    for name in names:
        if getattr(options, name) is not None:
            raise ValueError(f"--{name} is {getattr(options, name)}, which is not supported for {what}; remove it")
    if options.weights != "ema" or options.trust_pickle:
        given = f"--weights is {options.weights}" if options.weights != "ema" else "--trust-pickle is given"
        raise ValueError(f"{given}, which is not supported for a folder of this library; remove it")


def _read_names(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read class names from {path}: {error}") from error
