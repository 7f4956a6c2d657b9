"""`evaluate`: scores of runs, folders and arrays, with all that they depend on."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_moe.cli import main
from diffusion_moe.config import DataConfig, EvaluationConfig
from diffusion_moe.data import load_dataset
from diffusion_moe.evaluation.classifier import ClassifierFeatures
from diffusion_moe.evaluation.metrics import (
    FeatureSums,
    frechet_distance,
    inception_score,
    kernel_distance,
    nearest_neighbour_distance,
    precision_recall,
)
from diffusion_moe.evaluation.reference import read_reference
from diffusion_moe.pixels import to_uint8
from diffusion_moe.sampling.generate import class_schedule, generate
from diffusion_moe.sampling.loading import load_weights
from diffusion_moe.sampling.sampler import load_sampler
from diffusion_moe.sampling.source import read_source


def run(capsys, *arguments):
    """Exit status and what was said."""
    status = main([str(argument) for argument in arguments])
    return status, *capsys.readouterr()


def nchw(pixels):
    """NHWC numbers as a tensor."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def moments(features):
    """Mean and covariance."""
    return FeatureSums.of(features).moments()


@pytest.fixture(scope="module")
def classifier_reference(tmp_path_factory):
    """Statistics of held-out digits by a classifier that has seen the others once."""
    from diffusion_moe.evaluation import classifier

    usual, classifier.EPOCHS = classifier.EPOCHS, 1
    path = tmp_path_factory.mktemp("references") / "ref.npz"
    assert main(["stats", "digits", "--extractor=classifier", "--split=test", "--output", str(path)]) == 0
    classifier.EPOCHS = usual
    return path


SETTINGS = EvaluationConfig(num_samples=30, steps=2, batch_size=8, seed=3)
OPTIONS = ["--num_samples=30", "--steps=2", "--batch_size=8", "--seed=3"]


@pytest.fixture(scope="module")
def generated(run_folder):
    """The images that the options above ask for, uint8 NCHW."""
    return to_uint8(generate(load_weights(read_source(run_folder)), class_schedule(30, 10), 30, SETTINGS))


def test_a_run_is_scored_against_statistics(capsys, run_folder, classifier_reference, generated):
    status, out, _ = run(capsys, "evaluate", run_folder, "--reference", classifier_reference, *OPTIONS)
    assert status == 0
    reference = read_reference(classifier_reference)
    (path,) = (run_folder / "evaluations").iterdir()
    assert path.name == f"classifier-{reference.sha256[:8]}-n30-step40-seed3-euler2-guidance1.5.json"
    result = json.loads(path.read_text())
    pool = ClassifierFeatures.of_weights(reference.classifier)(generated)["pool"]
    assert result["frechet"] == pytest.approx(
        frechet_distance(FeatureSums.of(pool).moments(), reference.pool), rel=1e-5
    )
    kernel = kernel_distance(pool, reference.features_RD)
    assert (result["kernel_distance"], result["kernel_distance_std"]) == pytest.approx(
        (kernel.mean, kernel.std), rel=1e-4
    )
    assert (result["precision"], result["recall"]) == precision_recall(pool, reference.features_RD)
    expected = {
        "num_samples": 30,
        "solver": "euler",
        "steps": 2,
        "function_evaluations": 2.0,
        "guidance_scale": 1.5,
        "weights": "ema",
        "ema_decay": 0.995,
        "training_steps": 40,
        "seed": 3,
        "warnings": ["30 samples: Fréchet distances are higher than those of 50,000"],
    }
    assert {key: result[key] for key in expected} == expected
    assert result["extractor"]["weights"] == reference.extractor.weights
    assert result["reference"]["sha256"] == reference.sha256
    for line in (
        "30 samples; euler 2 steps, 2 evaluations; guidance 1.5; weights ema",
        "warning: 30 samples: ",
        "wrote ",
    ):
        assert line in out


