"""Scorers of images: by features against statistics of real images, or by a classifier of a run's own data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..config import DataConfig
from ..data import ImageDataset, load_dataset
from ..distributed import from_main, is_main
from ..log import Log
from ..pixels import to_uint8
from ..sampling.loading import best_device
from . import metrics
from .classifier import Classifier, ClassifierFeatures, train_classifier
from .extract_features import Features, extract_features
from .features import CLASSIFIER, INCEPTION, Extractor
from .images import NpzImages
from .inception import Inception
from .options import ReferenceOptions
from .reference import Reference, read_reference
from .report import Result, score_table
from .vision import VisionModel

ENOUGH = 50_000
"""Samples of published scores; with fewer, Fréchet distances are higher."""
OWN_DATA_LIMIT = 2**28
"""Pixel values of a run's data, up to which a classifier of it is trained."""


class Scorer(ABC):
    """Scores images by an extractor's features."""

    extractor: Extractor

    @property
    @abstractmethod
    def reference_sha256(self) -> str:
        """Start of a hash of the reference; empty for a run's own data."""

    def name(self) -> str:
        """A part of a file's name that distinguishes extractors and references."""
        return f"{self.extractor.identity.short_name}-{self.reference_sha256[:8]}"

    @abstractmethod
    def scores(self, features: Features, labels: Tensor | None) -> Result:
        """The scores, and what they depend on."""

    def table(self, result: Result) -> list[str]:
        """The scores as lines."""
        return score_table(result)

    def gallery(self, features: Features) -> Image.Image | None:
        """Some of the images, to be shown beside the scores; None: no gallery."""
        return None


@dataclass(frozen=True)
class FeatureScorer(Scorer):
    """Scores images by their features against a reference."""

    extractor: Extractor
    reference: Reference

    @property
    def reference_sha256(self) -> str:
        return self.reference.sha256

    def scores(self, features: Features, labels: Tensor | None) -> Result:
        """Every score that the features and the reference allow; null where the reference lacks what a score needs.

        Raises:
            ValueError: too few images, or features that are not finite.
        """
        inception = self.extractor.identity.name == INCEPTION
        pool, real, count = features.pool_SD, self.reference.features_RD, len(features.pool_SD)
        few = [f"{count} samples: Fréchet distances are higher than those of {ENOUGH:,}"] if count < ENOUGH else []
        distance = metrics.frechet_distance(metrics.moments_of(pool), self.reference.pool)
        result: Result = {"fid" if inception else "frechet": distance}
        if inception:
            spatial = self.reference.spatial
            no_spatial = spatial is None or features.spatial is None
            result["sfid"] = None if no_spatial else metrics.frechet_distance(features.spatial, spatial)  # type: ignore[arg-type]
            logits = self.extractor.logits(pool)
            assert logits is not None
            result["inception_score"] = metrics.inception_score(logits)
        name = "kid" if inception else "kernel_distance"
        result |= dict.fromkeys(
            (name, f"{name}_std", "precision", "recall", "num_reference_features", "kernel_subsets")
        )
        if real is not None:
            generated, real = pool.to(self.extractor.device), real.to(self.extractor.device)
            kernel, shares = metrics.kernel_distance(generated, real), metrics.precision_recall(generated, real)
            subsets = {"count": metrics.KERNEL_SUBSETS, "size": kernel.subset_size, "seed": metrics.KERNEL_SEED}
            result |= {name: kernel.mean, f"{name}_std": kernel.std, **shares._asdict()}
            result |= {"num_reference_features": len(real), "kernel_subsets": subsets}
        return result | {
            "num_samples": count,
            "extractor": asdict(self.extractor.identity),
            "reference": self.reference.metadata(),
            "images_sha256": features.images_sha256,
            "seconds_per_image": features.seconds_per_image,
            "warnings": self.extractor.warnings() + few,
        }


@dataclass(frozen=True)
class ClassifierScorer(FeatureScorer):
    """Scores images by a classifier of a run's own data, and by their distance to the training images."""

    real: dict[str, Any]
    """Scores of real images under the same names with `_real`, and how many there are."""

    def scores(self, features: Features, labels: Tensor | None) -> Result:
        """Scores of `FeatureScorer`, and two more.

        recognised: share of images that the classifier puts into their class (null without classes); nearest_neighbour:
        mean pixel distance to the nearest training image (copies would be nearer than real ones are).
        """
        logits = self.extractor.logits(features.pool_SD)
        assert logits is not None
        recognised = None if labels is None else float((logits.argmax(1) == labels).double().mean())
        own = {"recognised": recognised, "nearest_neighbour": float(features.others["nearest"].double().mean())}
        general = super().scores(features, labels)
        return own | general | self.real | {"classifier": self.extractor.identity.weights}


