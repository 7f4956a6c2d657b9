"""Adapters put in, merged, saved and loaded again."""

import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from diffusion_moe import DiT
from diffusion_moe.models.adapters import TABLE, WEIGHTS, add_adapters, load_lora, merged, save_adapters, targets_of

SMALL = {"sample_size": 8, "in_channels": 1, "hidden_size": 32, "depth": 2, "num_heads": 2, "num_classes": 5,
         "num_experts": 4, "expert_dim": 16}  # fmt: skip
EVERYWHERE = ("attn.qkv", "attn.proj", "mlp.experts.w_in", "mlp.experts.w_out", "shared.up_proj")


def small_model(**settings):
    """A model none of whose weights is zero."""
    torch.manual_seed(0)
    model = DiT(**SMALL | settings).eval()
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return model


def adapted_model(names=EVERYWHERE, alpha=None, **settings):
    """The same with adapters that are not zero."""
    model = small_model(**settings)
    add_adapters(model, 2, alpha, names)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def answer(model):
    generator = torch.Generator().manual_seed(1)
    x, t = torch.randn(3, 1, 8, 8, generator=generator), torch.rand(3, generator=generator)
    with torch.no_grad():
        return model(x, t, torch.tensor([0, 4, 5])).sample


def test_targets_are_ends_of_names():
    model = small_model()
    targets = targets_of(model, ["qkv", "mlp.experts.w_in", "final_layer.linear", "y_embedder"])
    assert targets == (["qkv", "final_layer.linear"], ["mlp.experts.w_in"], True)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["attn.qvk"], "init.lora_targets has attn.qvk, but no layer's name ends in it; choose from attn.qkv"),
        (["kv"], "has kv, but no layer"),
        (["experts.w_inn"], "mlp.experts.w_in"),
        (["y_embedder"], "name at least one layer"),
    ],
)
def test_a_wrong_target_is_told_with_near_names(names, message):
    with pytest.raises(ValueError, match=message) as caught:
        add_adapters(small_model(), 2, None, names)
    assert "\n" not in str(caught.value)


def test_an_unconditional_model_has_no_label_table():
    with pytest.raises(ValueError, match="has y_embedder, but no layer's name ends in it"):
        targets_of(small_model(num_classes=0), ["attn.qkv", "y_embedder"])


def test_only_adapters_and_the_label_table_learn():
    model = adapted_model(("attn.qkv", "y_embedder"))
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    layers = {f"blocks.{i}.attn.qkv.lora_{part}.default.weight" for i in range(2) for part in "AB"}
    assert learning == layers | {"y_embedder.weight"}


def test_a_merged_copy_is_a_plain_model_with_the_same_answers():
    """W + alpha / rank * B A; the adapted model stays as it was."""
    model = adapted_model(alpha=6.0)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = merged(model)
    assert plain.state_dict().keys() == small_model().state_dict().keys()
    torch.testing.assert_close(answer(plain), answer(model), rtol=1e-4, atol=1e-5)
    assert (answer(plain) - answer(small_model())).abs().max() > 1e-2
    a, b = (state[f"blocks.1.attn.qkv.lora_{part}.default.weight"] for part in "AB")
    expected = small_model().blocks[1].attn.qkv.weight + 3 * b @ a
    torch.testing.assert_close(plain.blocks[1].attn.qkv.weight, expected, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_saved_adapters_come_back_also_those_of_experts(tmp_path):
    model = adapted_model(alpha=6.0)
    save_adapters(model, tmp_path)
    loaded = small_model()
    load_lora(loaded, tmp_path)
    assert torch.equal(answer(loaded), answer(model))
    assert [path.name for path in tmp_path.iterdir()] == [WEIGHTS]


def test_adapters_of_attention_load_through_diffusers(tmp_path):
    model = adapted_model(("attn.qkv", "attn.proj"), alpha=6.0)
    save_adapters(model, tmp_path)
    loaded = small_model()
    loaded.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    assert torch.equal(answer(loaded), answer(model))


def test_a_label_table_of_more_classes_comes_back(tmp_path):
    model = adapted_model(("attn.qkv", "y_embedder"), num_classes=7)
    save_adapters(model, tmp_path, label_table=True)
    assert {path.name for path in tmp_path.iterdir()} == {WEIGHTS, TABLE}
    loaded = small_model()
    loaded.load_state_dict(
        {n: t for n, t in small_model(num_classes=7).state_dict().items() if "y_embedder" not in n}, strict=False
    )
    load_lora(loaded, tmp_path)
    assert loaded.null_class == 7 and loaded.config.num_classes == 7
    assert torch.equal(answer(loaded), answer(model))


def test_damaged_or_foreign_adapters_are_one_line(tmp_path):
    with pytest.raises(ValueError, match="cannot read adapters from"):
        load_lora(small_model(), tmp_path)
    save_adapters(adapted_model(), tmp_path)
    with pytest.raises(ValueError, match="for another model") as caught:
        load_lora(small_model(hidden_size=64), tmp_path)
    assert "\n" not in str(caught.value)
    save_file(load_file(tmp_path / WEIGHTS), tmp_path / WEIGHTS)  # without diffusers' note
    with pytest.raises(ValueError, match=r"cannot read adapters from .*lora_adapter_metadata"):
        load_lora(small_model(), tmp_path)


def test_peft_is_needed_for_adapters_only(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match="adapters of rank 2 need the package peft, which is not installed"):
        add_adapters(small_model(), 2, None, ["attn.qkv"])
