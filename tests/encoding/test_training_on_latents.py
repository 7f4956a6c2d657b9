"""From pictures to a latent cache to a run to images, by the command."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from PIL import Image

from diffusion_moe.cli import main
from diffusion_moe.data.latents import read_header
from diffusion_moe.sampling.generate import generate
from diffusion_moe.sampling.loading import load_vae, load_weights
from diffusion_moe.sampling.source import read_source

STEPS = 3


def run(capsys, *arguments):
    """Exit status, standard output and standard error of the command."""
    status = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return status, out, err


@pytest.fixture(scope="module")
def cache(tmp_path_factory, pictures, vae_folder):
    """Latents of the pictures, by a copy of the VAE that a test may move."""
    folder = tmp_path_factory.mktemp("cache")
    shutil.copytree(vae_folder, folder / "vae")
    options = [f"--vae={folder / 'vae'}", f"--output={folder / 'cache'}", "--image-size=16", "--shard-images=5"]
    assert main(["encode", str(pictures), *options]) == 0
    return folder / "cache"


@pytest.fixture(scope="module")
def tiny(tiny_options):
    """Options that make a latent recipe small enough."""
    return [
        *tiny_options,
        "--model.sample_size=8",
        "--model.num_classes=2",
        "--data.num_workers=0",
        f"--training.steps={STEPS}",
        "--training.device=cpu",
        "--training.precision=fp32",
    ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, cache, tiny):
    """A finished tiny run of a published latent recipe."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    command = ["train", "dsmoe-s-e16", "--output_dir", str(folder), f"--data.path={cache}", *tiny]
    assert main(command) == 0
    return folder


