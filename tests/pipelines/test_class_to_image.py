"""The pipeline against hand-written samplers: guidance, labels, noise, latents, callbacks."""

import dataclasses
import inspect

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import nn

from diffusion_moe import ClassToImagePipeline, DiT, JiT, TextToImagePipeline, default_scheduler
from diffusion_moe.diffusion import ddpm
from diffusion_moe.diffusion.guidance import inside
from diffusion_moe.diffusion.solvers import even_times
from diffusion_moe.moe import routers_of
from diffusion_moe.pipelines.denoising import Request

SMALL = {
    "sample_size": 8, "patch_size": 2, "in_channels": 3, "num_classes": 5, "hidden_size": 32, "depth": 2,
    "num_heads": 4, "router": "dsmoe", "num_experts": 4, "expert_dim": 16,
}  # fmt: skip
JIT = {"prediction": "x", "bottleneck_dim": 8, "class_tokens": 2, "norm": "rmsnorm"}
DDPM = {"process": "ddpm", "prediction": "epsilon", "learn_sigma": True, "in_channels": 4}
NAMES = {0: "tench, Tinca tinca", 1: "goldfish", 2: "crane", 3: "golden retriever", 4: "crane"}


def make_model(kind=DiT, **settings):
    """A small model in eval mode whose layers that start at zero have random weights."""
    torch.manual_seed(0)
    model = kind(**{**SMALL, **settings}).eval()
    for name, p in model.named_parameters():
        if not p.any():
            nn.init.normal_(p, std=0.1)
        elif "router" in name:
            nn.init.normal_(p)
    for router in routers_of(model):
        for buffer in router.buffers():
            nn.init.uniform_(buffer, 0.3, 0.5)
    return model


