"""A run that resumes with another recipe: what it keeps, what it refuses, and that it resumes as any run does."""

import json
import re
from pathlib import Path

import pytest
import torch
from poisoned_digits import poison_digits
from run_state import final_state
from safetensors.torch import load_file

from diffusion_moe import run_history
from diffusion_moe.cli import main
from diffusion_moe.config import SECTIONS, names_where, read_recipe
from diffusion_moe.data import Segment, load_dataset
from diffusion_moe.data.digits import Digits
from diffusion_moe.run_folder import RunFolder
from diffusion_moe.run_history import recipes_in, record
from diffusion_moe.storage import Manifest
from diffusion_moe.training import loop
from diffusion_moe.training.dataloader import images_of_step
from diffusion_moe.training.history import extend_segments, resume_with
from diffusion_moe.training.loop import train
from diffusion_moe.training.nonfinite import NonFiniteError
from diffusion_moe.training.state import make_state

FIRST, STEPS = 6, 14
OTHER = [
    f"--training.steps={STEPS}",
    "--training.batch_size=24",
    "--training.extra_ema_decays=[0.5]",
    "--optimizer.learning_rate=5e-4",
    "--optimizer.weight_decay=0.1",
    "--data.flip=true",
]


@pytest.fixture
def recipe(tiny):
    """The digits recipe with other options, and a cosine down to its last step."""

    def make(*options):
        usual = [f"--training.steps={FIRST}", "--training.checkpoint_every=4", "--logging.every=1"]
        usual += ["--training.ema_decay=0.9", "--optimizer.schedule=cosine", "--model.router=dsmoe"]
        return read_recipe("digits", [*tiny, *usual, *options])

    return make


class Killed(Exception):
    """Stands for the end of the process."""


def kill_at(monkeypatch, step):
    """The loop ends before this step, without a checkpoint."""

    def train_step(state, *arguments):
        if state.step + 1 == step:
            raise Killed
        return usual(state, *arguments)

    usual = loop.train_step
    monkeypatch.setattr(loop, "train_step", train_step)


def losses(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["learning_rate"]) for row in rows]


def recorded(folder):
    """The recipes of a run by the step at which each began, and the one in force."""
    run = RunFolder(folder)
    return {step: read_recipe(path) for step, path in recipes_in(run).items()}, run.read_recipe()


def test_a_run_resumes_longer_with_another_recipe(recipe, tmp_path):
    """Steps before the change are those of the first recipe, the learning rate after it that of the new cosine."""
    lines = []
    train(recipe(), tmp_path, log=str)
    before, first = losses(tmp_path), final_state(tmp_path, FIRST)
    train(recipe(*OTHER), tmp_path, "changed", log=lines.append)
    assert lines[1:10] == [
        "the recipe changes after step 6:",
        "  data.flip: False -> True",
        "  optimizer.learning_rate: 0.002 -> 0.0005",
        "  optimizer.weight_decay: 0.0 -> 0.1",
        "  training.steps: 6 -> 14",
        "  training.batch_size: 16 -> 24",
        "  training.extra_ema_decays: [] -> [0.5]",
        "the EMA of decay 0.5 starts at the weights of step 6",
        f"resuming from {tmp_path / 'checkpoints' / 'step-00000006'}",
    ]
    assert losses(tmp_path)[:FIRST] == before and len(losses(tmp_path)) == STEPS
    cosine = [5e-4 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / STEPS)).item()) for step in range(7, 15)]
    assert [rate for _, _, rate in losses(tmp_path)[FIRST:]] == pytest.approx(cosine, rel=1e-5, abs=1e-9)
    assert recorded(tmp_path) == ({0: recipe(), FIRST: recipe(*OTHER)}, recipe(*OTHER))
    last = final_state(tmp_path, STEPS)
    assert not torch.equal(first["model.x_embedder.weight"], last["model.x_embedder.weight"])
    manifest = Manifest.read(tmp_path / "checkpoints" / f"step-{STEPS:08d}")
    assert manifest.metadata["batch_sizes"] == [[0, 16], [FIRST, 24]]


def test_a_new_ema_starts_at_the_weights_and_follows_its_formula(recipe, tmp_path):
    train(recipe(), tmp_path, log=str)
    at_first = final_state(tmp_path, FIRST)
    longer = [f"--training.steps={FIRST + 1}", "--training.extra_ema_decays=[0.25]"]
    train(recipe(*longer), tmp_path, "changed", log=str)
    last = final_state(tmp_path, FIRST + 1)
    for name in [name.removeprefix("model.") for name in last if name.startswith("model.")]:
        if last[f"model.{name}"].is_floating_point():
            expected = torch.lerp(at_first[f"model.{name}"], last[f"model.{name}"], 0.75)
            torch.testing.assert_close(last[f"ema_0.25.{name}"], expected)
    published = load_file(tmp_path / "model-ema-0.25" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(tensor, last[f"ema_0.25.{name}"]) for name, tensor in published.items())


