"""The checks of golden cases on cases of other sizes and switches, recorded from our own models.

They show that the checks themselves hold for any such case, and that they notice a wrong answer.
"""

import json

import golden_cases
import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusion_moe.checkpoint_formats.formats import make_layout
from diffusion_moe.checkpoint_formats.layout import to_reference
from diffusion_moe.checkpoint_formats.settings import read_settings
from diffusion_moe.config import ModelConfig
from diffusion_moe.models import make_model

SIZES = {"input_size": 8, "patch_size": 4, "in_channels": 4, "hidden_size": 16, "depth": 2, "num_heads": 2}
SIZES |= {"mlp_ratio": 2, "num_classes": 5}
POOLED = {"num_experts": 4, "capacity": 1, "n_shared_experts": 0, "interleave": True, "init_MoeMLP": False}
GROUPED = {"num_experts": 4, "hidden_size": 16, "moe_intermediate_size": 8, "n_group": 2, "topk_group": 1}
GROUPED |= {"num_experts_per_tok": 2, "routed_scaling_factor": 2.0, "interleave": False, "use_shared_expert": True}
JIT = {"input_size": 16, "in_channels": 3, "bottleneck_dim": 8, "in_context_len": 2, "in_context_start": 1}
EVERYWHERE = POOLED | {"interleave": False}

CASES = {
    "diffmoe, experts in all blocks": ("diffmoe", SIZES, EVERYWHERE),
    "diffmoe, one block of experts": ("diffmoe", SIZES | {"depth": 1}, EVERYWHERE),
    "diffmoe, no block of experts": ("diffmoe", SIZES | {"depth": 1}, POOLED),
    "diffmoe, more capacity, shared": (
        "diffmoe",
        SIZES | {"depth": 3, "learn_sigma": False, "use_swiglu": True},
        EVERYWHERE | {"capacity": 2, "n_shared_experts": 1},
    ),
    "diffmoe, one token an expert": ("diffmoe", SIZES, EVERYWHERE | {"num_experts": 48}),
    "diffmoe, ddpm": ("diffmoe ddpm", SIZES, EVERYWHERE),
    "tc, ddpm": ("tc ddpm", SIZES, EVERYWHERE | {"capacity": 2, "n_shared_experts": 2}),
    "dense, ddpm": ("dense ddpm", SIZES, None),
    "tc, no null class": ("tc", SIZES | {"class_dropout_prob": 0.0}, EVERYWHERE | {"n_shared_experts": None}),
    "ec, experts in all blocks": ("ec", SIZES | {"head_dim": 4}, EVERYWHERE | {"capacity": 2}),
    "dense, wide heads": ("dense", SIZES | {"num_heads": 1, "use_swiglu": True}, None),
    "dsmoe, dropped groups": ("dsmoe", SIZES | {"rope_type": "2d", "norm_type": "rmsnorm"}, GROUPED),
    "dsmoe, one expert a token": (
        "dsmoe",
        SIZES | {"rope_type": "1d", "enable_gqa": True, "depth": 3},
        GROUPED | {"num_experts_per_tok": 1, "use_shared_expert": False, "skip_first2": True},
    ),
    "jit, class tokens from the first block": ("jit", SIZES | JIT | {"in_context_start": 0}, None),
    "jitmoe, dense without interleave": ("jitmoe", SIZES | JIT | {"depth": 3}, GROUPED),
    "jitmoe, without class tokens": ("jitmoe", SIZES | JIT | {"in_context_len": 0}, GROUPED | {"interleave": True}),
}
CHECKS = [check for name, check in vars(golden_cases).items() if name.startswith("check_")]


def kind_of(name):
    """How a published entry is drawn."""
    endings = {
        "gate_weight": "gate",
        "gate.weight": "gate",
        "e_score_correction_bias": "correction",
        "expert_threshold": "threshold",
        "ema_decay": "0.949999988079071",
        "norm1.weight": "norm",
        "norm2.weight": "norm",
        "q_norm.weight": "norm",
        "k_norm.weight": "norm",
        "norm_final.weight": "norm",
    }
    if name == "pos_embed":
        return "sincos"
    return next((kind for ending, kind in endings.items() if name.endswith(ending)), "normal")


