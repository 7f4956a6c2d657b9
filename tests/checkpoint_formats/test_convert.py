"""The command `convert` on files as the published code writes them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderKL, DiffusionPipeline
from safetensors.torch import load_file, save_file

from diffusion_moe.checkpoint_formats.convert import _find_config, _from_jit_arguments
from diffusion_moe.checkpoint_formats.formats import make_layout
from diffusion_moe.checkpoint_formats.layout import to_reference
from diffusion_moe.checkpoint_formats.settings import read_settings
from diffusion_moe.cli import main
from diffusion_moe.config import ModelConfig, Recipe, to_yaml
from diffusion_moe.models import make_model
from diffusion_moe.randomness import normal
from diffusion_moe.sampling.sample import class_numbers
from diffusion_moe.sampling.source import read_source

DSMOE = {"input_size": 8, "hidden_size": 32, "depth": 2, "num_heads": 4, "num_classes": 5, "rope_type": "2d"}
GROUPED = {
    "num_experts": 4,
    "moe_intermediate_size": 12,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "routed_scaling_factor": 2.0,
    "use_shared_expert": True,
}
JIT = {"input_size": 8, "patch_size": 4, "hidden_size": 32, "depth": 2, "num_heads": 4, "num_classes": 5}
JIT |= {"bottleneck_dim": 8, "in_context_len": 2, "in_context_start": 1}


def filled(config: ModelConfig, seed: int):
    model = make_model(config).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.normal_(std=0.2)
    return model


def reference_state(kind: str, config: ModelConfig, seed: int) -> dict[str, torch.Tensor]:
    return to_reference(make_layout(kind, config), filled(config, seed).state_dict())


def yaml_text(target: str, params: dict, moe: dict | None, rf: bool = True) -> str:
    extra = {} if moe is None else {"MoE_config": moe}
    model = {"ckpt": None, "target": f"models.models_{target}.DiT", "params": params | extra}
    return yaml.safe_dump({"basic": {"rf": rf, "epochs": 3}, "model": model, "optim": {"base_learning_rate": 1e-4}})


@pytest.fixture
def dsmoe(tmp_path) -> Path:
    """As DSMoE's training writes it: two sets of weights, the optimizer, arguments; a YAML file one folder higher."""
    config = ModelConfig(**read_settings("dsmoe", DSMOE, GROUPED))
    folder = tmp_path / "exp" / "checkpoints"
    folder.mkdir(parents=True)
    content = {"model": reference_state("dsmoe", config, 1), "ema": reference_state("dsmoe", config, 2)}
    content |= {"opt": {"state": {}, "param_groups": []}, "args": argparse.Namespace(config="x.yaml", wandb=False)}
    torch.save(content, folder / "0000010.pt")
    (tmp_path / "exp" / "config.yaml").write_text(yaml_text("DSMoE", DSMOE, GROUPED))
    return folder / "0000010.pt"


def convert(capsys, *arguments) -> tuple[int, str, str]:
    capsys.readouterr()
    status = main(["convert", *(str(argument) for argument in arguments)])
    captured = capsys.readouterr()
    assert captured.err.count("\n") <= 1
    return status, captured.out, captured.err


def sample_of(model, size: int, channels: int) -> torch.Tensor:
    torch.manual_seed(9)
    x = torch.randn(2, channels, size, size)
    with torch.no_grad():
        return model(x, torch.tensor([0.3, 0.8]), torch.tensor([1, 4])).sample


@pytest.mark.parametrize(("weights", "seed"), [(None, 2), ("ema", 2), ("model", 1)])
def test_a_published_file_becomes_a_pipeline(capsys, tmp_path, dsmoe, weights, seed):
    choice = [] if weights is None else ["--weights", weights]
    status, out, _ = convert(capsys, dsmoe, "--output", tmp_path / "out", *choice)
    assert status == 0 and "convert with --vae" in out
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "out")
    expected = filled(ModelConfig(**read_settings("dsmoe", DSMOE, GROUPED)), seed)
    assert torch.equal(sample_of(pipe.transformer, 8, 4), sample_of(expected, 8, 4))
    record = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert (record["format"], record["weights"]) == ("dsmoe", weights or "ema") and len(record["sha256"]) == 64
    assert not list(tmp_path.glob(".*.partial"))


