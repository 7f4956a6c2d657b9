"""Statistics of real images, made once and kept in a file."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import DataConfig
from ..data import load_dataset
from ..distributed import is_main, rank, to_main, world_size
from ..log import Log
from ..sampling.generate import SamplingStats
from .classifier import ClassifierFeatures
from .extract_features import PART, Progress
from .features import CLASSIFIER, Extractor, make_extractor
from .images import DatasetImages, Images, digest_of_all, digests_of, open_images
from .options import StatsOptions
from .reference import Reference, holds_statistics, read_reference
from .scorer import check_small, shared_classifier, with_features
from .statistics import FeatureSums


def make_statistics(name: str, data: DataConfig | None, options: StatsOptions, log: Log) -> Path | None:
    """Write the statistics of images; other processes than the main one help and return None.

    Args:
        name: of the recipe that `data` comes from, or the path of a folder of images or an `.npz` (data: None).

    Raises:
        ValueError: data, extractor and options do not fit.
    """
    _check(name, data, options)
    if data is None and holds_statistics(Path(name)):
        reference = _of_published(Path(name), options, log)
    else:
        extractor = _extractor(data, options)
        images, about = _images(name, data, options, extractor)
        for line in images.notes:
            log(line)
        reference = _of_images(images, extractor, about, options, log)
    if not is_main():
        return None
    path = options.output or Path(_file_name(name, reference))
    path.parent.mkdir(parents=True, exist_ok=True)
    written = reference.write(path)
    log(f"{reference.about['num_images']} images, {describe(reference)}; SHA-256 {written.sha256}")
    log(f"wrote {path}")
    return path


def describe(reference: Reference) -> str:
    """Extractor and widths in one line."""
    assert reference.extractor is not None
    widths = [reference.pool, *([reference.spatial] if reference.spatial is not None else [])]
    numbers = " and ".join(str(len(moments.mean_D)) for moments in widths)
    return f"{numbers} features of {reference.extractor.name} {reference.extractor.weights}"


def _check(name: str, data: DataConfig | None, options: StatsOptions) -> None:
    """What can be told wrong before anything is loaded."""
    if options.output is not None and options.output.suffix != ".npz":
        raise ValueError(f"output is {options.output}; statistics are an .npz file")
    if data is None and not Path(name).exists():
        raise ValueError(f"there is no {name}; give a recipe, a run, a folder of images or an .npz")
    if data is None and options.split != "train":
        raise ValueError(f"--split is {options.split}, but {name} has no splits; leave it out")
    if data is not None and options.image_size is not None:
        raise ValueError(f"--image_size is {options.image_size}, but a recipe has data.image_size; set that")


def _extractor(data: DataConfig | None, options: StatsOptions) -> Extractor:
    if options.extractor != CLASSIFIER:
        return make_extractor(options.extractor, options.inception)
    if data is None:
        raise ValueError("--extractor is classifier, which learns from a recipe's labelled data; give a recipe as DATA")
    if options.inception is not None:
        raise ValueError(f"--inception is {options.inception}, but the extractor is classifier; leave it out")
    training = load_dataset(data, "train")
    check_small(training)
    return ClassifierFeatures(shared_classifier(training))


def _images(
    name: str, data: DataConfig | None, options: StatsOptions, extractor: Extractor
) -> tuple[Images, dict[str, Any]]:
    """The images, and what is recorded of where they come from."""
    if data is None:
        images = open_images(Path(name), extractor.channels, options.image_size)
        return images, {"path": name, "crop": options.image_size}
    dataset = load_dataset(data, options.split)
    return DatasetImages(dataset, name, data.num_workers), {"recipe": name, "split": options.split, **asdict(data)}


def _of_published(path: Path, options: StatsOptions, log: Log) -> Reference:
    """A published batch's own moments, and the features of its images, which each score would otherwise extract."""
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


@dataclass
class Share:
    """What one process has learned of its share of the images."""

    sums: dict[str, FeatureSums]
    """Of `pool` and, from Inception, `spatial`."""
    kept: dict[int, Tensor] = field(default_factory=dict)
    """Features by the image's number."""
    digests: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def empty(cls, found: dict[str, Tensor]) -> Share:
        """Nothing yet, of the widths of these features."""
        return cls({key: FeatureSums.of(found[key][:0]) for key in ("pool", "spatial") if key in found})

    def add(self, found: dict[str, Tensor], digests: Tensor, first: int, wanted: set[int]) -> None:
        """Features and digests of images from number `first` on; those of wanted ones are kept."""
        for key in self.sums:
            self.sums[key] += FeatureSums.of(found[key])
        for i, digest in enumerate(digests, first):
            self.digests[i] = digest
            if i in wanted:
                self.kept[i] = found["pool"][i - first].clone()


def _of_images(
    images: Images, extractor: Extractor, about: dict[str, Any], options: StatsOptions, log: Log
) -> Reference:
    """Moments of all images, features of some. A process reads every n-th part; the sums are added over processes."""
    wanted = set(evenly(images.count, options.num_features))
    step = max(1, PART // options.batch_size) * options.batch_size
    share = Share.empty(extractor(next(images.read(range(1), 1, SamplingStats()))))
    progress = Progress(images.count, 0, log)
    for start in range(rank() * step, images.count, world_size() * step):
        place = start
        for batch in images.read(range(start, min(start + step, images.count)), options.batch_size, SamplingStats()):
            share.add(extractor(batch), digests_of(batch), place, wanted)
            place += len(batch)
        progress.tell(min(start * world_size() + step, images.count))
    moments = {key: sums.over_processes().moments() for key, sums in share.sums.items()}
    kept, digests = (
        dict(sorted((i, row) for rows in to_main(mine) for i, row in rows.items()))
        for mine in (share.kept, share.digests)
    )
    about = {
        "num_images": images.count,
        "image_size": list(images.size),
        "data": about,
        "images_sha256": digest_of_all(torch.stack([*digests.values()])) if digests else "",
    }
    return Reference(
        images.name,
        moments["pool"],
        moments.get("spatial"),
        torch.stack([*kept.values()]) if kept else None,
        extractor.identity,
        about,
        dict(extractor.module.state_dict()) if extractor.identity.name == CLASSIFIER else {},
    )


def evenly(count: int, wanted: int) -> list[int]:
    """At most `wanted` numbers below `count`, spread evenly."""
    wanted = min(count, wanted)
    return [i * count // wanted for i in range(wanted)]


def _file_name(name: str, reference: Reference) -> str:
    """Data, size and extractor in a name."""
    assert reference.extractor is not None
    size = reference.about.get("image_size")
    parts = [Path(name).stem, *([] if size is None else ["x".join(map(str, size))])]
    extractor = reference.extractor.name.rstrip("/").split("/")[-1]
    return "-".join([*parts, extractor, reference.extractor.weights[:8]]) + ".npz"
