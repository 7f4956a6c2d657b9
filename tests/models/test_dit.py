"""The backbone: its arguments, its initial state, its files, and what an image's answer depends on."""

import copy
import dataclasses
import inspect
import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from diffusion_moe import DiT, JiT
from diffusion_moe.config import TEXT_FIELDS, ModelConfig
from diffusion_moe.counts import is_moe_block
from diffusion_moe.models import load_model
from diffusion_moe.models.conditions import routing_context
from diffusion_moe.moe import MoEFeedForward, routers_of, update_routing_state
from diffusion_moe.routing_rules import RULES

ROUTERS, FAST = ["dense", *RULES], ("diffmoe", "dsmoe")
POSITIONS = ["sincos", "rope1d", "rope2d"]
SMALL = {
    "sample_size": 8, "patch_size": 2, "in_channels": 3, "num_classes": 5,
    "hidden_size": 32, "depth": 3, "num_heads": 4, "router": "dsmoe", "num_experts": 4, "expert_dim": 16,
}  # fmt: skip


def make_model(**settings) -> DiT:
    """A small model whose layers that start at zero have random weights instead: else every output is zero."""
    torch.manual_seed(0)
    model = DiT(**{**SMALL, **settings})
    for name, p in model.named_parameters():
        if not p.any():
            nn.init.normal_(p, std=0.2)
        elif "router" in name:
            nn.init.normal_(p)
    for router in routers_of(model):
        for buffer in router.buffers():
            nn.init.uniform_(buffer, 0.3, 0.5)
    return model


def batch(model: DiT, size: int = 3) -> tuple:
    torch.manual_seed(1)
    labels = torch.tensor([1, 4, 5, 0, 2, 3, 1, 0])[:size] if model.null_class else None
    return torch.randn(size, 3, 8, 8), torch.rand(size), labels


def test_arguments_are_the_fields_of_the_config():
    parameters = list(inspect.signature(DiT.__init__).parameters.values())[1:]
    assert [(p.name, p.default) for p in parameters] == [
        (f.name, f.default) for f in dataclasses.fields(ModelConfig) if f.name != "backbone"
    ]
    assert DiT(**SMALL).settings == ModelConfig(**SMALL)
    with pytest.raises(TypeError, match="hiden_size"):
        DiT(hiden_size=3)
    with pytest.raises(ValueError, match=r"hidden_size 32 is not divisible by model\.num_heads 5"):
        DiT(**{**SMALL, "num_heads": 5})


@pytest.mark.parametrize(
    "name", ["norm", "position", "mlp_activation", "router", "expert_activation", "shared", "balance", "inference_pool"]
)
def test_an_unknown_choice_is_refused_with_its_name(name):
    """Else a misspelt activation or shared expert would silently be another one."""
    with pytest.raises(ValueError, match="magic"):
        DiT(**{**SMALL, name: "magic"})


@pytest.mark.parametrize("router", ROUTERS)
def test_output_is_exactly_zero_at_initialisation(router):
    model = DiT(**{**SMALL, "router": router})
    out = model(*batch(model))
    assert out.sample.shape == (3, 3, 8, 8) and torch.all(out.sample == 0)