@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
def test_there_and_back_is_exact(capsys, tmp_path, dsmoe, ending):
    assert convert(capsys, dsmoe, "--output", tmp_path / "out")[0] == 0
    back = tmp_path / f"back{ending}"
    status, out, _ = convert(capsys, tmp_path / "out", "--to", "published", "--output", back)
    assert status == 0 and "layout of dsmoe" in out
    original = torch.load(dsmoe, weights_only=False)["ema"]
    if ending == ".pt":
        content = torch.load(back, weights_only=True)
        assert content.keys() == {"model", "ema"}
        state = content["ema"]
        assert list(state) == list(content["model"])
    else:
        state = load_file(back)
    assert state.keys() == original.keys() and all(torch.equal(state[key], original[key]) for key in state)
    # The YAML beside it is one the published code takes; and we read both again.
    model = yaml.safe_load((tmp_path / "back.yaml").read_text())["model"]
    assert model["target"] == "models.models_DSMoE.DiT" and model["params"]["MoE_config"]["n_group"] == 1
    assert convert(capsys, back, "--output", tmp_path / "again")[0] == 0
    first, second = (DiffusionPipeline.from_pretrained(tmp_path / name).transformer for name in ("out", "again"))
    assert torch.equal(sample_of(first, 8, 4), sample_of(second, 8, 4)) and first.settings == second.settings


