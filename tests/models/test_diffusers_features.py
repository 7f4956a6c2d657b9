"""What diffusers and peft offer for any model, tried on ours: files, dtypes, compiling, adapters, offloading."""

import copy
import json

import pytest
import torch
from diffusers.models.attention_dispatch import attention_backend
from peft import LoraConfig, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

from diffusion_moe import DiT, JiT
from diffusion_moe.models import save_model
from diffusion_moe.moe import GroupedExperts, routers_of

SMALL = {
    "sample_size": 8, "patch_size": 2, "in_channels": 3, "num_classes": 5, "hidden_size": 32, "depth": 4,
    "num_heads": 4, "num_experts": 4, "expert_dim": 16,
}  # fmt: skip
MODELS = {
    "dsmoe": (DiT, {"router": "dsmoe"}),
    "diffmoe": (DiT, {"router": "diffmoe"}),
    "jit": (JiT, {"prediction": "x", "bottleneck_dim": 8, "class_tokens": 2, "class_tokens_from": 1,
                  "norm": "rmsnorm", "qk_norm": True, "position": "sincos+rope2d"}),
}  # fmt: skip
every_model = pytest.mark.parametrize("name", MODELS)


def make_model(name="dsmoe", **settings):
    """A small model in eval mode whose layers that start at zero have random weights."""
    kind, own = MODELS[name]
    torch.manual_seed(0)
    model = kind(**{**SMALL, **own, **settings}).eval()
    for parameter_name, p in model.named_parameters():
        if not p.any():
            nn.init.normal_(p, std=0.1)
        elif "router" in parameter_name:
            nn.init.normal_(p)
    for router in routers_of(model):
        for buffer in router.buffers():
            nn.init.uniform_(buffer, 0.3, 0.5)
    return model


def make_sure_model(name="dsmoe"):
    """The same with all experts chosen, so that rounding cannot reroute."""
    model = make_model(name, top_k=4, capacity=4.0)
    for router in routers_of(model):
        if name == "diffmoe":
            router.threshold.zero_()
    return model


def batch(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    images, times = torch.randn(3, 3, 8, 8, generator=generator), torch.rand(3, generator=generator)
    return images.to(dtype), times, torch.tensor([1, 4, 5])


def sample(model, dtype=torch.float32):
    with torch.no_grad():
        return model(*batch(dtype)).sample


def relative_error(actual, expected):
    return float((actual - expected).norm() / expected.norm())


# Files


@every_model
def test_a_model_saved_without_diffusers_has_the_same_files(name, tmp_path):
    model = make_model(name)
    model.save_pretrained(tmp_path / "theirs")
    save_model(model, tmp_path / "ours")
    theirs, ours = ({file.name: file.read_bytes() for file in (tmp_path / who).iterdir()} for who in ("theirs", "ours"))
    assert theirs.keys() == ours.keys() == {"config.json", "diffusion_pytorch_model.safetensors"}
    assert theirs == ours


@every_model
@pytest.mark.parametrize("variant", [None, "ema"])
def test_sharded_files_give_the_same_bits(name, variant, tmp_path):
    model = make_model(name)
    model.save_pretrained(tmp_path, max_shard_size="40KB", variant=variant)
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    stem = "diffusion_pytorch_model" + (f".{variant}" if variant else "")
    assert len(shards) > 3 and shards[0] == f"{stem}-00001-of-{len(shards):05}.safetensors"
    (index,) = tmp_path.glob("*.index.json" if variant is None else f"*.index.{variant}.json")
    assert json.loads(index.read_text())["weight_map"].keys() == model.state_dict().keys()
    loaded = type(model).from_pretrained(tmp_path, variant=variant)
    state, loaded_state = model.state_dict(), loaded.state_dict()
    assert state.keys() == loaded_state.keys() and all(torch.equal(state[k], loaded_state[k]) for k in state)
    assert sample(model).std() > 0.1 and torch.equal(sample(loaded), sample(model))


def test_a_variant_lies_beside_the_other_weights(tmp_path):
    model, average = make_model(), make_model()
    with torch.no_grad():
        for p in average.parameters():
            p.mul_(0.9)
    model.save_pretrained(tmp_path)
    average.save_pretrained(tmp_path, variant="ema")
    assert torch.equal(sample(DiT.from_pretrained(tmp_path)), sample(model))
    assert torch.equal(sample(DiT.from_pretrained(tmp_path, variant="ema")), sample(average))
    assert not torch.equal(sample(model), sample(average))


# Dtypes


@every_model
@pytest.mark.parametrize("shard", ["10GB", "40KB"])
def test_a_narrow_dtype_leaves_routers_and_their_state_as_they_were(name, shard, tmp_path):
    model = make_sure_model(name)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    state = model.state_dict()
    kept = {key: tensor for key, tensor in loaded.state_dict().items() if ".router." in key}
    state_names = {"dsmoe": "e_score_correction_bias", "diffmoe": "threshold", "jit": "e_score_correction_bias"}
    assert {key.split(".router.")[1] for key in kept} >= {"weight", state_names[name]}
    assert all(tensor.dtype == torch.float32 and torch.equal(tensor, state[key]) for key, tensor in kept.items())
    others = {tensor.dtype for key, tensor in loaded.state_dict().items() if key not in kept}
    assert others == {torch.bfloat16} and loaded.dtype == torch.bfloat16
    actual = sample(loaded, torch.bfloat16)
    assert actual.dtype == torch.bfloat16 and relative_error(actual.float(), sample(model)) < 0.05


@every_model
def test_layerwise_casting_stores_everything_but_routers_and_embeddings_in_8_bits(name):
    model = make_sure_model(name)
    expected = sample(model)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    for _ in range(2):
        dtypes = {key: p.dtype for key, p in model.named_parameters()}
        narrow = {key for key, dtype in dtypes.items() if dtype == torch.float8_e4m3fn}
        assert not [key for key in narrow if ".router." in key or "x_embedder" in key or "t_embedder" in key]
        assert {"attn.qkv.weight", "mlp.experts.w_in", "mlp.experts.w_out", "adaln.1.weight"} <= {
            key.removeprefix("blocks.1.") for key in narrow
        }
        # float8_e4m3fn has 3 bits after the point: single weights are off by up to 6 %.
        assert 0.001 < relative_error(sample(model), expected) < 0.1
    assert model.dtype == torch.float32


def test_layerwise_casting_that_loses_nothing_changes_nothing():
    model = make_sure_model()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.bfloat16())
    expected = sample(model)
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    assert model.blocks[1].mlp.experts.w_in.dtype == torch.bfloat16
    assert torch.equal(sample(model), expected)


