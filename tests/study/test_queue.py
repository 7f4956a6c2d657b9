"""The queue: pairs are trained on the same numbers, a killed study resumes, a rule of one's own can be studied."""

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml

from diffusion_moe.cli import main
from diffusion_moe.evaluation import classifier
from diffusion_moe.moe import ROUTERS
from diffusion_moe.routing_rules import RULES
from diffusion_moe.run_folder import lock_file
from diffusion_moe.study import measure, queue, timing
from diffusion_moe.study.definition import read_study
from diffusion_moe.study.records import append_record, read_records, runs_of, step_seconds
from diffusion_moe.training import loss as training_loss
from diffusion_moe.training import validation

SMALL = {
    "model": {"hidden_size": 16, "depth": 2, "num_heads": 2, "num_experts": 4, "expert_dim": 8, "num_classes": 0},
    "data": {"test_fraction": 0.9},
    "training": {"batch_size": 8, "steps": 12, "device": "cpu", "checkpoint_every": 3, "ema_decay": 0.9},
    "optimizer": {"warmup_steps": 0},
    "logging": {"every": 4, "validate_every": 4, "validate_images": 50},
    "evaluation": {"guidance_scale": 1.0, "num_samples": 20, "steps": 2},
}
VARIANTS = {"dense": {"model.router": "dense"}, "dsmoe": {"match": "model.expert_dim"}}
CLAIM = {"text": "A mixture is better.", "better": "dsmoe", "worse": "dense"}


@pytest.fixture(autouse=True, scope="module")
def _few_images():
    """Losses of few images and short timings, so that a run takes a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "LEVEL_IMAGES", 16)
        patch.setattr(timing, "SECONDS", 0.0)
        yield


def write_study(folder, **fields):
    """The file of a small study whose output is in the folder."""
    content = {
        "recipe": "digits",
        "output": str(folder / "out"),
        "reference": "dense",
        "seeds": [0, 1],
        "tolerance": 0.1,
        "overrides": SMALL,
        "variants": VARIANTS,
        "claims": [CLAIM],
    }
    folder.mkdir(exist_ok=True)
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(content | fields))
    return file


def measured(file):
    """The records of a study without what the clock and the machine give."""
    records = runs_of(read_records(file.parent / "out" / "records.jsonl"))
    for record in records:
        del record["seconds"], record["machine"]
        record["val_curve"] = [point[:2] + point[3:] for point in record["val_curve"]]
    return records


@pytest.fixture(scope="module")
def seen():
    """Images, noise and times of every pass of `undisturbed`, its timing aside."""
    return []


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, seen):
    """A small study that was not stopped."""

    def recorded(model, recipe, images, labels, noise, t, *others):
        seen.append((images.clone(), noise.clone(), t.clone()))
        return real(model, recipe, images, labels, noise, t, *others)

    def unrecorded(study, scale):
        before = len(seen)
        timing = real_timing(study, scale)
        del seen[before:]
        return timing

    real, real_timing = training_loss.loss_at, queue.time_scale
    file = write_study(tmp_path_factory.mktemp("study") / "whole")
    with pytest.MonkeyPatch.context() as patch:
        for module in (training_loss, validation, measure):
            patch.setattr(module, "loss_at", recorded)
        patch.setattr(queue, "time_scale", unrecorded)
        assert main(["study", str(file)]) == 0
    return file


def test_each_run_has_a_record(undisturbed):
    records = runs_of(read_records(undisturbed.parent / "out" / "records.jsonl"))
    runs = list(read_study(undisturbed).runs())
    assert [(r["variant"], r["seed"], r["recipe_hash"]) for r in records] == [
        (run.variant, run.seed, run.hash) for run in runs
    ]
    for record in records:
        assert record["images"] == 96 and len(record["val_loss_by_level"]) == 10
        assert [point[:2] for point in record["val_curve"]] == [[4, 32], [8, 64], [12, 96]]
        assert record["val_loss"] == record["val_curve"][-1][3]
        assert [step for step, _ in record["train_curve"]] == [4, 8, 12]
        assert 0 < record["val_curve"][0][2] < record["seconds"]
        gap = sum(record["val_loss_by_level"]) - sum(record["train_loss_by_level"])
        assert record["gap"] == pytest.approx(gap / 10)
        assert record["fd"] is None  # a model without classes
    page = (undisturbed.parent / "out" / "study.md").read_text()
    assert "4 of 4 runs have finished" in page


def test_a_finished_study_trains_nothing_again(undisturbed, capsys):
    before = (undisturbed.parent / "out" / "records.jsonl").read_bytes()
    capsys.readouterr()
    assert main(["study", str(undisturbed)]) == 0
    assert "run 1" not in capsys.readouterr().out
    assert (undisturbed.parent / "out" / "records.jsonl").read_bytes() == before


def test_steps_are_timed_when_all_runs_are_done(undisturbed):
    study = read_study(undisturbed)
    records = read_records(undisturbed.parent / "out" / "records.jsonl")
    assert ["step_seconds" in record for record in records] == [False, False, False, False, True]
    found = step_seconds(study, records, "all")
    assert found is not None and found.keys() == VARIANTS.keys() and min(found.values()) > 0
    assert "timed for all variants in turns" in (undisturbed.parent / "out" / "study.md").read_text()
    records[-1]["recipe_hashes"]["dense"] = "123456789abc"
    assert step_seconds(study, records, "all") is None


def test_a_run_that_another_process_trains_is_left_to_it(undisturbed, tmp_path, capsys):
    """The lock of the second run is held by a process, as a second study has it."""
    file = write_study(tmp_path / "shared")
    runs = list(read_study(file).runs())
    ready, end = multiprocessing.Event(), multiprocessing.Event()
    other = multiprocessing.get_context("fork").Process(
        target=_hold, args=(file.parent / "out" / "locks" / runs[1].name, ready, end)
    )
    other.start()
    assert ready.wait(60)
    assert main(["study", str(file)]) == 0
    end.set()
    other.join()
    assert "1 runs are trained by other processes" in capsys.readouterr().out
    expected = measured(undisturbed)
    assert measured(file) == [expected[0], *expected[2:]]
    assert main(["study", str(file)]) == 0
    assert measured(file) == [expected[0], *expected[2:], expected[1]]


def _hold(lock, ready, end):
    with lock_file(lock):
        ready.set()
        end.wait(240)


def test_records_of_several_processes_are_all_kept(tmp_path):
    path = tmp_path / "records.jsonl"
    context = multiprocessing.get_context("fork")
    others = [context.Process(target=_append, args=(path, name)) for name in "abc"]
    for other in others:
        other.start()
    for other in others:
        other.join()
    assert sorted(record["recipe_hash"] for record in read_records(path)) == sorted(20 * ["a", "b", "c"])


def _append(path, name):
    for _ in range(20):
        append_record(path, {"recipe_hash": name})


def _run(file):
    os.setsid()
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    os._exit(main(["study", str(file)]))


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_stopped_study_resumes_to_the_same_records(undisturbed, tmp_path, number):
    """It is stopped in its second run, when that has a checkpoint but not its last."""
    file = write_study(tmp_path / "stopped")
    process = multiprocessing.get_context("fork").Process(target=_run, args=(file,))
    process.start()
    runs = file.parent / "out" / "runs"
    end = time.monotonic() + 240
    while not list(runs.glob("dsmoe-all-seed0-*/checkpoints/step-*")):
        assert time.monotonic() < end and process.is_alive()
        time.sleep(0.002)
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode in (-number, 128 + number)
    assert len(read_records(file.parent / "out" / "records.jsonl")) == 1
    assert main(["study", str(file)]) == 0
    assert measured(file) == measured(undisturbed)


def test_variants_of_a_seed_see_the_same_images_noise_and_times(undisturbed, seen):
    """Of training, of validation and of the noise levels; another seed sees others."""
    size = len(seen) // 4
    dense0, dsmoe0, dense1, dsmoe1 = (seen[i * size : (i + 1) * size] for i in range(4))
    for first, second in ((dense0, dsmoe0), (dense1, dsmoe1)):
        assert len(first) > 40
        for a, b in zip(first, second, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not torch.equal(dense0[0][0], dense1[0][0])
    assert not torch.equal(dense0[0][1], dense1[0][1])
    assert not torch.equal(dense0[0][2], dense1[0][2])


RULE = """
from diffusion_moe.moe import Router, register_router, route_by_token