def test_jit_has_two_averages_under_prefixed_names(capsys, tmp_path):
    config = ModelConfig(**read_settings("jit", JIT, GROUPED))
    keys = ("model", "model_ema1", "model_ema2")
    states = {key: reference_state("jit", config, seed) for seed, key in enumerate(keys)}
    content = {key: {f"net.{name}": value for name, value in state.items()} for key, state in states.items()}
    torch.save(content | {"epoch": 3, "args": argparse.Namespace(model="JiT-tiny")}, tmp_path / "checkpoint-last.pth")
    assert "JiT-tiny" in convert(capsys, tmp_path / "checkpoint-last.pth", "--output", tmp_path / "x")[2]
    (tmp_path / "tiny.yaml").write_text(to_yaml(Recipe(model=config)))
    for choice, seed in (("ema", 1), ("ema2", 2), ("model", 0)):
        arguments = ["--config", tmp_path / "tiny.yaml", "--weights", choice, "--output", tmp_path / choice]
        assert convert(capsys, tmp_path / "checkpoint-last.pth", *arguments)[0] == 0
        model = DiffusionPipeline.from_pretrained(tmp_path / choice).transformer
        assert torch.equal(sample_of(model, 8, 3), sample_of(filled(config, seed), 8, 3))
    convert(capsys, tmp_path / "ema2", "--to", "published", "--output", tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert back.keys() == set(keys)
    assert all(torch.equal(back["model_ema1"][name], value) for name, value in content["model_ema2"].items())


def test_jit_files_say_their_architecture(tmp_path):
    """The arguments of the training command name a published model; here one with two classes, at another size."""
    arguments = {"model": "JiT-B/16-E16", "img_size": 64, "class_num": 2, "proj_dropout": 0.1, "attn_dropout": 0.2}
    settings = _from_jit_arguments(tmp_path, arguments | {"t_eps": 0.01, "noise_scale": 2.0})
    expected = {"router": "dsmoe", "depth": 10, "sample_size": 64, "num_classes": 2, "dropout": 0.1}
    expected |= {"attention_dropout": 0.2, "min_gap": 0.01, "noise_scale": 2.0, "class_tokens": 32}
    assert {key: settings[key] for key in expected} == expected


PUBLIC = {
    "dit": {"process": "ddpm", "prediction": "epsilon", "router": "dense"},
    "sit": {"process": "flow", "prediction": "velocity", "router": "dense"},
    "dit-moe": {"process": "ddpm", "prediction": "epsilon", "router": "tc", "moe_layer_freq": 1, "num_experts": 3}
    | {"expert_dim": 20, "shared": "swiglu", "shared_dim": 24, "top_k": 2, "balance": "aux"},
}


@pytest.mark.parametrize("kind", PUBLIC)
def test_public_formats_are_inferred_from_their_shapes(capsys, tmp_path, kind):
    config = ModelConfig(
        sample_size=8, hidden_size=384, depth=2, num_classes=5, learn_sigma=True, position="sincos", **PUBLIC[kind]
    )
    state = reference_state(kind, config, 3)
    telling = "blocks.1.moe.experts.2.gate_proj.weight" if kind == "dit-moe" else "blocks.1.mlp.fc1.weight"
    assert telling in state
    torch.save(state, tmp_path / "model.pt")
    if kind != "dit-moe":
        error = convert(capsys, tmp_path / "model.pt", "--output", tmp_path / "x")[2]
        assert "--format dit or sit" in error
    assert convert(capsys, tmp_path / "model.pt", "--format", kind, "--output", tmp_path / "out")[0] == 0
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert torch.equal(sample_of(pipe.transformer, 8, 4), sample_of(filled(config, 3), 8, 4))
    assert pipe.transformer.settings.process == config.process
    convert(capsys, tmp_path / "out", "--to", "published", "--output", tmp_path / "back.pt")
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert back.keys() == state.keys() and all(torch.equal(back[key], state[key]) for key in state)


@pytest.mark.parametrize(
    ("target", "kind", "moe"),
    [("DiT", "dense", None), ("DiffMoE", "diffmoe", {"num_experts": 4, "capacity": 1, "init_MoeMLP": False})]
    + [(f"{kind.upper()}DiT", kind, {"num_experts": 4, "capacity": 1}) for kind in ("tc", "ec")],
)
@pytest.mark.parametrize("rf", [True, False])
def test_the_yaml_names_family_and_process(capsys, tmp_path, target, kind, moe, rf):
    params = {key: value for key, value in DSMOE.items() if key != "rope_type"}
    config = ModelConfig(**read_settings(kind, params, moe))
    torch.save({"ema": reference_state(kind, config, 4)}, tmp_path / "a.pt")
    (tmp_path / "a.yaml").write_text(yaml_text(target, params, moe, rf))
    assert convert(capsys, tmp_path / "a.pt", "--output", tmp_path / "out")[0] == 0
    settings = DiffusionPipeline.from_pretrained(tmp_path / "out").transformer.settings
    assert (settings.router, settings.process) == (kind, "flow" if rf else "ddpm")
    assert settings.prediction == ("velocity" if rf else "epsilon")


def test_the_decay_of_thresholds_is_read_from_the_file(capsys, tmp_path):
    params = {key: value for key, value in DSMOE.items() if key != "rope_type"}
    moe = {"num_experts": 4, "capacity": 1}
    state = reference_state("diffmoe", ModelConfig(**read_settings("diffmoe", params, moe)), 4)
    assert state["blocks.1.mlp.ema_decay"].tolist() == [pytest.approx(0.95)]
    for decay, expected in ((0.9, 0.9), (0.95000017, float(torch.tensor(0.95000017)))):
        state["blocks.1.mlp.ema_decay"] = torch.tensor([decay])
        save_file(state, tmp_path / "a.safetensors")
        (tmp_path / "a.yaml").write_text(yaml_text("DiffMoE", params, moe))
        out = tmp_path / f"{decay}"
        assert convert(capsys, tmp_path / "a.safetensors", "--output", out)[0] == 0
        assert DiffusionPipeline.from_pretrained(out).transformer.settings.threshold_decay == expected
        back = tmp_path / f"{decay}.safetensors"
        assert convert(capsys, out, "--to", "published", "--output", back)[0] == 0
        assert torch.equal(load_file(back)["blocks.1.mlp.ema_decay"], state["blocks.1.mlp.ema_decay"])


class Stranger:
    """Something no published file should hold."""


def test_pickles_are_read_only_when_trusted(capsys, tmp_path, dsmoe):
    content = torch.load(dsmoe, weights_only=False) | {"args": Stranger()}
    torch.save(content, dsmoe)
    status, _, error = convert(capsys, dsmoe, "--output", tmp_path / "out")
    assert status == 2 and "--trust-pickle" in error and not (tmp_path / "out").exists()
    assert convert(capsys, dsmoe, "--output", tmp_path / "out", "--trust-pickle")[0] == 0


def test_the_hub_is_read_through_its_cache(capsys, tmp_path, dsmoe, monkeypatch):
    """A cache as `huggingface_hub` keeps it, without a network: the real loading code finds the files in it."""
    cache = tmp_path / "hub" / "models--someone--DSMoE-tiny"
    snapshot = cache / "snapshots" / "abc123"
    snapshot.mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc123")
    (snapshot / "0000010.pt").write_bytes(dsmoe.read_bytes())
    (snapshot / "config.yaml").write_text((dsmoe.parents[1] / "config.yaml").read_text())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert convert(capsys, "someone/DSMoE-tiny", "--output", tmp_path / "out")[0] == 0
    expected = filled(ModelConfig(**read_settings("dsmoe", DSMOE, GROUPED)), 2)
    model = DiffusionPipeline.from_pretrained(tmp_path / "out").transformer
    assert torch.equal(sample_of(model, 8, 4), sample_of(expected, 8, 4))
    status, _, error = convert(capsys, "someone/else", "--output", tmp_path / "other")
    assert status == 2 and "cannot be downloaded from the hub" in error


def test_a_vae_and_class_names_are_saved_along(capsys, tmp_path, dsmoe):
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=8)
    vae.save_pretrained(tmp_path / "vae")
    (tmp_path / "names.txt").write_text("tench\ngoldfish\ncock\nhen\ngolden retriever\n")
    options = ["--vae", tmp_path / "vae", "--class-names", tmp_path / "names.txt"]
    status, out, _ = convert(capsys, dsmoe, "--output", tmp_path / "out", *options)
    assert status == 0 and "--vae" not in out
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)
    two_steps = {"num_inference_steps": 2, "output_type": "np"}
    by_name, by_number = (
        pipe(label, generator=torch.Generator().manual_seed(0), **two_steps).images for label in ("golden retriever", 4)
    )
    assert by_name.shape == (1, 8, 8, 3) and (by_name == by_number).all()
    # `sample` takes the folder too, and generates what the pipeline's model does.
    arguments = ["sample", str(tmp_path / "out"), "--classes", "golden retriever,1", "--steps=2", "--per_class=2"]
    assert main([*arguments, "--format=npz", f"--output={tmp_path / 's.npz'}"]) == 0
    # Both decode alike: from the same noise, the pipeline's equal steps are Euler's.
    noise = normal(0, "sample", 0, torch.arange(4), (4, 8, 8))
    images = pipe([4, 4, 1, 1], latents=noise, guidance_scale=1.5, **two_steps).images
    images_of_command = np.load(tmp_path / "s.npz")["images"].astype(int)
    assert np.abs(images_of_command - (images * 255).round()).max() <= 1 and images_of_command.std() > 5
    record = json.loads((tmp_path / "s.json").read_text())
    assert record["labels"] == [4, 4, 1, 1] and record["weights"] == "ema" and record["function_evaluations"] == 2
    assert main([*arguments[:2], "--classes", "golden retreiver"]) == 2
    assert "did you mean golden retriever" in capsys.readouterr().err
    # Converting the folder again keeps its VAE and its names.
    assert convert(capsys, tmp_path / "out", "--output", tmp_path / "copy")[0] == 0
    copy = DiffusionPipeline.from_pretrained(tmp_path / "copy")
    assert all(torch.equal(p, q) for p, q in zip(copy.vae.parameters(), pipe.vae.parameters(), strict=True))
    assert copy.get_label_ids("golden retriever") == [4]
    # Without a VAE of its own, the folder wants one.
    assert convert(capsys, dsmoe, "--output", tmp_path / "bare")[0] == 0
    latent = ["sample", str(tmp_path / "bare"), "--classes=4,1", *arguments[4:], f"--output={tmp_path / 'b.npz'}"]
    assert main([*latent, "--format=npz"]) == 2 and "give one with --vae" in capsys.readouterr().err
    assert main([*latent, "--format=npz", f"--vae={tmp_path / 'vae'}"]) == 0
    assert (np.load(tmp_path / "b.npz")["images"] == np.load(tmp_path / "s.npz")["images"]).all()
    (tmp_path / "names.txt").write_text("tench\n")
    assert "there are 1 class names" in convert(capsys, dsmoe, "--output", tmp_path / "x", *options)[2]


