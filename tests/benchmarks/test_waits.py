"""Waits for the device, traced on a stand-in for a GPU: planted ones are found, and a step has none."""

import dataclasses
import json
import linecache
import re
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusion_moe.benchmarks import waits as waits_module
from diffusion_moe.benchmarks.counting import SYNC_WARNING
from diffusion_moe.benchmarks.options import BenchOptions
from diffusion_moe.benchmarks.wait_trace import PACKAGE, Gpu, StandIn, Wait
from diffusion_moe.benchmarks.waits import pinned, random_batch, sampling_waits, small, step_waits, waits
from diffusion_moe.cli import main
from diffusion_moe.config import DDPM_SOLVERS, FLOW_SOLVERS, read_recipe, recipe_names
from diffusion_moe.evaluation.classifier import Classifier, ClassifierFeatures
from diffusion_moe.models import make_model
from diffusion_moe.moe import routers_of
from diffusion_moe.training.ema import reset_ema, update_ema
from diffusion_moe.training.measures import HostCopy
from diffusion_moe.training.state import state_from_model
from diffusion_moe.training.step import train_step
from diffusion_moe.training.validation import Validation

TINY = ["--model.hidden_size=32", "--model.depth=2", "--model.num_heads=2", "--model.expert_dim=16"]
TINY += ["--model.num_experts=4", "--training.batch_size=4", "--training.accumulation=2", "--training.precision=fp32"]


def on_device(*shape, dtype=torch.float32):
    return torch.ones(*shape, dtype=dtype, device="meta")


def on_host(*shape, **options):
    return torch.ones(*shape, **options).pin_memory()


@contextmanager
def refused(place):
    """Expect that the trace refuses a tensor of the CPU at a place."""
    with pytest.raises(RuntimeError, match=re.escape(f"mixes devices at {place}")), StandIn().trace():
        yield


X, FLAGS, INDEX = on_device(4), on_device(4, dtype=torch.bool), on_device(4, dtype=torch.int64)
PLANTED = {
    "item": (lambda: X[0].item(), "scalar read"),
    "bool": (lambda: bool(FLAGS[0]), "scalar read"),
    "if": (lambda: 1 if X.sum() > 0 else 0, "scalar read"),
    "index by a scalar": (lambda: X[INDEX[0]], "scalar read"),
    "full of a tensor": (lambda: torch.full((2,), X[0]), "scalar read"),
    "equal": (lambda: torch.equal(X, X), "scalar read"),
    "nonzero": (lambda: FLAGS.nonzero(), "data-dependent shape"),
    "masked_select": (lambda: X.masked_select(FLAGS), "data-dependent shape"),
    "a mask as index": (lambda: X[FLAGS], "data-dependent shape"),
    "values for a mask": (lambda: X.clone().index_put_((FLAGS,), X), "data-dependent shape"),
    "unique": (lambda: X.unique(), "data-dependent shape"),
    "bincount": (lambda: torch.bincount(INDEX), "data-dependent shape"),
    "repeat_interleave": (lambda: X.repeat_interleave(INDEX), "data-dependent shape"),
    "cpu": (lambda: X.cpu(), "copy to the host"),
    "tolist": (lambda: X.tolist(), "copy to the host"),
    "copy_ to memory that is not pinned": (lambda: torch.empty(4).copy_(X, non_blocking=True), "copy to the host"),
    "blocking copy to pinned memory": (lambda: on_host(4).copy_(X), "copy to the host"),
    "pageable copy": (lambda: torch.ones(4).to("meta", non_blocking=True), "copy to the device"),
    "blocking copy": (lambda: on_host(4).to("meta"), "copy to the device"),
    "copy_ of pageable memory": (lambda: X.clone().copy_(torch.ones(4), non_blocking=True), "copy to the device"),
    "cast copy": (lambda: on_host(4).to("meta", torch.float16, non_blocking=True), "copy to the device"),
    "strided copy": (lambda: on_host(4, 2)[:, 0].to("meta", non_blocking=True), "copy to the device"),
    "index on the host": (lambda: X[torch.tensor([0, 1])], "copy to the device"),
    "index from Python": (lambda: X[[0, 1]], "copy to the device"),
    "index from numpy": (lambda: X[np.array([0, 1])], "copy to the device"),
    "new_tensor": (lambda: X.new_tensor(1.0), "copy to the device"),
    "tensor": (lambda: torch.tensor([1.0], device="meta"), "copy to the device"),
    "as_tensor": (lambda: torch.as_tensor(3, device="meta"), "copy to the device"),
}
INNOCENT = {
    "pinned slice": lambda: on_host(4, 2)[1:3].to("meta", non_blocking=True),
    "pinned result": lambda: torch.empty(4, pin_memory=True).copy_(X, non_blocking=True),
    "host copy": lambda: HostCopy({"x": X[0], "finite": FLAGS[0]}),
    "full": lambda: torch.full((2,), 3, device="meta"),
    "a number": lambda: torch.where(FLAGS, 3.0, X) * 2,
    "a scalar of the host": lambda: X * torch.tensor(2.0),
    "a number for a mask": lambda: X.clone().masked_fill_(FLAGS, 0.0),
    "gather": lambda: X.gather(0, INDEX).scatter_add(0, INDEX, X)[INDEX],
    "known length": lambda: X.repeat_interleave(INDEX, output_size=4),
    "on the host alone": lambda: (torch.ones(3).nonzero(), torch.ones(3).sum().item(), torch.ones(3)[[0]]),
}