def record(folder, family, params, moe):
    """Write a case as the published code's recorder would, with answers of our model by formulas of its own."""
    family, _, process = family.partition(" ")
    kind = "jit" if family == "jitmoe" else family
    config = ModelConfig(**read_settings(kind, params, moe, process or "flow"))
    fresh = to_reference(make_layout(kind, config), make_model(config).state_dict())
    entries = [f"{name} {'x'.join(map(str, tensor.shape))} {kind_of(name)}" for name, tensor in fresh.items()]
    about = {"family": family, "params": params, "moe": moe, "state": entries, "seed": 7}
    about["timestep"] = "integer step 0..999" if process else "t in [0, 1]"
    about["grad_norm_names"] = [name for name in fresh if not name.endswith(("pos_embed", "ema_decay", "threshold"))]
    if kind == "jit":
        about["denoiser"] = {"P_mean": -0.8, "P_std": 0.8, "t_eps": 0.05, "noise_scale": 1.0}
    folder.mkdir()
    (folder / "case.json").write_text(json.dumps(about))
    shape = (4, config.in_channels, config.sample_size, config.sample_size)
    answers = {"x": torch.randn(shape), "t": torch.rand(4), "y": torch.arange(4) % config.num_classes}
    if process:
        answers["t"] = torch.tensor([0, 20, 500, 999])
    save_file(answers, folder / "tensors.safetensors")
    case = golden_cases.load.__wrapped__(folder)  # not kept: its answers are to come
    answers |= routed(case)
    if process:
        answers |= denoised(case)
    else:
        answers |= loss_of(case) | sampled(case)
    save_file(
        {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in answers.items()},
        folder / "tensors.safetensors",
    )
    return folder


def routed(case):
    """Outputs, and of DiffMoE's layers in training who was chosen: each expert its best tokens of the batch."""
    model, inputs = golden_cases.model_of(case), {}
    for n, block in enumerate(model.blocks):
        block.mlp.register_forward_pre_hook(lambda layer, args, n=n: inputs.setdefault(n, args[0].detach()))
    with torch.no_grad():
        x, t, y = (case.answers[key] for key in "xty")
        answers = {"eval.output": model.eval()(x, t, y).sample}
        inputs.clear()
        answers["train.output"] = model.train()(x, t, y).sample
        for n, x_BND in inputs.items():
            router = getattr(model.blocks[n].mlp, "router", None)
            if case.kind != "diffmoe" or router is None:
                continue
            gate_TE = (x_BND @ router.weight.T).softmax(-1).flatten(0, 1)
            logits_BNE = router.predictor(x_BND)
            expert_capacity = max(1, int(len(gate_TE) / case.config.num_experts * case.config.capacity))
            best_CE = gate_TE.argsort(dim=0, descending=True)[:expert_capacity]
            selected_TE = torch.zeros_like(gate_TE).scatter_(0, best_CE, 1.0)
            kth_E = logits_BNE.sigmoid().flatten(0, 1).sort(dim=0, descending=True).values[expert_capacity - 1]
            answers[f"train.selected.{n}"] = selected_TE.view_as(logits_BNE)
            answers[f"train.capacity_logits.{n}"] = logits_BNE
            answers[f"train.threshold_after.{n}"] = 0.95 * router.threshold + 0.05 * kth_E
    return answers


def loss_of(case):
    """A training loss by its formula, with every gradient's norm."""
    model, x, y = golden_cases.model_of(case).train(), case.answers["x"], case.answers["y"]
    noise, C = torch.randn_like(x), x.shape[1]
    if case.kind == "jit":
        normal = torch.randn(len(x))
        t = torch.sigmoid(0.8 * normal - 0.8)
        t_B111 = t[:, None, None, None]
        z, gap = t_B111 * x + (1 - t_B111) * noise, (1 - t_B111).clamp_min(0.05)
        loss = (((model(z, t, y).sample - z) / gap - (x - z) / gap) ** 2).mean()
        answers = {"loss.noise": noise, "loss.normal_for_t": normal, "loss.value": loss.detach().view(1)}
        return answers | {"loss.grad_norms": norms(case, model, loss)}
    t = torch.rand(len(x))
    t_B111 = t[:, None, None, None]
    out = model(t_B111 * x + (1 - t_B111) * noise, t, y)
    mse_B = ((out.sample[:, :C] - (x - noise)) ** 2).mean((1, 2, 3))
    answers = {"rf.noise": noise, "rf.t": t, "rf.mse": mse_B.detach()}
    routers, loss = golden_cases.router_loss(out), mse_B.mean()
    told = loss + routers if case.kind == "diffmoe" else loss
    answers |= {"rf.loss": told.detach().view(1), "rf.grad_norms": norms(case, model, loss + routers)}
    return answers | ({"rf.capacity_loss": routers.detach().view(1)} if case.kind == "diffmoe" else {})