def test_files_of_old_torch_versions_are_read(capsys, tmp_path, dsmoe):
    torch.save(torch.load(dsmoe, weights_only=False), dsmoe, _use_new_zipfile_serialization=False)
    assert convert(capsys, dsmoe, "--output", tmp_path / "out")[0] == 0


def damage(file: Path, how: str) -> None:
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:2000])
    elif how == "text":
        file.write_text("<html>not found</html>")
    elif how == "empty":
        file.write_bytes(b"")
    else:
        content = torch.load(file, weights_only=False)
        state = content["ema"]
        if how == "lacks":
            del state["t_embedder.mlp.0.bias"]
        elif how == "shape":
            state["t_embedder.mlp.0.bias"] = torch.zeros(7)
        elif how == "no ema":
            del content["ema"]
        else:
            content = [1, 2]
        torch.save(content, file)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("truncated", "is cut off or damaged, a zip archive without its end; fetch or save it again"),
        ("empty", "is empty, so it is no checkpoint; fetch or save it again"),
        ("lacks", "lacks t_embedder.mlp.0.bias"),
        ("shape", "of shape (7,), but its architecture expects (32,)"),
        ("no ema", "has no ema weights; choose with --weights from model"),
        ("list", "holds a value of type list, no dictionary of tensors; save the model's state_dict()"),
        ("text", "is a text file, no checkpoint; give a file that torch.save or safetensors wrote"),
    ],
)
def test_damaged_files_are_refused_in_one_line(capsys, tmp_path, dsmoe, how, expected):
    damage(dsmoe, how)
    status, _, error = convert(capsys, dsmoe, "--output", tmp_path / "out")
    assert status == 2 and expected in error and not (tmp_path / "out").exists()