def make_pipe(model=None, scheduler=None, **options):
    model = model or make_model()
    pipe = ClassToImagePipeline(model, scheduler or default_scheduler(model.settings), **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_vae(latent_channels=4, **options):
    torch.manual_seed(2)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    sizes = {"block_out_channels": [8, 8], "norm_num_groups": 4, "latent_channels": latent_channels}
    return AutoencoderKL(**blocks, **sizes, **options).eval()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def noise_like(model, count, seed=0):
    config = model.settings
    return torch.randn(count, config.in_channels, config.sample_size, config.sample_size, generator=seeded(seed))


def sample(pipe, *args, **kwargs):
    return pipe(*args, output_type="latent", **kwargs).images


def guided_by_hand(model, x, t, labels, scale, channels):
    """uncond + scale * (cond - uncond) in the first channels, cond in the others."""
    cond, uncond = (model(x, t, y).sample for y in (labels, torch.full_like(labels, model.null_class)))
    out = cond.clone()
    out[:, :channels] = (uncond + scale * (cond - uncond))[:, :channels]
    return out


def euler_by_hand(model, x, labels, steps, scale=1.0, interval=(0.0, 1.0), channels=3):
    """Equal Euler steps of the velocity, from t = 0 to 1."""
    config = model.settings
    with torch.no_grad():
        for i in range(steps):
            t = torch.tensor(i / steps)
            inside = (interval[0] == 0 or i / steps > interval[0]) and (interval[1] == 1 or i / steps < interval[1])
            answer = guided_by_hand(model, x, t, labels, scale if inside else 1.0, channels)[:, : config.in_channels]
            if config.prediction == "x":
                answer = (answer - x) / max(1 - i / steps, config.min_gap)
            x = x + answer / steps
    return x


@pytest.mark.parametrize("settings", [{}, {"learn_sigma": True}, {"router": "diffmoe"}, {"noise_scale": 2.0}], ids=str)
@pytest.mark.parametrize(
    "guidance",
    [
        {},
        {"guidance_scale": 3.0},
        {"guidance_scale": 0.5, "guidance_channels": 2},
        {"guidance_scale": 3.0, "guidance_interval": (0.25, 0.75)},
    ],
    ids=str,
)
def test_flow_euler_is_eulers_method(settings, guidance):
    model = make_model(**settings)
    noise, labels = noise_like(model, 3), torch.tensor([0, 4, 2])
    scale, interval, channels = (
        guidance.get(f"guidance_{name}", default)
        for name, default in (("scale", 1.0), ("interval", (0.0, 1.0)), ("channels", 3))
    )
    expected = euler_by_hand(model, noise * model.settings.noise_scale, labels, 8, scale, interval, channels)
    actual = sample(make_pipe(model), [0, 4, 2], num_inference_steps=8, latents=noise, **guidance)
    assert expected.std() > 0.3
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_guidance_changes_the_image():
    model = make_model()
    noise = noise_like(model, 1)
    plain, guided = (
        sample(make_pipe(model), 3, guidance_scale=s, num_inference_steps=4, latents=noise) for s in (1, 4)
    )
    assert (plain - guided).abs().max() > 0.05


def test_jit_predicts_the_image_and_divides_by_the_gap():
    """With 40 steps the last two have 1 - t below min_gap: without the clamp they would go further."""
    model = make_model(JiT, **JIT, min_gap=0.06)
    noise, labels = noise_like(model, 2), torch.tensor([1, 3])
    expected = euler_by_hand(model, noise, labels, 40, scale=2.0)
    actual = sample(make_pipe(model), [1, 3], num_inference_steps=40, guidance_scale=2.0, latents=noise)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    model.settings = type(model.settings)(backbone="jit", **{**SMALL, **JIT}, min_gap=1e-3)
    assert (euler_by_hand(model, noise, labels, 40, scale=2.0) - actual).abs().max() > 1e-3


@pytest.mark.parametrize("guidance", [(1.0, None), (2.0, None), (2.0, 3)], ids=str)
def test_ddim_is_ddim(guidance):
    """DDIM eq. 12, from step 999 on, every 100th; the learned variance is left out."""
    model, (scale, channels) = make_model(**DDPM), guidance
    alpha_bars = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    noise, labels = noise_like(model, 2), torch.tensor([0, 4])
    x = noise
    with torch.no_grad():
        for step in range(999, 0, -100):
            before = alpha_bars[step - 100] if step >= 100 else torch.tensor(1.0, dtype=torch.float64)
            epsilon = guided_by_hand(model, x, torch.tensor(step), labels, scale, channels or 4)[:, :4].double()
            data = (x - (1 - alpha_bars[step]).sqrt() * epsilon) / alpha_bars[step].sqrt()
            x = (before.sqrt() * data + (1 - before).sqrt() * epsilon).float()
    options = {"guidance_scale": scale, "guidance_channels": channels}
    actual = sample(make_pipe(model), [0, 4], num_inference_steps=10, latents=noise, **options)
    torch.testing.assert_close(actual, x, rtol=1e-4, atol=1e-4)


def test_ddpm_scheduler_takes_the_learned_variance():
    """Against the library's own ancestral sampling, on the steps 900, 800, ..., 0 and with the same noise."""
    model = make_model(**DDPM)
    scheduler = DDPMScheduler(variance_type="learned_range", clip_sample=False)
    actual = sample(make_pipe(model, scheduler), [0, 4], num_inference_steps=10, generator=seeded(5))
    numbers = torch.arange(0, 1000, 100)
    alpha_bars = ddpm.linear_schedule().alpha_bars_S[numbers]
    betas = 1 - alpha_bars / torch.cat((torch.ones(1, dtype=torch.float64), alpha_bars[:-1]))
    generator, labels = seeded(5), torch.tensor([0, 4])
    start = torch.randn(2, 4, 8, 8, generator=generator)
    with torch.no_grad():
        expected = ddpm.ddpm_ancestral(
            lambda x, number: model(x, number, labels).sample,
            start,
            ddpm.Schedule(betas, numbers),
            lambda sample: torch.randn(2, 4, 8, 8, generator=generator),
        )
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["flow", "ddim", "ddpm"])
def test_with_a_generator_each_an_image_does_not_depend_on_its_batch(name):
    model = make_model() if name == "flow" else make_model(**DDPM)
    scheduler = DDPMScheduler(variance_type="learned_range", clip_sample=False) if name == "ddpm" else None
    pipe = make_pipe(model, scheduler)
    options = {"num_inference_steps": 5, "guidance_scale": 2.0}
    together = sample(pipe, [0, 3, 1], generator=[seeded(s) for s in (10, 11, 12)], **options)
    alone = sample(pipe, 3, generator=seeded(11), **options)
    # Relative to the image: ddpm divides the last bits of the noisiest step by 0.01.
    assert (together[1] - alone[0]).norm() / alone.norm() < 1e-4
    assert (together[0] - alone[0]).norm() / alone.norm() > 0.1


