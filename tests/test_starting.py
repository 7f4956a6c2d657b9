"""Reading the model that training begins from: runs, folders and published files; and what the command makes of it."""

import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file

from diffusion_moe.cli import main
from diffusion_moe.config import StartConfig
from diffusion_moe.conversion import ConvertOptions, to_pipeline, to_published_file
from diffusion_moe.models import load_model
from diffusion_moe.parsing import read_recipe
from diffusion_moe.starting import StartingPoint, model_options


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
        "start": {"source": str(base)},
        "data": {"kind": "digits"},
        "training": {"steps": 2, "batch_size": 16, "precision": "fp32"},
        "logging": {"tensorboard": False},
    }
    path = tmp_path / "tune.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def states_equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_gives_its_average_or_its_last_weights(base):
    average, last = (StartingPoint(StartConfig(str(base), weights)) for weights in ("ema", "model"))
    assert average.settings == read_recipe(base / "recipe.yaml").model
    origin = average.origin()
    assert origin.name == f"{base} (ema weights)" and origin.class_names == tuple("0123456789")
    assert states_equal(origin.model.state_dict(), load_file(base / "model" / "diffusion_pytorch_model.safetensors"))
    saved = load_file(next(base.glob("checkpoints/*06/*.safetensors")))
    expected = {name.removeprefix("model."): t for name, t in saved.items() if name.startswith("model.")}
    assert states_equal(last.origin().model.state_dict(), expected)
    assert not states_equal(origin.model.state_dict(), expected)


def test_last_weights_of_a_run_of_adapters_are_merged(capsys, tmp_path, base, recipe_file):
    tuned = tmp_path / "tuned"
    assert run(capsys, "train", recipe_file, "--output_dir", tuned, "--start.lora_rank=2")[0] == 0
    model = StartingPoint(StartConfig(str(tuned), "model")).origin().model
    saved = load_file(next(tuned.glob("checkpoints/*02/*.safetensors")))
    name = "blocks.1.attn.qkv."
    a, b, w = (
        saved[f"model.{name}{part}"] for part in ("lora_A.default.weight", "lora_B.default.weight", "base_layer.weight")
    )
    torch.testing.assert_close(model.state_dict()[f"{name}weight"], w + b @ a)
    assert (b @ a).abs().max() > 0
    assert not [name for name in model.state_dict() if "lora" in name]


def test_pipelines_and_model_folders_and_published_files_give_the_same(tmp_path, base):
    to_pipeline(str(base), ConvertOptions(tmp_path / "pipeline"))
    to_published_file(str(base), ConvertOptions(tmp_path / "published" / "model.pt", to="published"))
    expected = StartingPoint(StartConfig(str(base))).origin()
    for path in (tmp_path / "pipeline", base / "model", tmp_path / "published" / "model.pt", tmp_path / "published"):
        point = StartingPoint(StartConfig(str(path)))
        found = point.origin()
        assert states_equal(found.model.state_dict(), expected.model.state_dict()), path
        assert point.settings == found.model.settings
        names = () if "published" in str(path) else expected.class_names
        assert found.class_names == names


