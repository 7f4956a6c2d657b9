"""A small classifier of the real training split: its predictions and features score generated images.

For data sets too far from ImageNet for Inception's features to mean much.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import ImageDataset
from ..distributed import to_device
from .features import CLASSIFIER, Extractor, ExtractorIdentity, fingerprint

FEATURES = 64
EPOCHS = 60
MAX_STEPS = 800
"""Most training steps; bounds the time for data sets larger than digits."""
BATCH = 128


class Classifier(nn.Module):
    """Three convolutions, averages over 4 x 4 parts of the image, two linear layers.

    Args:
        stride: pixels a step of the first convolution, 1 or even; its kernel is 3 or twice as wide as the stride.
    """

    def __init__(self, channels: int, num_classes: int, stride: int = 1) -> None:
        super().__init__()
        kernel, padding = (3, 1) if stride == 1 else (2 * stride, stride // 2)
        self.body = nn.Sequential(
            nn.Conv2d(channels, 32, kernel, stride, padding),
            nn.GELU(),
            nn.Conv2d(32, FEATURES, 3, padding=1, stride=2),
            nn.GELU(),
            nn.Conv2d(FEATURES, FEATURES, 3, padding=1),
            nn.GELU(),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(16 * FEATURES, FEATURES),
            nn.GELU(),
        )
        self.head = nn.Linear(FEATURES, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """NCHW in [-1, 1] to (S, 64)."""
        return self.body(images)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


class ClassifierFeatures(Extractor):
    """`pool` (S, 64): input of the classifier's last layer."""

    def __init__(self, classifier: Classifier) -> None:
        self.module: Classifier = classifier
        self.channels = next(classifier.parameters()).shape[1]
        self.identity = ExtractorIdentity(CLASSIFIER, fingerprint(classifier), "none", "last hidden layer")

    @classmethod
    def of_weights(cls, weights: Mapping[str, Tensor]) -> ClassifierFeatures:
        """Build it from a state dict, as statistics hold it.

        Raises:
            ValueError: it is no classifier's.
        """
        try:
            _, channels, kernel, _ = weights["body.0.weight"].shape
            classifier = Classifier(channels, len(weights["head.bias"]), 1 if kernel == 3 else kernel // 2)
            classifier.load_state_dict(dict(weights))
        except (KeyError, IndexError, ValueError, RuntimeError) as error:
            raise ValueError(f"the statistics hold no classifier of this version ({error}); make them again") from error
        return cls(classifier.eval().requires_grad_(False))

    def extract(self, images: Tensor) -> dict[str, Tensor]:
        return {"pool": self.module.features(images / 127.5 - 1)}

    def logits(self, pool_SD: Tensor) -> Tensor:
        with torch.no_grad():
            return self.module.head(to_device(pool_SD, self.device)).cpu()


def _moved(images: Tensor) -> Tensor:
    """Each image shifted by up to a pixel, rotated by up to 0.15 radians and scaled by up to a tenth."""
    S, _, H, W = images.shape
    angle, scale = 0.15 * _between(S), 1 + 0.1 * _between(S)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    rows = torch.stack((cos, -sin, _between(S) * 2 / W), 1), torch.stack((sin, cos, _between(S) * 2 / H), 1)
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return F.grid_sample(images + 1, grid, align_corners=False) - 1  # the border is padded with -1


def _between(count: int) -> Tensor:
    return torch.rand(count) * 2 - 1


def train_classifier(dataset: ImageDataset, seed: int = 0) -> Classifier:
    """Train on a data set's images, randomly moved a little; a function of data and seed."""
    images, labels = dataset.read_all()[:2]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # From 32 pixels a side the first convolution leaves 16 to 31.
        stride = 2 ** max(0, int(math.log2(min(images.shape[2:]) / 16)))
        model = Classifier(images.shape[1], len(dataset.class_names), stride)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=5e-2)
        batches = -(-len(images) // BATCH)
        epochs = max(1, min(EPOCHS, MAX_STEPS // batches))
        steps = epochs * batches
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
        for _ in range(epochs):
            for rows in torch.randperm(len(images)).split(BATCH):
                optimizer.zero_grad()
                F.cross_entropy(model(_moved(images[rows])), labels[rows]).backward()
                optimizer.step()
                schedule.step()
    return model.eval().requires_grad_(False)
