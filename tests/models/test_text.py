"""Models conditioned on text: what starts at zero, what a mask hides, what stands for no prompt, and other sizes."""

import copy

import pytest
import torch
from torch import nn

from diffusion_moe import DiT, JiT
from diffusion_moe.config import TEXT_FIELDS, ModelConfig
from diffusion_moe.counts import model_flops, model_size
from diffusion_moe.models import load_model
from diffusion_moe.moe import routers_of
from diffusion_moe.nn.attention import CrossAttention
from diffusion_moe.nn.position import sincos_table
from diffusion_moe.routing_rules import RULES

ROUTERS = ["dense", *RULES]
W, L = 12, 5
SMALL = {
    "sample_size": 8, "patch_size": 2, "in_channels": 3, "num_classes": 0, "hidden_size": 32, "depth": 2,
    "num_heads": 4, "num_experts": 4, "expert_dim": 16, "text_dim": W, "text_length": L,
}  # fmt: skip


def randomize(model):
    """Give random weights to what starts at zero; else every answer is zero."""
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        if not p.any():
            nn.init.normal_(p, std=0.2)
        elif "router" in name:
            nn.init.normal_(p)
    for router in routers_of(model):
        for buffer in router.buffers():
            nn.init.uniform_(buffer, 0.3, 0.5)
    return model.eval()


def make_model(**settings):
    torch.manual_seed(0)
    return randomize(DiT(**SMALL | settings))


def inputs(size=3, height=8, width=8, channels=3):
    torch.manual_seed(1)
    lengths = torch.tensor([L, 2, 3])[:size]
    return {
        "hidden_states": torch.randn(size, channels, height, width),
        "timestep": torch.rand(size),
        "encoder_hidden_states": torch.randn(size, L, W),
        "encoder_attention_mask": torch.arange(L) < lengths[:, None],
    }


def test_a_model_without_text_is_the_one_it_was():
    """Same parameters in the same order, same draws, same config file, whatever the other fields."""
    torch.manual_seed(0)
    plain = DiT(**SMALL | {"text_dim": 0, "text_length": 77, "num_classes": 3})
    assert not any("text" in name or "cross" in name for name in plain.state_dict())
    assert not set(TEXT_FIELDS) & plain.config.keys()
    torch.manual_seed(0)
    with_text = DiT(**SMALL | {"num_classes": 3})
    shared = [name for name in with_text.state_dict() if "text" not in name and "cross" not in name]
    assert shared == list(plain.state_dict())
    assert set(TEXT_FIELDS) <= with_text.config.keys()


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("conditioning", ["cross", "joint"])
def test_every_text_changes_its_own_image_alone(router, conditioning):
    model, batch = make_model(router=router, text_conditioning=conditioning), inputs()
    before = model(**batch).sample
    batch["encoder_hidden_states"][0] += 1 * torch.randn(L, W)
    after = model(**batch).sample
    assert (after - before)[0].abs().max() > 1e-3
    torch.testing.assert_close(after[1:], before[1:])


@pytest.mark.parametrize("conditioning", ["cross", "joint"])
def test_what_the_mask_hides_is_not_seen(conditioning):
    model, batch = make_model(text_conditioning=conditioning), inputs()
    before = model(**batch).sample
    batch["encoder_hidden_states"][~batch["encoder_attention_mask"]] = 100.0
    torch.testing.assert_close(model(**batch).sample, before)
    short = {**batch, "encoder_hidden_states": batch["encoder_hidden_states"][1:, :3]}
    short = {name: value[1:] if len(value) == 3 else value for name, value in short.items()}
    short["encoder_attention_mask"] = batch["encoder_attention_mask"][1:, :3]
    torch.testing.assert_close(model(**short).sample, before[1:])  # nor how far texts are padded


@pytest.mark.parametrize("conditioning", ["cross", "joint"])
@pytest.mark.parametrize("null", ["learned", "empty"])
def test_a_text_without_tokens_is_the_null_prompt(conditioning, null):
    model, batch = make_model(text_conditioning=conditioning, text_null=null), inputs()
    embedder, empty = model.text_embedder, torch.randn(2, W)
    if null == "empty":
        embedder.set_null(empty, None)
    nothing = {**batch, "encoder_hidden_states": torch.zeros(3, 0, W), "encoder_attention_mask": torch.zeros(3, 0)}
    answer = model(**nothing).sample
    given = embedder.null_text.detach().expand(3, L, W) if null == "learned" else empty.expand(3, 2, W)
    explicit = {**batch, "encoder_hidden_states": given, "encoder_attention_mask": None}
    torch.testing.assert_close(model(**explicit).sample, answer)
    assert (embedder.null_text in set(model.parameters())) == (null == "learned")


