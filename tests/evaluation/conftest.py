"""Fixtures of tests of scores: Inception with random weights, and small stand-ins."""

import importlib
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diffusion_moe.evaluation.features import ExtractorIdentity
from diffusion_moe.evaluation.inception import Inception, _torch_fidelity


def stand_in_for_torchvision() -> dict[str, types.ModuleType]:
    """Names that torch-fidelity imports and its Inception does not use. The CPU build of torch has no torchvision."""
    names = ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional")
    modules = {name: types.ModuleType(name) for name in names}
    for dataset in ("CIFAR10", "CIFAR100", "STL10"):
        setattr(modules["torchvision.datasets"], dataset, object)
    for name in names[1:]:
        parent, child = name.rsplit(".", 1)
        setattr(modules[parent], child, modules[name])
    return modules


@pytest.fixture(scope="session")
def fidelity():
    """torch-fidelity, with the real torchvision where it works."""
    if importlib.util.find_spec("torch_fidelity") is None:
        pytest.skip("torch-fidelity is not installed (pip install --no-deps torch-fidelity)")
    try:
        return importlib.import_module("torch_fidelity")
    except (ImportError, RuntimeError, AttributeError):
        found = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "torch_fidelity"}
        for name in [*found, *(name for name in sys.modules if name.split(".")[0] == "torchvision")]:
            del sys.modules[name]
        stand_in = stand_in_for_torchvision()
        sys.modules.update(stand_in)
        try:
            return importlib.import_module("torch_fidelity")
        finally:
            for name in stand_in:
                del sys.modules[name]


@pytest.fixture(scope="session")
def inception_class():
    """torch-fidelity's Inception, which needs no torchvision."""
    if importlib.util.find_spec("torch_fidelity") is None:
        pytest.skip("torch-fidelity is not installed (pip install --no-deps torch-fidelity)")
    return _torch_fidelity()[0]


@pytest.fixture(scope="session")
def inception_file(inception_class, tmp_path_factory):
    """A weight file of random numbers, scaled so that features neither vanish nor explode."""

    class Fresh(inception_class):
        def load_state_dict(self, weights):
            return None

    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save({}, path)
    generator = torch.Generator().manual_seed(0)
    module = Fresh("inception", ["2048"], feature_extractor_weights_path=str(path))
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            gain = (2 / layer.weight[0].numel()) ** 0.5
            layer.weight.data = gain * torch.randn(layer.weight.shape, generator=generator)
    torch.save(module.state_dict(), path)
    return path


@pytest.fixture(autouse=True)
def quick_classifier(monkeypatch):
    """A classifier that has seen its data once."""
    monkeypatch.setattr("diffusion_moe.evaluation.classifier.EPOCHS", 1)


class SmallInception(Inception):
    """Random linear features under Inception's name, of colour images made 4 x 4 pixels."""

    def __init__(self, published=True):
        self.module = nn.Linear(48, 6, bias=False)
        nn.init.normal_(self.module.weight, generator=torch.Generator().manual_seed(1))
        self.published = published
        self.identity = ExtractorIdentity("inception", "0123456789abcdef", "none", "all")

    def extract(self, images):
        pool = self.module(F.adaptive_avg_pool2d(images.float(), 4).flatten(1) / 255)
        return {"pool": pool, "spatial": pool[:, :2].sin()}

    def logits(self, pool_SD):
        return 3 * pool_SD[:, :4]


@pytest.fixture
def small_inception(monkeypatch):
    """Makes Inception and what is published of it small; returns the class."""
    monkeypatch.setattr("diffusion_moe.evaluation.reference.POOL_WIDTH", 6)
    monkeypatch.setattr("diffusion_moe.evaluation.reference.SPATIAL_WIDTH", 2)
    monkeypatch.setattr("diffusion_moe.evaluation.scorer.Inception", lambda file: SmallInception())
    return SmallInception


@pytest.fixture
def pixels():
    """150 images of 4 x 4 pixels in colour, uint8 NHWC."""
    return np.random.RandomState(0).randint(0, 256, (150, 4, 4, 3), dtype=np.uint8)