def test_arrays_and_folders_of_the_same_images_score_the_same(
    capsys, tmp_path, run_folder, classifier_reference, generated
):
    assert run(capsys, "evaluate", run_folder, "--reference", classifier_reference, *OPTIONS)[0] == 0
    model = json.loads(next((run_folder / "evaluations").iterdir()).read_text())
    pixels = generated.permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "x.npz", images=pixels, labels=np.arange(30) % 10)
    (tmp_path / "pngs").mkdir()
    for i, image in enumerate(pixels):
        Image.fromarray(image[..., 0]).save(tmp_path / "pngs" / f"{i:03d}.png")
    for source in ("x.npz", "pngs"):
        status, out, _ = run(
            capsys, "evaluate", tmp_path / source, "--reference", classifier_reference, "--batch_size=8"
        )
        assert status == 0
        path = tmp_path / f"{source.removesuffix('.npz')}.classifier-{model['reference']['sha256'][:8]}.json"
        assert f"wrote {path}" in out
        result = json.loads(path.read_text())
        for key in ("frechet", "kernel_distance", "precision", "recall", "images_sha256", "num_samples", "extractor"):
            assert result[key] == model[key], (source, key)
    options = ["--num_samples=20", "--output", tmp_path / "few.json"]
    assert run(capsys, "evaluate", tmp_path / "x.npz", "--reference", classifier_reference, *options)[0] == 0
    assert json.loads((tmp_path / "few.json").read_text())["num_samples"] == 20


def test_a_run_without_statistics_is_judged_by_its_own_data(capsys, run_folder, generated):
    status, out, _ = run(capsys, "evaluate", run_folder, *OPTIONS)
    assert status == 0
    result = json.loads((run_folder / "evaluation.json").read_text())
    from diffusion_moe.evaluation.scorer import classifier_scorer

    extractor = classifier_scorer(DataConfig()).extractor
    pool, training = extractor(generated)["pool"], load_dataset(DataConfig(), "train").read_all().images
    assert result["recognised"] == float((extractor.logits(pool).argmax(1) == class_schedule(30, 10)).double().mean())
    nearest = nearest_neighbour_distance(generated / 127.5 - 1, training).mean()
    assert result["nearest_neighbour"] == pytest.approx(float(nearest), rel=1e-4)
    real = load_dataset(DataConfig(), "test").read_all()
    of_real = moments(extractor(to_uint8(real.images))["pool"])
    assert result["frechet"] == pytest.approx(frechet_distance(moments(pool), of_real), rel=1e-5)
    assert result["num_real"] == {"training": 1438, "held_out": 359}
    assert result["recognised_real"] > 0.5 and result["nearest_neighbour_real"] == pytest.approx(2.113, abs=1e-3)
    assert out.splitlines()[0].startswith("computing in fp32") and out.splitlines()[1].split() == ["generated", "real"]


def test_inceptions_scores_follow_adms_protocol(capsys, small_inception, tmp_path, pixels):
    """FID, sFID, IS, KID, precision and recall of two halves of the same images."""
    for name, part in (("real", pixels[:100]), ("fake", pixels[100:])):
        np.savez(tmp_path / f"{name}.npz", arr_0=part)
    assert run(capsys, "stats", tmp_path / "real.npz", "--output", tmp_path / "ref.npz")[0] == 0
    status, out, _ = run(capsys, "evaluate", tmp_path / "fake.npz", "--reference", tmp_path / "ref.npz")
    assert status == 0
    result = json.loads(next(tmp_path.glob("fake.inception-*.json")).read_text())
    extractor = small_inception()
    real, fake = (extractor(nchw(x)) for x in (pixels[:100], pixels[100:]))
    fid, sfid = (frechet_distance(*(moments(x[key]) for x in (fake, real))) for key in ("pool", "spatial"))
    assert (result["fid"], result["sfid"]) == pytest.approx((fid, sfid), rel=1e-5)
    assert result["inception_score"] == pytest.approx(inception_score(extractor.logits(fake["pool"])))
    assert result["kid"] == pytest.approx(kernel_distance(fake["pool"], real["pool"]).mean, rel=1e-4)
    assert (result["precision"], result["recall"]) == precision_recall(fake["pool"], real["pool"])
    for title in ("FID", "sFID", "Inception score", "KID", "precision", "recall"):
        assert f"\n{title} " in out


