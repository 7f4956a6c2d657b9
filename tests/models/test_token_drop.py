"""Token dropping against an oracle that takes and puts back tokens one by one, for each image alone."""

import copy

import pytest
import torch
from torch import nn

from diffusion_moe import DiT, JiT
from diffusion_moe.models.token_drop import TokenDrop

SMALL = {
    "sample_size": 8, "patch_size": 2, "in_channels": 3, "num_classes": 5, "hidden_size": 32, "depth": 5,
    "num_heads": 4, "router": "dsmoe", "num_experts": 4, "expert_dim": 16, "first_k_full": 1, "last_k_full": 1,
}  # fmt: skip
JIT = {"prediction": "x", "bottleneck_dim": 6, "class_tokens": 2, "norm": "rmsnorm", "qk_norm": True}
JIT |= {"position": "sincos+rope2d", "rotary_pairs": "neighbours"}
TEXT = {"num_classes": 0, "text_dim": 12, "text_length": 3}
KINDS = {
    "dsmoe": (DiT, {"num_kv_heads": 2, "balance": "aux"}),
    "dense, sincos": (DiT, {"router": "dense", "position": "sincos", "attention_sinks": True}),
    "ec, rope1d": (DiT, {"router": "ec", "capacity": 1.5, "position": "rope1d", "first_k_full": 0}),
    "tc, two and three": (DiT, {"router": "tc", "first_k_full": 2, "last_k_full": 0}),
    "diffmoe": (DiT, {"router": "diffmoe"}),
    "jit, class tokens from the first": (JiT, JIT),
    "jit, class tokens from the middle": (JiT, {**JIT, "class_tokens_from": 2}),
    "jit, class tokens from the end": (JiT, {**JIT, "class_tokens_from": 4}),
    "text": (DiT, {**TEXT, "text_conditioning": "cross"}),
    "text, one sequence": (DiT, {**TEXT, "text_conditioning": "joint"}),
}
KEPT = torch.tensor([[0, 5, 6, 15], [1, 2, 3, 14], [4, 7, 8, 9]])
PATH = torch.tensor([False, True, False])


def make_model(kind, **more):
    """A small model with random weights also where initialisation says zero."""
    torch.manual_seed(0)
    model_class, settings = KINDS[kind]
    model = model_class(**{**SMALL, **settings, **more}).train()
    for name, p in model.named_parameters():
        if not p.any():
            nn.init.normal_(p, std=0.2)
        elif "router" in name:
            nn.init.normal_(p)
    return model


def inputs(model, images=3):
    torch.manual_seed(1)
    config = model.settings
    given = {"hidden_states": torch.randn(3, 3, 8, 8)[:images], "timestep": torch.rand(3)[:images]}
    given["class_labels"] = torch.tensor([1, 4, 5])[:images] if config.num_classes else None
    if config.text_dim:
        given["encoder_hidden_states"] = torch.randn(3, 3, config.text_dim)[:images]
    return given


def oracle_of_an_image(model, given, kept, path):
    """Output for one image; tokens are taken and put back one by one, with the angles of their own places."""
    config, fusion = model.settings, model.fusion
    x, condition, label, context, text, still = model.embed(**given)
    first, last = config.first_k_full, config.depth - config.last_k_full - 1
    places, all_before = list(range(still + 16)), None
    for index, block in enumerate(model.blocks):
        if index == first:
            all_before = x
            places = [*range(still), *(still + int(place) for place in kept)]
            x = torch.stack([x[0, place] for place in places])[None]
        if config.class_tokens and index == config.class_tokens_from:
            tokens = label[:, None] + model.class_positions
            x, still = torch.cat((tokens, x), dim=1), still + config.class_tokens
            places = [*range(config.class_tokens), *(place + config.class_tokens for place in places)]
            all_before = all_before if all_before is None else torch.cat((tokens, all_before), dim=1)
        rotary = model.rotary(still)
        if rotary is not None:
            rotary = rotary._replace(cos_NI=rotary.cos_NI[places], sin_NI=rotary.sin_NI[places])
        x, _ = block(x, condition, rotary, None, text, context)
        if index == last:
            rows = []
            for place in range(still + 16):
                if fusion is not None and (path or place not in places):
                    row = fusion.mask_token
                else:
                    row = x[0, places.index(place)] if place in places else all_before[0, place]
                rows.append(row if fusion is None else fusion.linear(torch.cat((row, all_before[0, place]))))
            x, places, all_before = torch.stack(rows)[None], list(range(still + 16)), None
    x = model.final_layer(x[:, still:], condition)
    rows = x.view(4, 4, 2, 2, 3)  # rows and columns of patches, and of a patch
    return rows.permute(4, 0, 2, 1, 3).reshape(3, 8, 8)


def check_gradients(model, output, other, expected):
    """Outputs and the gradients of all parameters are equal, and those that the loss depends on are not zero."""
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    (output * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: name + text)
    return {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}


