"""Reading the model that training begins from: runs, folders and published files; and what the command makes of it."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from diffusion_moe.cli import main
from diffusion_moe.config import InitConfig, read_recipe
from diffusion_moe.conversion import ConvertOptions, export_reference_checkpoint, to_pipeline
from diffusion_moe.initialization import PretrainedSource, model_settings
from diffusion_moe.models import load_model, make_model
from diffusion_moe.sampling.loading import load_weights
from diffusion_moe.sampling.source import read_source


def run(capsys, *arguments):
    """Exit status, standard output and standard error of the command."""
    status = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return status, out, err


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_options):
    """A tiny finished run."""
    folder = tmp_path_factory.mktemp("base") / "run"
    options = [*tiny_options, "--training.steps=6", "--training.ema_decay=0.5", "--model.mlp_activation=silu"]
    assert main(["train", "digits", "--output_dir", str(folder), *options]) == 0
    return folder


@pytest.fixture
def recipe_file(tmp_path, base):
    """A recipe that leaves the architecture to its source."""
    content = {
        "init": {"from_checkpoint": str(base)},
        "data": {"kind": "digits"},
        "training": {"steps": 2, "batch_size": 16, "precision": "fp32"},
        "logging": {"tensorboard": False},
    }
    path = tmp_path / "tune.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def states_equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_gives_its_ema_or_its_last_weights(base):
    ema, last = (PretrainedSource(InitConfig(str(base), weights)) for weights in ("ema", "model"))
    assert ema.config == read_recipe(base / "recipe.yaml").model
    pretrained = ema.load()
    assert pretrained.name == f"{base} (ema weights)" and pretrained.class_names == tuple("0123456789")
    assert states_equal(
        pretrained.model.state_dict(), load_file(base / "model" / "diffusion_pytorch_model.safetensors")
    )
    saved = load_file(next(base.glob("checkpoints/*06/*.safetensors")))
    expected = {name.removeprefix("model."): t for name, t in saved.items() if name.startswith("model.")}
    assert states_equal(last.load().model.state_dict(), expected)
    assert not states_equal(pretrained.model.state_dict(), expected)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory, base, tiny_options):
    """A run of adapters of layers and experts that learn fast: its newest weights are far from its EMA."""
    folder, source = (tmp_path_factory.mktemp("adapted") / name for name in ("run", "source"))
    torch.manual_seed(0)
    model = load_model(base / "model")
    for parameter in model.parameters():  # after six steps gates are near zero, and adapters behind them would not tell
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(source)
    options = ["--init.lora_rank=2", "--init.lora_targets=[attn.qkv,mlp.experts.w_out]", "--init.lora_alpha=3"]
    more = ["--training.steps=4", "--training.ema_decay=0.9", "--model.mlp_activation=silu"]
    more += ["--optimizer.learning_rate=0.05", "--training.checkpoint_every=2"]
    command = ["train", "digits", "--output_dir", str(folder), f"--init.from_checkpoint={source}"]
    assert main([*command, *tiny_options, *options, *more]) == 0
    return folder


def merged_by_hand(run):
    """W + alpha / rank * B A of a run's checkpoint after four steps (LoRA, section 4.1)."""
    saved = load_file(next(run.glob("checkpoints/*04/*.safetensors")))
    state = {name.removeprefix("model."): tensor for name, tensor in saved.items() if name.startswith("model.")}
    whole = {}
    for name, tensor in state.items():
        layer, base, weight = name.partition("base_layer.")
        if base and weight in ("weight", "w_out"):
            a, b = (state[f"{layer}lora_{part}.default.weight"] for part in "AB")
            if weight == "w_out":  # peft stacks A as (E * rank, in) and B as (out, rank * E); the layer is (E, in, out)
                delta = torch.einsum("ore,eri->eio", b.unflatten(1, (2, -1)), a.unflatten(0, (-1, 2)))
            else:
                delta = b @ a
            assert delta.abs().max() > 1e-3
            tensor = tensor + 3 / 2 * delta
        if "lora_" not in name:
            whole[layer + weight] = tensor
    return whole


def test_last_weights_of_a_run_of_adapters_are_merged(adapted):
    pretrained = PretrainedSource(InitConfig(str(adapted), "model")).load().model
    sampled = load_weights(replace(read_source(adapted), weights="model"))
    expected = merged_by_hand(adapted)
    torch.testing.assert_close(dict(pretrained.state_dict()), expected)
    assert states_equal(pretrained.state_dict(), sampled.state_dict())
    ema = load_model(adapted / "model")
    assert all(ema.state_dict()[name].shape == tensor.shape for name, tensor in expected.items())
    by_hand = make_model(read_recipe(adapted / "recipe.yaml").model).eval()
    by_hand.load_state_dict(expected)
    x, t, y = torch.randn(3, 1, 8, 8), torch.rand(3), torch.tensor([1, 5, 9])
    with torch.no_grad():
        torch.testing.assert_close(sampled(x, t, y).sample, by_hand(x, t, y).sample)
        assert (ema(x, t, y).sample - by_hand(x, t, y).sample).abs().max() > 1e-3