def test_initialisation():
    """Xavier linears, normal 0.02 embeddings, zero biases, adaLN and output; experts and routers keep their own."""
    torch.manual_seed(0)
    model = DiT(**{**SMALL, "hidden_size": 128, "num_classes": 100, "router": "diffmoe", "expert_dim": 64})
    assert all(torch.all(p == 0) for name, p in model.named_parameters() if name.endswith("bias"))
    zero = [m.adaln[1].weight for m in (*model.blocks, model.final_layer)] + [model.final_layer.linear.weight]
    assert all(torch.all(w == 0) for w in zero)
    for weight in (model.y_embedder.weight, model.t_embedder.mlp[0].weight, model.t_embedder.mlp[2].weight):
        assert float(weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    qkv, experts = model.blocks[1].attn.qkv.weight, model.blocks[1].mlp.experts.w_in
    assert float(qkv.detach().std()) == pytest.approx((2 / (128 + 384)) ** 0.5, rel=0.05)
    assert float(experts.detach().std()) == pytest.approx((2 / (128 + 64)) ** 0.5, rel=0.05)
    assert float(model.blocks[1].mlp.router.weight.std()) == pytest.approx(0.006, rel=0.15)


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("router", ROUTERS)
def test_saved_and_loaded_again_it_gives_the_same_bits(router, position, tmp_path):
    model = make_model(router=router, position=position).eval()
    model.save_pretrained(tmp_path)
    loaded = DiT.from_pretrained(tmp_path)
    assert type(loaded) is DiT and not loaded.training and loaded.settings == model.settings
    state, loaded_state = model.state_dict(), loaded.state_dict()
    assert state.keys() == loaded_state.keys() and all(torch.equal(state[k], loaded_state[k]) for k in state)
    sample = model(*batch(model)).sample
    assert sample.std() > 0.01 and torch.equal(loaded(*batch(model)).sample, sample)


def test_saved_config_is_flat(tmp_path):
    make_model().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved.pop("_class_name") == "DiT" and saved.pop("_diffusers_version")
    assert all(value is None or isinstance(value, bool | int | float | str) for value in saved.values())
    fields = dataclasses.asdict(ModelConfig(**SMALL))
    assert saved | {"backbone": "dit"} == {name: value for name, value in fields.items() if name not in TEXT_FIELDS}


CHECKPOINTED = [
    {"router": "tc", "balance": "aux"},
    {"router": "dsmoe", "balance": "bias", "position": "sincos"},
    *({"router": router} for router in ("dense", "ec", "diffmoe", "promoe", "nucleus", "time")),
]


@pytest.mark.parametrize("settings", CHECKPOINTED, ids=str)
def test_gradient_checkpointing_changes_nothing(settings):
    plain = make_model(**settings, moe_layer_freq=1)
    checkpointed = copy.deepcopy(plain)
    checkpointed.enable_gradient_checkpointing()
    outs, calls = [], []
    for model in (plain, checkpointed):
        handle = model.blocks[1].attn.register_forward_hook(lambda *args: calls.append(0))
        out = model(*batch(model))
        loss = out.sample.square().mean() + sum(sum(r.losses.values()) for r in out.routing)
        loss.backward()
        handle.remove()
        calls.append(1)
        outs.append(out)
    assert calls == [0, 1, 0, 0, 1], "a checkpointed block runs twice"
    assert torch.equal(outs[0].sample, outs[1].sample)
    torch.testing.assert_close(outs[0].routing, outs[1].routing, rtol=0, atol=0)
    for (name, p), q in zip(plain.named_parameters(), checkpointed.parameters()):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-6, atol=1e-7, msg=name)
    buffers = zip(plain.named_buffers(), checkpointed.named_buffers())
    assert all(torch.equal(a, b) for (_, a), (_, b) in buffers)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [1, 3, 5]),
        ({"moe_layer_freq": 1}, [0, 1, 2, 3, 4, 5]),
        ({"first_k_dense": 2}, [3, 5]),
        ({"first_k_dense": 2, "moe_layer_freq": 1}, [2, 3, 4, 5]),
        ({"first_k_dense": 6, "moe_layer_freq": 1}, []),
        ({"first_k_dense": 3, "last_k_dense": 1, "moe_layer_freq": 1}, [3, 4]),
        ({"last_k_dense": 1}, [1, 3]),
        ({"router": "dense"}, []),
    ],
    ids=str,
)
def test_layout_of_mixture_blocks(settings, expected):
    config = ModelConfig(**{**SMALL, "depth": 6, **settings})
    assert [i for i in range(6) if is_moe_block(config, i)] == expected
    model = DiT(**{**SMALL, "depth": 6, **settings})
    assert [i for i, block in enumerate(model.blocks) if isinstance(block.mlp, MoEFeedForward)] == expected
    assert routers_of(model) == [model.blocks[i].mlp.router for i in expected]
    assert len(model(*batch(model)).routing) == len(expected)


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("router", ROUTERS)
def test_an_image_does_not_depend_on_the_others(router, position):
    model = make_model(router=router, position=position, moe_layer_freq=1, n_group=2, topk_group=1).eval()
    images, times, labels = batch(model)
    together = model(images, times, labels).sample
    assert together.std() > 0.01
    for b in range(3):
        alone = model(images[b : b + 1], times[b : b + 1], labels[b : b + 1]).sample
        torch.testing.assert_close(together[b : b + 1], alone, rtol=1e-5, atol=1e-5)