def test_wrong_options_are_refused_in_one_line(capsys, tmp_path, dsmoe):
    out = ["--output", tmp_path / "out"]
    cases = {
        "there is no file or folder": ["/no/such.pt", *out],
        "is not empty": [dsmoe, "--output", dsmoe.parent],
        "--format is jit, but the names": [dsmoe, *out, "--format", "jit"],
        "choose one of dense": [dsmoe, *out, "--format", "gan"],
        "model.target": [dsmoe, *out, "--config", tmp_path / "gan.yaml"],
        "cannot load the VAE": [dsmoe, *out, "--vae", tmp_path / "none"],
        "holds 2 checkpoint files": [dsmoe.parent, *out],
        "ends in .pt": [tmp_path / "whole", "--to", "published", "--output", tmp_path / "x.zip"],
        "is not supported for": [tmp_path / "whole", "--output", tmp_path / "y", "--file", "z"],
        "the format is 'gan'": [
            tmp_path / "whole",
            "--to",
            "published",
            "--output",
            tmp_path / "x.pt",
            "--format",
            "gan",
        ],
        "it lacks": [tmp_path / "whole", "--to", "published", "--output", tmp_path / "x.pt", "--format", "dit"],
        "--weights is model": [tmp_path / "whole", "--output", tmp_path / "y", "--weights", "model"],
        "--file is ../a": [dsmoe.parent, *out, "--file", "../a"],
        "has no model with": [tmp_path / "whole", "--to", "published", "--output", tmp_path / "x.pt", "--format", "ec"],
    }
    (tmp_path / "gan.yaml").write_text(yaml_text("GAN", {}, None))
    for i, broken in enumerate(("params: 3", "params: {MoE_config: [1]}", "params: {depth: many}", "params: [1, 2]")):
        file = tmp_path / f"broken{i}.yaml"
        file.write_text("model: {target: models.models_DSMoE.DiT, " + broken + "}")
        status, _, error = convert(capsys, dsmoe, *out, "--config", file)
        assert status == 2 and "traceback" not in error.lower(), error
    assert convert(capsys, dsmoe, "--output", tmp_path / "whole")[0] == 0
    save_file({"a": torch.zeros(1)}, dsmoe.with_name("other.safetensors"))
    for expected, arguments in cases.items():
        status, _, error = convert(capsys, *arguments)
        assert status == 2 and expected in error, (expected, error)
    assert convert(capsys, dsmoe.parent, *out, "--file", dsmoe.name)[0] == 0


def test_imagenets_classes_have_names(capsys, tmp_path):
    config = ModelConfig(**read_settings("dsmoe", DSMOE | {"num_classes": 1000}, GROUPED))
    torch.save(reference_state("dsmoe", config, 1), tmp_path / "a.pt")
    (tmp_path / "a.yaml").write_text(yaml_text("DSMoE", DSMOE | {"num_classes": 1000}, GROUPED))
    assert convert(capsys, tmp_path / "a.pt", "--output", tmp_path / "out")[0] == 0
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert pipe.get_label_ids(["tench", "golden retriever", "toilet tissue"]) == [0, 207, 999]
    # Nobody wants ten thousand samples unasked.
    assert class_numbers(None, read_source(tmp_path / "out")) == [0, 125, 250, 375, 500, 625, 750, 875]


def test_a_run_becomes_a_pipeline(capsys, tmp_path, tiny_options):
    run = tmp_path / "run"
    assert main(["train", "digits", f"--output_dir={run}", *tiny_options, "--training.steps=3"]) == 0
    assert convert(capsys, run, "--output", tmp_path / "out")[0] == 0
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)
    image = pipe(["7", 3], num_inference_steps=2, output_type="pt").images
    assert image.shape == (2, 1, 8, 8) and image.min() >= 0 and image.max() <= 1
    record = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert record["training_steps"] > 0 and "ema_decay" in record


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("YHLLEO/DSMoE-S-E16", "dsmoe-s-e16"),
        ("YHLLEO/DSMoE-3B-E16", "dsmoe-3b-e16"),
        ("YHLLEO/JiTMoE-B16-E16", "jitmoe-b-16-e16"),
        ("downloads/JiTMoE-L16-E16/", "jitmoe-l-16-e16"),
        ("someone/DSMoE-S-E17", None),
        ("someone/else", None),
    ],
)
def test_published_ids_name_their_recipe(tmp_path, source, expected):
    """Weights without a YAML file beside them."""
    assert _find_config(source, tmp_path / "a" / "b" / "weights.pt") == expected