def test_the_command_takes_last_weights_of_a_run_of_adapters(capsys, adapted, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusion_moe.evaluation.classifier.EPOCHS", 1)
    hand = make_model(read_recipe(adapted / "recipe.yaml").model)
    hand.load_state_dict(merged_by_hand(adapted))
    hand.save_pretrained(tmp_path / "hand")
    options = ["--steps=2", "--per_class=1", "--classes=3,8", "--format=npz", "--guidance_scale=1.5", "--solver=euler"]
    images = {}
    for name, folder, more in (
        ("last", adapted, ["--weights=model"]),
        ("hand", tmp_path / "hand", []),
        ("ema", adapted, []),
    ):
        output = tmp_path / f"{name}.npz"
        status, _, err = run(capsys, "sample", folder, "--output", output, *options, *more)
        assert (status, err) == (0, "")
        images[name] = np.load(output)["images"].astype(int)
    assert np.abs(images["last"] - images["hand"]).max() <= 1 and np.abs(images["last"] - images["ema"]).max() > 1
    record = json.loads((tmp_path / "last.json").read_text())
    assert (record["weights"], record["training_steps"], record["ema_decay"]) == ("model", 4, None)
    output = tmp_path / "scores.json"
    options = ["--num_samples=20", "--steps=1", "--solver=euler", "--weights=model", "--output", output]
    status, _, err = run(capsys, "evaluate", adapted, *options)
    assert (status, err) == (0, "") and json.loads(output.read_text())["weights"] == "model"


def test_samples_of_other_weights_are_kept_beside_those_of_the_ema(capsys, base, tmp_path):
    shutil.copytree(base, tmp_path / "run")
    for weights in ("ema", "model"):
        assert run(capsys, "sample", tmp_path / "run", "--per_class=1", "--steps=1", f"--weights={weights}")[0] == 0
    names = sorted(path.name for path in (tmp_path / "run" / "samples").glob("*.png"))
    assert len(names) == 2 and sum("-model-" in name for name in names) == 1
    status, _, err = run(capsys, "sample", base / "model", "--weights=model")
    assert status == 2 and err.count("\n") == 1 and "set --weights to ema" in err


def test_pipelines_and_model_folders_and_published_files_give_the_same(tmp_path, base):
    to_pipeline(str(base), ConvertOptions(tmp_path / "pipeline"))
    export_reference_checkpoint(str(base), ConvertOptions(tmp_path / "published" / "model.pt", to="published"))
    expected = PretrainedSource(InitConfig(str(base))).load()
    for path in (tmp_path / "pipeline", base / "model", tmp_path / "published" / "model.pt", tmp_path / "published"):
        point = PretrainedSource(InitConfig(str(path)))
        found = point.load()
        assert states_equal(found.model.state_dict(), expected.model.state_dict()), path
        assert point.config == found.model.settings
        names = () if "published" in str(path) else expected.class_names
        assert found.class_names == names


def test_a_choice_of_weights_that_is_not_there_is_refused(tmp_path, base):
    with pytest.raises(ValueError, match=r"init.weights is ema2, but .*run has ema or model"):
        _ = PretrainedSource(InitConfig(str(base), "ema2")).source
    with pytest.raises(ValueError, match=r"init.weights is model, but .* has one set of weights; remove it"):
        _ = PretrainedSource(InitConfig(str(base / "model"), "model")).source
    shutil.copytree(base, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(ValueError, match=r"init.weights is model, but .* has no checkpoint.*; set init.weights to ema"):
        PretrainedSource(InitConfig(str(tmp_path / "run"), "model")).load()


def test_the_recipe_need_not_repeat_the_architecture(capsys, tmp_path, base, recipe_file):
    status, out, _ = run(capsys, "train", recipe_file, "--output_dir", tmp_path / "run", "--model.dropout=0.1")
    assert status == 0 and out.startswith(f"starting from {base} (ema weights)")
    recipe, pretrained = read_recipe(tmp_path / "run" / "recipe.yaml"), read_recipe(base / "recipe.yaml")
    assert recipe.model == type(recipe.model)(**vars(pretrained.model) | {"dropout": 0.1})
    assert recipe.init.from_checkpoint == str(base)
    status, out, _ = run(capsys, "train", recipe_file, "--print_config")
    assert yaml.safe_load(out)["model"]["hidden_size"] == 32


def test_a_finished_run_needs_its_source_no_more(capsys, tmp_path, base, recipe_file):
    source = tmp_path / "source"
    shutil.copytree(base, source)
    command = ["train", recipe_file, "--output_dir", tmp_path / "run", "--init.from_checkpoint", source]
    assert run(capsys, *command, "--training.steps=1")[0] == 0
    shutil.rmtree(source)
    status, out, err = run(capsys, *command)
    assert (status, err) == (0, "") and "resuming from" in out and "starting from" not in out
    assert "model.depth: 2 -> 4" in run(capsys, *command, "--model.depth=4")[2]
    status, _, err = run(capsys, *command[:3], tmp_path / "other", "--init.from_checkpoint", source)
    assert status == 2 and err.count("\n") == 1 and "there is no file or folder" in err


def test_upcycling_takes_the_dense_width_unless_given(tmp_path, capsys, tiny):
    dense = tmp_path / "dense"
    options = [*tiny, "--training.steps=1", "--model.router=dense"]
    assert run(capsys, "train", "digits", "--output_dir", dense, *options)[0] == 0
    start = InitConfig(str(dense), upcycle=True)
    given = model_settings(PretrainedSource(start))
    assert (given["expert_dim"], given["shared"]) == (128, "none")
    (tmp_path / "up.yaml").write_text(
        yaml.safe_dump(
            {
                "init": {"from_checkpoint": str(dense), "upcycle": True},
                "data": {"kind": "digits"},
                "training": {"steps": 1, "batch_size": 16, "precision": "fp32"},
                "logging": {"tensorboard": False},
            }
        )
    )
    status, out, err = run(capsys, "train", tmp_path / "up.yaml", "--output_dir", tmp_path / "up")
    assert (status, err) == (0, "")
    assert "16 routed ones are copies of the layer; they start exactly equal to the dense layers" in out
    experts = load_model(tmp_path / "up" / "model").settings
    assert (experts.expert_dim, experts.expert_activation, experts.expert_bias) == (128, "gelu", True)


MISTAKES = {
    "text": (
        ["--init.from_checkpoint={text}"],
        "init.from_checkpoint: {text} is a text file, no checkpoint; give a file that",
    ),
    "no such folder": (["--init.from_checkpoint=/no/such"], "there is no file or folder /no/such"),
    "unfinished": (["--init.from_checkpoint={unfinished}"], "has no trained model yet"),
    "no model": (
        ["--init.from_checkpoint={empty}"],
        "holds no checkpoint file; give a file, or a folder with a file, that ends in .pt",
    ),
    "contradiction": (["--model.depth=6"], "model.depth is 6, but that of"),
    "pattern": (['--init.freeze=["block.*"]'], "did you mean blocks"),
    "target": (["--init.lora_rank=2", "--init.lora_targets=[attn.q]"], "choose from attn.qkv"),
    "experts already": (["--init.upcycle"], "already has experts"),
    "classes": (["--model.num_classes=7"], "the data has 10 classes"),
    "a field": (["--init.from_chekpoint=x"], "did you mean --init.from_checkpoint"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_writes_nothing(capsys, tmp_path, base, recipe_file, mistake):
    options, expected = MISTAKES[mistake]
    (tmp_path / "empty").mkdir()
    (tmp_path / "unfinished").mkdir()
    shutil.copy(base / "recipe.yaml", tmp_path / "unfinished")
    (tmp_path / "text").write_text("import torch\n")
    paths = {name: tmp_path / name for name in ("empty", "unfinished", "text")}
    options, expected = [option.format(**paths) for option in options], expected.format(**paths)
    status, out, err = run(capsys, "train", recipe_file, "--output_dir", tmp_path / "run", *options)
    assert (status, out) == (2, "") and expected in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_tuned_run_is_sampled_and_converted(capsys, tmp_path, recipe_file):
    folder = tmp_path / "run"
    targets = "--init.lora_targets=[attn.qkv,mlp.experts.w_out]"
    assert run(capsys, "train", recipe_file, "--output_dir", folder, "--init.lora_rank=2", targets)[0] == 0
    assert (folder / "lora" / "pytorch_lora_weights.safetensors").is_file()
    status, out, _ = run(capsys, "sample", folder, "--per_class=1", "--steps=2", "--classes=3")
    assert status == 0 and out.splitlines()[-1].startswith("wrote")
    assert run(capsys, "convert", folder, "--output", tmp_path / "pipeline")[0] == 0