@pytest.mark.parametrize(("plant", "kind"), PLANTED.values(), ids=PLANTED)
def test_planted_waits_are_found_with_their_line(plant, kind):
    with StandIn().trace() as found:
        plant()
    assert found == [Wait(kind, __file__, plant.__code__.co_firstlineno)]


@pytest.mark.parametrize("run", INNOCENT.values(), ids=INNOCENT)
def test_what_does_not_wait_is_left_out(run):
    with StandIn().trace() as found:
        run()
    assert found == []


def make_state(recipe, device):
    return state_from_model(make_model(recipe.model), recipe, device.device)


@pytest.fixture(scope="module")
def tiny_recipe():
    """A DSMoE whose only block has experts."""
    return read_recipe("digits", [*TINY, "--model.depth=1", "--model.moe_layer_freq=1"])


def test_waits_planted_in_a_step_are_found(tiny_recipe):
    """In the forward and the backward pass, each time they are met: two micro-batches."""
    device = StandIn()
    state = make_state(tiny_recipe, device)
    block = state.model.blocks[0]

    def read_output(module, args, out):
        out.sample.sum().item() if hasattr(out, "sample") else None

    def read_gradient(grad):
        return grad * grad.abs().max().item()

    state.model.register_forward_hook(read_output)
    block.attn.proj.weight.register_hook(read_gradient)
    lines = [hook.__code__.co_firstlineno + 1 for hook in (read_output, read_gradient)]
    expected = [Wait("scalar read", __file__, line) for line in lines] * 2
    assert sorted(step_waits(state, tiny_recipe, device)) == sorted(expected)


def test_a_batch_that_is_not_pinned_is_found_where_it_is_copied(tiny_recipe, monkeypatch):
    monkeypatch.setattr(waits_module, "pinned", lambda batch: batch)
    device = StandIn()
    found = step_waits(make_state(tiny_recipe, device), tiny_recipe, device)
    assert {wait.kind for wait in found} == {"copy to the device"}
    lines = [linecache.getline(str(PACKAGE.parent / wait.file), wait.line).strip() for wait in found]
    assert sorted(lines) == sorted(
        ["return self.positions.to(device, non_blocking=True)"]
        + ["images = batch.images.to(device, non_blocking=True)"] * 2
        + ["labels = batch.labels.to(device, non_blocking=True)"] * 2
    )


KINDS = ["dit-s", "tc-dit-l-e16", "ec-dit-l-e16", "diffmoe-l-e8-ddpm", "jitmoe-b-16-e16"]
KINDS += ["t2i-dsmoe-s-e16", "shapes-t2i"]  # cross-attention, and one sequence with DiffMoE


