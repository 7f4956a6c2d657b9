"""`evaluate` and `sweep` of text-to-image models against statistics of real images."""

import csv
import json
import shutil
from dataclasses import asdict

import pytest
import torch

from diffusion_moe.cli import main
from diffusion_moe.config import DataConfig, EvaluationConfig
from diffusion_moe.data import load_dataset
from diffusion_moe.evaluation.evaluate import prompts_for
from diffusion_moe.evaluation.images import GeneratedImages, digest_of_all, digests_of
from diffusion_moe.evaluation.options import EvaluateOptions
from diffusion_moe.models import load_model
from diffusion_moe.pixels import to_uint8
from diffusion_moe.sampling.generate import Prompts, generate
from diffusion_moe.sampling.loading import load_text_encoder
from diffusion_moe.sampling.sampler import load_sampler
from diffusion_moe.sampling.source import read_source
from diffusion_moe.text import TextFeatures

OPTIONS = ["--num_samples=12", "--steps=2", "--batch_size=5", "--seed=3", "--guidance_scale=2"]
SETTINGS = EvaluationConfig(num_samples=12, steps=2, batch_size=5, seed=3, guidance_scale=2.0)


def run(capsys, *arguments):
    """Exit status and what was said."""
    status = main([str(argument) for argument in arguments])
    return status, *capsys.readouterr()


def with_noise(folder):
    """The run, its weights far enough from their start that images depend on prompts."""
    torch.manual_seed(0)
    model = load_model(folder / "model")
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder / "model")
    return folder


def make_reference(folder, captioned_folder, size):
    """Statistics of the pictures by a classifier of them."""
    data = [f"--data.path={captioned_folder}", "--data.caption_column=text", f"--data.image_size={size}"]
    options = ["--data.channels=3", "--data.test_fraction=0", "--extractor=classifier"]
    assert main(["stats", "image-folder", *data, *options, "--output", str(folder / "ref.npz")]) == 0
    return folder / "ref.npz"


@pytest.fixture(scope="module")
def reference(captioned_folder, tmp_path_factory):
    return make_reference(tmp_path_factory.mktemp("reference"), captioned_folder, 8)


@pytest.fixture(scope="module")
def text_run(tmp_path_factory, tiny_t2i):
    """Five of 24 pictures are held out."""
    folder = tmp_path_factory.mktemp("run") / "run"
    assert main(["train", "digits", "--output_dir", str(folder), *tiny_t2i, "--training.steps=2"]) == 0
    return with_noise(folder)


def expected_digest(folder, texts):
    """Texts of the images that the options ask for: text k mod their number for image k."""
    source = read_source(folder)
    encoded = load_text_encoder(source).encode_all([texts[i % len(texts)] for i in range(12)], 5)
    text, sampler = TextFeatures.together(encoded), load_sampler(source)
    images = generate(sampler.model, None, 12, SETTINGS, sampler.vae, prompts=Prompts(text, text.nothing()))
    return digest_of_all(digests_of(to_uint8(images)))


def test_images_show_the_held_out_captions_in_turn(capsys, text_run, reference, captioned_folder, tmp_path):
    output = ["--output", tmp_path / "x.json"]
    assert run(capsys, "evaluate", text_run, "--reference", reference, *OPTIONS, *output)[0] == 0
    result = json.loads((tmp_path / "x.json").read_text())
    data = DataConfig(kind="folder", path=str(captioned_folder), caption_column="text", image_size=8, channels=3)
    held_out = load_dataset(data, "test")
    texts = [held_out.captions(i)[0] for i in range(len(held_out))]
    assert len(texts) == 5 and len(set(texts)) > 1
    assert result["images_sha256"] == expected_digest(text_run, texts)
    assert result["prompts"]["count"] == 5
    assert result["prompts"]["origin"] == f"held-out captions of folder {captioned_folder}"
    assert result["text_encoder"] == asdict(read_source(text_run).text_space)
    assert result["frechet"] > 0 and result["num_samples"] == 12 and "recognised" not in result
    assert list(tmp_path.iterdir()) == [tmp_path / "x.json"]


