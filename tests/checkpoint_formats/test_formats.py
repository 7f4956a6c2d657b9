"""Names and shapes of the published state dicts, and the settings of the published constructors."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
import torch

from diffusion_moe.checkpoint_formats import files
from diffusion_moe.checkpoint_formats.formats import detect_format, make_layout
from diffusion_moe.checkpoint_formats.layout import from_reference, to_reference
from diffusion_moe.checkpoint_formats.settings import read_settings, write_settings
from diffusion_moe.config import ModelConfig, read_recipe
from diffusion_moe.models import make_model

# For each published model '<pattern of names>': [shape, how many]; N is a block's number, E an expert's.
STATES = json.loads((Path(__file__).parent / "states.json").read_text())
SMALL = {"input_size": 8, "hidden_size": 32, "depth": 4, "num_heads": 4, "num_classes": 5}
GROUPED = {
    "num_experts": 4,
    "moe_intermediate_size": 12,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "routed_scaling_factor": 2.0,
    "use_shared_expert": True,
}
POOLED = {"num_experts": 4, "capacity": 1}


def kind_of(config: ModelConfig) -> str:
    return "jit" if config.backbone == "jit" else "dense" if config.router == "dense" else config.router


@pytest.mark.parametrize("name", STATES)
def test_names_and_shapes_are_the_published_ones(name):
    config = read_recipe(name).model
    with torch.device("meta"):
        state = to_reference(make_layout(kind_of(config), config), make_model(config).state_dict())
    found: Counter = Counter()
    for key, value in state.items():
        pattern = re.sub(r"experts\.(blocks\.)?\d+\.", r"experts.\1E.", re.sub(r"^blocks\.\d+\.", "blocks.N.", key))
        found[pattern, tuple(value.shape)] += 1
    assert found == {(pattern, tuple(shape)): count for pattern, (shape, count) in STATES[name].items()}


VARIANTS = {
    "dense": [("dense", {}, None), ("dense", {"use_swiglu": True}, None), ("dense", {"learn_sigma": False}, None)],
    "heads": [("dense", {"head_dim": 12}, None), ("dense", {"class_dropout_prob": 0.0}, None)],
    "tc": [
        ("tc", {}, POOLED | {"n_shared_experts": 2}),
        ("tc", {"use_swiglu": True}, POOLED | {"n_shared_experts": None}),
    ],
    "ec": [("ec", {}, POOLED | {"n_shared_experts": 1}), ("ec", {"use_swiglu": True}, POOLED | {"interleave": False})],
    "diffmoe": [
        ("diffmoe", {}, POOLED | {"n_shared_experts": 3}),
        ("diffmoe", {"use_swiglu": True, "mlp_ratio": 2}, POOLED),
    ],
    "dsmoe": [
        ("dsmoe", {"norm_type": "rmsnorm", "enable_gqa": True, "rope_type": "2d"}, GROUPED),
        ("dsmoe", {"use_sinks": True, "sliding_window": 3}, GROUPED | {"skip_first2": True, "interleave": False}),
        ("dsmoe", {"rope_type": "1d"}, GROUPED | {"skip_first2": 3, "use_shared_expert": False, "interleave": False}),
        ("dsmoe", {"use_swiglu": True}, GROUPED | {"num_experts_per_tok": 1}),
    ],
    "jit": [
        ("jit", {"patch_size": 4, "bottleneck_dim": 8, "in_context_len": 0, "proj_drop": 0.1}, None),
        ("jit", {"patch_size": 4, "bottleneck_dim": 8, "in_context_len": 3, "in_context_start": 1}, GROUPED),
        ("jit", {"patch_size": 4, "bottleneck_dim": 8, "in_context_start": 1}, GROUPED | {"interleave": False}),
    ],
}


@pytest.mark.parametrize(("kind", "params", "moe"), [variant for family in VARIANTS.values() for variant in family])
def test_every_switch_goes_over_and_back(kind, params, moe):
    torch.manual_seed(0)
    config = ModelConfig(**read_settings(kind, SMALL | params, moe))
    model, layout = make_model(config), make_layout(kind, config)
    for tensor in model.state_dict().values():
        torch.nn.init.normal_(tensor)
    published = to_reference(layout, model.state_dict())
    again = from_reference(layout, published)
    assert again.keys() == model.state_dict().keys()
    assert all(torch.equal(again[name], value) for name, value in model.state_dict().items())
    assert detect_format(published) in (kind, None)
    params_again, moe_again = write_settings(kind, config)
    assert ModelConfig(**read_settings(kind, params_again, moe_again)) == config


def names_of(kind: str, params: dict, moe: dict | None) -> set[str]:
    return make_layout(kind, ModelConfig(**read_settings(kind, SMALL | params, moe))).reference_names()


def test_names_of_switches_no_published_recipe_uses():
    """As the published modules call them."""
    names = names_of("dsmoe", {"norm_type": "rmsnorm", "enable_gqa": True, "use_sinks": True}, GROUPED)
    for name in ("norm1.weight", "norm2.weight", "attn.q_proj.weight", "attn.k_proj.bias", "attn.v_proj.weight"):
        assert f"blocks.0.{name}" in names
    assert "blocks.2.attn.sinks" in names and "blocks.0.attn.qkv.weight" not in names and "pos_embed" in names
    assert not any("norm_final" in name for name in names)
    swiglu = names_of("diffmoe", {"use_swiglu": True}, POOLED | {"n_shared_experts": 1})
    for name in ("blocks.0.mlp.gate_proj.weight", "blocks.1.mlp.experts.3.down_proj.weight"):
        assert name in swiglu and name.replace(".weight", ".bias") not in swiglu
    assert {"blocks.1.mlp.shared_experts.fc1.bias", "blocks.3.mlp.ema_decay"} <= swiglu
    skipped = names_of("dsmoe", {}, GROUPED | {"skip_first2": 2, "interleave": False})
    assert {"blocks.1.mlp.fc1.weight", "blocks.2.mlp.gate.weight"} <= skipped
    assert "blocks.1.mlp.gate.weight" not in skipped
    assert names_of("dsmoe", {}, GROUPED | {"skip_first2": True, "interleave": False}) == skipped


def test_shapes_that_other_settings_decide():
    def shape_of(kind, params, moe, name):
        config = ModelConfig(**read_settings(kind, SMALL | params, moe))
        return tuple(to_reference(make_layout(kind, config), make_model(config).state_dict())[name].shape)

    table = "y_embedder.embedding_table.weight"
    assert shape_of("dense", {"class_dropout_prob": 0.0}, None, table) == (5, 32)
    assert shape_of("dense", {}, None, table) == (6, 32)
    shared = "blocks.1.mlp.shared_experts"
    # DiffMoE's is of eight widths whatever the count; the others' of count widths.
    assert shape_of("diffmoe", {}, POOLED | {"n_shared_experts": 3}, f"{shared}.fc1.weight") == (256, 32)
    assert shape_of("ec", {}, POOLED | {"n_shared_experts": 3}, f"{shared}.up_proj.weight") == (96, 32)
    assert shape_of("dense", {"head_dim": 12}, None, "blocks.0.attn.proj.weight") == (32, 48)
    assert shape_of(
        "jit", {"patch_size": 4, "bottleneck_dim": 8, "in_context_start": 1}, None, "blocks.0.mlp.w3.weight"
    ) == (32, 85)


def test_parts_of_joined_matrices_stand_where_the_published_code_looks_for_them():
    config = ModelConfig(**read_settings("dsmoe", SMALL | {"enable_gqa": True}, GROUPED))
    model = make_model(config)
    for tensor in model.state_dict().values():
        torch.nn.init.normal_(tensor)
    published = to_reference(make_layout("dsmoe", config), model.state_dict())
    qkv, w_in = model.blocks[0].attn.qkv.weight, model.blocks[1].mlp.experts.w_in
    assert torch.equal(published["blocks.0.attn.q_proj.weight"], qkv[:32])
    assert torch.equal(published["blocks.0.attn.k_proj.weight"], qkv[32:48])
    assert torch.equal(published["blocks.0.attn.v_proj.weight"], qkv[48:])
    assert torch.equal(published["blocks.1.mlp.experts.blocks.2.gate_proj.weight"], w_in[2, :, :12].T)
    assert torch.equal(published["blocks.1.mlp.experts.blocks.2.up_proj.weight"], w_in[2, :, 12:].T)
    assert published["x_embedder.proj.weight"].shape == (32, 4, 2, 2)
    assert torch.equal(published["x_embedder.proj.weight"].flatten(1), model.x_embedder.weight)


def test_missing_and_unknown_names_are_said():
    config = ModelConfig(**read_settings("dense", SMALL, None))
    layout = make_layout("dense", config)
    published = to_reference(layout, make_model(config).state_dict())
    published["blocks.9.what"] = published.pop("blocks.0.attn.qkv.bias")
    with pytest.raises(ValueError, match=r"lacks blocks.0.attn.qkv.bias and has unknown blocks.9.what"):
        from_reference(layout, published)


@pytest.mark.parametrize(
    ("kind", "params", "moe", "expected"),
    [
        ("dense", {"hiden_size": 3}, None, "params have unknown hiden_size"),
        ("dsmoe", {}, {"num_experts": 4}, "MoE_config lack moe_intermediate_size"),
        ("dsmoe", {"rope_type": "3d"}, GROUPED, "rope_type is '3d'"),
    ],
)
def test_wrong_published_settings_are_refused(kind, params, moe, expected):
    with pytest.raises(ValueError, match=expected):
        read_settings(kind, SMALL | params, moe)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"router": "dsmoe", "learn_sigma": True, "mlp_activation": "gelu"}, "mlp_activation 'gelu'"),
        ({"router": "ec", "position": "rope2d", "shared": "none"}, "position 'rope2d'"),
        ({"router": "dense", "position": "sincos", "qk_norm": True}, "qk_norm True"),
    ],
)
def test_models_the_published_code_does_not_have_are_refused(settings, expected):
    config = ModelConfig(sample_size=8, hidden_size=32, depth=2, num_heads=4, expert_dim=128, **settings)
    with pytest.raises(ValueError, match=expected):
        write_settings(kind_of(config), config)


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
def test_a_file_that_cannot_be_written_whole_leaves_the_old_one(tmp_path, monkeypatch, name):
    """Neither a part of it nor a file beside it stays; what is written is on the disk before it replaces the old."""
    path, state, synced = tmp_path / name, {"x": torch.ones(3)}, []
    path.write_text("old")

    def fails(*_):
        raise OSError("no space left")

    with monkeypatch.context() as broken:
        broken.setattr(files.os, "fsync", fails)
        with pytest.raises(OSError, match="no space left"):
            files.write_checkpoint(path, "dit", state)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    monkeypatch.setattr(files.os, "fsync", lambda descriptor: synced.append(path.read_text()))
    files.write_checkpoint(path, "dit", state)
    assert synced == ["old"] and list(tmp_path.iterdir()) == [path]