def check_waits(record):
    """None in training; in sampling only DiffMoE's numbers of rows, one an MoE layer and evaluation of the network."""
    assert record["waits"] == 0, record["places"]
    if "diffmoe" not in record["recipe"] and record["recipe"] != "shapes-t2i":
        assert record["sampling_waits"] == 0, record["places"]
        return
    (place,) = record["places"]
    assert (place["in"], place["kind"]) == ("sampling", "data-dependent shape")
    file, _, line = place["at"].rpartition(":")
    assert file == "diffusion_moe/moe/routing.py"
    assert "nonzero" in linecache.getline(str(PACKAGE.parent / file), int(line))
    # Two solver steps (ancestral sampling makes two as well), one MoE layer, both halves of guidance in one batch.
    assert place["times"] == record["sampling_waits"] == 2


@pytest.mark.parametrize("name", KINDS)
def test_no_kind_of_recipe_waits_in_training(name):
    check_waits(waits(BenchOptions(recipe=name)))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in recipe_names() if name not in KINDS])
def test_no_recipe_waits_in_training(name):
    check_waits(waits(BenchOptions(recipe=name)))


def test_muon_does_not_wait():
    recipe = small(read_recipe("digits", ["--optimizer.kind=muon"]), "fp32")
    device = StandIn()
    state = state_from_model(make_model(recipe.model).to(device.device), recipe, device.device)
    assert state.optimizer.matrices
    assert step_waits(state, recipe, device) == []


def test_a_capacity_limit_leaves_no_wait_in_sampling():
    recipe = small(read_recipe("shapes-t2i", ["--evaluation.capacity_limit=2"]), "fp32")
    device = StandIn()
    assert sampling_waits(make_state(recipe, device), recipe, device) == []