def test_with_the_papers_pool_an_image_does_depend_on_the_others():
    model = make_model(router="diffmoe", inference_pool="batch", moe_layer_freq=1).eval()
    images, times, labels = batch(model)
    alone = model(images[:1], times[:1], labels[:1]).sample
    assert (model(images, times, labels).sample[:1] - alone).abs().max() > 1e-3


@pytest.mark.parametrize("position", POSITIONS)
def test_image_time_class_and_place_all_matter(position):
    model = make_model(position=position).eval()
    images, times, labels = batch(model)
    before = model(images, times, labels).sample
    changed = {
        "image": model(images.flip(0), times, labels).sample,
        "time": model(images, 1 - times, labels).sample,
        "class": model(images, times, labels.flip(0)).sample,
        # Without positions, shifted tokens would give the shifted answer.
        "place": model(images.roll(2, dims=-1), times, labels).sample.roll(-2, dims=-1),
    }
    for what, sample in changed.items():
        assert (sample - before).abs().amax() > 1e-4, what


def test_dropout_is_in_the_middle_half_of_the_blocks_and_in_all_experts():
    """As JiT spreads it."""
    rates = {"dropout": 0.1, "attention_dropout": 0.2, "expert_dropout": 0.3}
    model = DiT(**{**SMALL, "depth": 9, **rates})
    seen = [(block.attn.dropout.p, block.attn.attention_dropout) for block in model.blocks]
    assert seen == [(0.0, 0.0)] * 2 + [(0.1, 0.2)] * 4 + [(0.0, 0.0)] * 3
    dense = [block.mlp.dropout.p for block in model.blocks[0::2]]
    assert dense == [0.0, 0.1, 0.1, 0.0, 0.0]
    assert {block.mlp.experts.dropout.p for block in model.blocks[1::2]} == {0.3}


def test_null_class_is_the_last_row_and_learn_sigma_doubles_the_channels():
    model = make_model(learn_sigma=True)
    assert model.null_class == 5 and model.y_embedder.num_embeddings == 6
    assert model(*batch(model)).sample.shape == (3, 6, 8, 8)


def test_a_scalar_time_is_for_every_image_and_a_tuple_on_request():
    model = make_model().eval()
    images, _, labels = batch(model)
    sample, reports = model(images, torch.tensor(0.3), labels, return_dict=False)
    out = model(images, torch.full((3,), 0.3), labels)
    assert torch.equal(sample, out.sample)
    torch.testing.assert_close(reports, out.routing, rtol=0, atol=0)


def test_unconditional_model():
    model = make_model(num_classes=0)
    assert model.y_embedder is None and model.null_class is None
    images, times, _ = batch(model)
    assert model(images, times).sample.std() > 0.01
    with pytest.raises(ValueError, match="class_labels are given, but the model has num_classes 0"):
        model(images, times, torch.zeros(3, dtype=torch.int64))


def test_missing_labels_are_named():
    model = make_model()
    with pytest.raises(ValueError, match="class_labels are missing, but the model has num_classes 5"):
        model(*batch(model)[:2])