def test_where_routing_pools_the_batch_guidance_runs_two_batches():
    """Else each image's answer would depend on the other half's class."""
    model = make_model(router="diffmoe", inference_pool="batch")
    noise, labels, sizes = noise_like(model, 3), torch.tensor([0, 4, 2]), []
    model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    actual = sample(make_pipe(model), [0, 4, 2], num_inference_steps=4, latents=noise, guidance_scale=3.0)
    assert sizes == [3] * 8
    expected = euler_by_hand(model, noise, labels, 4, 3.0)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_batches_are_doubled_inside_the_interval_only():
    model, sizes = make_model(), []
    model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    pipe = make_pipe(model)
    # t = 0, 1/4, 1/2, 3/4; the ends of the interval are not inside, but 0 is where it starts there.
    sample(pipe, [0, 1], num_inference_steps=4, guidance_scale=2.0, guidance_interval=(0.25, 0.75))
    sample(pipe, [0, 1], num_inference_steps=4, guidance_scale=2.0, guidance_interval=(0.0, 0.5))
    sample(pipe, [0, 1], num_inference_steps=4)
    assert sizes == [2, 2, 4, 2] + [4, 4, 2, 2] + [2] * 4


@pytest.mark.parametrize("steps", [10, 20, 50, 100])
def test_ends_of_the_interval_are_met_as_by_equal_times(steps):
    model, guided = make_model(), []
    model.register_forward_pre_hook(lambda module, args: guided.append(len(args[0]) == 2))
    sample(make_pipe(model), 0, num_inference_steps=steps, guidance_scale=2.0, guidance_interval=(0.1, 0.9))
    assert guided == [inside(t, (0.1, 0.9)) for t in even_times(steps)[:-1]]
    assert sum(guided) == steps * 8 // 10 - 1


def test_labels_by_name_and_number():
    pipe = make_pipe(id2label={str(number): name for number, name in NAMES.items()})
    assert pipe.get_label_ids(["tench", 3, "Tinca tinca", "golden retriever", np.int64(1)]) == [0, 3, 0, 3, 1]
    assert pipe.get_label_ids("goldfish") == pipe.get_label_ids(1) == pipe.get_label_ids(torch.tensor(1)) == [1]
    noise = noise_like(pipe.transformer, 4)
    by_name = sample(pipe, ["goldfish", 3], num_images_per_label=2, num_inference_steps=2, latents=noise)
    by_number = sample(pipe, [1, 1, 3, 3], num_inference_steps=2, latents=noise)
    assert torch.equal(by_name, by_number)


def test_an_integer_is_a_number_and_a_text_a_name_first():
    pipe = make_pipe(id2label={0: "0", 1: "1", 2: "10", 3: "11", 4: "2"})
    assert pipe.get_label_ids([2, np.int64(4), "10", "#2", "name:2", "3", "1"]) == [2, 4, 2, 2, 4, 3, 1]
    with pytest.raises(
        ValueError, match="'2' is the name of class 4 and the number of another; give #2 for the number"
    ):
        pipe("2")


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("golden retreiver", "there is no class 'golden retreiver'; did you mean golden retriever"),
        ("crane", "'crane' is the name of classes 2, 4; give one as #2"),
        (5, "class 5 is out of range; the model has classes 0 to 4"),
        (-1, "class -1 is out of range"),
        ([], "class_labels is empty"),
        (None, "the model has classes; give class_labels"),
    ],
    ids=str,
)
def test_labels_that_do_not_exist(label, message):
    with pytest.raises(ValueError, match=message):
        make_pipe(id2label=NAMES)(label)
    with pytest.raises(ValueError, match=r"no id2label.*; give a number from 0 to 4"):
        make_pipe()("tench")
    with pytest.raises(ValueError, match="class 7 is out of range"):
        make_pipe(id2label={7: "tench"})("tench")