# Computing


@every_model
def test_gradient_checkpointing_counts_once(name):
    plain = make_model(name).train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.enable_gradient_checkpointing()
    routed = []
    checkpointed.blocks[1].mlp.router.register_forward_hook(lambda *args: routed.append(0))
    outs = []
    for model in (plain, checkpointed):
        out = model(*batch())
        (out.sample.square().mean() + sum(sum(report.losses.values()) for report in out.routing)).backward()
        outs.append(out)
    assert len(routed) == 2, "the router runs again in the backward pass"
    assert len(outs[1].routing) == 2
    for report, other in zip(outs[0].routing, outs[1].routing):
        assert torch.equal(report.counts_E, other.counts_E) and report.counts_E.sum() > 0
    for (key, p), q in zip(plain.named_parameters(), checkpointed.named_parameters()):
        assert p.grad is not None, key
        torch.testing.assert_close(q[1].grad, p.grad, rtol=1e-6, atol=1e-7, msg=key)
    for (key, p), q in zip(plain.named_buffers(), checkpointed.buffers()):
        assert torch.equal(p, q), key


@pytest.mark.parametrize(
    "name", ["dsmoe", *(pytest.param(name, marks=pytest.mark.slow) for name in ("diffmoe", "jit"))]
)
def test_compiling_the_repeated_blocks_changes_nothing(name):
    torch._dynamo.reset()
    model = make_model(name, depth=2)
    expected = sample(model)
    model.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(sample(model), expected, rtol=1e-5, atol=1e-5)


@every_model
@pytest.mark.parametrize("backend", ["native", "_native_math", "_native_flash", "flex"])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_attention_backends_agree(name, backend):
    """Those that a CPU has. What is set last becomes the default of the whole process; the context undoes that."""
    model = make_model(name)
    expected = sample(model)
    with attention_backend("native"):
        model.set_attention_backend(backend)
        assert {block.attn.processor._attention_backend.value for block in model.blocks} == {backend}
        torch.testing.assert_close(sample(model), expected, rtol=1e-5, atol=1e-5)


@every_model
@pytest.mark.parametrize("offload_type", ["leaf_level", "block_level"])
def test_group_offloading_changes_nothing(name, offload_type):
    """From CPU to CPU: the hooks run, the transfers do nothing."""
    model = make_model(name)
    expected, device = sample(model), torch.device("cpu")
    options = {"onload_device": device, "offload_device": device, "num_blocks_per_group": 1}
    model.enable_group_offload(offload_type=offload_type, **options)
    assert torch.equal(sample(model), expected)


@pytest.mark.parametrize("name", ["dsmoe", "jit", "diffmoe"])
def test_every_layer_that_offloading_moves_alone_is_called(name):
    """Else its weights would stay behind: leaf-level offloading loads a linear layer or embedding when it is called."""
    model, called = make_model(name), set()
    leaves = {key: m for key, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding)}
    for key, module in leaves.items():
        module.register_forward_pre_hook(lambda module, args, key=key: called.add(key))
    sample(model)
    assert called == leaves.keys()


# Adapters

ATTENTION = {"target_modules": ["attn.qkv", "attn.proj"]}
EXPERTS = {"target_modules": [], "target_parameters": ["mlp.experts.w_in", "mlp.experts.w_out"]}
every_target = pytest.mark.parametrize(
    "targets", [ATTENTION, EXPERTS, ATTENTION | {"target_parameters": EXPERTS["target_parameters"]}],
    ids=["attention", "experts", "both"],
)  # fmt: skip


