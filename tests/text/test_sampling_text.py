"""From a trained text-to-image run to images, by the command and by its pipeline."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

import diffusion_moe
from diffusion_moe.cli import main
from diffusion_moe.sampling.loading import load_text_encoder
from diffusion_moe.sampling.sampler import load_sampler
from diffusion_moe.sampling.source import read_source

PROMPTS = ["a red square", "a blue square"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_t2i, text_encoder_folder):
    """A run of 150 steps, long enough to tell colours apart, with an encoder that a test may move."""
    folder = tmp_path_factory.mktemp("run")
    shutil.copytree(text_encoder_folder, folder / "encoder")
    more = ["--training.steps=150", "--optimizer.learning_rate=3e-3", "--training.ema_decay=0.9", "--logging.every=50"]
    more += [f"--data.text_encoder={folder / 'encoder'}", "--data.test_fraction=0", "--logging.sample_every=150"]
    assert main(["train", "digits", "--output_dir", str(folder / "run"), *tiny_t2i, *more]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def pipeline_folder(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines") / "pipeline"
    assert main(["convert", str(trained), "--output", str(folder)]) == 0
    return folder


def sample(folder, output, *options):
    """Images that the command samples, uint8, NHWC."""
    common = ["--format=npz", "--output", str(output), "--per_class=3", "--steps=10"]
    assert main(["sample", str(folder), *common, *options]) == 0
    return np.load(output)


def test_images_show_their_prompts(trained, tmp_path):
    """The colour of the prompt is the brightest, and guidance makes it more so."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n\n")
    means = {}
    for scale in (1.0, 2.0):
        drawn = sample(trained, tmp_path / "out.npz", f"--prompts={prompts}", f"--guidance_scale={scale}")
        assert drawn["prompts"].tolist() == [text for text in PROMPTS for _ in range(3)]
        means[scale] = drawn["images"].reshape(2, -1, 3).mean(axis=1)
        assert means[scale][0].argmax() == 0 and means[scale][1].argmax() == 2
    assert means[2.0][0, 0] - means[2.0][0, 2] >= means[1.0][0, 0] - means[1.0][0, 2] - 1
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["prompts"] == PROMPTS and record["per_prompt"] == 3 and record["size"] == [8, 8]
    assert record["training_steps"] == 150 and record["negative_prompt"] is None


def test_a_negative_prompt_leads_away(trained, tmp_path):
    def draw(*more):
        images = sample(trained, tmp_path / "out.npz", "--prompt=a square", "--guidance_scale=2", *more)["images"]
        return images.reshape(-1, 3).mean(axis=0)

    assert draw("--negative_prompt=a red square")[0] < draw("--negative_prompt=a blue square")[0]


def test_files_are_named_by_what_they_show(trained, tmp_path, capsys):
    shared = ["--per_class=2", "--steps=2", "--prompt=a red square"]
    assert main(["sample", str(trained), *shared, "--format=png", f"--output={tmp_path / 'png'}"]) == 0
    names = sorted(path.name for path in (tmp_path / "png").glob("*.png"))
    assert names == ["prompt0000-000000.png", "prompt0000-000001.png"]
    assert main(["sample", str(trained), *shared, "--height=6", "--width=12"]) == 0
    grid = capsys.readouterr().out.splitlines()[-1].removeprefix("wrote ")
    assert "-6x12-prompts" in grid and Image.open(grid).width > Image.open(grid).height
    assert list((trained / "previews").glob("step-00000150.png"))


def test_the_pipeline_samples_the_images_of_the_command(trained, pipeline_folder, tmp_path):
    pipe = DiffusionPipeline.from_pretrained(pipeline_folder)
    assert type(pipe) is diffusion_moe.TextToImagePipeline
    pipe.set_progress_bar_config(disable=True)
    assert main(["sample", str(pipeline_folder), "--prompt=a red square", "--steps=2", "--per_class=1"]) == 0
    sampler = load_sampler(read_source(trained))
    model = sampler.model
    assert sampler.vae is None
    noise = torch.randn(2, 3, 8, 8)
    options = {"num_inference_steps": 4, "guidance_scale": 3.0, "latents": noise, "output_type": "latent"}
    drawn = pipe(PROMPTS, **options).images
    # By hand: four Euler steps of the guided velocity.
    encoder = load_text_encoder(read_source(trained))
    text, x = encoder.encode(PROMPTS), noise
    with torch.no_grad():
        for t in (0.0, 0.25, 0.5, 0.75):
            time = torch.tensor(t)
            given = model(x, time, **text.arguments()).sample
            null = model(x, time, **text.nothing().arguments()).sample
            x = x + 0.25 * (null + 3.0 * (given - null))
    torch.testing.assert_close(drawn, x, rtol=1e-4, atol=1e-4)