def test_a_choice_of_weights_that_is_not_there_is_refused(tmp_path, base):
    with pytest.raises(ValueError, match=r"start.weights is ema2, but .*run has ema or model"):
        _ = StartingPoint(StartConfig(str(base), "ema2")).source
    with pytest.raises(ValueError, match=r"start.weights is model, but .* has one set of weights; leave it out"):
        _ = StartingPoint(StartConfig(str(base / "model"), "model")).source
    shutil.copytree(base, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(ValueError, match="holds no checkpoint; set it to ema"):
        StartingPoint(StartConfig(str(tmp_path / "run"), "model")).origin()


def test_the_recipe_need_not_repeat_the_architecture(capsys, tmp_path, base, recipe_file):
    status, out, _ = run(capsys, "train", recipe_file, "--output_dir", tmp_path / "run", "--model.dropout=0.1")
    assert status == 0 and out.startswith(f"starting from {base} (ema weights)")
    recipe, origin = read_recipe(tmp_path / "run" / "recipe.yaml"), read_recipe(base / "recipe.yaml")
    assert recipe.model == type(recipe.model)(**vars(origin.model) | {"dropout": 0.1})
    assert recipe.start.source == str(base)
    status, out, _ = run(capsys, "train", recipe_file, "--print_config")
    assert yaml.safe_load(out)["model"]["hidden_size"] == 32


def test_a_finished_run_needs_its_source_no_more(capsys, tmp_path, base, recipe_file):
    source = tmp_path / "source"
    shutil.copytree(base, source)
    command = ["train", recipe_file, "--output_dir", tmp_path / "run", "--start.source", source]
    assert run(capsys, *command, "--training.steps=1")[0] == 0
    shutil.rmtree(source)
    status, out, err = run(capsys, *command)
    assert (status, err) == (0, "") and "resuming from" in out and "starting from" not in out
    assert "model.depth: 2 -> 4" in run(capsys, *command, "--model.depth=4")[2]
    status, _, err = run(capsys, *command[:3], tmp_path / "other", "--start.source", source)
    assert status == 2 and err.count("\n") == 1 and "there is no file or folder" in err


def test_upcycling_takes_the_dense_width_unless_told(tmp_path, capsys, tiny):
    dense = tmp_path / "dense"
    options = [*tiny, "--training.steps=1", "--model.router=dense"]
    assert run(capsys, "train", "digits", "--output_dir", dense, *options)[0] == 0
    start = StartConfig(str(dense), upcycle=True)
    given = model_options(start, StartingPoint(start))
    assert "--model.expert_dim=128" in given and "--model.shared=none" in given
    (tmp_path / "up.yaml").write_text(
        yaml.safe_dump(
            {
                "start": {"source": str(dense), "upcycle": True},
                "data": {"kind": "digits"},
                "training": {"steps": 1, "batch_size": 16, "precision": "fp32"},
                "logging": {"tensorboard": False},
            }
        )
    )
    status, out, err = run(capsys, "train", tmp_path / "up.yaml", "--output_dir", tmp_path / "up")
    assert (status, err) == (0, "")
    assert "16 routed ones are copies of the layer; they begin as the dense layers" in out
    experts = load_model(tmp_path / "up" / "model").settings
    assert (experts.expert_dim, experts.expert_activation, experts.expert_bias) == (128, "gelu", True)


MISTAKES = {
    "no such folder": (["--start.source=/no/such"], "there is no file or folder /no/such"),
    "unfinished": (["--start.source={unfinished}"], "has no trained model yet"),
    "no model": (["--start.source={empty}"], "holds 0 checkpoint files"),
    "contradiction": (["--model.depth=6"], "model.depth is 6, but that of"),
    "pattern": (['--start.freeze=["block.*"]'], "did you mean blocks"),
    "target": (["--start.lora_rank=2", "--start.lora_targets=[attn.q]"], "take attn.qkv"),
    "experts already": (["--start.upcycle"], "has experts already"),
    "classes": (["--model.num_classes=7"], "the data has 10 classes"),
    "a field": (["--start.sourse=x"], "did you mean --start.source"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_writes_nothing(capsys, tmp_path, base, recipe_file, mistake):
    options, expected = MISTAKES[mistake]
    (tmp_path / "empty").mkdir()
    (tmp_path / "unfinished").mkdir()
    shutil.copy(base / "recipe.yaml", tmp_path / "unfinished")
    paths = {name: tmp_path / name for name in ("empty", "unfinished")}
    options = [option.format(**paths) for option in options]
    status, out, err = run(capsys, "train", recipe_file, "--output_dir", tmp_path / "run", *options)
    assert (status, out) == (2, "") and expected in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_tuned_run_is_sampled_and_converted(capsys, tmp_path, recipe_file):
    folder = tmp_path / "run"
    targets = "--start.lora_targets=[attn.qkv,mlp.experts.w_out]"
    assert run(capsys, "train", recipe_file, "--output_dir", folder, "--start.lora_rank=2", targets)[0] == 0
    assert (folder / "lora" / "pytorch_lora_weights.safetensors").is_file()
    status, out, _ = run(capsys, "sample", folder, "--per_class=1", "--steps=2", "--classes=3")
    assert status == 0 and out.splitlines()[-1].startswith("wrote")
    assert run(capsys, "convert", folder, "--output", tmp_path / "pipeline")[0] == 0