def adapted(name, targets, random=True):
    """A model with a LoRA of rank 2 and scale 2, and the sample without it."""
    model = make_model(name)
    expected = sample(model)
    model.add_adapter(LoraConfig(r=2, lora_alpha=4, **targets))
    if random:
        for key, p in model.named_parameters():
            if "lora_B" in key:
                nn.init.normal_(p, std=0.1)
    return model, expected


@every_model
@every_target
def test_an_adapter_starts_as_nothing_and_alone_is_trained(name, targets):
    model, expected = adapted(name, targets, random=False)
    assert torch.equal(sample(model), expected)
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    places = {"attn": 2 * 4, "experts": 2 * 2}  # layers or matrices, in four blocks, of which two have experts
    assert all("lora_" in key for key in trained)
    assert len(trained) == 2 * sum(n for place, n in places.items() if any(place in key for key in trained))
    frozen = {key: p.detach().clone() for key, p in model.named_parameters() if key not in trained}
    optimizer, target = torch.optim.Adam(trained.values(), lr=0.02), torch.randn(3, 3, 8, 8)
    losses = []
    for _ in range(8):
        loss = (model(*batch()).sample - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is None for key, p in model.named_parameters() if key in frozen)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert all(p.grad is not None and p.grad.any() for p in trained.values())
    assert losses[-1] < losses[0] - 0.01
    assert all(torch.equal(p, frozen[key]) for key, p in model.named_parameters() if key in frozen)
    assert relative_error(sample(model), expected) > 0.01


@every_model
@every_target
def test_an_adapter_can_be_merged_disabled_and_removed(name, targets):
    model, plain = adapted(name, targets)
    expected = sample(model)
    assert relative_error(expected, plain) > 0.02
    model.fuse_lora()
    torch.testing.assert_close(sample(model), expected, rtol=1e-4, atol=1e-5)
    model.unfuse_lora()
    torch.testing.assert_close(sample(model), expected, rtol=1e-4, atol=1e-5)
    model.disable_adapters()
    torch.testing.assert_close(sample(model), plain, rtol=1e-4, atol=1e-5)
    model.unload_lora()
    torch.testing.assert_close(sample(model), plain, rtol=1e-4, atol=1e-5)
    assert model.state_dict().keys() == make_model(name).state_dict().keys()


def test_an_adapter_of_experts_has_its_rank_for_each_expert():
    """W_e + scale * (B_e A_e)^T, where A_e reads the expert's inputs."""
    model, _ = adapted("dsmoe", EXPERTS)
    before = make_model().blocks[1].mlp.experts
    wrapper = model.blocks[1].mlp.experts
    a, b = wrapper.base_layer.lora_A["default"].weight, wrapper.base_layer.lora_B["default"].weight
    assert (a.shape, b.shape) == ((4 * 2, 32), (32, 4 * 2)), "of w_in: 4 experts of rank 2, from 32 to 2 x 16"
    assert wrapper.lora_A["default"].weight.shape == (4 * 2, 16), "of w_out, from 16 to 32"
    model.fuse_lora()
    (experts,) = [module for module in wrapper.modules() if isinstance(module, GroupedExperts)]
    for w, w_before in ((experts.w_in, before.w_in), (experts.w_out, before.w_out)):
        ranks = torch.linalg.matrix_rank((w - w_before).detach(), rtol=1e-3)
        assert ranks.tolist() == [2] * 4
    # peft numbers A's rows expert by expert, but B's columns rank by rank.
    expected = 2 * torch.einsum("erd,fre->edf", a.view(4, 2, 32), b.view(32, 2, 4))
    torch.testing.assert_close(experts.w_in - before.w_in, expected, rtol=1e-4, atol=1e-6)


@every_model
def test_a_saved_adapter_of_attention_comes_back(name, tmp_path):
    model, _ = adapted(name, ATTENTION)
    model.save_lora_adapter(tmp_path)
    loaded = make_model(name)
    loaded.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    assert torch.equal(sample(loaded), sample(model))


@every_model
@every_target
def test_a_saved_adapter_comes_back_through_peft(name, targets, tmp_path):
    """The way for adapters of experts, which `load_lora_adapter` refuses, as peft cannot infer them from the file."""
    model, _ = adapted(name, targets)
    model.save_lora_adapter(tmp_path)
    loaded = make_model(name)
    loaded.add_adapter(LoraConfig(r=2, lora_alpha=4, **targets))
    result = set_peft_model_state_dict(loaded, load_file(tmp_path / "pytorch_lora_weights.safetensors"))
    assert not result.unexpected_keys and torch.equal(sample(loaded), sample(model))


def test_adapters_and_gradient_checkpointing():
    model, _ = adapted("dsmoe", ATTENTION | {"target_parameters": EXPERTS["target_parameters"]})
    checkpointed = copy.deepcopy(model)
    checkpointed.enable_gradient_checkpointing()
    for m in (model, checkpointed):
        m(*batch()).sample.square().mean().backward()
    for (key, p), q in zip(model.named_parameters(), checkpointed.parameters()):
        if p.requires_grad:
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-6, atol=1e-7, msg=key)