@pytest.mark.parametrize("fusion", [False, True], ids=["TREAD", "SPRINT"])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_those_of_the_oracle(kind, fusion):
    model = make_model(kind, fusion=fusion)
    other, images = copy.deepcopy(model), 1 if kind == "diffmoe" else 3  # whose experts choose from the whole batch
    given = inputs(model, images)
    path = PATH[:images] if fusion else torch.zeros(images, dtype=torch.bool)
    output = model(**given, token_drop=TokenDrop(KEPT[:images], path if fusion else False)).sample
    expected = [
        oracle_of_an_image(other, {k: v if v is None else v[i : i + 1] for k, v in given.items()}, KEPT[i], path[i])
        for i in range(images)
    ]
    still = check_gradients(model, output, other, torch.stack(expected))
    assert not [name for name in still if name.startswith(("fusion.", "blocks.2.attn."))]


def test_an_image_without_its_middle_blocks_is_one_whose_blocks_are_not_computed():
    model = make_model("jit, class tokens from the middle", fusion=True)
    given, calls = inputs(model), []
    for index, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, index=index: calls.append(index))
    computed = model(**given, token_drop=TokenDrop(path=torch.ones(3, dtype=torch.bool)))
    assert calls == [0, 1, 2, 3, 4] and len(computed.routing) == 2
    del calls[:]
    skipped = model(**given, token_drop=TokenDrop(path=True))
    assert calls == [0, 4] and skipped.routing == ()  # the MoE blocks are 1 and 3
    assert torch.equal(skipped.sample, computed.sample)
    assert (skipped.sample - model(**given).sample).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["dsmoe", "jit, class tokens from the middle"])
def test_keeping_all_tokens_changes_nothing(kind):
    model = make_model(kind)
    given, every = inputs(model), torch.arange(16).expand(3, -1)
    assert torch.equal(model(**given, token_drop=TokenDrop(every)).sample, model(**given).sample)


def test_without_dropping_the_blocks_are_applied_one_after_another():
    model = make_model("dsmoe")
    x, condition, *_ = model.embed(**(given := inputs(model)))
    for block in model.blocks:
        x = block(x, condition, model.rotary()).hidden_states
    x = model.final_layer(x, condition).view(3, 4, 4, 2, 2, 3).permute(0, 5, 1, 3, 2, 4).reshape(3, 3, 8, 8)
    assert torch.equal(model(**given).sample, x)


@pytest.mark.parametrize("fusion", [False, True], ids=["TREAD", "SPRINT"])
def test_recomputed_blocks_give_the_same(fusion):
    plain = make_model("dsmoe", fusion=fusion)
    recomputed = copy.deepcopy(plain)
    recomputed.enable_gradient_checkpointing()
    given, drop = inputs(plain), TokenDrop(KEPT, PATH if fusion else False)
    outputs = [model(**given, token_drop=drop).sample for model in (recomputed, plain)]
    check_gradients(recomputed, outputs[0], plain, outputs[1])


@pytest.mark.slow
def test_compiled_blocks_serve_a_part_of_the_tokens_and_all_of_them():
    plain = make_model("dsmoe", fusion=True)
    compiled, given = copy.deepcopy(plain), inputs(plain)
    compiled.compile_blocks(backend="aot_eager")
    for drop in (TokenDrop(KEPT, PATH), TokenDrop(), TokenDrop(KEPT, PATH)):
        plain.zero_grad()
        compiled.zero_grad()
        outputs = [model(**given, token_drop=drop).sample for model in (compiled, plain)]
        check_gradients(compiled, outputs[0], plain, outputs[1])


def test_other_image_sizes_keep_the_angles_of_their_places():
    model = make_model("dsmoe")
    images = torch.randn(3, 3, 12, 4)
    given = inputs(model) | {"hidden_states": images}
    kept = torch.tensor([[0, 5, 6, 11]]).expand(3, -1)
    output = model(**given, token_drop=TokenDrop(kept)).sample
    assert output.shape == images.shape and (output - model(**given).sample).abs().max() > 1e-3
    every = torch.arange(12).expand(3, -1)
    assert torch.equal(model(**given, token_drop=TokenDrop(every)).sample, model(**given).sample)


@pytest.mark.parametrize(
    ("settings", "drop", "message"),
    [
        ({}, TokenDrop(path=True), "token_drop leaves out whole paths, but model.fusion is false"),
        ({"first_k_full": 4}, TokenDrop(KEPT), "model.first_k_full 4 and last_k_full 1 leave no middle blocks of"),
    ],
)
def test_what_cannot_be_dropped_says_why(settings, drop, message):
    model = make_model("dsmoe", **settings)
    with pytest.raises(ValueError, match=message):
        model(**inputs(model), token_drop=drop)


def test_a_fusion_needs_middle_blocks():
    with pytest.raises(ValueError, match=r"model.fusion is true, but model.first_k_full 2 and last_k_full 3 leave no"):
        DiT(**{**SMALL, "fusion": True, "first_k_full": 2, "last_k_full": 3})