def test_a_file_of_prompts_serves_a_run_and_a_pipeline_alike(capsys, text_run, reference, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red square\na large blue square\n\n")
    options = ["--reference", reference, "--prompts", prompts, *OPTIONS]
    assert run(capsys, "evaluate", text_run, *options)[0] == 0
    (path,) = (text_run / "evaluations").iterdir()
    result = json.loads(path.read_text())
    assert f"-prompts{result['prompts']['sha256'][:8]}-" in path.name
    assert result["prompts"]["count"] == 2 and result["prompts"]["origin"] == str(prompts)
    assert result["images_sha256"] == expected_digest(text_run, ["a red square", "a large blue square"])
    assert run(capsys, "convert", text_run, "--output", tmp_path / "pipeline")[0] == 0
    output = ["--output", tmp_path / "x.json"]
    assert run(capsys, "evaluate", tmp_path / "pipeline", *options, *output)[0] == 0
    again = json.loads((tmp_path / "x.json").read_text())
    for key in ("images_sha256", "frechet", "prompts"):
        assert again[key] == result[key]
    assert again["text_encoder"]["sha256"] == result["text_encoder"]["sha256"]
    status, _, err = run(capsys, "evaluate", tmp_path / "pipeline", "--reference", reference, *OPTIONS)
    assert status == 2 and "is no run, so it has no captions of its own; give --prompts FILE" in err


def test_points_of_other_prompts_are_other_points(capsys, text_run, reference, tmp_path):
    shas = {}
    for text in ("a red square", "a blue square", "a red square"):
        (tmp_path / "prompts.txt").write_text(text)
        options = ["--reference", reference, "--prompts", tmp_path / "prompts.txt", "--output", tmp_path / "sweep"]
        status, out, _ = run(capsys, "sweep", text_run, *OPTIONS, *options, "--guidance_scale=1,3")
        assert status == 0 and ("1 of 2" in out) == (text not in shas)
        rows = list(csv.DictReader((tmp_path / "sweep" / "sweep.csv").read_text().splitlines()))
        digests = [row["images_sha256"] for row in rows]
        assert shas.setdefault(text, digests) == digests
    assert len({digest for digests in shas.values() for digest in digests}) == 4
    assert len(list((tmp_path / "sweep" / "points").iterdir())) == 4


def test_other_prompts_are_other_work(text_run, tmp_path):
    """An unfinished one resumes with the same prompts alone, whatever file they come from."""
    sampler, identities = load_sampler(read_source(text_run), SETTINGS), []
    for name, text in (("a", "a red square"), ("b", "a blue square"), ("c", "a red square")):
        (tmp_path / name).write_text(text)
        prompts = prompts_for(sampler, EvaluateOptions(prompts=tmp_path / name), print)
        identities.append(GeneratedImages(sampler, prompts).identity())
    assert identities[0] == identities[2] != identities[1]


def test_captions_of_a_latent_cache(
    capsys, tmp_path, captioned_folder, vae_folder, tiny_options, text_encoder_folder, make_text_encoder
):
    encoder = shutil.copytree(text_encoder_folder, tmp_path / "encoder")
    text = ["--captions=text", f"--text_encoder={encoder}", "--text_length=12", "--flip=false"]
    paths = [f"--vae={vae_folder}", f"--output={tmp_path / 'cache'}"]
    assert main(["encode", str(captioned_folder), *paths, *text, "--image_size=16", "--device=cpu"]) == 0
    options = [*tiny_options, "--model.sample_size=8", "--model.text_dim=16", "--model.text_length=12"]
    options += ["--data.num_workers=0", "--training.device=cpu", "--training.precision=fp32", "--training.steps=2"]
    options += [f"--data.path={tmp_path / 'cache'}", "--data.test_fraction=0.2"]
    folder = tmp_path / "run"
    assert main(["train", "t2i-dsmoe-s-e16", "--output_dir", str(folder), *options]) == 0
    shutil.rmtree(encoder)  # the features are in the cache
    with_noise(folder)
    reference = make_reference(tmp_path, captioned_folder, 16)
    output = ["--output", tmp_path / "x.json"]
    assert run(capsys, "evaluate", folder, "--reference", reference, *OPTIONS, *output)[0] == 0
    result = json.loads((tmp_path / "x.json").read_text())
    cached = load_dataset(DataConfig(kind="latents", path=str(tmp_path / "cache")), "test")
    text, sampler = cached.first_texts(torch.arange(12) % len(cached)), load_sampler(read_source(folder))
    images = generate(sampler.model, None, 12, SETTINGS, sampler.vae, prompts=Prompts(text, text.nothing()))
    assert result["images_sha256"] == digest_of_all(digests_of(to_uint8(images)))
    assert result["prompts"]["count"] == len(cached) == 5
    other = make_text_encoder("bert", tmp_path / "bert")
    for option, message in [
        (f"--text_encoder={other}", "are encoded; remove the option, or give --prompts FILE"),
        ("--prompts=/no/such.txt", "cannot read prompts from /no/such.txt"),
    ]:
        status, _, err = run(capsys, "evaluate", folder, "--reference", reference, *OPTIONS, *output, option)
        assert status == 2 and message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], "there is nothing to compare with; give --reference FILE"),
        (["--reference=none.npz"], "there is no file none.npz"),
        (["--prompts=/no/such.txt"], "cannot read prompts from /no/such.txt"),
        (["--text_encoder=/no/such"], "cannot load the text encoder /no/such"),
        (["--num_samples=3", "--reference=REF"], "scores need more than 3 images"),
    ],
)
def test_mistakes_are_one_line(capsys, text_run, reference, options, expected):
    options = [option.replace("REF", str(reference)) for option in options]
    for verb in ("evaluate", "sweep"):
        status, _, err = run(capsys, verb, text_run, *OPTIONS, *options)
        assert status == 2 and expected in err and err.count("\n") == 1


def test_runs_without_held_out_captions_need_prompts(capsys, tmp_path, tiny_t2i, tiny, reference):
    options = ["--training.steps=1", "--data.test_fraction=0"]
    assert main(["train", "digits", "--output_dir", str(tmp_path / "all"), *tiny_t2i, *options]) == 0
    status, _, err = run(capsys, "evaluate", tmp_path / "all", "--reference", reference, *OPTIONS)
    assert status == 2 and "data.test_fraction is 0, so there are no held-out captions; give --prompts FILE" in err
    assert main(["train", "digits", "--output_dir", str(tmp_path / "classes"), *tiny, "--training.steps=1"]) == 0
    status, _, err = run(capsys, "evaluate", tmp_path / "classes", "--prompts=x.txt", *OPTIONS)
    assert status == 2 and "takes no text; remove the option" in err