def test_unconditional_model():
    pipe = make_pipe(make_model(num_classes=0))
    assert sample(pipe, num_images=3, num_inference_steps=2).shape == (3, 3, 8, 8)
    for options in ({"class_labels": [1]}, {"num_images": 2, "num_images_per_label": 2}):
        with pytest.raises(ValueError, match="the model is unconditional; give num_images"):
            pipe(**options)
    with pytest.raises(ValueError, match=r"guidance_scale is 2\.0, but the model has no null class"):
        pipe(num_images=1, guidance_scale=2.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_interval": (0.5, 0.5)}, r"guidance_interval is \(0\.5, 0\.5\)"),
        ({"guidance_channels": 4}, "guidance_channels is 4; the model has 1 to 3"),
        ({"num_images": 2}, "instead of num_images"),
        ({"num_images_per_label": 0}, "must be positive"),
        ({"generator": [torch.Generator()] * 3}, "list of 3 for 1 images"),
        ({"latents": torch.zeros(2, 3, 8, 8)}, r"shape \(2, 3, 8, 8\); the images asked for need \(1, 3, 8, 8\)"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0; it must be positive"),
        ({"output_type": "jpg"}, "output_type is 'jpg'; choose one of pil, np, pt, latent"),
        ({"threshold_scale": 0.5}, "routers have thresholds"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "callbacks are given latents, not noise"),
    ],
    ids=lambda value: ", ".join(value),  # of options their names
)
def test_arguments_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        make_pipe()(1, **options)


def test_guidance_that_the_model_cannot_give():
    with pytest.raises(ValueError, match="no null class"):
        make_pipe(make_model(null_class=False))(1, guidance_scale=2.0)
    with pytest.raises(ValueError, match="not supported for models of process ddpm"):
        make_pipe(make_model(**DDPM))(1, guidance_scale=2.0, guidance_interval=(0.0, 0.5), output_type="latent")


def test_output_types():
    pipe, options = make_pipe(), {"num_inference_steps": 2, "latents": noise_like(make_model(), 2)}
    x = sample(pipe, [0, 1], **options)
    expected = (x / 2 + 0.5).clamp(0, 1)
    tensors, arrays, pictures = (pipe([0, 1], **options, output_type=o).images for o in ("pt", "np", "pil"))
    assert torch.equal(tensors, expected)
    assert np.array_equal(arrays, expected.permute(0, 2, 3, 1).numpy())
    assert np.array_equal(np.stack(pictures), (arrays * 255).round().astype("uint8"))
    (tuple_images,) = pipe([0, 1], **options, output_type="pt", return_dict=False)
    assert torch.equal(tuple_images, expected)
    grey = make_pipe(make_model(in_channels=1))(0, num_inference_steps=2).images[0]
    assert (grey.mode, grey.size) == ("L", (8, 8))


@pytest.mark.parametrize("shift", [None, 0.25])
def test_latents_are_decoded_by_the_vae(shift):
    vae = make_vae(scaling_factor=0.5, shift_factor=shift)
    model = make_model(in_channels=4)
    pipe = make_pipe(model, vae=vae)
    options = {"num_inference_steps": 3, "latents": noise_like(model, 2)}
    latents = sample(pipe, [0, 1], **options)
    with torch.no_grad():
        expected = (vae.decode(latents / 0.5 + (shift or 0)).sample / 2 + 0.5).clamp(0, 1)
    images = pipe([0, 1], **options, output_type="pt").images
    assert images.shape == (2, 3, 16, 16) and images.std() > 0.01
    torch.testing.assert_close(images, expected)


def test_a_latent_model_without_vae_says_what_to_do():
    pipe = make_pipe(make_model(in_channels=4))
    assert sample(pipe, 0, num_inference_steps=2).shape == (1, 4, 8, 8)
    with pytest.raises(ValueError, match="needs a vae, as the model generates latents; give one"):
        pipe(0, num_inference_steps=2)
    pipe.register_modules(vae=make_vae())
    assert pipe(0, num_inference_steps=2).images[0].size == (16, 16)
    with pytest.raises(ValueError, match="the vae has 4 latent channels, but the transformer 3"):
        make_pipe(vae=make_vae())
    pipe.register_modules(vae=make_vae(latent_channels=3))
    with pytest.raises(ValueError, match="the vae has 3 latent channels, but the transformer 4"):
        pipe(0)
    three = make_pipe(vae=make_vae(latent_channels=3))
    assert three(0, num_inference_steps=2).images[0].size == (16, 16), "three channels and a vae: latents"