def test_the_command_prints_one_line(capsys, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: {router: dense, num_classes: 0, sample_size: 8, dropout: 0.1}\n")
    assert main(["bench", "waits", "--recipe", str(recipe), "--device=cpu"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    expected = {"benchmark": "waits", "recipe": str(recipe), "waits": 0, "sampling_waits": 0, "places": []}
    assert json.loads(line) == expected | {"device": "meta", "torch": torch.__version__}


def test_options_that_waits_cannot_use_are_refused(capsys):
    assert main(["bench", "waits", "--tokens=64"]) == 2
    assert capsys.readouterr().err == "diffusion-moe: tokens is 64, but waits times nothing; remove it\n"


MIXED = {
    "matmul": lambda: on_device(3, 3) @ torch.ones(3, 3),
    "sum": lambda: X + torch.ones(4),
    "cat": lambda: torch.cat((X, torch.ones(4))),
    "stack of scalars": lambda: torch.stack((X[0], torch.tensor(1.0))),
    "index_select": lambda: X.index_select(0, torch.tensor([0])),
    "tensor of the host": lambda: torch.ones(4)[INDEX],
    "norm": lambda: torch.nn.functional.layer_norm(X, (4,), torch.ones(4)),
}


@pytest.mark.parametrize("mix", MIXED.values(), ids=MIXED)
def test_a_tensor_of_the_host_among_those_of_the_device_raises(mix):
    with refused(f"{__file__}:{mix.__code__.co_firstlineno}: a tensor on the CPU"):
        mix()


@pytest.mark.parametrize("forgotten", ["buffer", "labels", "router"])
def test_a_step_with_something_left_on_the_host_raises(tiny_recipe, forgotten):
    device = StandIn()
    state = make_state(tiny_recipe, device)
    batch = random_batch(tiny_recipe.model)
    if forgotten == "buffer":
        state.model.rotary_cos = torch.zeros(state.model.rotary_cos.shape)
    elif forgotten == "router":
        router = routers_of(state.model)[0]
        router.e_score_correction_bias = torch.zeros(4)
    else:
        embedder = state.model.y_embedder
        embedder.forward = lambda labels: torch.nn.functional.embedding(labels.cpu(), embedder.weight)
    with refused(__file__ if forgotten == "labels" else "diffusion_moe/"):
        train_step(state, tiny_recipe, pinned(batch))


def test_steps_that_drop_tokens_and_guidance_by_a_dropped_path_do_not_wait():
    options = ["--model.depth=6", "--model.fusion=true", "--training.path_drop_rate=0.1"]
    options += ["--training.token_drop_rate=0.75", "--training.token_selection=squares"]
    recipe = small(read_recipe("digits", [*options, "--evaluation.path_drop_guidance=true"]), "fp32")
    device = StandIn()
    state = make_state(recipe, device)
    assert step_waits(state, recipe, device) == []
    assert sampling_waits(state, recipe, device) == []


# dopri5 chooses its steps by values, which the stand-in has none of.
SOLVERS = [solver for solver in (*FLOW_SOLVERS, *DDPM_SOLVERS) if solver != "dopri5"]


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_with_guidance_stays_on_the_device(solver):
    process = ["--model.process=ddpm", "--model.prediction=epsilon", "--model.learn_sigma=true"]
    options = [*TINY, "--model.depth=1", *(process if solver in DDPM_SOLVERS else [])]
    recipe = read_recipe("digits", [*options, f"--evaluation.solver={solver}", "--evaluation.steps=2"])
    recipe = dataclasses.replace(recipe, evaluation=dataclasses.replace(recipe.evaluation, precision="fp32"))
    device = StandIn()
    state = make_state(recipe, device)
    assert recipe.evaluation.guidance_scale != 1
    assert sampling_waits(state, recipe, device) == []
    if solver != "euler":
        return
    state.ema.rotary_cos = torch.zeros(state.ema.rotary_cos.shape)
    with refused("diffusion_moe/nn/position.py"):
        sampling_waits(state, recipe, device)


def test_emas_stay_on_the_device(tiny_recipe):
    device = StandIn()
    state = make_state(tiny_recipe, device)
    with device.trace() as found:
        update_ema(state.ema, state.model, 0.9)
        reset_ema(state.ema, state.model)
    assert found == []
    with refused("diffusion_moe/training/ema.py"):
        update_ema(state.ema, make_model(tiny_recipe.model), 0.9)


def test_a_feature_pass_waits_for_its_features_alone():
    extractor = ClassifierFeatures(Classifier(1, 10).eval()).to(torch.device("meta"))
    images = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    with StandIn().trace() as found:
        features = extractor(images)
        logits = extractor.logits(features["pool"])
    assert (features["pool"].device.type, logits.shape) == ("cpu", (2, 10))
    assert [wait.kind for wait in found] == ["copy to the host"] * 2
    assert {Path(wait.file).parent.name for wait in found} == {"evaluation"}
    extractor.module.body[0].bias = torch.nn.Parameter(torch.zeros(32))
    with refused("diffusion_moe/evaluation/classifier.py"):
        extractor(images)


def test_validation_waits_once_for_the_loss_of_each_model(tiny_recipe):
    """Its three batches are copied through pinned memory, the last one a smaller one."""
    recipe = dataclasses.replace(tiny_recipe, logging=dataclasses.replace(tiny_recipe.logging, validate_images=5))
    device = StandIn()
    state = make_state(recipe, device)
    with device.trace() as found:
        losses = Validation(recipe, device.device).losses(state)
    assert list(losses) == ["val_loss", f"val_loss_ema_{recipe.training.ema_decay}"]
    assert [wait.kind for wait in found] == ["scalar read"] * 2
    lines = {linecache.getline(str(PACKAGE.parent / wait.file), wait.line).strip() for wait in found}
    assert lines == {"return float(all_reduce_sum(total)) / (self.count * world_size())"}


def test_waits_on_a_gpu_are_torchs_warnings_with_their_line(monkeypatch):
    """With torch.cuda played by a stand-in: tests/gpu has the real one."""
    modes = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def wait():
        warnings.warn(SYNC_WARNING, stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    with Gpu(torch.device("cuda")).trace() as found:
        for _ in range(2):
            wait()
    assert found == [Wait("synchronization", __file__, wait.__code__.co_firstlineno + 1)] * 2
    assert modes == ["warn", "default"]