def test_an_ema_that_is_no_longer_kept_is_dropped_with_a_line(recipe, tmp_path):
    train(recipe("--training.extra_ema_decays=[0.5,0.25]"), tmp_path, log=str)
    lines = []
    train(recipe("--training.extra_ema_decays=[0.25]", "--training.steps=8"), tmp_path, "changed", log=lines.append)
    assert lines[2:5] == [
        "  training.steps: 6 -> 8",
        "  training.extra_ema_decays: [0.5, 0.25] -> [0.25]",
        "the EMA of decay 0.5 is dropped",
    ]
    names = Manifest.read(tmp_path / "checkpoints" / "step-00000008").tensors
    assert {name.split(".x_embedder.weight")[0] for name in names if name.endswith(".x_embedder.weight")} == {
        "model", "ema", "ema_0.25", "optimizer.step", "optimizer.exp_avg", "optimizer.exp_avg_sq",
    }  # fmt: skip


@pytest.mark.parametrize(
    "step", [FIRST + 1, pytest.param(FIRST + 2, marks=pytest.mark.slow), pytest.param(11, marks=pytest.mark.slow)]
)
def test_killed_after_the_change_it_resumes_by_the_plain_command_bit_for_bit(recipe, tmp_path, monkeypatch, step):
    for folder in ("whole", "killed"):
        train(recipe(), tmp_path / folder, log=str)
    train(recipe(*OTHER), tmp_path / "whole", "changed", log=str)
    with monkeypatch.context() as patch:
        kill_at(patch, step)
        with pytest.raises(Killed):
            train(recipe(*OTHER), tmp_path / "killed", "changed", log=str)
    lines = []
    train(recipe(*OTHER), tmp_path / "killed", log=lines.append)
    assert not any("recipe changes" in line for line in lines)
    expected, found = (final_state(tmp_path / folder, STEPS) for folder in ("whole", "killed"))
    assert expected.keys() == found.keys()
    assert not [name for name in expected if not torch.equal(expected[name], found[name])]
    assert losses(tmp_path / "whole") == losses(tmp_path / "killed")
    assert recorded(tmp_path / "killed") == recorded(tmp_path / "whole")


@pytest.mark.parametrize("writes", [0, 1, 2])
def test_killed_between_two_writes_nothing_is_lost_and_either_recipe_resumes(recipe, tmp_path, monkeypatch, writes):
    """Three files are written: the first recipe, the new one, and recipe.yaml."""
    train(recipe(), tmp_path, log=str)
    run, done = RunFolder(tmp_path), []
    write = run_history.write_atomically

    def write_some(path, content):
        if len(done) == writes:
            raise Killed
        done.append(path.name)
        write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(run_history, "write_atomically", write_some)
        with pytest.raises(Killed):
            record(run, recipe(*OTHER), FIRST, "changed", str)
    assert done == ["step-00000000.yaml", "step-00000006.yaml"][:writes]
    assert run.read_recipe() == recipe()  # the plain command of the first recipe still resumes
    record(run, recipe(), FIRST, "auto", str)
    assert set(recorded(tmp_path)[0].values()) <= {recipe()} and run.read_recipe() == recipe()
    record(run, recipe(*OTHER), FIRST, "changed", str)
    assert recorded(tmp_path) == ({0: recipe(), FIRST: recipe(*OTHER)}, recipe(*OTHER))


def test_several_changes_are_all_kept(recipe, tmp_path):
    options = [
        [],
        ["--training.steps=8", "--training.batch_size=8"],
        ["--training.steps=10", "--training.batch_size=20"],
    ]
    for more in options:
        train(recipe(*more), tmp_path, "changed", log=str)
    first, second, third = (recipe(*more) for more in options)
    assert recorded(tmp_path) == ({0: first, 6: second, 8: third}, third)
    metadata = Manifest.read(tmp_path / "checkpoints" / "step-00000010").metadata
    assert metadata["batch_sizes"] == [[0, 16], [6, 8], [8, 20]]


def test_without_a_difference_or_a_run_it_is_as_auto(recipe, tmp_path):
    train(recipe(), tmp_path / "changed", "changed", log=str)
    train(recipe(), tmp_path / "auto", log=str)
    lines = []
    train(recipe("--logging.every=2"), tmp_path / "changed", "changed", log=lines.append)
    assert not any("recipe changes" in line for line in lines)
    assert {path.name for path in (tmp_path / "changed").iterdir()} == {"recipe.yaml", "checkpoints", "metrics.jsonl",
                                                                        "model", ".lock"}  # fmt: skip
    expected, found = (final_state(tmp_path / folder, FIRST) for folder in ("auto", "changed"))
    assert not [name for name in expected if not torch.equal(expected[name], found[name])]


