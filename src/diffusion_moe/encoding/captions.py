"""Encoding a data set's captions into files of features (data/captions.py has the format).

Shard i holds the captions of the images in the latents' shard i, and a file's content depends on nothing else. So the
files are the same for any number of processes. Each shard appears whole, with a record of its lengths.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ..data.captions import EMPTY, FOLDER, HEADER, VERSION, feature_files, read_shard
from ..data.float16_files import DTYPE
from ..data.image_files import ImageFileDataset
from ..data.latents import CachePlan
from ..log import Log
from ..run_folder import write_atomically
from ..text import TextEncoder, TextFeatures, TextSpace, load_encoder
from .files import Process, differences, record_path, write_json
from .options import EncodeOptions


def claim_captions(dataset: ImageFileDataset, options: EncodeOptions, log: Log) -> TextEncoder | None:
    """Load the text encoder, and begin the caption files or check that they are a part of the same ones.

    Raises:
        ValueError: the encoder cannot be loaded, or the folder holds captions of another encoder, column or data set.
    """
    if options.captions is None or options.text_encoder is None:
        return None
    encoder = load_encoder(options.text_encoder, options.text_length, options.text_precision, warn=log)
    digest = hashlib.sha256()
    for index in range(len(dataset)):
        digest.update(json.dumps(list(dataset.captions(index))).encode() + b"\n")
    new = {"column": options.captions, "captions_sha256": digest.hexdigest(), "space": asdict(encoder.space())}
    header = options.output / HEADER
    (options.output / FOLDER).mkdir(exist_ok=True)
    if header.is_file():
        changes = differences(_identity(json.loads(header.read_text())), _identity(new))
        if changes:
            raise ValueError(
                f"output {options.output} holds other captions ({changes}); remove {header} and "
                f"{options.output / FOLDER} to encode them again"
            )
    else:
        write_json(header, {"format": "diffusion-moe captions", "version": VERSION, **new})
    return encoder


def _identity(header: dict[str, Any]) -> dict[str, Any]:
    """The fields that have to agree: all but the path of the encoder."""
    fields = {name: header.get(name) for name in ("column", "captions_sha256")} | header.get("space", {})
    return {name: value for name, value in fields.items() if name != "encoder"}


def encode_captions(
    encoder: TextEncoder, dataset: ImageFileDataset, plan: CachePlan, options: EncodeOptions, process: Process, log: Log
) -> None:
    """Write this process' shards, after their latents.

    Raises:
        ValueError: a feature is not finite, or larger than float16 holds.
    """
    folder, space = options.output, encoder.space()
    todo = [shard for shard in process.shards(plan) if read_shard(folder, f"{shard:05d}", space) is None]
    if todo:
        log(f"encoding captions; {len(todo)} of {plan.shards} files to do here")
        encoder.to(process.device(options.device))
    if read_shard(folder, EMPTY, space) is None:
        _write(folder, EMPTY, space, [1], encoder.encode_all([""]))
    for shard in todo:
        skipped = {int(index) for index, _ in json.loads(record_path(folder, shard).read_text())["skipped"]}
        captions = [dataset.captions(index) for index in plan.indices(shard) if index not in skipped]
        texts = encoder.encode_all([text for each in captions for text in each], options.batch_size)
        _write(folder, f"{shard:05d}", space, [len(each) for each in captions], texts)


def missing_captions(folder: Path, plan: CachePlan, space: TextSpace) -> int:
    """Number of shards whose captions are not written yet."""
    return sum(read_shard(folder, f"{shard:05d}", space) is None for shard in range(plan.shards))


def _write(folder: Path, name: str, space: TextSpace, counts: list[int], texts: Sequence[TextFeatures]) -> None:
    parts = [
        [text.features[0].numpy() for text in texts],
        [text.pooled.numpy() for text in texts if text.pooled is not None],
    ]
    for file, part in zip(feature_files(folder, name, space), parts):
        features = np.concatenate(part or [np.zeros(0)])
        with np.errstate(over="ignore"):
            stored = features.astype(DTYPE)
        if not np.isfinite(stored).all():
            raise ValueError(
                f"a caption's feature is {np.abs(features).max():g}, but float16 holds finite ones up to 65504; take "
                "another text encoder, or --text_precision fp32"
            )
        write_atomically(file, stored.tobytes(), shared=True)
    lengths = [text.features.shape[1] for text in texts]
    write_json(folder / FOLDER / f"{name}.json", {"counts": counts, "lengths": lengths})
