"""Kept activations by formula equal what autograd keeps of a real forward pass, part by part."""

import dataclasses

import pytest
from activation_trace import traced
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_configs import model_configs

from diffusion_moe.config import read_recipe
from diffusion_moe.planning.activations import kept_activations

WAYS = [("fp32", "none"), ("bf16", "none"), ("bf16", "experts"), ("fp32", "blocks")]
TEXT = ["--model.num_classes=0", "--model.text_dim=12", "--model.text_length=5"]
MODELS = {
    "dsmoe": [],
    "dsmoe, aux": ["--model.balance=aux", "--model.top_k=1"],
    "tc": ["--model.router=tc"],
    "tc, aux": ["--model.router=tc", "--model.balance=aux"],
    "ec": ["--model.router=ec", "--model.expert_activation=gelu"],
    "diffmoe": ["--model.router=diffmoe", "--model.expert_bias=true"],
    "race": ["--model.router=race"],
    "promoe": ["--model.router=promoe", "--model.expert_bias=true"],
    "promoe, no loss": ["--model.router=promoe", "--model.top_k=1", "--model.contrastive_weight=0"],
    "time": ["--model.router=time", "--model.shared=none"],
    "nucleus": [
        *("--model.router=nucleus", "--model.depth=5", "--model.moe_layer_freq=1", "--model.first_k_dense=2"),
        *("--model.last_k_dense=1", "--model.layer_capacities=[2,1]"),
    ],
    "dense": ["--model.router=dense", "--model.mlp_activation=swiglu"],
    "jit": [
        *("--model.backbone=jit", "--model.prediction=x", "--model.bottleneck_dim=6", "--model.norm=rmsnorm"),
        *("--model.class_tokens=2", "--model.class_tokens_from=1", "--model.qk_norm=true"),
    ],
    "sincos": ["--model.position=sincos", "--model.num_kv_heads=1"],
    "window": ["--model.sliding_window=3"],
    "sinks": ["--model.attention_sinks=true"],
    "fusion": ["--model.fusion=true", "--model.first_k_full=1", "--model.last_k_full=0"],
    "dropout": ["--model.depth=4", *(f"--model.{kind}dropout=0.1" for kind in ("", "attention_", "expert_"))],
    "identity": ["--model.shared=identity", "--model.expert_dropout=0.1"],
    "ddpm": ["--model.process=ddpm", "--model.prediction=epsilon", "--model.learn_sigma=true"],
    "text": [*TEXT, "--model.qk_norm=true"],
    "text, one sequence": [*TEXT, "--model.text_conditioning=joint"],
    "text, pooled": [*TEXT, "--model.text_pooled_dim=6", "--model.text_null=empty"],
}


def recipe_of(tiny, precision, recompute, *more):
    return read_recipe(
        "digits", [*tiny, f"--training.precision={precision}", f"--training.recompute={recompute}", *more]
    )


@pytest.mark.parametrize("sharded", [False, True], ids=["one process", "sharded"])
@pytest.mark.parametrize(("precision", "recompute"), WAYS)
@pytest.mark.parametrize("model", MODELS)
def test_of_each_kind_of_model(model, precision, recompute, sharded, tiny):
    recipe = recipe_of(tiny, precision, recompute, *MODELS[model])
    assert kept_activations(recipe, 3, sharded) == traced(recipe, 3, sharded)


def test_casts_of_experts_with_many_rows_are_not_kept(tiny):
    recipe = recipe_of(tiny, "bf16", "none", "--model.sample_size=16", "--model.patch_size=1")
    assert [kept_activations(recipe, images) for images in (3, 4)] == [traced(recipe, images) for images in (3, 4)]
    casts = 2 * 4 * 32 * (2 * 16 + 16)
    few, many = (kept_activations(recipe, images).blocks[1] for images in (3, 4))
    per_image = few - kept_activations(recipe, 2).blocks[1]
    assert many - few == per_image - casts  # 4 experts have 512 rows or more of 4 images


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(model_configs(), st.sampled_from(WAYS), st.integers(1, 3), st.booleans())
def test_of_any_settings(model, way, images, sharded):
    recipe = read_recipe("digits", ["--diffusion.class_dropout=0"])
    training = dataclasses.replace(recipe.training, precision=way[0], recompute=way[1])
    recipe = dataclasses.replace(recipe, model=model, training=training)
    assert kept_activations(recipe, images, sharded) == traced(recipe, images, sharded)


@pytest.mark.parametrize(("precision", "recompute"), WAYS)
@pytest.mark.parametrize(
    "init",
    [
        ["--init.freeze=[blocks.0.*]"],
        ["--init.freeze=['*embedder*']"],
        ["--init.lora_rank=2", "--init.lora_targets=[attn.qkv,adaln.1]"],
        ["--init.lora_rank=2", "--init.lora_targets=[up_proj]"],
        ["--init.lora_rank=2", "--init.lora_targets=[up_proj,down_proj,attn.qkv,attn.proj,adaln.1,x_embedder]"],
        ["--init.lora_rank=2", "--init.lora_targets=[mlp.experts.w_in,mlp.experts.w_out]"],
    ],
)
def test_frozen_weights_and_adapters_keep_at_most_as_much(init, precision, recompute, tiny):
    recipe = recipe_of(tiny, precision, recompute, "--init.from_checkpoint=another", *init)
    bound, real = kept_activations(recipe, 3), traced(recipe, 3)
    assert real.outside <= bound.outside and real.inputs <= bound.inputs
    assert all(kept <= most for kept, most in zip(real.blocks, bound.blocks))


def test_recomputed_blocks_keep_their_inputs_and_one_block(tiny):
    kept = kept_activations(recipe_of(tiny, "fp32", "blocks"), 3)
    assert kept.total("blocks") == kept.outside + kept.inputs + max(kept.blocks) < kept.total("none")
    assert kept.total("none") == kept.outside + sum(kept.blocks)


def test_recomputed_experts_keep_no_hidden_layers(tiny):
    keeping, again = (recipe_of(tiny, "fp32", recompute) for recompute in ("none", "experts"))
    rows = 16 * (keeping.model.top_k + 1)  # of each image; the shared expert takes every token
    less = kept_activations(keeping, 3).total("none") - kept_activations(again, 3).total("experts")
    assert less == 3 * rows * 4 * 2 * keeping.model.expert_dim