def test_arguments_of_the_pipeline(pipeline_folder):
    pipe = DiffusionPipeline.from_pretrained(pipeline_folder)
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "output_type": "np"}

    def generators(count):
        return [torch.Generator().manual_seed(i) for i in range(count)]

    several = pipe(PROMPTS, num_images_per_prompt=2, generator=generators(4), **options).images
    alone = pipe(PROMPTS[1], generator=[torch.Generator().manual_seed(3)], **options).images
    np.testing.assert_allclose(several[3], alone[0], atol=1e-4)
    assert pipe("a square", height=4, width=10, **options).images.shape == (1, 4, 10, 3)
    plain, away, each = (
        pipe(PROMPTS, negative_prompt=negative, generator=generators(2), **options | {"output_type": "latent"}).images
        for negative in (None, "a green square", ["a green square", "a red square"])
    )
    assert (plain - away).abs().max() > 1e-3
    torch.testing.assert_close(away[0], each[0], rtol=1e-4, atol=1e-4)
    assert (away[1] - each[1]).abs().max() > 1e-3
    for arguments, message in [
        ({"prompt": []}, "there are 0 prompts"),
        ({"prompt": "a", "num_images_per_prompt": 0}, "num_images_per_prompt is 0"),
        ({"prompt": "a", "negative_prompt": ["b", "c"]}, "there are 2 negative prompts for 1 prompts"),
        ({"prompt": "a", "height": 7}, "height is 7; it must be a positive multiple of 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            pipe(**arguments)


def test_long_prompts_are_cut_with_a_warning(pipeline_folder, caplog):
    pipe = DiffusionPipeline.from_pretrained(pipeline_folder)
    pipe.set_progress_bar_config(disable=True)
    pipe("a large red circle " * 8, num_inference_steps=1)
    assert "prompts of more than 12 tokens are cut to that: 'a large red circle" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "takes text; give --prompt or --prompts"),
        (["--prompt=a", "--prompts=b.txt"], "prompt is 'a' and prompts b.txt; give one of them"),
        (["--prompts=/no/such.txt"], "cannot read prompts from /no/such.txt"),
        (["--negative_prompt=a"], "negative_prompt is a, but there is no prompt"),
        (["--prompt=a", "--width=9"], "width is 9; it must be a positive multiple of 2"),
        (["--prompt=a", "--text_encoder=/no/such"], "cannot load the text encoder /no/such"),
    ],
)
def test_mistakes_are_one_line(trained, capsys, options, message):
    capsys.readouterr()
    assert main(["sample", str(trained), *options]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_another_encoder_is_refused(trained, tmp_path, make_text_encoder, capsys):
    other = make_text_encoder("bert", tmp_path / "bert")
    assert main(["sample", str(trained), "--prompt=a", f"--text_encoder={other}"]) == 2
    assert "is not the one of" in capsys.readouterr().err


def test_models_without_text_are_not_for_prompts(tmp_path, tiny, capsys):
    assert main(["train", "digits", "--output_dir", str(tmp_path / "run"), *tiny, "--training.steps=1"]) == 0
    assert main(["sample", str(tmp_path / "run"), "--prompt=a"]) == 2
    assert "takes no text; remove the prompts" in capsys.readouterr().err
    out = ["--height=12", "--width=4", "--classes=3", "--per_class=1", "--steps=1", "--format=npz"]
    assert main(["sample", str(tmp_path / "run"), *out, f"--output={tmp_path / 'o.npz'}"]) == 0
    assert np.load(tmp_path / "o.npz")["images"].shape == (1, 12, 4, 1)