def test_before_the_first_checkpoint_the_new_recipe_starts_from_scratch(recipe, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        kill_at(patch, 3)
        with pytest.raises(Killed):
            train(recipe(), tmp_path / "run", log=str)
    train(recipe(*OTHER), tmp_path / "run", "changed", log=str)
    train(recipe(*OTHER), tmp_path / "fresh", log=str)
    assert recorded(tmp_path / "run") == ({}, recipe(*OTHER))
    expected, found = (final_state(tmp_path / folder, STEPS) for folder in ("fresh", "run"))
    assert not [name for name in expected if not torch.equal(expected[name], found[name])]


def test_a_damaged_checkpoint_leads_to_before_the_change_and_the_record_says_so(recipe, tmp_path):
    """The newer recipe then begins at the step that it is in fact resumed from."""
    other = recipe("--training.steps=8", "--training.batch_size=8", "--training.keep_checkpoints=9")
    train(recipe("--training.keep_checkpoints=9"), tmp_path, log=str)
    train(other, tmp_path, "changed", log=str)
    assert list(recorded(tmp_path)[0]) == [0, 6]
    for step in (6, 8):
        path = tmp_path / "checkpoints" / f"step-{step:08d}" / "tensors-00000-000.safetensors"
        path.write_bytes(path.read_bytes()[:-4])
    train(other, tmp_path, log=str)
    assert list(recorded(tmp_path)[0]) == [0, 4]
    assert Manifest.read(tmp_path / "checkpoints" / "step-00000008").metadata["batch_sizes"] == [[0, 16], [4, 8]]


def test_the_images_of_each_step_continue_the_stream(recipe, tmp_path, monkeypatch):
    """All that training reads, one step after another, is the stream of a run whose batches never changed."""
    seen, draw = [], Digits.__getitems__

    def noted(self, draws):
        seen.extend(one[:2] for one in draws)
        return draw(self, draws)

    monkeypatch.setattr(Digits, "__getitems__", noted)
    train(recipe(), tmp_path / "run", log=str)
    train(recipe(*OTHER), tmp_path / "run", "changed", log=str)
    changed = list(seen)
    seen.clear()
    train(recipe("--training.steps=18"), tmp_path / "plain", log=str)
    assert len(changed) == 6 * 16 + 8 * 24 == len(seen)
    assert changed == seen


REFUSED = {
    "model": (["--model.num_experts=8"], "model.num_experts: 4 -> 8"),
    "process": (["--model.process=ddpm", "--model.prediction=epsilon"], "model.process: flow -> ddpm"),
    "init": (["--init.from_checkpoint=elsewhere"], "init.from_checkpoint: None -> elsewhere"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_resumed_is_refused_with_the_fields_and_a_remedy(recipe, tmp_path, case):
    options, field = REFUSED[case]
    train(recipe(), tmp_path, log=str)
    saved = (tmp_path / "recipe.yaml").read_bytes()
    with pytest.raises(ValueError, match="holds a run that began otherwise") as refused:
        RunFolder(tmp_path).claim(recipe(*options), "changed")
    message = str(refused.value)
    assert field in message and message.endswith("restore these values, or choose another --output_dir")
    assert "\n" not in message and (tmp_path / "recipe.yaml").read_bytes() == saved
    with pytest.raises(ValueError, match="another recipe") as plain:
        RunFolder(tmp_path).claim(recipe(*options), "auto")
    assert "--resume changed" not in str(plain.value)


def test_the_command_names_the_way_and_refuses_other_data_with_one_line(tiny, tmp_path, capsys):
    def command(*options):
        status = main(["train", "digits", *tiny, "--training.steps=1", "--output_dir", str(tmp_path / "run"), *options])
        return status, capsys.readouterr().err

    assert command()[0] == 0
    status, said = command("--training.seed=3")
    assert (status, said.count("\n")) == (2, 1)
    assert said.endswith("choose another --output_dir, or resume with the new recipe by --resume changed\n")
    status, said = command("--data.kind=shapes", "--data.channels=3", "--resume", "changed")
    assert (status, said.count("\n")) == (2, 1) and "the data's images are (3, 8, 8)" in said
    assert command("--training.seed=3", "--resume", "changed", "--training.steps=2")[0] == 0
    assert RunFolder(tmp_path / "run").read_recipe().training.seed == 3


def test_steps_that_are_left_out_follow_their_images(recipe):
    """Before: 8 images a step. After step 4, 3 a step: positions 40 to 47 and 48 to 55 are steps 7 to 12."""
    data = load_dataset(recipe().data, "train")
    state = make_state(recipe("--training.batch_size=8"), torch.device("cpu"))
    state.step, state.skipped_steps = 4, {2, 6, 7}
    spoilt = {i for step in (6, 7) for i in images_of_step(recipe(), data, step, state.segments)}
    lines = resume_with(state, recipe("--training.batch_size=3", "--training.steps=40"), data)
    assert state.segments == (Segment(0, 8), Segment(4, 3)) and state.skipped_steps == {2, 7, 8, 9, 10, 11, 12}
    assert lines == ["the batch size changes: steps 7, 8, 9, 10, 11, 12 are skipped instead of 6, 7"]
    found = {i for step in range(7, 13) for i in images_of_step(recipe(), data, step, state.segments)}
    assert spoilt < found and len(found) - len(spoilt) == 2
    assert resume_with(state, recipe("--training.batch_size=3"), data) == []
    assert state.skipped_steps == {2, 7, 8, 9, 10, 11, 12}


def test_a_segment_without_steps_goes():
    first = (Segment(0, 8), Segment(4, 3))
    assert extend_segments(first, 4, 5) == (Segment(0, 8), Segment(4, 5))
    assert extend_segments(first, 4, 8) == (Segment(0, 8),)
    assert extend_segments(first, 9, 3) == first
    assert extend_segments(first, 9, 8) == (*first, Segment(9, 8))
    assert extend_segments(first, 0, 5) == (Segment(0, 5),)


def test_bad_steps_after_the_change_are_left_out_and_named_by_the_segments(recipe, tmp_path, monkeypatch):
    bad = ["--training.max_nonfinite_steps=1", "--training.checkpoint_every=100"]
    changed = recipe(*bad, "--training.batch_size=8", "--training.steps=14")
    data = load_dataset(changed.data, "train")
    segments = (Segment(0, 16), Segment(FIRST, 8))
    images = {images_of_step(changed, data, step, segments)[-1] for step in (8, 9, 10, 11)}
    read = Digits.read
    poison_digits(monkeypatch, images)
    train(recipe(*bad), tmp_path, log=str)
    lines = []
    with pytest.raises(NonFiniteError):
        train(changed, tmp_path, "changed", log=lines.append)
    assert "warning: rolled back to step 6; the batches of steps 8 to 9 are skipped" in lines
    named = json.loads((tmp_path / "nonfinite-steps.json").read_text())
    assert named["steps"] == [10, 11]
    assert named["training_images"] == {str(s): images_of_step(changed, data, s, segments) for s in (10, 11)}
    # Of another seed the order is another one, and steps mean other images.
    monkeypatch.setattr(Digits, "read", read)
    lines = []
    train(recipe("--training.steps=14", "--training.seed=1"), tmp_path, "changed", log=lines.append)
    assert "the seed changes the order: steps 8 to 9 are no longer skipped" in lines
    assert Manifest.read(tmp_path / "checkpoints" / "step-00000014").metadata["skipped_steps"] == []


def test_the_page_of_run_folders_lists_what_may_change():
    page = (Path(__file__).parents[2] / "docs" / "run-folder.md").read_text()
    start = page.index("These may change")
    listed = set(re.findall(r"`([a-z_.*]+)`", page[start : page.index("`--resume never`")]))
    expected, excepted = set(), {"parallel.pool"}
    for section, kind in SECTIONS.items():
        free = names_where(kind, change="always") | names_where(kind, change="constant")
        everything = kind.__dataclass_fields__.keys() - {name.partition(".")[2] for name in excepted}
        names = {f"{section}.*"} if free == everything else {f"{section}.{name}" for name in free}
        expected |= {name.removeprefix("training.") for name in names}
    assert listed == expected | excepted | {"training."}


def test_other_images_are_refused_unless_wanted(tiny, tmp_path):
    """The order of training is a function of the listing, so a run does not resume silently on another one."""
    from PIL import Image

    folder, run = tmp_path / "images", tmp_path / "run"
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        for i in range(8):
            Image.new("L", (8, 8), 16 * i).save(folder / name / f"{i}.png")
    options = [*tiny, "--data.kind=folder", f"--data.path={folder}", "--data.test_fraction=0", "--model.num_classes=2"]
    options.append("--optimizer.schedule=constant")

    def go(steps, resume="auto"):
        train(read_recipe("digits", [*options, f"--training.steps={steps}"]), run, resume, log=lambda line: None)

    go(2)
    began = (run / "listing.sha256").read_text()
    (folder / "a" / "8.png").symlink_to("../b/0.png")
    with pytest.raises(ValueError, match=r"images holds other images than when .* began: .*; resume with them by"):
        go(4)
    assert (run / "listing.sha256").read_text() == began
    go(4, "changed")
    assert (run / "listing.sha256").read_text() != began
    go(6)