def norms(case, model, loss):
    """Of the gradient of every published parameter."""
    loss.backward()
    state = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    state |= {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    theirs = to_reference(case.layout, state)
    return torch.stack([theirs[name].norm() for name in case.about["grad_norm_names"]])


@torch.no_grad()
def sampled(case):
    """Equal steps of Euler, with guidance where there is a null class."""
    model, config = golden_cases.model_of(case).eval(), case.config
    z, y, steps = torch.randn(2, *case.answers["x"].shape[1:]), torch.tensor([0, 3]), 3
    answers = {"sample.z": z, "sample.y": y}
    for scale in ("1.0", "2.5") if config.null_class else ("1.0",):
        x = z
        for k in range(steps):
            t = torch.tensor(k / steps)
            parts = []
            for labels in (y, torch.full_like(y, config.num_classes))[: 2 if scale != "1.0" else 1]:
                out = model(x, t.expand(2), labels).sample[:, : config.in_channels]
                parts.append((out - x) / max(1 - k / steps, 0.05) if case.kind == "jit" else out)
            guided = parts[0] if len(parts) == 1 else parts[1] + float(scale) * (parts[0] - parts[1])
            x = x + guided / steps
        answers[f"sample.euler.cfg{scale}.steps{steps}"] = x
    return answers


def denoised(case):
    """DDPM's loss and two ancestral steps, through the library's own formulas, which recorded cases hold to account."""
    from diffusion_moe.diffusion.ddpm import ddpm_ancestral, ddpm_losses, linear_schedule, noised, respaced

    model, x, schedule = golden_cases.model_of(case).train(), case.answers["x"], linear_schedule(1000)
    noise, noises, labels = torch.randn_like(x), torch.randn(2, 2, *x.shape[1:]), torch.tensor([1, 2])
    step = torch.tensor([0, 10, 400, 900])
    with torch.no_grad():
        out = model(noised(schedule, x, noise, step), step, case.answers["y"])
        losses = ddpm_losses(out.sample, x, noise, step, schedule)
        loss = losses.mse.mean() + losses.vb.mean()
        loss = loss + golden_cases.router_loss(out) if case.kind == "diffmoe" else loss
        model.eval()
        last = ddpm_ancestral(
            lambda x, t: model(x, t, labels).sample, noises[0], respaced(schedule, 2), lambda k: noises[k]
        )
    answers = {"t": step, "noise": noise, "mse": losses.mse, "vb": losses.vb, "loss": loss.view(1)}
    answers |= {"sample.y": labels, "sample.z": noises[0], "sample.noises": noises, "sample.output": last}
    return {f"ddpm.{name}": tensor for name, tensor in answers.items()}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Records a case once."""
    folders = {}

    def folder_of(name):
        if name not in folders:
            torch.manual_seed(0)
            folders[name] = record(tmp_path_factory.mktemp("golden") / "case", *CASES[name])
        return folders[name]

    return folder_of


@pytest.mark.parametrize("name", CASES)
def test_every_check_passes(recorded, name):
    case, passed = golden_cases.load(recorded(name)), 0
    for check in CHECKS:
        try:
            check(case)
            passed += 1
        except pytest.skip.Exception:  # the case has no such answers
            pass
    experts = case.kind == "diffmoe" and any(key.startswith("train.selected") for key in case.answers)
    assert passed == (3 if "ddpm" in name else 4) + experts


def test_the_first_block_is_checked(recorded, tmp_path):
    """A wrong answer of block 0 alone fails; those of other blocks are right."""
    folder = recorded("diffmoe, experts in all blocks")
    answers = load_file(folder / "tensors.safetensors")
    assert "train.selected.0" in answers
    for key, wrong in (
        ("train.selected.0", answers["train.selected.0"].flip(0)),
        ("train.capacity_logits.0", answers["train.capacity_logits.1"].clone()),
        ("train.threshold_after.0", answers["train.threshold_after.0"] + 0.01),
    ):
        copy = tmp_path / key
        copy.mkdir()
        (copy / "case.json").write_text((folder / "case.json").read_text())
        save_file(answers | {key: wrong}, copy / "tensors.safetensors")
        with pytest.raises(AssertionError):
            golden_cases.check_selections_and_thresholds(golden_cases.load(copy))
