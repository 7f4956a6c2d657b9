"""GenEval's prompts, and images in the layout that its scorer reads (arXiv 2310.11513, github.com/djghosh13/geneval).

The file of prompts, `evaluation_metadata.jsonl`, holds one JSON object a line: `tag` (the task), `prompt` (the text),
`include` and perhaps `exclude`: lists of objects with `class`, `count` and perhaps `color` and `position`, which is a
relation and the number of the entry of `include` that it relates to. Line N goes with the folder NNNNN:

    00000/metadata.jsonl      the line itself
    00000/samples/0000.png    the images
    00000/grid.png            all of them side by side; the scorer does not read it
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from diffusion_moe.pixels import image_grid, to_uint8
from diffusion_moe.run_folder import write_atomically

IMAGES_PER_PROMPT = 4
"""Of the published scores."""


@dataclass(frozen=True)
class Required:
    """Objects of at least a count that an image must (`include`) or must not (`exclude`) show."""

    name: str
    """The key `class` of the file."""
    count: int
    color: str | None = None
    position: tuple[str, int] | None = None
    """Relation to the objects of another entry of `include`, and its index."""


@dataclass(frozen=True)
class GenEvalPrompt:
    """One line of the file."""

    prompt: str
    tag: str
    include: tuple[Required, ...]
    exclude: tuple[Required, ...]
    line: str
    """The line as read, to be written beside the images."""


def read_prompts(path: Path) -> list[GenEvalPrompt]:
    """Read the prompts of a file in GenEval's format.

    Raises:
        ValueError: there is no such file, it holds no prompts, or a line does not follow the format.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}; give GenEval's evaluation_metadata.jsonl")
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").split("\n")]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8; give GenEval's evaluation_metadata.jsonl") from error
    prompts = []
    for number, line in enumerate(lines, start=1):
        if line:
            try:
                prompts.append(_read(line))
            except ValueError as error:
                raise ValueError(
                    f"{path}, line {number}: {error}; is it GenEval's evaluation_metadata.jsonl?"
                ) from error
    if not prompts:
        raise ValueError(f"{path} holds no prompts; give GenEval's evaluation_metadata.jsonl")
    return prompts


def _read(line: str) -> GenEvalPrompt:
    try:
        values = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError("this is no JSON") from error
    if not isinstance(values, dict):
        raise ValueError(f"this is no object but {type(values).__name__}")
    for key in ("prompt", "tag"):
        if not isinstance(values.get(key), str) or not values[key].strip():
            raise ValueError(f"{key} is {values.get(key)!r}; it must be a text")
    include = _entries(values, "include")
    if not include:
        raise ValueError("include is missing or empty")
    for number, entry in enumerate(include):
        # GenEval looks for the other objects among the entries that it has already matched.
        if entry.position and not 0 <= entry.position[1] < number:
            raise ValueError(f"include {number} is {entry.position[0]} entry {entry.position[1]}; name an earlier one")
    return GenEvalPrompt(values["prompt"], values["tag"], include, _entries(values, "exclude"), line)


def _entries(values: dict[str, Any], key: str) -> tuple[Required, ...]:
    entries = values.get(key, [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{key} is {entries!r}; it must be a list of objects")
    return tuple(_required(entry, key) for entry in entries)


def _required(entry: dict[str, Any], key: str) -> Required:
    name, count, color, position = (entry.get(field) for field in ("class", "count", "color", "position"))
    if not isinstance(name, str) or not name:
        raise ValueError(f"class is {name!r} in {key}; it must be a text")
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ValueError(f"count is {count!r} in {key}; it must be a positive number")
    if color is not None and not isinstance(color, str):
        raise ValueError(f"color is {color!r} in {key}; it must be a text")
    if position is None:
        return Required(name, count, color)
    match position:
        case [str(relation), int(other)]:
            return Required(name, count, color, (relation, other))
    raise ValueError(f"position is {position!r} in {key}; it must be a relation and the index of an entry")


def missing(folder: Path, prompts: Sequence[GenEvalPrompt]) -> list[int]:
    """Indices of the prompts whose images are not all written yet.

    Raises:
        ValueError: the folder holds images of other prompts; GenEval would score them too.
    """
    numbers = []
    beyond = [item for item in folder.glob("*") if item.name.isdigit() and int(item.name) >= len(prompts)]
    if beyond:
        raise ValueError(f"{min(beyond)} is beyond the {len(prompts)} prompts; choose another folder")
    for number, prompt in enumerate(prompts):
        written = folder / f"{number:05}" / "metadata.jsonl"
        if not written.is_file():
            numbers.append(number)
        elif written.read_text(encoding="utf-8").strip() != prompt.line:
            raise ValueError(f"{written} belongs to another prompt than {prompt.prompt!r}; choose another folder")
    return numbers


def write_images(folder: Path, number: int, prompt: GenEvalPrompt, images: Tensor) -> Path:
    """Write one prompt's images, and its line last, as the mark that all are written.

    Args:
        folder: of all images.
        number: index of the prompt in its file.
        prompt: of the images.
        images: (K, 3, H, W), [-1, 1].

    Returns:
        The prompt's folder.

    Raises:
        ValueError: they exist already, or are no colour images.
    """
    if images.ndim != 4 or images.shape[1] != 3 or not len(images):
        raise ValueError(f"images have the shape {tuple(images.shape)}; give (images, 3, height, width)")
    place = folder / f"{number:05}"
    if (place / "metadata.jsonl").exists():
        raise ValueError(f"{place} holds images already; choose another folder")
    samples = place / "samples"
    samples.mkdir(parents=True, exist_ok=True)
    for stale in samples.glob("*.png"):  # of a run that was stopped before this prompt was whole
        stale.unlink()
    for k, pixels in enumerate(to_uint8(images.float().cpu())):
        _save(pixels.permute(1, 2, 0), samples / f"{k:04}.png")
    _save(image_grid(images.float().cpu(), min(len(images), IMAGES_PER_PROMPT)), place / "grid.png")
    write_atomically(place / "metadata.jsonl", prompt.line + "\n")
    return place


def _save(pixels: Tensor, path: Path) -> None:
    partial = path.with_name(f".{path.name}.partial")
    Image.fromarray(pixels.numpy()).save(partial, format="PNG")
    partial.replace(path)


def sample_all(
    folder: Path,
    prompts: Sequence[GenEvalPrompt],
    sample: Callable[[str, int], Tensor],
    log: Callable[[str], None] = print,
) -> int:
    """Sample and write the missing images; a stopped call is resumed.

    Args:
        folder: of the images.
        prompts: of the file.
        sample: from a prompt's text and number to its images, (K, 3, H, W), [-1, 1].
        log: receives a line a prompt.

    Returns:
        The number of prompts whose images were sampled.

    Raises:
        ValueError: the folder holds images of other prompts.
    """
    todo = missing(folder, prompts)
    for number in todo:
        write_images(folder, number, prompts[number], sample(prompts[number].prompt, number))
        log(f"{number + 1} of {len(prompts)}: {prompts[number].prompt}")
    return len(todo)