class Largest(Router):
    reads = frozenset({"top_k"})

    @staticmethod
    def experts_per_token(settings):
        return settings.top_k

    def route(self, x_BND, logits_BNE):
        weight_TK, expert_TK = logits_BNE.flatten(0, 1).softmax(-1).topk(self.config.top_k, dim=-1)
        return route_by_token(expert_TK, weight_TK, self.config.num_experts)


register_router("largest", Largest)
"""


def test_a_rule_of_ones_own_is_studied_from_one_file(tmp_path):
    rule = tmp_path / "largest_rule.py"
    rule.write_text(RULE)
    variants = VARIANTS | {"largest": {"model.router": "largest", "match": "model.expert_dim"}}
    claims = [CLAIM | {"better": "largest", "worse": "dsmoe"}]
    file = write_study(tmp_path / "own", modules=[str(rule)], variants=variants, claims=claims, seeds=[0])
    try:
        assert main(["study", str(file)]) == 0
    finally:
        for table in (ROUTERS, RULES):
            del table["largest"]
    records = runs_of(read_records(tmp_path / "own" / "out" / "records.jsonl"))
    assert [record["variant"] for record in records] == ["dense", "dsmoe", "largest"]
    assert "| largest | dsmoe | all | " in (tmp_path / "own" / "out" / "study.md").read_text()


def test_images_are_scored_by_one_classifier_of_the_data(tmp_path, monkeypatch):
    monkeypatch.setattr(classifier, "EPOCHS", 1)
    overrides = SMALL | {"model": SMALL["model"] | {"num_classes": 10}}
    file = write_study(tmp_path / "scored", overrides=overrides, seeds=[0])
    assert main(["study", str(file)]) == 0
    out = tmp_path / "scored" / "out"
    records = runs_of(read_records(out / "records.jsonl"))
    assert len(list(out.glob("statistics-*.npz"))) == 1
    for record in records:
        assert record["fd"] > 0 and record["num_samples"] == 20
        (scores,) = out.glob(f"runs/{record['variant']}-*/study-scores.json")
        assert record["kid"] == json.loads(scores.read_text())["kernel_distance"]