# Parameters of the published models, and the settings that make them.
PUBLISHED = {
    "DSMoE-S-E16": (96_870_560, {"depth": 10, "num_experts": 16, "expert_dim": 768, "top_k": 2, "n_group": 2}),
    "DSMoE-S-E48": (69_238_304, {"depth": 12, "num_experts": 48, "expert_dim": 128, "top_k": 5, "n_group": 1}),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    """To the number; the state dict holds one correction bias an expert besides, as the published ones do."""
    total, settings = PUBLISHED[name]
    with torch.device("meta"):
        model = DiT(learn_sigma=True, mlp_activation="silu", topk_group=settings["n_group"], **settings)
    corrections = settings["num_experts"] * settings["depth"] // 2
    assert sum(p.numel() for p in model.parameters()) == total
    assert sum(t.numel() for t in model.state_dict().values()) == total + corrections


@pytest.mark.parametrize("router", ROUTERS)
def test_a_bfloat16_model_is_close_to_float32(router):
    """As from_pretrained(torch_dtype=torch.bfloat16) makes it. All experts are chosen, so rounding cannot reroute."""
    every = {"top_k": 3 if router == "promoe" else 4, "capacity": 4.0}
    model = make_model(router=router, **every).eval()
    for m in routers_of(model):
        if router in ("diffmoe", "race", "threshold"):
            m.threshold.fill_(0.0 if router == "diffmoe" else -torch.inf)
    images, times, labels = batch(model)
    expected = model(images, times, labels).sample
    actual = model.to(torch.bfloat16)(images.bfloat16(), times.bfloat16(), labels).sample
    assert actual.dtype == torch.bfloat16
    assert (actual - expected).norm() / expected.norm() < 0.05


def test_the_mask_of_a_window_is_made_once_for_all_blocks(monkeypatch):
    """Once again where class tokens lengthen the sequence. With sinks there is one more key, which all attend to."""
    masks, real = [], torch.nn.functional.scaled_dot_product_attention

    def recorded(q, k, v, attn_mask=None, **options):
        masks.append(attn_mask)
        return real(q, k, v, attn_mask=attn_mask, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recorded)
    model = make_model(depth=2, sliding_window=3, attention_sinks=True)
    model(*batch(model))
    index = torch.arange(17)
    near = (index[:16, None] - index).abs() < 3
    near[:, 16] = True
    assert masks[0] is masks[1] and torch.equal(masks[0], near)
    masks.clear()
    model = JiT(**SMALL, bottleneck_dim=8, class_tokens=2, class_tokens_from=1, sliding_window=3)
    model(*batch(model))
    assert [len(mask) for mask in masks] == [16, 18, 18] and masks[1] is masks[2]


@pytest.mark.parametrize(
    "router", [pytest.param(r, marks=() if r in FAST else pytest.mark.slow) for r in RULES if RULES[r].has_fixed_rows]
)
def test_a_block_compiles_to_one_graph(router):
    torch._dynamo.reset()
    model = make_model(router=router)
    block, x, condition = model.blocks[1], torch.randn(2, 16, 32), torch.randn(2, 32)
    rotary, context = model.rotary(), routing_context(model.settings, torch.rand(2), condition, torch.tensor([1, 5]))
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    results = []
    for function in (block, compiled):
        out = function(x, condition, rotary, None, None, context)
        loss = out.hidden_states.square().sum() + sum(out.report.losses.values())
        if out.report.predicted_BNP is not None:
            loss = loss + out.report.predicted_BNP.square().sum()
        results.append((out.hidden_states, out.report.counts_E, *torch.autograd.grad(loss, list(block.parameters()))))
    # Eager and compiled feed-forward layers add up in another order: single small entries are off by more.
    for actual, expected in zip(results[1], results[0]):
        assert (actual - expected).double().norm() <= 1e-5 * expected.double().norm()


@pytest.mark.parametrize("router", ["diffmoe", "dsmoe"])
def test_loading_in_bfloat16_keeps_routers_in_float32(tmp_path, router):
    DiT(sample_size=8, hidden_size=32, depth=2, num_heads=2, router=router, expert_dim=8).save_pretrained(tmp_path)
    model = DiT.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    assert {dtype for name, dtype in dtypes.items() if ".router." in name} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if ".router." not in name} == {torch.bfloat16}
    out = model.eval()(torch.randn(1, 4, 8, 8).bfloat16(), torch.rand(1), torch.tensor([1])).sample
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "router", ["dense", pytest.param("diffmoe", marks=pytest.mark.slow), pytest.param("dsmoe", marks=pytest.mark.slow)]
)
def test_compiled_blocks_serve_every_batch_size_and_routing_state(router):
    """Two batch sizes are compiled for; further ones and moved routing state find their code."""
    torch._dynamo.reset()
    model = make_model(router=router, balance="bias" if router in ("tc", "dsmoe") else "none")
    same = copy.deepcopy(model)
    model.compile_blocks(backend="aot_eager")
    graphs = []
    for size in (2, 3, 5, 8):
        images, times, labels = batch(model, size)
        outputs = [m(images, times, labels) for m in (model, same)]
        torch.testing.assert_close(outputs[0].sample, outputs[1].sample, rtol=1e-4, atol=1e-5)
        for m, out in zip((model, same), outputs):
            (out.sample.square().mean() + sum(sum(report.losses.values()) for report in out.routing)).backward()
            update_routing_state(routers_of(m), out.routing)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] > 0 and graphs[1] == graphs[2] == graphs[3]
    for compiled, plain in zip(model.parameters(), same.parameters()):
        torch.testing.assert_close(compiled.grad, plain.grad, rtol=1e-3, atol=1e-5)


