"""What a recipe leaves open: the precision, and fields that are younger than the run."""

import json

import pytest
import torch
import yaml
from run_state import final_state

from diffusion_moe.cli import main
from diffusion_moe.config import read_recipe
from diffusion_moe.moe import precision
from diffusion_moe.moe.precision import choose_precision
from diffusion_moe.planning.options import PlanOptions
from diffusion_moe.planning.plan import make_plan
from diffusion_moe.run_folder import RunFolder
from diffusion_moe.training.loop import train

CPU = torch.device("cpu")


@pytest.fixture
def fast(monkeypatch):
    """As on a processor that is fast in bfloat16."""
    monkeypatch.setattr(precision, "FAST_IN_BF16", True)
    monkeypatch.setattr(precision, "SLOW_DTYPES", frozenset())
    monkeypatch.delenv(precision.VARIABLE)


def forget(folder, *names):
    """Turn a run's recipe into one of an older version, which did not know these fields of the training section."""
    path = folder / "recipe.yaml"
    sections = yaml.safe_load(path.read_text())
    for name in names:
        del sections["training"][name]
    path.write_text(yaml.safe_dump(sections))


def test_auto_on_processors(fast, monkeypatch):
    assert str(choose_precision("auto", CPU)) == "bf16 (auto: this processor is fast in bfloat16)"
    assert str(choose_precision("fp32", CPU)) == "fp32"
    monkeypatch.setenv(precision.VARIABLE, "float32")
    assert str(choose_precision("auto", CPU)) == "fp32 (auto: DIFFUSION_MOE_CPU_MATMUL is float32)"
    assert str(choose_precision("bf16", CPU)) == "bf16"
    monkeypatch.setattr(precision, "FAST_IN_BF16", False)
    monkeypatch.setenv(precision.VARIABLE, "low_precision")
    assert choose_precision("auto", CPU).precision == "fp32"


@pytest.mark.parametrize(("has_it", "expected"), [(True, "bf16"), (False, "fp32")])
def test_auto_on_gpus_is_bf16_where_it_is_not_emulated(monkeypatch, has_it, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation or has_it)
    assert choose_precision("auto", torch.device("cuda")).precision == expected


def test_training_records_what_auto_has_chosen_and_a_resumed_run_keeps_it(tiny, tmp_path, fast, monkeypatch):
    options = [*tiny, "--optimizer.schedule=constant", "--training.precision=auto"]
    lines = []
    train(read_recipe("digits", [*options, "--training.steps=1"]), tmp_path, log=lines.append)
    assert lines[0] == "computing in bf16 (auto: this processor is fast in bfloat16)"
    assert RunFolder(tmp_path).read_recipe().training.precision == "bf16"
    monkeypatch.setattr(precision, "FAST_IN_BF16", False)
    lines = []
    train(read_recipe("digits", [*options, "--training.steps=2"]), tmp_path, log=lines.append)
    assert lines[0] == "computing in bf16 (auto: as the run began)"
    train(read_recipe("digits", [*options, "--training.steps=1"]), tmp_path / "slow", log=lines.append)
    assert RunFolder(tmp_path / "slow").read_recipe().training.precision == "fp32"


def test_what_auto_computes_is_what_it_says(tiny, tmp_path, fast, monkeypatch):
    """Bit for bit the weights of a run that asks for it."""
    monkeypatch.setenv(precision.VARIABLE, "low_precision")
    for name in ("auto", "bf16", "fp32"):
        recipe = read_recipe("digits", [*tiny, "--training.steps=2", f"--training.precision={name}"])
        train(recipe, tmp_path / name, log=str)
    auto, narrow, wide = (final_state(tmp_path / name, 2) for name in ("auto", "bf16", "fp32"))
    assert all(torch.equal(auto[name], narrow[name]) for name in auto)
    assert any(not torch.equal(auto[name], wide[name]) for name in auto)


