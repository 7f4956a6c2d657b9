"""From a data set's captions to files of their features (data/captions.py has the format).

Shard i holds the captions of the images that the latents' shard i holds, and what is stored depends on nothing else, so
that the files are the same for any number of processes. Each shard appears whole, with a record of its lengths.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data.captions import DTYPE, EMPTY, FOLDER, HEADER, VERSION, feature_files, read_record
from ..data.latents import CachePlan
from ..data.table import TableImages
from ..log import Log
from ..text import TextEncoder, TextFeatures, TextSpace, load_encoder
from .files import record_path, write_json
from .options import EncodeOptions
from .process import Process


def claim_captions(dataset: TableImages, options: EncodeOptions, log: Log) -> TextEncoder | None:
    """Load the text encoder, and begin the caption files or check that they are a part of the same ones.

    Raises:
        ValueError: the encoder cannot be loaded, or the folder holds captions of another encoder, column or data set.
    """
    if options.captions is None or options.text_encoder is None:
        return None
    encoder = load_encoder(options.text_encoder, options.text_length, options.text_precision, warn=log)
    space = encoder.space()
    new = {"column": options.captions, "captions_sha256": _identity(dataset), "space": space.to_dict()}
    header = options.output / HEADER
    if header.is_file():
        old = json.loads(header.read_text())
        changes = [f"{name}: {str(a)[:40]} -> {str(b)[:40]}" for name, a, b in _decisive(old, new) if a != b]
        if changes:
            raise ValueError(
                f"output {options.output} holds other captions ({'; '.join(changes)}); remove {header} and "
                f"{options.output / FOLDER} to encode anew"
            )
    (options.output / FOLDER).mkdir(exist_ok=True)
    if not header.is_file():
        write_json(header, {"format": "diffusion-moe captions", "version": VERSION, **new})
    return encoder


def _decisive(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Fields that have to agree; where the encoder lies does not."""
    pairs = [(name, old.get(name), new[name]) for name in ("column", "captions_sha256")]
    old_space, new_space = old.get("space", {}), new["space"]
    return pairs + [(name, old_space.get(name), new_space[name]) for name in new_space if name != "encoder"]


def _identity(dataset: TableImages) -> str:
    digest = hashlib.sha256()
    for index in range(len(dataset)):
        digest.update(json.dumps(list(dataset.captions(index))).encode() + b"\n")
    return digest.hexdigest()


def encode_captions(
    encoder: TextEncoder, dataset: TableImages, plan: CachePlan, options: EncodeOptions, process: Process, log: Log
) -> None:
    """Write this process' shards; their latents are there.

    Raises:
        ValueError: a feature is not finite, or larger than float16 holds.
    """
    folder, space = options.output, encoder.space()
    todo = [shard for shard in process.shards(plan) if read_record(folder, f"{shard:05d}", space) is None]
    if todo and options.device != "cpu" and torch.cuda.is_available():
        encoder.to(torch.device("cuda", process.local_rank % torch.cuda.device_count()))
    if read_record(folder, EMPTY, space) is None:
        _write(folder, EMPTY, space, [1], encoder.encode_all([""]))
    if todo:
        log(f"encoding captions; {len(todo)} of {plan.shards} files to do here")
    for shard in todo:
        skipped = {int(index) for index, _ in json.loads(record_path(folder, shard).read_text())["skipped"]}
        captions = [dataset.captions(index) for index in plan.indices(shard) if index not in skipped]
        texts = encoder.encode_all([text for each in captions for text in each], options.batch_size)
        _write(folder, f"{shard:05d}", space, [len(each) for each in captions], texts)


def missing_captions(folder: Path, plan: CachePlan, space: TextSpace) -> int:
    """How many shards are still to come."""
    return sum(read_record(folder, f"{shard:05d}", space) is None for shard in range(plan.shards))


def _write(folder: Path, name: str, space: TextSpace, counts: list[int], texts: Sequence[TextFeatures]) -> None:
    parts = [np.concatenate([text.features[0].numpy() for text in texts] or [np.zeros((0, space.width))])]
    if space.pooled_width:
        pooled = [text.pooled.numpy() for text in texts if text.pooled is not None]
        parts.append(np.concatenate(pooled or [np.zeros((0, space.pooled_width))]))
    for file, part in zip(feature_files(folder, name, space), parts):
        with np.errstate(over="ignore"):
            stored = part.astype(DTYPE)
        if not np.isfinite(stored).all():
            raise ValueError(
                f"a caption's feature is {np.abs(part).max():g}, but float16 holds finite ones up to 65504; take "
                "another text encoder, or --text_precision fp32"
            )
        partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
        with partial.open("wb") as opened:
            opened.write(stored.tobytes())
            opened.flush()
            os.fsync(opened.fileno())
        partial.replace(file)
    lengths = [text.features.shape[1] for text in texts]
    write_json(folder / FOLDER / f"{name}.json", {"counts": counts, "lengths": lengths})
