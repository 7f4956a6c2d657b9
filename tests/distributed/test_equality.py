"""Training by gloo processes is training on one: losses, measures, weights and EMAs.

Sums over processes are taken in another order than on one, so numbers differ by float32 rounding. Adam divides a
gradient by its size and would make steps of full length out of the rounding where a gradient should be zero (a key's
bias), so its eps is far above it.
"""

import json
import math
import runpy
from pathlib import Path

import pytest
import torch

from diffusion_moe.config import read_recipe
from diffusion_moe.training.state import make_state

OPTIONS = ["--optimizer.eps=1e-5", "--optimizer.weight_decay=0.1", "--training.extra_ema_decays=[0.5]"]
ROUTERS = {
    "dsmoe": ["--model.router=dsmoe", "--model.balance=bias"],
    "dsmoe unbalanced": ["--model.router=dsmoe", "--model.balance=none"],
    "tc": ["--model.router=tc", "--model.balance=bias", "--model.expert_activation=gelu"],
    "ec": ["--model.router=ec"],
    "nucleus": [
        *("--model.router=nucleus", "--model.moe_layer_freq=1", "--model.first_k_dense=1"),
        "--model.routed_scaling_factor=2.5",
    ],
    "time": ["--model.router=time", "--model.moe_layer_freq=1"],
    "dense": ["--model.router=dense"],
    "muon": ["--model.router=dsmoe", "--optimizer.kind=muon", "--model.num_kv_heads=1"],
    "diffmoe": ["--model.router=diffmoe", "--parallel.pool=global", "--model.expert_bias=true"],
    "race": ["--model.router=race", "--parallel.pool=global", "--model.similarity_loss_weight=0.1"],
    "threshold": ["--model.router=threshold", "--model.capacity=1.5"],
    "promoe": [
        *("--model.router=promoe", "--parallel.pool=global", "--diffusion.class_dropout=0.5"),
        "--model.contrastive_weight=0.1",
    ],
}
LAYOUTS = {
    "replicate": ["--parallel.replicate=2"],
    "shard": ["--parallel.shard=2"],
    "experts": ["--parallel.experts=2"],
    "shard x experts": ["--parallel.shard=2", "--parallel.experts=2"],
    "replicate x experts": ["--parallel.replicate=2", "--parallel.experts=2"],
    "replicate x shard": ["--parallel.replicate=2", "--parallel.shard=2"],
}
FROZEN_EXPERTS = ["--init.from_checkpoint=unused", '--init.freeze=["*.experts.*"]']
JIT = ["--model.backbone=jit", "--model.prediction=x", "--model.bottleneck_dim=6", "--model.class_tokens=2"]
JIT += ["--model.class_tokens_from=1", "--model.norm=rmsnorm", "--model.qk_norm=true", "--model.shared_bias=true"]
JIT += ["--model.position=sincos+rope2d", "--model.rotary_pairs=neighbours", "--diffusion.loss=velocity"]
SPRINT = ["--model.depth=3", "--model.first_k_full=1", "--model.last_k_full=1", "--model.fusion=true"]
SPRINT += ["--training.token_drop_rate=0.75", "--training.token_selection=squares", "--training.path_drop_rate=0.2"]
FEATURES = {
    "accumulation": ["--training.accumulation=2"],
    "recomputed blocks": ["--training.recompute=blocks"],
    "recomputed experts": ["--training.recompute=experts"],
    "compiled": ["--training.compile=true"],
    "jit": JIT,
    "ddpm": ["--model.process=ddpm", "--model.prediction=epsilon", "--model.learn_sigma=true"],
    "all together": ["--training.accumulation=2", "--training.recompute=blocks", "--training.compile=true"],
}


@pytest.fixture
def compare(tiny, tmp_path, run_processes):
    """Takes steps in several cases (by name: options for all, options of several processes), on one and on many."""
    train = runpy.run_path(str(Path(__file__).with_name("train_worker.py")))["train"]

    def compare(world, steps, cases, check):
        cases = {name: ([*tiny, *OPTIONS, *common], spread) for name, (common, spread) in cases.items()}
        results = {name: tmp_path / f"{i}.pt" for i, name in enumerate(cases)}
        todo = [
            {"result": str(results[name]), "steps": steps, "options": [*common, *spread], "backend": "aot_eager"}
            for name, (common, spread) in cases.items()
        ]
        (tmp_path / "cases.json").write_text(json.dumps(todo))
        run_processes(world, "train_worker.py", tmp_path / "cases.json")
        alone = {}
        for name, (common, _) in cases.items():
            if str(common) not in alone:
                alone[str(common)] = train([o for o in common if "compile" not in o], steps)
            check(name, common, alone[str(common)], torch.load(results[name], weights_only=True))

    return compare