def test_verbs_that_sample_say_and_record_the_precision(tiny, tmp_path, capsys, fast, monkeypatch):
    monkeypatch.setattr("diffusion_moe.evaluation.classifier.EPOCHS", 1)
    folder = str(tmp_path / "run")
    assert main(["train", "digits", *tiny, "--training.steps=1", "--output_dir", folder]) == 0
    sample = ["sample", folder, "--steps=2", "--per_class=1", f"--output={tmp_path / 'x.png'}"]

    def said_and_recorded(verb, record):
        capsys.readouterr()
        assert main(verb) == 0
        return capsys.readouterr().out.splitlines()[0], json.loads(record.read_text())["dtype"]

    by_auto = ("computing in bf16 (auto: this processor is fast in bfloat16)", "bf16")
    assert said_and_recorded(sample, tmp_path / "x.json") == by_auto
    evaluate = ["evaluate", folder, "--num_samples=20", "--steps=2"]
    assert said_and_recorded(evaluate, tmp_path / "run" / "evaluation.json") == by_auto
    assert said_and_recorded([*sample, "--precision=fp32"], tmp_path / "x.json") == ("computing in fp32", "fp32")
    monkeypatch.setattr(precision, "FAST_IN_BF16", False)
    assert said_and_recorded(sample, tmp_path / "x.json")[1] == "fp32"


def test_a_plan_takes_auto_for_bf16(tiny):
    plans = [
        make_plan(read_recipe("digits", [*tiny, f"--training.precision={name}"]), PlanOptions()).record()
        for name in ("auto", "bf16", "fp32")
    ]
    assert plans[0] == plans[1] != plans[2]


@pytest.mark.parametrize("source", ["digits", "its own recipe"])
def test_a_run_older_than_the_warm_up_resumes_with_a_constant_decay(tiny, tmp_path, capsys, source):
    """By the same command, whose default is now another, and from its own recipe.yaml; bit for bit as before."""
    plain = [option for option in tiny if "ema_warmup" not in option]
    options = [*plain, "--optimizer.schedule=constant"]
    constant = [*options, "--training.ema_warmup=false"]
    old, whole = tmp_path / "old", tmp_path / "whole"
    train(read_recipe("digits", [*constant, "--training.steps=6"]), whole, log=str)
    train(read_recipe("digits", [*constant, "--training.steps=3"]), old, log=str)
    forget(old, "ema_warmup")
    assert RunFolder(old).read_recipe().training.ema_warmup is False
    name, given = ("digits", options) if source == "digits" else (str(old / "recipe.yaml"), [])
    assert main(["train", name, *given, "--training.steps=6", "--output_dir", str(old)]) == 0
    assert RunFolder(old).read_recipe().training.ema_warmup is False
    expected, found = final_state(whole, 6), final_state(old, 6)
    assert not [name for name in expected if not torch.equal(expected[name], found[name])]
    # Wanted on purpose, it is a change like any other.
    changed = [*options, "--training.ema_warmup=true", "--training.steps=7"]
    forget(old, "ema_warmup")
    capsys.readouterr()
    assert main(["train", "digits", *changed, "--resume", "changed", "--output_dir", str(old)]) == 0
    assert "  training.ema_warmup: False -> True" in capsys.readouterr().out.splitlines()


def test_a_new_run_warms_up(tiny, tmp_path):
    plain = [option for option in tiny if "ema_warmup" not in option]
    train(read_recipe("digits", [*plain, "--training.steps=1"]), tmp_path, log=str)
    state = final_state(tmp_path, 1)
    fresh = read_recipe("digits", plain)
    assert fresh.training.ema_warmup
    from diffusion_moe.training.state import make_state

    begun = make_state(fresh, CPU).model.state_dict()["x_embedder.weight"]
    expected = 0.1 * begun + 0.9 * state["model.x_embedder.weight"]
    torch.testing.assert_close(state["ema.x_embedder.weight"], expected)
