"""Statistics of real images."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_moe.cli import main
from diffusion_moe.config import DataConfig
from diffusion_moe.data import load_dataset
from diffusion_moe.evaluation.classifier import ClassifierFeatures
from diffusion_moe.evaluation.images import digest_of_all, digests_of
from diffusion_moe.evaluation.make_statistics import evenly, make_statistics
from diffusion_moe.evaluation.options import StatsOptions
from diffusion_moe.evaluation.reference import read_reference
from diffusion_moe.pixels import to_uint8


def run(capsys, *arguments):
    """Exit status and what was said."""
    status = main([str(argument) for argument in arguments])
    return status, *capsys.readouterr()


def nchw(pixels):
    """NHWC numbers as a tensor."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def test_statistics_of_an_array_are_numpys_moments_of_its_features(capsys, small_inception, tmp_path, pixels):
    np.savez(tmp_path / "x.npz", arr_0=pixels)
    output = tmp_path / "new" / "ref.npz"
    status, out, _ = run(capsys, "stats", tmp_path / "x.npz", "--output", output, "--num_features=20", "--batch_size=7")
    assert status == 0
    found = read_reference(output)
    assert f"150 images, 6 and 2 features of inception 0123456789abcdef; SHA-256 {found.sha256}" in out
    features = small_inception()(nchw(pixels))
    for moments, x in ((found.pool, features["pool"]), (found.spatial, features["spatial"])):
        x = x.double().numpy()
        np.testing.assert_allclose(moments.mean_D, x.mean(0), rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(moments.covariance_DD, np.cov(x, rowvar=False), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found.features_RD, features["pool"][evenly(150, 20)])
    assert found.extractor == small_inception().identity
    assert found.about == {
        "num_images": 150,
        "image_size": [4, 4],
        "data": {"path": str(tmp_path / "x.npz"), "crop": None},
        "images_sha256": digest_of_all(digests_of(nchw(pixels))),
    }


def test_a_folder_may_be_cropped_and_an_array_may_not(capsys, small_inception, tmp_path, pixels):
    for i, image in enumerate(pixels[:9]):
        Image.fromarray(image).resize((8, 12)).save(tmp_path / f"{i}.png")
    status, _, _ = run(capsys, "stats", tmp_path, "--image_size=4", "--output", tmp_path / "ref.npz")
    assert status == 0
    found = read_reference(tmp_path / "ref.npz")
    assert (found.about["num_images"], found.about["image_size"], found.about["data"]["crop"]) == (9, [4, 4], 4)
    np.savez(tmp_path / "x.npz", arr_0=pixels)
    status, _, err = run(capsys, "stats", tmp_path / "x.npz", "--image_size=4")
    assert status == 2 and "the images of" in err and "are not resized" in err


@pytest.mark.parametrize("source", ["recipe", "run"])
def test_a_classifier_of_a_recipes_data_travels_in_the_file(capsys, tmp_path, run_folder, source):
    name = "digits" if source == "recipe" else run_folder
    output = tmp_path / "ref.npz"
    status, _, _ = run(capsys, "stats", name, "--extractor=classifier", "--split=test", "--output", output)
    assert status == 0
    found, test = read_reference(output), load_dataset(DataConfig(), "test")
    extractor = ClassifierFeatures.of_weights(found.classifier)
    assert extractor.identity == found.extractor
    pool = extractor(to_uint8(test.read_all().images))["pool"]
    torch.testing.assert_close(found.features_RD, pool)
    np.testing.assert_allclose(found.pool.mean_D, pool.double().mean(0), rtol=1e-6)
    as_json = json.loads(json.dumps(dataclasses.asdict(DataConfig())))
    assert found.about["data"] == {"recipe": str(name), "split": "test", **as_json}


def test_a_published_batch_keeps_its_moments_and_gains_features(capsys, small_inception, tmp_path, pixels):
    mu, sigma = np.arange(6.0), np.diag(np.arange(1.0, 7.0))
    np.savez(tmp_path / "adm.npz", mu=mu, sigma=sigma, mu_s=mu[:2], sigma_s=sigma[:2, :2], arr_0=pixels)
    status, out, _ = run(capsys, "stats", tmp_path / "adm.npz", "--output", tmp_path / "ref.npz", "--num_features=50")
    assert status == 0
    assert "reading the 150 images" in out
    found = read_reference(tmp_path / "ref.npz")
    np.testing.assert_array_equal(found.pool.mean_D, mu)
    np.testing.assert_array_equal(found.spatial.covariance_DD, sigma[:2, :2])
    torch.testing.assert_close(found.features_RD, small_inception()(nchw(pixels))["pool"][evenly(150, 50)])
    assert found.about["moments"] == "as published in adm.npz"
    assert not found.published
    status, _, err = run(capsys, "stats", tmp_path / "ref.npz")
    assert status == 2 and "holds statistics of this library already" in err


def test_the_file_is_named_after_data_size_and_extractor(small_inception, tmp_path, pixels, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("x.npz", arr_0=pixels)
    path = make_statistics("x.npz", None, StatsOptions(), lambda line: None)
    assert str(path) == "x-4x4-inception-01234567.npz"
    assert path.is_file()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["digit"], "did you mean digits"),
        ([], "the data is missing; usage: diffusion-moe stats DATA"),
        (["no/folder"], "no recipe file no/folder"),
        (["x.npz"], "there is no x.npz; give a recipe, a run, a folder"),
        (["digits", "--image_size=3"], "a recipe has data.image_size; set that"),
        ([".", "--split=test"], "has no splits; remove the option"),
        (["digits", "--data.test_fraction=2"], "data.test_fraction is 2"),
        (["digits", "--num_features=0"], "num_features is 0; it must be positive"),
        (["digits", "--extractor=classifier", "--output=x.txt"], "statistics are an .npz file"),
        (
            ["digits", "--extractor=classifier", "--inception=x.pth"],
            "the extractor is classifier; remove the option",
        ),
        (["digits", "--extractor=no/model"], "cannot load the extractor no/model"),
        ([".", "--extractor=classifier"], "learns from a recipe's labelled data; give a recipe"),
        ([".", "--data.path=x"], "there is no --data.path"),
    ],
)
def test_mistakes_are_one_line(capsys, monkeypatch, tmp_path, arguments, expected):
    monkeypatch.chdir(tmp_path)
    status, _, err = run(capsys, "stats", *arguments)
    assert status == 2
    assert expected in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_features_are_kept_evenly():
    assert evenly(10, 4) == [0, 2, 5, 7]
    assert evenly(3, 10) == [0, 1, 2]
