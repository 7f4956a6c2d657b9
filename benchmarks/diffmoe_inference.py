"""DiffMoE at inference: choice per image against choice per batch (the paper's), and the effect of thresholds.

    diffusion-moe train digits --model.router diffmoe --output_dir runs/diffmoe
    python benchmarks/diffmoe_inference.py runs/diffmoe

Every line samples the same 500 digits (same noise, same classes) and scores them by a classifier of real digits.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import torch
from torch import Tensor

from diffusion_moe.config import EvaluationConfig
from diffusion_moe.data import load_dataset
from diffusion_moe.evaluation.classifier import Classifier, train_classifier
from diffusion_moe.evaluation.metrics import FeatureSums, frechet_distance
from diffusion_moe.moe import routers_of
from diffusion_moe.run_folder import RunFolder
from diffusion_moe.sampling.generate import SamplingStats, class_schedule, generate
from diffusion_moe.sampling.loading import best_device, load_weights
from diffusion_moe.sampling.source import read_source

IMAGES = 500


def main(folder: Path) -> None:
    """Print a line for each setting."""
    data = RunFolder(folder).read_recipe().data
    model = load_weights(read_source(folder)).to(best_device())
    classifier = train_classifier(load_dataset(data, "train"))
    held_out = FeatureSums.of(classified(classifier, load_dataset(data, "test").read_all().images)[0])
    labels = class_schedule(IMAGES, model.settings.num_classes)
    columns = f"{'pool':8}{'batch':>7}{'scale':>7}{'experts a token':>17}{'recognised':>12}{'Frechet':>9}"
    print(f"{columns}{'RMS difference':>16}")
    reference = None
    settings_of_lines = [("image", IMAGES, 1.0)] + [("batch", batch, 1.0) for batch in (1, 10, 100, IMAGES)]
    settings_of_lines += [("image", IMAGES, scale) for scale in (0.5, 0.8, 0.9, 1.1, 1.2, 1.5)]
    for pool, batch, scale in settings_of_lines:
        for router in routers_of(model):
            router.config = dataclasses.replace(router.config, inference_pool=pool)
        stats, settings = SamplingStats(), EvaluationConfig(batch_size=batch, threshold_scale=scale)
        images = generate(model, labels, IMAGES, settings, stats=stats).clamp(-1, 1)
        reference = images if reference is None else reference
        features, classes = classified(classifier, images)
        difference = float((images - reference).square().mean().sqrt())
        print(
            f"{pool:8}{batch:7}{scale:7.2f}{stats.summary()['average_capacity']:17.3f}"
            f"{float((classes == labels).float().mean()):12.1%}"
            f"{frechet_distance(FeatureSums.of(features), held_out):9.1f}{difference:16.3f}",
            flush=True,
        )


@torch.no_grad()
def classified(classifier: Classifier, images: Tensor) -> tuple[Tensor, Tensor]:
    """Features, (S, F), and predicted classes, (S,), of images."""
    features = classifier.features(images)
    return features, classifier.head(features).argmax(-1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
