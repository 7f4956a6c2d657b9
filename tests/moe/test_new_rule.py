"""A routing rule from outside the package: one class and one registration, and the whole project treats it right."""

import json

import pytest
import torch

from diffusion_moe import record_routing
from diffusion_moe.benchmarks.scaling import axes
from diffusion_moe.cli import main
from diffusion_moe.config import ModelConfig, read_recipe
from diffusion_moe.counts import model_size
from diffusion_moe.data import batches_from, load_dataset
from diffusion_moe.models import make_model
from diffusion_moe.moe import ROUTERS, Router, register_router, route_by_token
from diffusion_moe.planning.plan import compute_of
from diffusion_moe.routing_rules import RULES
from diffusion_moe.training.state import make_state
from diffusion_moe.training.step import train_step
from diffusion_moe.training.upcycling import divide

TOP_K = 3
"""Experts a token of the new rule. Every other setting that could be taken for it has another value."""


class NoisyTopK(Router):
    """Top-k of softmax scores, with noise while training; weights are normalised over the K."""

    reads = frozenset({"top_k"})

    @staticmethod
    def experts_per_token(settings):
        return settings.top_k

    @classmethod
    def initial_weight(cls, settings):
        return 1.0

    @staticmethod
    def has_fixed_weight(settings):
        return True

    def route(self, x_BND, logits_BNE):
        logits_TE = logits_BNE.flatten(0, 1)
        if self.training:
            logits_TE = logits_TE + 0.1 * torch.randn_like(logits_TE)
        weight_TK, expert_TK = logits_TE.softmax(-1).topk(self.config.top_k, dim=-1)
        return route_by_token(expert_TK, weight_TK / weight_TK.sum(-1, keepdim=True), self.config.num_experts)


@pytest.fixture(autouse=True, scope="module")
def _registered():
    register_router("noisy", NoisyTopK)
    yield
    for table in (ROUTERS, RULES):
        del table["noisy"]


@pytest.fixture(scope="module")
def options(tiny_options):
    return [*tiny_options, "--model.router=noisy", f"--model.top_k={TOP_K}", "--model.capacity=1"]


@pytest.fixture(scope="module")
def trained(options, tmp_path_factory):
    """The folder of a run of four steps."""
    folder = tmp_path_factory.mktemp("run") / "noisy"
    command = ["train", "digits", "--output_dir", str(folder), *options, "--training.steps=4", "--logging.every=1"]
    assert main(command) == 0
    return folder


def test_a_token_activates_as_many_experts_as_the_rule_says():
    config = ModelConfig(router="noisy", num_experts=8, top_k=TOP_K, capacity=1.0, expert_dim=32)
    size = model_size(config)
    an_expert = 3 * 384 * 32  # SwiGLU without biases
    idle = 6 * (8 - TOP_K) * an_expert  # every other of 12 blocks is MoE
    assert size.activated == size.total - idle
    assert size == model_size(ModelConfig(**vars(config) | {"router": "tc"}))


def test_settings_that_it_reads_are_checked_and_no_others():
    with pytest.raises(ValueError, match=r"model\.top_k is 5, more than model\.num_experts 4"):
        ModelConfig(router="noisy", num_experts=4, top_k=5)
    assert ModelConfig(router="noisy", num_experts=4, top_k=2, capacity=9.0, n_group=3).experts_per_token == 2


def test_plan_counts_the_rows_of_the_rule(options):
    recipe = read_recipe("digits", [*options, "--training.recompute=experts"])
    model, batch, tokens = recipe.model, recipe.training.batch_size, 16
    assert compute_of(recipe).recompute == 2 * batch * tokens * TOP_K * model.hidden_size * 2 * model.expert_dim


def test_plan_and_recipe_lists_take_the_rule(options, capsys):
    assert main(["plan", "digits", *options]) == 0
    size = model_size(read_recipe("digits", options).model)
    assert f"{round(size.activated):,}" in capsys.readouterr().out


def test_bench_scaling_varies_the_field_that_the_rule_reads():
    points = axes(ModelConfig(router="noisy", num_experts=16, top_k=TOP_K), 4, 256)
    assert [point.config.top_k for point in points["top_k"]] == [1, 2, 4, 8, 16]
    assert {point.config.capacity for point in points["top_k"]} == {1.0}


def test_bench_multiplies_the_rows_of_the_rule(trained, capsys):
    """16 images of 16 tokens, 3 experts a token: 768 rows for 4 experts."""
    recipe = f"--recipe={trained / 'recipe.yaml'}"
    capsys.readouterr()
    assert main(["bench", "matmuls", recipe, "--tokens=256", "--seconds=1e-3", "--dtype=float32"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {line["rows_an_expert"] for line in lines} == {192}


def test_it_learns_one_batch(options):
    recipe = read_recipe("digits", [*options, "--optimizer.learning_rate=3e-3", "--optimizer.schedule=constant"])
    state = make_state(recipe, torch.device("cpu"))
    data = load_dataset(recipe.data, "train")
    batch = data.__getitems__(next(batches_from(0, 1, len(data), recipe.training.batch_size, recipe.training.seed)))
    losses = [train_step(state, recipe, batch).loss for _ in range(60)]
    assert sum(losses[-10:]) / 10 < 0.75 * sum(losses[:5]) / 5


def test_experts_made_of_a_dense_layer_compute_what_it_did():
    """Its weights sum to 1 whatever the logits, so copies of the dense layer are exact."""
    settings = {"num_experts": 6, "top_k": TOP_K, "shared": "none", "mlp_dim": 48, "expert_dim": 48}
    for router, exact in (("noisy", True), ("tc", False)):
        config = ModelConfig(router=router, expert_activation="gelu", **settings)
        division = divide(config)
        assert division.exact == exact
        assert division.weight == (1.0 if exact else TOP_K / 6)


def test_a_record_holds_every_assignment(options):
    model = make_model(read_recipe("digits", options).model).eval()
    with record_routing(model, time_bins=1) as record, torch.no_grad():
        model(torch.randn(5, 1, 8, 8), torch.rand(5), torch.arange(5))
    counts = record.counts()
    assert counts.tokens_LSK.sum() == 5 * 16
    assert counts.served_LSKE.sum() == 5 * 16 * TOP_K


def test_a_trained_run_is_sampled_with_its_metadata(trained, tmp_path):
    command = ["sample", str(trained), "--per_class=1", "--steps=2", "--classes=3,7", "--format=npz"]
    assert main([*command, "--output", str(tmp_path / "images.npz")]) == 0
    (metadata,) = tmp_path.rglob("*.json")
    assert json.loads(metadata.read_text())["average_capacity"] == TOP_K


def test_the_report_names_the_rule_and_counts_its_experts(trained, tmp_path):
    assert main(["analyze", str(trained), "--output", str(tmp_path), "--num_samples=20", "--steps=4"]) == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert f"With noisy routing a token gets {TOP_K} experts at every time, in every layer" in page