def test_the_pooled_feature_is_the_encoder_s_own_or_the_mean_over_tokens():
    model, batch = make_model(text_pooled_dim=7), inputs()
    with pytest.raises(ValueError, match=r"pooled_projections are missing, but model\.text_pooled_dim is 7"):
        model(**batch)
    one, two = (model(**batch, pooled_projections=torch.full((3, 7), value)).sample for value in (0.0, 1.0))
    assert (one - two).abs().max() > 1e-3
    embedder = make_model().text_embedder
    features, mask = batch["encoder_hidden_states"], batch["encoder_attention_mask"]
    _, pooled = embedder(features, mask, None)
    normed = nn.functional.layer_norm(features, (W,), eps=1e-6)
    means = torch.stack([row[chosen].mean(dim=0) for row, chosen in zip(normed, mask)])
    torch.testing.assert_close(pooled, embedder.pool(means))


def test_cross_attention_is_softmax_over_the_tokens_that_are_there():
    attention = CrossAttention(8, 2)
    x, text, mask = torch.randn(2, 3, 8), torch.randn(2, 4, 8), torch.tensor([[1, 1, 0, 1], [0, 0, 1, 0]]).bool()
    expected = []
    for b in range(2):
        q = attention.q(x[b]).view(3, 2, 4)
        k, v = attention.kv(text[b][mask[b]]).chunk(2, dim=-1)
        k, v = k.view(-1, 2, 4), v.view(-1, 2, 4)
        weights = (torch.einsum("nhi,lhi->hnl", q, k) / 2).softmax(-1)
        expected.append(attention.proj(torch.einsum("hnl,lhi->nhi", weights, v).flatten(1)))
    torch.testing.assert_close(attention(x, text, mask), torch.stack(expected))


def test_training_starts_as_if_there_were_no_cross_attention():
    torch.manual_seed(0)
    model = DiT(**SMALL)
    nn.init.normal_(model.final_layer.linear.weight)
    for block in model.blocks:
        nn.init.normal_(block.adaln[1].weight, std=0.1)
    before = model(**inputs()).sample
    for block in model.blocks:
        assert not block.cross_attn.proj.weight.any()
        block.cross_attn = None
    assert torch.equal(model(**inputs()).sample, before)


@pytest.mark.parametrize("conditioning", ["cross", "joint"])
@pytest.mark.parametrize("router", ROUTERS)
def test_gradients_reach_every_parameter(router, conditioning):
    model = make_model(router=router, text_conditioning=conditioning, text_pooled_dim=4).train()
    batch = inputs()
    batch["encoder_attention_mask"][0] = False
    out = model(**batch, pooled_projections=torch.randn(3, 4))
    loss = out.sample.square().mean() + sum(sum(report.losses.values()) for report in out.routing)
    loss = loss + sum(r.predicted_BNP.square().sum() for r in out.routing if r.predicted_BNP is not None)
    loss.backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert [name for name in missing if "experts" not in name] == []


def test_routers_see_image_tokens_or_in_one_sequence_both():
    for conditioning, tokens in (("cross", 16), ("joint", 16 + L)):
        report = make_model(text_conditioning=conditioning, top_k=2)(**inputs()).routing[0]
        assert report.num_tokens == 3 * tokens and int(report.counts_E.sum()) == 2 * 3 * tokens


def test_one_sequence_with_class_tokens_in_jit():
    settings = SMALL | {"num_classes": 3, "bottleneck_dim": 8, "class_tokens": 2, "class_tokens_from": 1}
    model = randomize(JiT(**settings, text_conditioning="joint", position="sincos+rope2d"))
    labels, batch = torch.tensor([0, 1, 2]), inputs()
    before = model(**batch, class_labels=labels).sample
    assert before.shape == (3, 3, 8, 8)
    changed = model(**batch, class_labels=torch.tensor([0, 1, 0])).sample
    torch.testing.assert_close(changed[:2], before[:2])
    assert (changed[2] - before[2]).abs().max() > 1e-3


@pytest.mark.parametrize("backbone", [DiT, JiT])
@pytest.mark.parametrize("null", ["learned", "empty"])
def test_files_hold_everything(tmp_path, backbone, null):
    own = {"bottleneck_dim": 8} if backbone is JiT else {}
    model = randomize(backbone(**SMALL, **own, text_null=null, text_pooled_dim=4))
    model.text_embedder.set_null(torch.randn(3, W), torch.randn(4)) if null == "empty" else None
    model.save_pretrained(tmp_path)
    loaded, batch = load_model(tmp_path), inputs()
    assert loaded.settings == model.settings
    batch["encoder_attention_mask"][0] = False
    answers = [each(**batch, pooled_projections=torch.ones(3, 4)).sample for each in (model, loaded)]
    assert torch.equal(*answers)