class ClassifierAndNearest(ClassifierFeatures):
    """The classifier's features, and `nearest`: each image's distance to the nearest training image in pixels."""

    def __init__(self, classifier: Classifier, training: Tensor) -> None:
        super().__init__(classifier)
        self.training = training
        self.identity = replace(self.identity, feature=f"{self.identity.feature}, nearest training image")

    def to(self, device: torch.device) -> Extractor:
        self.training = self.training.to(device)
        return super().to(device)

    def extract(self, images: Tensor) -> dict[str, Tensor]:
        nearest = metrics.nearest_neighbour_distance(images / 127.5 - 1, self.training)
        return super().extract(images) | {"nearest": nearest}


def make_scorer(
    options: ReferenceOptions, own: DataConfig | None, image_size: tuple[int, int], folder: Path, log: Log
) -> Scorer:
    """The scorer that options ask for.

    Args:
        own: the data of a run, for a classifier where no reference is given.
        image_size: height and width of the images to come, in pixels.
        folder: where unfinished work is kept.

    Raises:
        ValueError: reference, extractor and images do not fit, or one of them is missing.
    """
    if options.reference is None:
        if own is None or options.extractor is not None or options.inception is not None:
            raise ValueError(
                "there is nothing to compare with; give --reference FILE, as made by `diffusion-moe stats DATA`"
            )
        return classifier_scorer(own)
    reference = read_reference(options.reference)
    made_by = reference.extractor.name if reference.extractor is not None else INCEPTION
    extractor = make_extractor(options.extractor or made_by, options.inception, reference)
    reference.check(extractor, image_size)
    return FeatureScorer(extractor, with_features(reference, extractor, 50, folder, log))


def make_extractor(name: str, inception: Path | None = None, reference: Reference | None = None) -> Extractor:
    """An extractor by name, on the best device.

    Args:
        inception: Inception's weight file.
        reference: statistics that hold the classifier.
    """
    if inception is not None and name != INCEPTION:
        raise ValueError(f"--inception is {inception}, but the extractor is {name}; remove the option")
    if name == INCEPTION:
        return Inception(inception).to(best_device())
    if name != CLASSIFIER:
        return VisionModel(name).to(best_device())
    if reference is None or not reference.classifier:
        raise ValueError(
            "a classifier is stored in the statistics that it made; give --reference FILE of "
            "`diffusion-moe stats DATA --extractor classifier`"
        )
    return ClassifierFeatures.of_weights(reference.classifier).to(best_device())


def with_features(reference: Reference, extractor: Extractor, batch_size: int, folder: Path, log: Log) -> Reference:
    """Add the features of a published batch's images, if it has any."""
    if reference.images is None:
        return reference
    images = NpzImages(reference.images)
    log(f"reading the {images.count} images of {reference.images}")
    with extract_features(images, extractor, batch_size, folder, log) as features:
        if features is None:
            return reference
        about = reference.about | {"image_size": list(images.size)}
        return replace(reference, features_RD=features.pool_SD, about=about, images=None)


def classifier_scorer(data: DataConfig) -> ClassifierScorer:
    """A classifier trained on the data's training split, and the held-out split's features.

    Raises:
        ValueError: nothing is held out, or the data is too large for such a classifier.
    """
    training, test = load_dataset(data, "train"), load_dataset(data, "test")
    if len(test) == 0:
        raise ValueError(f"data.test_fraction is {data.test_fraction}, so there are no held-out images to compare with")
    classifier = shared_classifier(training)
    seen, held_out = training.read_all(), test.read_all()
    extractor = ClassifierAndNearest(classifier, seen.images)
    extractor.to(best_device())
    real, of_training = extractor(to_uint8(held_out.images)), extractor(to_uint8(seen.images))
    predicted = extractor.logits(real["pool"]).argmax(1)
    reference = Reference(
        "the run's held-out images",
        metrics.moments_of(real["pool"]),
        features_RD=real["pool"],
        extractor=extractor.identity,
        about={"num_images": len(test), "data": asdict(data)},
    )
    scores_of_real = {
        "recognised_real": float((predicted == held_out.labels).double().mean()),
        "frechet_real": metrics.frechet_distance(metrics.moments_of(of_training["pool"]), reference.pool),
        "nearest_neighbour_real": float(real["nearest"].double().mean()),
        "num_real": {"training": len(training), "held_out": len(test)},
    }
    return ClassifierScorer(extractor, reference, scores_of_real)


def shared_classifier(training: ImageDataset) -> Classifier:
    """One classifier for all processes: trained on each, its weights could differ in the last digit.

    Raises:
        ValueError: the data is too large for a classifier of all images in memory, or has no classes.
    """
    remedy = "give --reference FILE, as made by `diffusion-moe stats DATA`"
    if len(training) * training.read([0]).images[0].numel() > OWN_DATA_LIMIT:
        raise ValueError(f"the data's {len(training)} images are too many for a small classifier; {remedy}")
    if not training.class_names:
        raise ValueError(f"the data has no classes for a small classifier to learn; {remedy}")
    return from_main(train_classifier(training) if is_main() else None)