def test_scores_that_statistics_cannot_give_are_null(capsys, small_inception, tmp_path, pixels):
    np.savez(tmp_path / "x.npz", arr_0=pixels)
    np.savez(tmp_path / "ref.npz", mu=np.zeros(6), sigma=np.eye(6))
    status, out, _ = run(capsys, "evaluate", tmp_path / "x.npz", "--reference", tmp_path / "ref.npz")
    assert status == 0
    result = json.loads(next(tmp_path.glob("x.inception-*.json")).read_text())
    pool = small_inception()(nchw(pixels))["pool"]
    mean, covariance = pool.double().mean(0), np.cov(pool.double().numpy(), rowvar=False)
    by_hand = mean.square().sum() + np.square(np.linalg.eigvalsh(covariance) ** 0.5 - 1).sum()
    assert result["fid"] == pytest.approx(float(by_hand), rel=1e-5)
    assert [result[key] for key in ("sfid", "kid", "precision", "recall")] == [None] * 4
    assert result["reference"]["made_by"] == "not said in the file"
    assert "sFID" in out and "-\n" in out


def test_a_published_batch_brings_its_images(capsys, small_inception, tmp_path, pixels):
    np.savez(tmp_path / "x.npz", arr_0=pixels[:50])
    statistics = {"mu": np.zeros(6), "sigma": np.eye(6), "mu_s": np.zeros(2), "sigma_s": np.eye(2)}
    np.savez(tmp_path / "adm.npz", **statistics, arr_0=pixels[50:])
    status, out, _ = run(capsys, "evaluate", tmp_path / "x.npz", "--reference", tmp_path / "adm.npz")
    assert status == 0 and "reading the 100 images of" in out
    result = json.loads(next(tmp_path.glob("x.inception-*.json")).read_text())
    fake, real = (
        small_inception()(torch.from_numpy(x).permute(0, 3, 1, 2))["pool"] for x in (pixels[:50], pixels[50:])
    )
    assert (result["precision"], result["recall"]) == precision_recall(fake, real)
    assert result["num_reference_features"] == 100


def test_latents_are_decoded_before_they_are_scored(capsys, small_inception, tmp_path, pixels):
    from diffusers import AutoencoderKL

    from diffusion_moe import DiT

    size = {"hidden_size": 8, "depth": 1, "num_heads": 1, "router": "dense"}
    DiT(sample_size=2, patch_size=2, in_channels=4, num_classes=10, **size).save_pretrained(tmp_path / "model")
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    vae = AutoencoderKL(**blocks, block_out_channels=[4, 4], norm_num_groups=2, latent_channels=4).eval()
    vae.save_pretrained(tmp_path / "vae")
    np.savez(tmp_path / "real.npz", arr_0=pixels)
    assert run(capsys, "stats", tmp_path / "real.npz", "--output", tmp_path / "ref.npz")[0] == 0
    arguments = ["evaluate", tmp_path / "model", "--reference", tmp_path / "ref.npz", "--num_samples=7", "--steps=1"]
    status, _, err = run(capsys, *arguments)
    assert status == 2 and "generates latents of 4 channels and has no VAE to decode them" in err
    assert run(capsys, *arguments, "--vae", tmp_path / "vae", "--output", tmp_path / "x.json")[0] == 0
    result = json.loads((tmp_path / "x.json").read_text())
    sampler = load_sampler(read_source(tmp_path / "model").with_vae(str(tmp_path / "vae")))
    settings = EvaluationConfig(num_samples=7, steps=1, batch_size=16)
    images = to_uint8(generate(sampler.model, class_schedule(7, 10), 7, settings, sampler.vae))
    assert images.shape == (7, 3, 4, 4)
    fake, real = (moments(small_inception()(x)["pool"]) for x in (images, nchw(pixels)))
    assert result["fid"] == pytest.approx(frechet_distance(fake, real), rel=1e-5)