@pytest.mark.parametrize("position", ["sincos", "rope1d", "rope2d", "sincos+rope2d"])
@pytest.mark.parametrize("conditioning", ["cross", "joint"])
def test_any_size_that_patches_fill(position, conditioning):
    model = make_model(position=position, text_conditioning=conditioning)
    batch = inputs(height=6, width=12)
    wide = model(**batch).sample
    assert wide.shape == (3, 3, 6, 12) and wide.isfinite().all()
    assert torch.equal(wide, model(**batch).sample)
    # A larger model's answer at its own size is this one's beyond its size: nothing but the tables knows it.
    large = DiT(**SMALL | {"position": position, "text_conditioning": conditioning, "sample_size": 12})
    weights = {name: value for name, value in model.state_dict().items() if name != "pos_embed"}
    large.load_state_dict(weights, strict=False)
    batch = inputs(height=12, width=12)
    torch.testing.assert_close(model(**batch).sample, large.eval()(**batch).sample)
    with pytest.raises(ValueError, match="the image is 7 x 8; both must be positive multiples of patch_size 2"):
        model(**inputs(height=7))


def test_the_table_of_another_size_is_the_formula_s():
    model = make_model(position="sincos")
    torch.testing.assert_close(model.sincos(2, 8), sincos_table(2, 8, 32))
    model.pos_embed.add_(1)  # published checkpoints have their own table for their own size
    assert model.sincos(4, 4) is model.pos_embed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder_hidden_states": None}, "encoder_hidden_states are missing, but the model has text_dim 12"),
        ({"encoder_hidden_states": torch.zeros(3, 6, W)}, "have 6 tokens of width 12, but the model takes up to 5"),
        (
            {"encoder_hidden_states": torch.zeros(3, L, 9)},
            "5 tokens of width 9, but the model takes up to 5 of",
        ),
        ({"encoder_attention_mask": torch.ones(3, 2)}, r"mask has shape \(3, 2\); the features need \(3, 5\)"),
        ({"pooled_projections": torch.ones(3, 2)}, "pooled_projections are given, but model.text_pooled_dim is 0"),
    ],
)
def test_features_that_are_not_the_model_s_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make_model()(**inputs() | changes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"text_length": 5}, r"model\.text_length is 5, but model\.text_dim is 0 \(no text\); remove it"),
        ({"text_dim": -1}, r"model\.text_dim is -1; use 0 for none"),
        ({"text_dim": 4, "text_length": 0}, r"model\.text_length is 0; it must be positive"),
        ({"text_dim": 4, "text_conditioning": "joint", "sliding_window": 3}, r"model\.sliding_window is 3, but in one"),
        ({"text_dim": 4, "text_null": "zero"}, r"model\.text_null is 'zero'; choose one of learned, empty"),
    ],
)
def test_settings_that_contradict_each_other(settings, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**settings)


def test_the_empty_prompt_has_to_fit():
    embedder = make_model(text_null="empty", text_pooled_dim=3).text_embedder
    with pytest.raises(ValueError, match="the empty prompt has 6 tokens of width 12"):
        embedder.set_null(torch.zeros(6, W), torch.zeros(3))
    with pytest.raises(ValueError, match="has no pooled feature of width 3"):
        embedder.set_null(torch.zeros(2, W), None)


def test_sizes_and_operations_count_the_text():
    """Cross-attention and the embedder written out."""
    config = ModelConfig(**SMALL)
    plain = ModelConfig(**{name: value for name, value in SMALL.items() if name not in TEXT_FIELDS})
    D, N, depth = 32, 16, 2
    embedder = (W * D + D) + (D * D + D) + (W * D + D) + (D * D + D) + L * W
    cross = (D * D + D) + (2 * D * D + 2 * D) + (D * D + D)
    assert model_size(config).total - model_size(plain).total == embedder + depth * cross
    products = L * (W * D + D * D) + (W * D + D * D)
    products += depth * (2 * N * D * D + L * 2 * D * D + 2 * N * L * D)
    assert model_flops(config).total - model_flops(plain).total == 2 * products


@pytest.mark.slow
@pytest.mark.parametrize("conditioning", ["cross", "joint"])
def test_checkpointed_and_compiled_blocks_give_the_same_gradients(conditioning):
    plain, batch = make_model(text_conditioning=conditioning, qk_norm=True).train(), inputs()
    checkpointed, compiled = copy.deepcopy(plain), copy.deepcopy(plain)
    checkpointed.enable_gradient_checkpointing()
    torch._dynamo.reset()
    compiled.compile_blocks(backend="aot_eager")
    for model in (plain, checkpointed, compiled):
        model(**batch).sample.square().mean().backward()
    for other in (checkpointed, compiled):
        for one, two in zip(plain.parameters(), other.parameters()):
            torch.testing.assert_close(two.grad, one.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("conditioning", ["cross", "joint"])
def test_half_precision_is_near(conditioning):
    model, batch = make_model(text_conditioning=conditioning, qk_norm=True, router="dense"), inputs()
    expected = model(**batch).sample
    with torch.autocast("cpu", torch.bfloat16):
        automatic = model(**batch).sample
    whole = copy.deepcopy(model).to(torch.bfloat16)
    narrow = whole(**batch | {"hidden_states": batch["hidden_states"].bfloat16()}).sample
    for answer in (automatic, narrow):
        assert 0 < (answer.float() - expected).abs().max() < 0.1 * expected.abs().max()
