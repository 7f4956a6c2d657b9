"""The command as a user meets it."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import yaml

from diffusion_moe.cli import VERBS, main
from diffusion_moe.cli.help import field_docs
from diffusion_moe.config import SECTIONS, find_recipe, read_recipe, recipe_names
from diffusion_moe.routing_rules import RULES


def run(capsys, *arguments):
    """Exit status, standard output and standard error of the command."""
    status = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return status, out, err


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_options):
    """A tiny finished run."""
    folder = tmp_path_factory.mktemp("run") / "tiny"
    assert main(["train", "digits", "--output_dir", str(folder), *tiny_options, "--training.steps=4"]) == 0
    return folder


MISTAKES = {
    "unknown option": (["--model.dept=4"], "did you mean --model.depth"),
    "abbreviated option": (["--model.dep=4"], "did you mean --model.depth"),
    "wrong type": (["--model.depth=four"], "model.depth is four; expected int"),
    "fraction for an integer": (["--training.steps=1.5"], "training.steps is 1.5"),
    "unknown choice": (["--model.router=best"], f"model.router is 'best'; choose one of dense, {', '.join(RULES)}"),
    "a lone item for a list": (["--data.buckets=64x64"], "data.buckets is 64x64; expected a list, as [64x64]"),
    "number out of range": (["--training.steps=0"], "training.steps is 0"),
    "experts": (["--model.top_k=9"], "model.top_k is 9, more than model.num_experts 8"),
    "groups": (["--model.n_group=3"], "model.num_experts 8 is not divisible by model.n_group 3"),
    "heads": (["--model.num_heads=5"], "model.num_heads 5"),
    "rotary": (["--model.hidden_size=60", "--model.num_heads=6"], "model.position rope2d"),
    "several processes": (["--parallel.shard=2"], "1 x 2 x 1 = 2"),
    "missing folder path": (["--data.kind=folder"], "data.path is missing"),
    "missing folder": (["--data.kind=folder", "--data.path=/no/such"], "data.path /no/such is not a folder"),
    "shape of the data": (["--model.sample_size=16"], "(1, 16, 16)"),
    "classes of the data": (["--model.num_classes=7"], "model.num_classes is 7, but the data has 10 classes"),
    "no GPU": (["--training.device=cuda"], "no CUDA device"),
    "accumulation": (["--training.accumulation=3"], "not divisible by training.accumulation 3"),
    "resume": (["--resume=maybe"], "resume is maybe"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_writes_nothing(capsys, tmp_path, mistake):
    options, expected = MISTAKES[mistake]
    status, out, err = run(capsys, "train", "digits", "--output_dir", tmp_path / "run", *options)
    assert status == 2
    assert expected in err
    assert err.count("\n") == 1
    assert out == ""
    assert not (tmp_path / "run").exists()


RECIPES = {
    "misspelled key": ("model:\n  dept: 4\n", "model.dept; did you mean model.depth"),
    "misspelled section": ("modle:\n  depth: 4\n", "there is no modle; did you mean model"),
    "wrong type": ("training:\n  steps: many\n", "training.steps is many; expected int"),
    "not YAML": ("model: [", "cannot read "),
    "a list": ("- 1\n", "not a mapping of sections"),
    "a number for a section": ("model: 4\n", "model is 4; expected a mapping"),
    "a list for a number": ("model:\n  depth: [1, 2]\n", "model.depth is"),
    "empty": ("", "not a mapping of sections"),
}


@pytest.mark.parametrize("case", RECIPES)
def test_a_wrong_recipe_file_is_one_line(capsys, tmp_path, case):
    text, expected = RECIPES[case]
    (tmp_path / "wrong.yaml").write_text(text)
    status, _, err = run(capsys, "train", tmp_path / "wrong.yaml", "--output_dir", tmp_path / "run")
    assert status == 2
    assert expected in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train", "digit"], "did you mean digits"),
        (["train", "no/such.yaml"], "no recipe file no/such.yaml"),
        (["train"], "the recipe is missing"),
        (["trian", "digits"], "did you mean train"),
        (["sample", "/no/such/run"], "there is no folder /no/such/run"),
        (["sample"], "the folder is missing"),
        (["evaluate", "."], "has no recipe.yaml"),
        (["recipes", "--all"], "there is no --all"),
    ],
)
def test_other_mistakes_are_one_line_too(capsys, arguments, expected):
    status, _, err = run(capsys, *arguments)
    assert status == 2
    assert expected in err
    assert err.count("\n") == 1


def test_print_config_shows_every_field_and_reads_back(capsys, tmp_path):
    status, out, _ = run(capsys, "train", "digits", "--model.num_experts", 4, "--print_config")
    assert status == 0
    printed = yaml.safe_load(out)
    assert printed.keys() == SECTIONS.keys()
    assert all(printed[name].keys() == SECTIONS[name].__dataclass_fields__.keys() for name in SECTIONS)
    (tmp_path / "again.yaml").write_text(out)
    assert read_recipe(str(tmp_path / "again.yaml")) == read_recipe("digits", ["--model.num_experts=4"])


def test_help_explains_every_option(capsys):
    status, out, _ = run(capsys, "train", "--help", "all")
    assert status == 0
    text = " ".join(out.split())
    for name, section in SECTIONS.items():
        for field in section.__dataclass_fields__:
            assert f"--{name}.{field}" in text
    assert "Experts per token (router: tc, dsmoe, promoe)." in text


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(capsys, verb):
    status, out, _ = run(capsys, verb, "--help")
    assert status == 0
    assert f"diffusion-moe {verb}" in out
    assert out.count("\n") < 100
    assert f"  {verb} " in run(capsys, "--help")[1]


@pytest.mark.parametrize("verb", ["train", "plan"])
def test_the_short_help_has_what_most_need(capsys, verb):
    out, whole = run(capsys, verb, "--help")[1], run(capsys, verb, "digits", "--help", "all")[1]
    assert (
        out.endswith("\n\n`--help all` lists every option. A BOOL without its value is true.\n")
        and "--help all" not in whole
    )
    shown, everything = (set(re.findall(r"^  (--[\w.]+)", text, re.M)) for text in (out, whole))
    assert {"--model.depth", "--model.router", "--training.steps", "--data.path"} <= shown < everything
    assert "--model.rotary_pairs" in everything - shown


def test_every_option_of_a_dataclass_has_a_docstring():
    for section in SECTIONS.values():
        assert field_docs(section).keys() == section.__dataclass_fields__.keys()
        assert all(field_docs(section).values())


def test_recipes_are_listed_with_their_sizes(capsys):
    status, out, _ = run(capsys, "recipes")
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()[1:]] == recipe_names()


def test_every_shipped_recipe_can_be_read():
    for name in recipe_names():
        assert read_recipe(find_recipe(name)) == read_recipe(name)


def test_running_again_resumes_and_another_recipe_is_refused(capsys, trained, tiny):
    command = ["train", "digits", "--output_dir", trained, *tiny]
    assert "already at the last step" in run(capsys, *command, "--training.steps=4")[1]
    before = (trained / "recipe.yaml").read_text()
    status, _, err = run(capsys, *command, "--training.steps=4", "--optimizer.learning_rate=0.5", "--model.top_k=1")
    assert status == 2
    assert "optimizer.learning_rate: 0.002 -> 0.5" in err
    assert "model.top_k: 2 -> 1" in err
    assert (trained / "recipe.yaml").read_text() == before
    status, _, err = run(capsys, *command, "--training.steps=4", "--resume=never")
    assert status == 2
    assert "--resume is never" in err
    # Under a cosine schedule another number of steps is another course of training.
    assert "training.steps: 4 -> 8" in run(capsys, *command, "--training.steps=8")[2]


def test_a_folder_of_other_files_is_refused(capsys, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    status, _, err = run(capsys, "train", "digits", "--output_dir", tmp_path)
    assert status == 2
    assert "no recipe.yaml" in err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_sample_writes_a_grid_with_its_record(capsys, trained):
    status, out, _ = run(capsys, "sample", trained, "--per_class=2", "--steps=2", "--classes=3,7")
    assert status == 0
    picture = trained / "samples" / "grid-step4-seed0-euler2-guidance1.5-class3+7-2each.png"
    assert str(picture) in out
    record = json.loads(picture.with_name(f"{picture.name.removesuffix('.png')}.json").read_text())
    assert record["labels"] == [3, 3, 7, 7]
    assert (record["solver"], record["function_evaluations"], record["guidance_scale"]) == ("euler", 2, 1.5)


def test_sample_writes_arrays_and_single_pictures(capsys, trained, tmp_path):
    import numpy as np
    from PIL import Image

    options = ["--per_class=1", "--steps=2", "--classes=[1,4]"]
    run(capsys, "sample", trained, *options, "--format=npz", "--output", tmp_path / "x.npz")
    run(capsys, "sample", trained, *options, "--format=png", "--output", tmp_path / "pictures")
    arrays = np.load(tmp_path / "x.npz")
    assert arrays["labels"].tolist() == [1, 4]
    names = sorted(path.name for path in (tmp_path / "pictures").glob("*.png"))
    assert names == ["class0001-000000.png", "class0004-000001.png"]
    pictures = [np.array(Image.open(tmp_path / "pictures" / name)) for name in names]
    np.testing.assert_array_equal(np.stack(pictures), arrays["images"][..., 0])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--classes=10"], "class 10 is out of range; the model has classes 0 to 9"),
        (["--classes=-1"], "class -1 is out of range"),
        (["--classes=cat"], "there is no class 'cat'; give a number from 0 to 9"),
        (["--classes="], "there is no class ''"),
        (["--per_class=0"], "per_class is 0"),
        (["--solver=rk4"], "solver is rk4"),
        (["--guidance_interval=[0.5,0.2]"], "guidance_interval is 0.5, 0.2"),
        (["--num_samples=3"], "there is no --num_samples"),
        (["--format=npz", "--output=images"], "output is images; a file of format npz ends in .npz"),
        (["--output=images.npz"], "a file of format grid ends in .png"),
    ],
)
def test_a_wrong_sampling_option_is_one_line_and_writes_nothing(capsys, trained, options, expected):
    before = sorted(trained.rglob("*"))
    status, _, err = run(capsys, "sample", trained, *options)
    assert status == 2
    assert expected in err
    assert err.count("\n") == 1
    assert sorted(trained.rglob("*")) == before


def test_classes_are_taken_by_name_first(capsys, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    data = tmp_path / "run" / "model" / "data.json"
    record = json.loads(data.read_text())
    assert record["class_names"] == list("0123456789")
    data.write_text(json.dumps(record | {"class_names": ["0", "1", "10", "11", "2", "3", "4", "5", "6", "b #2"]}))
    options = ["--per_class=1", "--steps=1", "--format=npz"]
    status, _, err = run(capsys, "sample", tmp_path / "run", *options, "--classes=2")
    assert status == 2 and err.count("\n") == 1 and "give #2 for the number or name:2 for the name" in err
    for index, (classes, numbers) in enumerate(
        [("#2", [2]), ("name:2,#2", [4, 2]), ("10,1,8,b #2", [2, 1, 8, 9]), ("[#3, 11]", [3, 3]), ("#8,#9", [8, 9])]
    ):
        output = tmp_path / f"{index}.npz"
        for spelling in (["--classes", classes], [f"--classes={classes}"]):
            assert run(capsys, "sample", tmp_path / "run", *options, "--output", output, *spelling)[0] == 0
            assert json.loads(output.with_suffix(".json").read_text())["labels"] == numbers


def test_samples_of_other_settings_do_not_overwrite_each_other(capsys, trained):
    before = set((trained / "samples").glob("*.png")) if (trained / "samples").exists() else set()
    variants = [
        [],
        ["--classes=3"],
        ["--guidance_interval=[0.1,0.9]"],
        ["--per_class=2"],
        ["--solver=heun"],
        ["--seed=1"],
    ]
    for options in variants:
        assert run(capsys, "sample", trained, "--steps=1", "--per_class=1", *options)[0] == 0
    assert len(set((trained / "samples").glob("*.png")) - before) == len(variants)


def test_a_damaged_model_is_one_line(capsys, tmp_path, trained):
    shutil.copytree(trained, tmp_path / "run")
    weights = next((tmp_path / "run" / "model").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:100])
    status, _, err = run(capsys, "sample", tmp_path / "run")
    assert status == 2
    assert "cannot load" in err
    assert err.count("\n") == 1


def test_evaluate_and_analyze_write_what_they_say(capsys, trained, monkeypatch):
    monkeypatch.setattr("diffusion_moe.evaluation.classifier.EPOCHS", 2)
    status, out, _ = run(capsys, "evaluate", trained, "--num_samples=20", "--steps=2")
    assert status == 0
    assert "recognised as their class" in out
    result = json.loads((trained / "evaluation.json").read_text())
    keys = ["recognised", "frechet", "nearest_neighbour"]
    assert all(isinstance(result[key], float) and isinstance(result[f"{key}_real"], float) for key in keys)
    assert (result["num_samples"], result["steps"], result["training_steps"]) == (20, 2, 4)
    status, out, _ = run(capsys, "analyze", trained, "--num_samples=10", "--steps=2")
    assert status == 0
    assert f"wrote {trained / 'figures' / 'report.html'}" in out
    assert {"report.html", "loss.png", "experts.png", "data"} <= {path.name for path in (trained / "figures").iterdir()}


def test_an_unfinished_run_cannot_be_sampled(capsys, tmp_path, trained):
    (tmp_path / "recipe.yaml").write_text((trained / "recipe.yaml").read_text())
    status, _, err = run(capsys, "sample", tmp_path)
    assert status == 2
    assert "no trained model yet" in err


def test_a_folder_of_images_trains_by_the_shipped_recipe(capsys, tmp_path, tiny):
    import numpy as np
    from PIL import Image

    for name in ("cat", "dog", "hen"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(6):
            pixels = np.random.RandomState(i).randint(0, 255, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.jpg")
    options = [*tiny, f"--data.path={tmp_path / 'images'}", "--model.num_classes=3", "--training.steps=2"]
    options += ["--data.num_workers=0", "--model.patch_size=8"]
    status, out, err = run(capsys, "train", "image-folder", "--output_dir", tmp_path / "run", *options)
    assert (status, err) == (0, "")
    assert "trained 2 steps" in out
    status, out, err = run(capsys, "sample", tmp_path / "run", "--per_class=1", "--steps=2", "--classes=hen,0")
    assert (status, err) == (0, "")
    picture = Image.open(next((tmp_path / "run" / "samples").glob("*.png")))
    assert picture.mode == "RGB"


def test_a_full_disk_is_one_line_and_keeps_what_was_saved(capsys, tmp_path, tiny, monkeypatch):
    from diffusion_moe.storage import writing

    options = ["--training.steps=4", "--training.checkpoint_every=2"]
    command = ["train", "digits", "--output_dir", tmp_path, *tiny, *options]
    real, calls = writing.write_safetensors, []

    def full_at_the_second_checkpoint(path, entries):
        calls.append(path)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        return real(path, entries)

    monkeypatch.setattr(writing, "write_safetensors", full_at_the_second_checkpoint)
    status, _, err = run(capsys, *command)
    assert status == 1
    assert "No space left on device" in err
    assert err.count("\n") == 1
    monkeypatch.undo()
    status, out, _ = run(capsys, *command)
    assert status == 0
    assert "step-00000002" in out


def test_an_unconditional_run_is_sampled_scored_and_plotted(capsys, tmp_path, tiny, monkeypatch):
    monkeypatch.setattr("diffusion_moe.evaluation.classifier.EPOCHS", 1)
    folder = tmp_path / "run"
    options = [*tiny, "--model.num_classes=0", "--training.steps=2"]
    assert run(capsys, "train", "digits", "--output_dir", folder, *options)[0] == 0
    assert run(capsys, "sample", folder, "--steps=1")[0] == 0
    assert run(capsys, "evaluate", folder, "--steps=1", "--num_samples=9")[0] == 0
    scores = json.loads((folder / "evaluation.json").read_text())
    assert (scores["recognised"], scores["guidance_scale"]) == (None, 1.0)
    assert run(capsys, "analyze", folder, "--num_samples=10", "--steps=2")[0] == 0
    assert run(capsys, "convert", folder, "--output", tmp_path / "pipeline")[0] == 0
    for option in ("--classes=3", "--guidance_scale=2"):
        status, _, err = run(capsys, "sample", folder, option)
        assert status == 2
        assert "unconditional" in err


def test_a_diverging_run_goes_back_once_then_stops_and_names_the_images(capsys, tmp_path, tiny):
    options = [*tiny, "--training.steps=30", "--training.checkpoint_every=1", "--optimizer.max_grad_norm=null"]
    status, out, err = run(
        capsys, "train", "digits", "--output_dir", tmp_path / "run", *options, "--optimizer.learning_rate=1e30"
    )
    assert status == 1
    assert "step 2 was skipped" in out and "rolled back to step 1" in out
    assert "nonfinite-steps.json" in out + err
    bad = json.loads((tmp_path / "run" / "nonfinite-steps.json").read_text())
    assert list(map(str, bad["steps"])) == list(bad["training_images"])
    assert all(len(images) == 16 for images in bad["training_images"].values())
    assert any((tmp_path / "run" / "checkpoints").glob("step-*"))


def test_a_reader_that_leaves_early_is_no_error():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "diffusion_moe", "recipes"]
    with os.fdopen(write, "w") as gone:
        left = subprocess.run(command, stdout=gone, stderr=subprocess.PIPE, text=True)
    assert (left.returncode, left.stderr) == (1, "")