@pytest.mark.slow  # eigenvalues of 2048 x 2048 on one thread
def test_real_inception_scores_two_folders(capsys, tmp_path, inception_file):
    """From the command to the number: FID of few images equals its form in Gram matrices."""
    pixels = np.random.RandomState(0).randint(0, 256, (12, 16, 16, 3), dtype=np.uint8)
    for name, part in (("real", pixels[:6]), ("fake", pixels[6:])):
        np.savez(tmp_path / f"{name}.npz", arr_0=part)
    inception = ["--inception", inception_file]
    assert run(capsys, "stats", tmp_path / "real.npz", "--output", tmp_path / "ref.npz", *inception)[0] == 0
    fake = [tmp_path / "fake.npz", "--reference", tmp_path / "ref.npz"]
    status, out, _ = run(capsys, "evaluate", *fake, *inception)
    assert status == 0
    assert "warning: the Inception weights" in out and "do not compare with published ones" in out
    result = json.loads(next(tmp_path.glob("fake.inception-*.json")).read_text())
    from diffusion_moe.evaluation.inception import Inception

    found = [Inception(inception_file)(nchw(x)) for x in (pixels[:6], pixels[6:])]
    for key, name in (("pool", "fid"), ("spatial", "sfid")):
        real, fake = (x[key].double() for x in found)
        a, b = real - real.mean(0), fake - fake.mean(0)
        # tr (A B)^(1/2) of covariances a^T a / 5 and b^T b / 5 is the sum of singular values of a b^T / 5.
        root = torch.linalg.svdvals(a @ b.T).sum() / 5
        expected = (real.mean(0) - fake.mean(0)).square().sum() + (a.square().sum() + b.square().sum()) / 5 - 2 * root
        assert result[name] == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["RUN", "--extractor=inception"], "there is nothing to compare with; give --reference FILE"),
        (["RUN", "--reference=none.npz"], "there is no file none.npz; make one with `diffusion-moe stats"),
        (["RUN", "--reference=REF", "--extractor=no/model"], "cannot load the extractor no/model"),
        (["RUN", "--reference=REF", "--inception=x.pth"], "but the extractor is classifier; remove the option"),
        (["RUN", "--solver=ddim"], "solver is ddim, but the model's process is flow"),
        (["RUN", "--num_samples=3"], "scores need more than 3 images"),
        (["RUN", "--vae=x"], "cannot load the VAE x"),
        (["EMPTY"], "is no model (it has no recipe.yaml"),
        (["EMPTY", "--reference=REF"], "holds no images"),
        (["COLOUR", "--reference=REF"], "classifier reads images of 1 channels; these have 3"),
        (["COLOUR", "--reference=REF", "--solver=euler"], "there is no --solver"),
        (["COLOUR", "--reference=REF", "--num_samples=1000"], "num_samples is 1000, but"),
        (["LARGE", "--reference=REF"], "of images of 8 x 8 pixels, but these have 9 x 8"),
        (["missing.npz", "--reference=REF"], "missing.npz is no folder and no .npz file"),
    ],
)
def test_mistakes_are_one_line(capsys, monkeypatch, tmp_path, run_folder, classifier_reference, arguments, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "colour.npz", images=np.zeros((5, 8, 8, 3), np.uint8))
    np.savez(tmp_path / "large.npz", images=np.zeros((5, 9, 8, 1), np.uint8))
    paths = {"RUN": run_folder, "REF": classifier_reference, "EMPTY": "empty", "COLOUR": "colour.npz"}
    for name, path in (paths | {"LARGE": "large.npz"}).items():
        arguments = [argument.replace(name, str(path)) for argument in arguments]
    status, _, err = run(capsys, "evaluate", *arguments)
    assert status == 2
    assert expected in err
    assert err.count("\n") == 1


def test_weights_that_are_not_averaged_can_be_scored(capsys, run_folder, classifier_reference, tmp_path):
    output = tmp_path / "x.json"
    options = ["--weights=model", "--output", output, *OPTIONS]
    assert run(capsys, "evaluate", run_folder, "--reference", classifier_reference, *options)[0] == 0
    raw = json.loads(output.read_text())
    assert (raw["weights"], raw["ema_decay"], raw["training_steps"]) == ("model", None, 40)
    averaged = ["--output", tmp_path / "averaged.json", *OPTIONS]
    assert run(capsys, "evaluate", run_folder, "--reference", classifier_reference, *averaged)[0] == 0
    averaged = json.loads((tmp_path / "averaged.json").read_text())
    assert raw["images_sha256"] != averaged["images_sha256"]
    status, _, err = run(capsys, "evaluate", run_folder / "model", "--reference", classifier_reference, *options)
    assert status == 2 and "has no checkpoint, only EMA weights" in err


def test_data_too_large_for_a_classifier_needs_statistics(capsys, run_folder, monkeypatch):
    monkeypatch.setattr("diffusion_moe.evaluation.scorer.OWN_DATA_LIMIT", 1000)
    status, _, err = run(capsys, "evaluate", run_folder, *OPTIONS)
    assert status == 2
    assert "1438 images are too many for a small classifier; give --reference FILE" in err