def test_a_model_folder_of_version_0_1_is_loaded_with_its_biases_or_refused(tmp_path):
    """By the command it is loaded; diffusers alone would drop the settings it does not know."""
    model = make_model(num_classes=3, moe_layer_freq=1, first_k_dense=1, n_group=2, topk_group=1)
    for router in routers_of(model):
        router.e_score_correction_bias.uniform_()
    model.save_pretrained(tmp_path)
    path, file = tmp_path / "config.json", tmp_path / "diffusion_pytorch_model.safetensors"
    config = json.loads(path.read_text())
    names = {"n_group": "num_groups", "topk_group": "top_groups", "routed_scaling_factor": "routed_scale"}
    names["first_k_dense"] = "skip_first"
    for new, old in names.items():
        config[old] = config.pop(new)
    config["interleave"] = config.pop("moe_layer_freq") == 2
    path.write_text(json.dumps(config))
    state = load_file(file)
    save_file({name.replace("e_score_correction_bias", "correction"): value for name, value in state.items()}, file)
    loaded = load_model(tmp_path)
    assert loaded.settings == model.settings
    assert {name: value.tolist() for name, value in loaded.state_dict().items()} == {
        name: value.tolist() for name, value in model.state_dict().items()
    }
    with pytest.raises(ValueError, match=r"earlier version.*num_groups \(now n_group\).*`diffusion-moe convert`"):
        DiT.from_pretrained(tmp_path)


@pytest.mark.parametrize("router", ["dsmoe", "tc"])
def test_a_model_without_its_correction_bias_is_refused_rather_than_balanced_from_zero(router, tmp_path):
    """The buffer had another name in version 0.1, whose config.json may have been edited."""
    model = make_model(router=router, balance="bias")
    model.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    assert any(name.endswith("e_score_correction_bias") for name in state)
    save_file({name.replace("e_score_correction_bias", "correction"): value for name, value in state.items()}, file)
    for load in (DiT.from_pretrained, load_model):
        with pytest.raises(ValueError, match=r"no blocks\.1\.mlp\.router\.e_score_correction_bias.*earlier version"):
            load(tmp_path)
    save_file(state, file)
    loaded, info = DiT.from_pretrained(tmp_path, output_loading_info=True)
    name = "blocks.1.mlp.router.e_score_correction_bias"
    assert not info["missing_keys"] and torch.equal(loaded.state_dict()[name], state[name])


def test_the_output_is_read_as_those_of_diffusers_are():
    model = make_model()
    out, plain = model(*batch(model)), model(*batch(model), return_dict=False)
    assert out[0] is out.sample is out["sample"] is out.to_tuple()[0]
    assert out[1] is out["routing"] and out[:1] == (out.sample,)
    assert type(plain) is tuple is type(out.to_tuple()) and len(plain) == 2
    with pytest.raises(AttributeError, match="nothing"):
        out["nothing"]


@pytest.mark.parametrize("kind", [pytest.param(DiT, marks=pytest.mark.slow), JiT])
def test_a_model_is_pickled_and_compiled_whole(kind):
    torch._dynamo.reset()
    own = {"prediction": "x", "bottleneck_dim": 8, "class_tokens": 2, "class_tokens_from": 1} if kind is JiT else {}
    model = kind(**SMALL | own).eval()
    nn.init.normal_(model.final_layer.linear.weight)
    images, times, labels = batch(model)
    expected = model(images, times, labels).sample
    assert torch.equal(pickle.loads(pickle.dumps(model))(images, times, labels).sample, expected)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(images, times, labels).sample, expected) and expected.std() > 0.1