def expected_image(run_folder, vae_folder, shift, scale):
    """Image 0 of class 1, denormalised and decoded by hand."""
    source = read_source(run_folder)
    settings = type(source.settings)(steps=2, guidance_scale=1.0)
    model = load_weights(source)
    latents = generate(model, torch.tensor([1]), 1, settings)
    latents = latents / torch.tensor(scale)[:, None, None] + torch.tensor(shift)[:, None, None]
    with torch.no_grad():
        image = AutoencoderKL.from_pretrained(vae_folder).eval().decode(latents.float()).sample
    return ((image[0].clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 0).numpy()


def sampled_image(capsys, folder, output, *options):
    command = ["sample", folder, "--classes=bee", "--per_class=1", "--steps=2", "--guidance_scale=1", "--format=png"]
    status, _, err = run(capsys, *command, "--output", output, *options)
    assert (status, err) == (0, "")
    return np.array(Image.open(output / "class0001-000000.png")).astype(float)


def test_a_run_on_a_cache_samples_images_by_the_cache_s_vae(capsys, tmp_path, trained, vae_folder):
    record = json.loads((trained / "model" / "data.json").read_text())
    assert record["class_names"] == ["ant", "bee"]
    assert record["latent_space"]["scaling"] == {"shift": [0.1], "scale": [0.5]}
    assert len((trained / "metrics.jsonl").read_text().splitlines()) == 1
    found = sampled_image(capsys, trained, tmp_path / "out")
    expected = expected_image(trained, vae_folder, [0.1], [0.5])
    np.testing.assert_allclose(found, expected, atol=1)
    assert found.std() > 1
    of_its_model = sampled_image(capsys, trained / "model", tmp_path / "model")
    np.testing.assert_array_equal(of_its_model, found)


def test_normalised_channels_are_undone_by_the_same_record_also_in_a_pipeline(
    capsys, tmp_path, cache, tiny, vae_folder
):
    folder, header = tmp_path / "run", read_header(cache)
    command = ["train", "dsmoe-s-e16", "--output_dir", folder, f"--data.path={cache}", "--data.normalize=channel"]
    assert run(capsys, *command, *tiny)[0] == 0
    expected = expected_image(folder, vae_folder, header.channel_mean, [1 / std for std in header.channel_std])
    found = sampled_image(capsys, folder, tmp_path / "out")
    np.testing.assert_allclose(found, expected, atol=1)
    assert run(capsys, "convert", folder, "--output", tmp_path / "pipeline")[0] == 0
    converted = sampled_image(capsys, tmp_path / "pipeline", tmp_path / "converted")
    np.testing.assert_array_equal(converted, found)
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    assert pipe.get_label_ids(["bee"]) == [1]
    latents = torch.randn(1, 4, 8, 8)
    std, mean = (torch.tensor(numbers)[:, None, None] for numbers in (header.channel_std, header.channel_mean))
    with torch.no_grad():
        by_hand = pipe.vae.decode((latents * std + mean).float()).sample
        torch.testing.assert_close(pipe.decode(latents), by_hand, rtol=1e-4, atol=1e-4)


def test_a_vae_that_has_moved_is_given_by_option_and_must_be_the_same(capsys, tmp_path, trained, cache):
    expected = sampled_image(capsys, trained, tmp_path / "before")
    vae = cache.with_name("vae")
    vae.rename(tmp_path / "moved")
    try:
        status, _, err = run(capsys, "sample", trained, "--per_class=1", "--steps=1")
        assert status == 2
        assert f"cannot load the VAE {vae}" in err
        assert "if it was moved, give its folder with --vae" in err
        assert err.count("\n") == 1
        found = sampled_image(capsys, trained, tmp_path / "after", f"--vae={tmp_path / 'moved'}")
        np.testing.assert_array_equal(found, expected)
        published = ["convert", trained, "--to=published", "--output", tmp_path / "x.pt", "--format=dsmoe"]
        assert run(capsys, *published)[0] == 0
        other = AutoencoderKL.from_pretrained(tmp_path / "moved")
        with torch.no_grad():
            other.encoder.conv_in.bias.add_(1)
        other.save_pretrained(tmp_path / "other")
        status, _, err = run(capsys, "sample", trained, f"--vae={tmp_path / 'other'}")
        assert status == 2
        assert "has another encoder than" in err
        assert err.count("\n") == 1
    finally:
        (tmp_path / "moved").rename(vae)


MISTAKES = {
    "no path": (
        [],
        "data.path is missing; data.kind latents needs a latent cache: make one with `diffusion-moe encode",
    ),
    "classes": (["CACHE", "--model.num_classes=3"], "model.num_classes is 3, but the data has 2 classes"),
    "size": (["CACHE", "--model.sample_size=16"], "encode with another --image_size or --vae, or set the model's"),
    "channels": (["CACHE", "--model.in_channels=3"], "are (4, 8, 8) (channels, height, width), but"),
    "no cache": (["--data.path=/no/such"], "holds no latents.json, so it is no latent cache"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_cache_and_recipe_disagree_on_is_one_line(capsys, tmp_path, cache, tiny, mistake):
    options, expected = MISTAKES[mistake]
    options = [option.replace("CACHE", f"--data.path={cache}") for option in options]
    status, _, err = run(capsys, "train", "dsmoe-s-e16", "--output_dir", tmp_path / "run", *tiny, *options)
    assert status == 2
    assert expected in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("space", [{}, {"vae": "x"}, 3])
def test_a_damaged_record_is_one_line(capsys, tmp_path, trained, space):
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / "model" / "data.json").write_text(json.dumps({"latent_space": space}))
    status, _, err = run(capsys, "sample", tmp_path / "run")
    assert status == 2
    assert "data.json is damaged" in err
    assert err.count("\n") == 1


def test_scores_of_latents_are_refused(capsys, trained):
    status, _, err = run(capsys, "evaluate", trained)
    assert status == 2
    assert "give --reference FILE" in err


def test_a_vae_may_lie_in_a_folder_of_a_hub_repository(monkeypatch, vae_folder):
    asked = []

    def from_pretrained(name, **options):
        asked.append((name, options))
        return load(vae_folder)

    load = AutoencoderKL.from_pretrained
    monkeypatch.setattr(AutoencoderKL, "from_pretrained", from_pretrained)
    for name in ("owner/vae", "owner/model/vae", str(vae_folder)):
        load_vae(name)
    safe = {"use_safetensors": True}
    assert asked == [("owner/vae", safe), ("owner/model", {"subfolder": "vae"} | safe), (str(vae_folder), safe)]


def test_a_vae_of_pickled_weights_is_refused(vae_folder, tmp_path):
    """They could run code."""
    AutoencoderKL.from_pretrained(vae_folder).save_pretrained(tmp_path / "pickled", safe_serialization=False)
    assert [path.name for path in (tmp_path / "pickled").glob("*.bin")] == ["diffusion_pytorch_model.bin"]
    with pytest.raises(ValueError, match=r"cannot load the VAE .*; only safetensors are read") as refused:
        load_vae(str(tmp_path / "pickled"))
    assert "\n" not in str(refused.value)
