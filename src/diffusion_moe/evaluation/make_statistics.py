"""Statistics of real images, made once and kept in a file."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from ..config import DataConfig
from ..data import load_dataset
from ..distributed import is_main, rank, to_main, world_size
from ..log import Log, ProgressLog
from ..sampling.generate import SamplingStats
from .classifier import ClassifierFeatures
from .extract_features import parts_of
from .features import CLASSIFIER, Extractor
from .images import DatasetImages, Images, digest_of_all, digests_of, open_images
from .metrics import FeatureSums
from .options import StatsOptions
from .reference import Reference, holds_statistics, read_reference
from .scorer import make_extractor, shared_classifier, with_features


def make_statistics(name: str, data: DataConfig | None, options: StatsOptions, log: Log) -> Path | None:
    """Write the statistics of images; other processes than the main one help and return None.

    Args:
        name: of the recipe that `data` comes from, or the path of a folder of images or an `.npz`.
        data: the recipe's data; None for a folder or an `.npz`.

    Raises:
        ValueError: data, extractor and options do not fit.
    """
    _check(name, data, options)
    if data is None and holds_statistics(Path(name)):
        reference = _with_published_moments(Path(name), options, log)
    else:
        reference = _measure(name, data, options, log)
    if not is_main():
        return None
    extractor, size = reference.extractor, reference.about.get("image_size")
    assert extractor is not None
    parts = [Path(name).stem, *([] if size is None else ["x".join(map(str, size))])]
    path = options.output or Path("-".join([*parts, extractor.short_name, extractor.weights[:8]]) + ".npz")
    path.parent.mkdir(parents=True, exist_ok=True)
    written = reference.write(path)
    widths = [str(len(moments.mean_D)) for moments in (reference.pool, reference.spatial) if moments is not None]
    features = f"{' and '.join(widths)} features of {extractor.name} {extractor.weights}"
    log(f"{reference.about['num_images']} images, {features}; SHA-256 {written.sha256}")
    log(f"wrote {path}")
    return path


def _check(name: str, data: DataConfig | None, options: StatsOptions) -> None:
    """Refuse wrong options before anything is loaded."""
    if options.output is not None and options.output.suffix != ".npz":
        raise ValueError(f"output is {options.output}; statistics are an .npz file")
    if data is None and not Path(name).exists():
        raise ValueError(f"there is no {name}; give a recipe, a run, a folder of images or an .npz")
    if data is None and options.split != "train":
        raise ValueError(f"--split is {options.split}, but {name} has no splits; remove the option")
    if data is not None and options.image_size is not None:
        raise ValueError(f"--image_size is {options.image_size}, but a recipe has data.image_size; set that")


def _extractor(data: DataConfig | None, options: StatsOptions) -> Extractor:
    if options.extractor != CLASSIFIER:
        return make_extractor(options.extractor, options.inception)
    if data is None:
        raise ValueError("--extractor is classifier, which learns from a recipe's labelled data; give a recipe as DATA")
    if options.inception is not None:
        raise ValueError(f"--inception is {options.inception}, but the extractor is classifier; remove the option")
    return ClassifierFeatures(shared_classifier(load_dataset(data, "train")))


def _with_published_moments(path: Path, options: StatsOptions, log: Log) -> Reference:
    """A published batch's moments, and the features of its images, so that `evaluate` need not extract them."""
    reference = read_reference(path)
    if not reference.published:
        raise ValueError(f"{path} holds statistics of this library already; use it as --reference")
    extractor = make_extractor(options.extractor, options.inception)
    reference.check(extractor, None)
    reference = with_features(reference, extractor, options.batch_size, path.parent, log)
    features = reference.features_RD
    about = reference.about | {"num_images": "not said in the file", "moments": f"as published in {path.name}"}
    kept = None if features is None else features[evenly(len(features), options.num_features)].clone()
    return replace(reference, about=about, extractor=extractor.identity, features_RD=kept)


def _measure(name: str, data: DataConfig | None, options: StatsOptions, log: Log) -> Reference:
    """Moments of all images, features of some. A process reads every n-th part; the sums are added over processes."""
    extractor = _extractor(data, options)
    images: Images
    if data is None:
        images = open_images(Path(name), extractor.channels, options.image_size)
        origin = {"path": name, "crop": options.image_size}
    else:
        images = DatasetImages(load_dataset(data, options.split), name, data.num_workers)
        origin = {"recipe": name, "split": options.split, **asdict(data)}
    for line in images.notes:
        log(line)
    wanted = set(evenly(images.count, options.num_features))
    first_image = extractor(next(images.read(range(1), 1, SamplingStats())))  # for the widths of its features
    sums = {key: FeatureSums.of(first_image[key][:0]) for key in ("pool", "spatial") if key in first_image}
    own_features: dict[int, Tensor] = {}
    own_digests: dict[int, Tensor] = {}
    parts, progress = parts_of(images.count, options.batch_size), ProgressLog(images.count, log)
    for part in parts[rank() :: world_size()]:
        numbers = iter(part)
        for batch in images.read(part, options.batch_size, SamplingStats()):
            features = extractor(batch)
            for key in sums:
                sums[key] += FeatureSums.of(features[key])
            for digest, row, i in zip(digests_of(batch), features["pool"], numbers):
                own_digests[i] = digest
                if i in wanted:
                    own_features[i] = row.clone()
        progress.update(min(part.start * world_size() + len(part), images.count))
    moments = {key: own.over_processes().moments() for key, own in sums.items()}
    kept, digests = _gathered(own_features), _gathered(own_digests)
    about = {
        "num_images": images.count,
        "image_size": list(images.size),
        "data": origin,
        "images_sha256": digest_of_all(torch.stack(digests)) if digests else "",
    }
    kept_RD = torch.stack(kept) if kept else None
    classifier = dict(extractor.module.state_dict()) if extractor.identity.name == CLASSIFIER else {}
    pool, spatial = moments["pool"], moments.get("spatial")
    return Reference(images.name, pool, spatial, kept_RD, extractor.identity, about, classifier)


def _gathered(own: dict[int, Tensor]) -> list[Tensor]:
    """Rows of all processes in the order of their image numbers, on the main process; empty elsewhere."""
    rows = {i: row for share in to_main(own) for i, row in share.items()}
    return [rows[i] for i in sorted(rows)]


def evenly(count: int, wanted: int) -> list[int]:
    """At most `wanted` numbers below `count`, evenly spaced."""
    wanted = min(count, wanted)
    return [i * count // wanted for i in range(wanted)]