def test_callbacks_see_every_step_change_latents_and_interrupt():
    model, seen = make_model(), []
    pipe, noise = make_pipe(model), noise_like(model, 1)

    def look(pipe, i, step, tensors):
        seen.append((i, float(step), tensors["latents"]))
        return {}

    plain = sample(pipe, 2, num_inference_steps=4, latents=noise, callback_on_step_end=look)
    assert [(i, step) for i, step, _ in seen] == [(0, 1000.0), (1, 750.0), (2, 500.0), (3, 250.0)]
    assert torch.equal(seen[-1][2], plain)

    zero = sample(
        pipe, 2, num_inference_steps=4, latents=noise,
        callback_on_step_end=lambda pipe, i, step, tensors: {"latents": 0 * tensors["latents"]} if i == 3 else {},
    )  # fmt: skip
    assert torch.all(zero == 0)

    def stop(pipe, i, step, tensors):
        pipe._interrupt = i == 1
        return {}

    stopped = sample(pipe, 2, num_inference_steps=4, latents=noise, callback_on_step_end=stop)
    assert torch.equal(stopped, seen[1][2])


def test_a_training_model_samples_in_eval_mode_and_trains_on():
    model = make_model(router="diffmoe", dropout=0.5, depth=4)
    noise = noise_like(model, 2)
    expected = sample(make_pipe(model), [0, 1], num_inference_steps=2, latents=noise)
    actual = sample(make_pipe(model.train()), [0, 1], num_inference_steps=2, latents=noise)
    assert torch.equal(actual, expected) and all(module.training for module in model.modules())


def test_threshold_scale_sets_the_compute_and_is_undone():
    model, counts = make_model(router="diffmoe"), []
    router = routers_of(model)[0]
    router.register_forward_hook(lambda module, args, routing: counts.append(int(routing.report.counts_E.sum())))
    pipe, noise = make_pipe(model), noise_like(model, 2)
    for scale in (0.5, 1.0, 2.0):
        sample(pipe, [0, 1], num_inference_steps=1, latents=noise, threshold_scale=scale)
    assert counts[0] > counts[1] > counts[2]
    assert router.threshold_scale == 1.0

    def fail(*args):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        sample(pipe, 0, num_inference_steps=1, threshold_scale=0.5, callback_on_step_end=fail)
    assert router.threshold_scale == 1.0


def test_a_bfloat16_model_is_close_to_float32():
    """All experts are chosen, so rounding cannot reroute; the latents stay in float32."""
    model = make_model(top_k=4)
    options = {"num_inference_steps": 6, "guidance_scale": 2.0, "latents": noise_like(model, 2)}
    expected = sample(make_pipe(model), [0, 1], **options)
    actual = sample(make_pipe(model.to(torch.bfloat16)), [0, 1], **options)
    assert actual.dtype == torch.float32
    assert 0 < (actual - expected).norm() / expected.norm() < 0.03


def test_progress_and_the_number_of_evaluations(capsys):
    pipe = make_pipe(scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))
    pipe.set_progress_bar_config(disable=False)
    sample(pipe, 0, num_inference_steps=7)
    assert "7/7" in capsys.readouterr().err
    # Esser et al., arXiv 2403.03206, eq. 23: the shift of equal steps.
    even = torch.linspace(1, 1 / 7, 7)
    torch.testing.assert_close(pipe.scheduler.sigmas[:-1], 3 * even / (1 + 2 * even))


def test_a_scheduler_set_later_is_checked_when_called():
    pipe = make_pipe()
    pipe.scheduler = DDIMScheduler()
    with pytest.raises(ValueError, match="DDIMScheduler does not fit"):
        pipe(0)


@pytest.mark.parametrize(("kind", "guidance_scale"), [(ClassToImagePipeline, 1.0), (TextToImagePipeline, 4.0)])
def test_help_shows_and_explains_every_option(kind, guidance_scale):
    parameters = inspect.signature(kind.__call__).parameters
    shared = {field.name: field.default for field in dataclasses.fields(Request)} | {"guidance_scale": guidance_scale}
    assert {name: parameters[name].default for name in shared} == shared
    assert not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    assert all(f"    {name}: " in kind.__call__.__doc__ for name in parameters if name != "self")


def test_unknown_options_and_options_by_position_are_refused():
    pipe = make_pipe()
    with pytest.raises(TypeError, match="unexpected keyword argument 'steps'"):
        pipe([1], steps=3)
    with pytest.raises(TypeError, match="positional"):
        pipe([1], 3)
