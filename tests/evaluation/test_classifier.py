"""The classifier of a run's own data."""

from types import SimpleNamespace

import pytest
import torch

from diffusion_moe.config import DataConfig
from diffusion_moe.data import Batch, load_dataset
from diffusion_moe.evaluation import classifier
from diffusion_moe.evaluation.classifier import ClassifierFeatures, train_classifier
from diffusion_moe.evaluation.features import fingerprint
from diffusion_moe.pixels import to_uint8


def test_the_classifier_reads_held_out_digits_and_is_a_function_of_its_seed(monkeypatch):
    monkeypatch.setattr(classifier, "EPOCHS", 6)
    training, test = load_dataset(DataConfig(), "train"), load_dataset(DataConfig(), "test").read_all()
    one, again, other = (train_classifier(training, seed) for seed in (0, 0, 1))
    assert (one(test.images).argmax(1) == test.labels).float().mean() > 0.9
    assert fingerprint(one) == fingerprint(again) != fingerprint(other)


def test_features_and_logits_are_the_classifiers_and_survive_as_weights(monkeypatch):
    monkeypatch.setattr(classifier, "EPOCHS", 1)
    training = load_dataset(DataConfig(), "train")
    model = train_classifier(training)
    images = to_uint8(training.read_all().images[:5])
    extractor = ClassifierFeatures.of_weights(ClassifierFeatures(model).module.state_dict())
    pool = extractor(images)["pool"]
    torch.testing.assert_close(pool, model.features(images / 127.5 - 1))
    torch.testing.assert_close(extractor.logits(pool), model(images / 127.5 - 1))
    assert extractor.identity == ClassifierFeatures(model).identity
    with pytest.raises(ValueError, match="classifier reads images of 1 channels; these have 3"):
        extractor(images.expand(-1, 3, -1, -1))
    with pytest.raises(ValueError, match="hold no classifier of this version"):
        ClassifierFeatures.of_weights({"head.bias": torch.zeros(3)})


def test_moving_images_keeps_their_background_and_most_of_their_ink():
    images = load_dataset(DataConfig(), "test").read_all().images
    moved = classifier._moved(images)
    assert moved.amin() >= -1
    assert (moved + 1).sum().item() == pytest.approx((images + 1).sum().item(), rel=0.1)
    assert (moved - images).abs().mean() > 0.05


@pytest.mark.parametrize(("side", "kernel", "rows"), [(8, 3, 8), (28, 3, 28), (32, 4, 16), (64, 8, 16), (96, 8, 24)])
def test_large_images_are_reduced_by_the_first_convolution(monkeypatch, side, kernel, rows):
    """To 16 to 31 pixels a side; the weights alone rebuild it."""
    monkeypatch.setattr(classifier, "EPOCHS", 1)
    images, labels = torch.rand(6, 3, side, side) * 2 - 1, torch.tensor([0, 1, 0, 1, 0, 1])
    dataset = SimpleNamespace(read_all=lambda: Batch(images, labels), class_names=["a", "b"])
    model = train_classifier(dataset)
    assert model.body[0].weight.shape[2:] == (kernel, kernel)
    assert model.body[0](images).shape[2:] == (rows, rows)
    again = ClassifierFeatures.of_weights(model.state_dict())
    torch.testing.assert_close(again.module(images), model(images), rtol=0, atol=0)