def moved(options, tensors):
    """How far the weights went, and how far two ends are from each other: a function."""
    recipe = read_recipe("digits", options)
    start = make_state(recipe, torch.device("cpu")).model.state_dict()
    return distance({f"model.{name}": tensor for name, tensor in start.items()}, tensors)


def distance(some, others):
    """The norm of the difference of two models' weights."""
    return math.sqrt(sum((some[name] - others[name]).square().sum().item() for name in some if "model." in name))


def check_equal(name, options, alone, spread):
    """Within float32 rounding."""
    for step, (one, other) in enumerate(zip(alone["numbers"], spread["numbers"], strict=True)):
        assert other == pytest.approx(one, rel=2e-5, abs=1e-6, nan_ok=True), f"{name}, step {step}"
    assert alone["tensors"].keys() == spread["tensors"].keys()
    for tensor, value in alone["tensors"].items():
        assert (spread["tensors"][tensor] - value).abs().max() < 5e-6, f"{name}, {tensor}"
    assert moved(options, alone["tensors"]) > 1e4 * distance(alone["tensors"], spread["tensors"]), name


def check_close(name, options, alone, spread):
    """Within what bfloat16 leaves: gradients are rounded before they are summed over processes."""
    for one, other in zip(alone["numbers"], spread["numbers"], strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=5e-3), name
    assert moved(options, alone["tensors"]) > 20 * distance(alone["tensors"], spread["tensors"]), name


def test_two_processes(compare):
    cases = {
        "dsmoe, replicate": (ROUTERS["dsmoe"], LAYOUTS["replicate"]),
        "dsmoe, experts": (ROUTERS["dsmoe"], LAYOUTS["experts"]),
        "diffmoe, shard": (ROUTERS["diffmoe"], LAYOUTS["shard"]),
        "diffmoe, experts, accumulated and recomputed": (
            [*ROUTERS["diffmoe"], *FEATURES["accumulation"]],
            [*LAYOUTS["experts"], *FEATURES["recomputed blocks"]],
        ),
        "race, experts, accumulated": ([*ROUTERS["race"], *FEATURES["accumulation"]], LAYOUTS["experts"]),
        "threshold, shard": (ROUTERS["threshold"], LAYOUTS["shard"]),
        "dsmoe, experts, dropped tokens": ([*ROUTERS["dsmoe"], *SPRINT, *FEATURES["accumulation"]], LAYOUTS["experts"]),
        "promoe, replicate, accumulated and recomputed": (
            [*ROUTERS["promoe"], *FEATURES["accumulation"]],
            [*LAYOUTS["replicate"], *FEATURES["recomputed blocks"]],
        ),
        "dsmoe, experts, frozen": ([*ROUTERS["dsmoe"], *FROZEN_EXPERTS], LAYOUTS["experts"]),
        "muon, shard": (ROUTERS["muon"], LAYOUTS["shard"]),
    }
    compare(2, 4, cases, check_equal)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["replicate", "shard", "experts"])
def test_every_rule_on_two_processes(compare, layout):
    cases = {
        f"{router}, {layout}": (["--model.depth=4", *options], LAYOUTS[layout])
        for router, options in ROUTERS.items()
        if (router, layout) != ("dense", "experts")
    }
    compare(2, 20, cases, check_equal)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["shard x experts", "replicate x experts", "replicate x shard"])
def test_every_rule_on_four_processes(compare, layout):
    cases = {
        f"{router}, {layout}": (options, LAYOUTS[layout])
        for router, options in ROUTERS.items()
        if router != "dense" or "experts" not in layout
    }
    compare(4, 20, cases, check_equal)


@pytest.mark.slow
@pytest.mark.parametrize("router", ["dsmoe", "diffmoe", "promoe"])
def test_everything_else_that_a_recipe_may_ask_for(compare, router):
    cases = {
        f"{router}, {feature}": ([*ROUTERS[router], *options], LAYOUTS["experts"])
        for feature, options in FEATURES.items()
    }
    compare(2, 20, cases, check_equal)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["replicate", "shard", "experts"])
def test_bfloat16_within_its_bounds(compare, layout):
    cases = {
        f"{router}, {layout}": ([*ROUTERS[router], "--training.precision=bf16"], LAYOUTS[layout])
        for router in ("dsmoe", "diffmoe")
    }
    compare(2, 20, cases, check_close)
