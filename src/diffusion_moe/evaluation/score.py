"""The scores of a run on its own data: recognised classes, a Fréchet distance, nearness to the training set."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from ..config import DataConfig, EvaluationConfig
from ..data import load_dataset
from ..models import Backbone
from ..run_folder import RunFolder, write_atomically
from .features import train_classifier
from .generate import Usage, class_schedule, generate, provenance
from .metrics import frechet_distance, nearest_neighbour_distance
from .source import read_source
from .statistics import FeatureSums


def score(model: Backbone, data: DataConfig, settings: EvaluationConfig) -> dict[str, Any]:
    """Generate images and compare them with the real ones.

    Returns:
        recognised: share of generated images that the classifier puts into their class (null for an unconditional
            model); frechet: between classifier features of generated and held-out real images; nearest_neighbour: mean
            pixel distance of generated images to the training images (copies would be nearer than real ones are). The
            same names with `_real`: held-out real images (frechet_real: training against held-out) in their place.

    Raises:
        ValueError: the data set has no test split, or is a latent cache.
    """
    if data.kind == "latents":
        raise ValueError("data.kind is latents, which hold no real images to compare with; sample the run instead")
    if data.test_fraction == 0:
        raise ValueError("data.test_fraction is 0, so there are no held-out images to compare with")
    training, test = load_dataset(data, "train"), load_dataset(data, "test")
    real, held_out = training.everything(), test.everything()
    labels = class_schedule(settings.num_samples, model.settings.num_classes)
    usage = Usage()
    images = generate(model, labels, settings.num_samples, settings, usage=usage).clamp(-1, 1)
    classifier = train_classifier(training)
    features, verdicts = classifier.judge(images)
    real_features, _ = classifier.judge(real.images)
    test_features, test_verdicts = classifier.judge(held_out.images)
    test_sums = FeatureSums.of(test_features)
    return {
        "recognised": None if labels is None else float((verdicts == labels).float().mean()),
        "recognised_real": float((test_verdicts == held_out.labels).float().mean()),
        "frechet": frechet_distance(FeatureSums.of(features), test_sums),
        "frechet_real": frechet_distance(FeatureSums.of(real_features), test_sums),
        "nearest_neighbour": float(nearest_neighbour_distance(images, real.images).mean()),
        "nearest_neighbour_real": float(nearest_neighbour_distance(held_out.images, real.images).mean()),
        "num_samples": settings.num_samples,
        "num_real": {"training": len(training), "held_out": len(test)},
        "classifier": classifier.fingerprint(),
        **provenance(settings, usage),
    }


def evaluate_run(run: RunFolder, settings: EvaluationConfig) -> dict[str, Any]:
    """Score a finished run and keep the result as its `evaluation.json`."""
    source = read_source(run.path)
    result = score(source.load().model, run.read_recipe().data, settings) | source.origin()
    write_atomically(run.evaluation, json.dumps(result, indent=2) + "\n")
    return result


def table(result: dict[str, Any], say: Callable[[str], None]) -> None:
    """The scores as a small table, generated beside real."""
    rows = [
        ("recognised as their class", "recognised", "{:.1%}"),
        ("Fréchet distance to held-out images", "frechet", "{:.3f}"),
        ("distance to the nearest training image", "nearest_neighbour", "{:.3f}"),
    ]
    say(f"{'':40}{'generated':>12}{'real':>12}")
    for title, key, form in rows:
        values = [result[key], result[f"{key}_real"]]
        say(f"{title:40}" + "".join(f"{'-' if v is None else form.format(v):>12}" for v in values))
