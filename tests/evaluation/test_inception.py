"""Inception's features: torch-fidelity's module, ADM's layers."""

import hashlib
import pickle
import sys

import numpy as np
import pytest
import torch

from diffusion_moe.benchmarks.wait_trace import StandIn
from diffusion_moe.evaluation import inception
from diffusion_moe.evaluation.inception import Inception
from diffusion_moe.evaluation.scorer import make_extractor


@pytest.fixture(scope="module")
def extractor(inception_file):
    return Inception(inception_file)


@pytest.fixture(scope="module")
def images():
    return torch.randint(0, 256, (3, 3, 20, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_features_are_torch_fidelitys_and_the_spatial_ones_adms(extractor, images, inception_class, inception_file):
    """ADM takes seven channels of mixed_6/conv, the 1x1 branch of Mixed_6d, in the order height, width, channel."""
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    found = extractor(images)
    theirs = inception_class("theirs", ["2048", "logits_unbiased"], str(inception_file))
    pool, logits = theirs(images)
    torch.testing.assert_close(found["pool"], pool)
    torch.testing.assert_close(extractor.logits(pool), logits, rtol=1e-4, atol=1e-4)
    x = interpolate_bilinear_2d_like_tensorflow1x(images.float(), (299, 299), align_corners=False)
    x = (x - 128) / 128
    layers = ["Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1", "Conv2d_3b_1x1", "Conv2d_4a_3x3"]
    blocks = [f"Mixed_{name}" for name in ("5b", "5c", "5d", "6a", "6b", "6c")]
    for name in [*layers, "MaxPool_2", *blocks]:
        x = getattr(theirs, name)(x)
    first_of_block = theirs.Mixed_6d(x)[:, :7].numpy()  # the block's channels begin with those of its 1x1 branch
    expected = np.transpose(first_of_block, (0, 2, 3, 1)).reshape(3, 17 * 17 * 7)
    np.testing.assert_allclose(found["spatial"], expected, rtol=1e-5, atol=1e-5)
    assert found["pool"].std() > 0.1 and found["spatial"].std() > 0.01


def test_a_pass_on_a_device_waits_for_its_features_alone(inception_file):
    """Traced on the stand-in for a GPU: two outputs, and the logits."""
    extractor = Inception(inception_file).to(torch.device("meta"))
    with StandIn().trace() as waits:
        features = extractor(torch.zeros(2, 3, 20, 20, dtype=torch.uint8))
        extractor.logits(features["pool"])
    assert [wait.kind for wait in waits] == ["copy to the host"] * 3


def test_grey_images_are_repeated(extractor, images):
    grey = images[:1, :1]
    torch.testing.assert_close(extractor(grey)["pool"], extractor(grey.repeat(1, 3, 1, 1))["pool"])


def test_the_file_is_named_by_its_hash_and_others_than_the_published_one_are_warned_of(
    extractor, inception_file, monkeypatch
):
    digest = hashlib.sha256(inception_file.read_bytes()).hexdigest()
    assert extractor.identity.weights == digest[:16]
    assert "do not compare with published ones" in extractor.warnings()[0]
    monkeypatch.setattr(inception, "PUBLISHED_SHA256", digest)
    assert make_extractor("inception", inception_file).warnings() == []


class Touch:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_weight_file_that_runs_code_is_refused(tmp_path, inception_class):
    torch.save({"weights": Touch(tmp_path / "touched")}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match=r"evil.pth holds no weights of torch-fidelity's Inception"):
        Inception(tmp_path / "evil.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Touch(tmp_path / "touched")))
    with pytest.raises(ValueError, match=r"plain.pth holds no weights"):
        Inception(tmp_path / "plain.pth")
    assert not (tmp_path / "touched").exists()


def test_missing_and_foreign_weights_are_one_line(tmp_path, inception_class):
    with pytest.raises(ValueError, match=r"cannot read the Inception weights .*none.pth: No such file"):
        Inception(tmp_path / "none.pth")
    torch.save({"a": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other.pth holds no weights") as error:
        Inception(tmp_path / "other.pth")
    assert "\n" not in str(error.value)


def test_without_torch_fidelity_the_remedy_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(ValueError, match=r"pip install diffusion-moe\[eval\]"):
        Inception(tmp_path / "x.pth")


def test_an_option_that_does_not_belong_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"--inception is .*, but the extractor is classifier; remove the option"):
        make_extractor("classifier", tmp_path / "x.pth")
