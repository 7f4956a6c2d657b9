"""Sampling with fixed shapes, compiled, in bfloat16: the same images, and every drop accounted for."""

import dataclasses
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from diffusion_moe.config import EvaluationConfig
from diffusion_moe.models import DiT
from diffusion_moe.moe import backend, limit_capacity, routers_of
from diffusion_moe.sampling import acceleration
from diffusion_moe.sampling.generate import SamplingStats, class_schedule, generate, sampling_metadata
from diffusion_moe.sampling.options import SampleOptions
from diffusion_moe.sampling.prompts import encode_prompts
from diffusion_moe.sampling.sampler import load_sampler
from diffusion_moe.sampling.source import read_source
from diffusion_moe.text import TextFeatures

PARTS = [(10, 10), (20, 10), (24, 4)]
"""Number after the last image of each, and how many images there are."""
SETTINGS = EvaluationConfig(steps=2, solver="heun", guidance_interval=(0.0, 0.6))


def make_model(router, **options):
    model = DiT(
        sample_size=8, in_channels=1, hidden_size=32, depth=2, num_heads=2, num_classes=10, router=router,
        num_experts=4, expert_dim=16, **options,
    ).eval()  # fmt: skip
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    for router in routers_of(model):
        if hasattr(router, "threshold"):
            router.threshold.fill_(0.5)
    return model


def images_and_record(model, settings):
    stats = SamplingStats()
    return generate(model, class_schedule(6, 10), 6, settings, stats=stats), sampling_metadata(settings, stats)


@pytest.mark.parametrize("pool", ["image", "batch"])
def test_with_ample_room_nothing_changes(pool):
    model = make_model("diffmoe", inference_pool=pool)
    expected, record = images_and_record(model, SETTINGS)
    assert "dropped_share" not in record
    images, limited = images_and_record(model, dataclasses.replace(SETTINGS, capacity_limit=4.0))
    torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-5)
    assert limited["dropped_share"] == 0 and limited["average_capacity"] == record["average_capacity"]
    assert all(router.capacity_limit is None for router in routers_of(model))  # as it was


def test_without_room_choices_are_dropped_and_counted():
    model = make_model("diffmoe")
    expected, record = images_and_record(model, SETTINGS)
    images, limited = images_and_record(model, dataclasses.replace(SETTINGS, capacity_limit=0.5))
    assert limited["average_capacity"] == 0.5 < record["average_capacity"]
    assert 0 < limited["dropped_share"] < 1
    assert (images - expected).abs().max() > 1e-3


def test_a_limit_is_for_thresholds():
    with pytest.raises(ValueError, match=r"capacity_limit is 2\.0, but only diffmoe, .* need one"):
        images_and_record(make_model("dsmoe"), dataclasses.replace(SETTINGS, capacity_limit=2.0))
    with pytest.raises(ValueError, match="capacity_limit is -1; it must be positive"):
        limit_capacity(make_model("diffmoe"), -1)


@pytest.mark.parametrize(
    "router", ["dense", pytest.param("dsmoe", marks=pytest.mark.slow), pytest.param("diffmoe", marks=pytest.mark.slow)]
)
def test_compiled_blocks_draw_the_same_images(router, monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(DiT.compile_blocks, "__defaults__", ("aot_eager", True))
    limit = 3.0 if router == "diffmoe" else None
    model, settings = make_model(router), dataclasses.replace(SETTINGS, capacity_limit=limit)
    expected, _ = images_and_record(model, settings)
    images, _ = images_and_record(model, dataclasses.replace(settings, acceleration="compile"))
    torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_bfloat16_is_close_and_routes_in_float32():
    model = make_model("dsmoe")
    expected, _ = images_and_record(model, SETTINGS)
    images, record = images_and_record(model, dataclasses.replace(SETTINGS, precision="bf16"))
    assert record["dtype"] == "bf16" and images.dtype == torch.float32
    assert 1e-5 < (images - expected).norm() / expected.norm() < 0.05


def test_what_cannot_be_accelerated_says_why():
    model = make_model("diffmoe")
    with pytest.raises(ValueError, match="acceleration is graph, but the model is on cpu"):
        images_and_record(model, dataclasses.replace(SETTINGS, acceleration="graph", capacity_limit=2.0))
    with pytest.raises(ValueError, match="give it a capacity_limit"):
        images_and_record(model, dataclasses.replace(SETTINGS, acceleration="compile"))


class Graphs:
    """Stands in for CUDA's: what a capture saw is run again by each replay, in the place of the first answer."""

    def __init__(self, monkeypatch):
        self.captures = []
        monkeypatch.setattr(acceleration, "check_acceleration", lambda *_: None)
        monkeypatch.setattr(acceleration.Replayed, "_capture", lambda *arguments: self.capture(*arguments))

    def capture(self, replayed, inputs, options):
        self.captures.append(tuple(None if tensor is None else tuple(tensor.shape) for tensor in inputs))
        text = () if inputs[3] is None else (TextFeatures(*inputs[3:]),)
        output = replayed.network(*inputs[:3], *text, **options)

        def replay():
            again = replayed.network(*inputs[:3], *text, **options)
            output.sample.copy_(again.sample)
            for report, new in zip(output.routing, again.routing):
                report.counts_E.copy_(new.counts_E)
                if report.dropped is not None:
                    report.dropped.copy_(new.dropped)

        return acceleration._Captured(SimpleNamespace(replay=replay), inputs, output)


@pytest.mark.parametrize("run", ["run_folder", "shapes_run"])
def test_a_graph_is_captured_once_for_each_shape_of_all_parts(run, request, monkeypatch):
    """Parts of 10 images in batches of 5, the last of 4: two shapes with guidance, two without, for any prompts."""
    graphs, source = Graphs(monkeypatch), read_source(request.getfixturevalue(run))
    settings = dataclasses.replace(source.settings, batch_size=5, steps=2, guidance_interval=(0.0, 0.4))
    sampler, labels, prompts = load_sampler(source, settings), class_schedule(24, source.config.num_classes), None
    if source.config.text_dim:
        texts = ["a red square and a circle"[: 4 + i] for i in range(24)]
        prompts = encode_prompts(texts, SampleOptions(per_class=1), source, print)
        assert len(prompts.text.mask.sum(dim=1).unique()) > 2
    images, summaries = {}, {}
    for name in ("none", "graph"):
        chosen, stats = dataclasses.replace(settings, acceleration=name), SamplingStats()
        same = dataclasses.replace(sampler, settings=chosen)
        parts = [same.batches(stop, labels, prompts, first=stop - n, stats=stats) for stop, n in PARTS]
        images[name] = torch.cat([batch for part in parts for batch in part])
        summaries[name] = stats.summary()
    assert torch.equal(images["graph"], images["none"]) and summaries["graph"] == summaries["none"]
    assert [shapes[0][0] for shapes in graphs.captures] == [10, 5, 8, 4]
    if prompts is not None:
        assert {shapes[4] for shapes in graphs.captures} == {(n, 16) for n in (10, 5, 8, 4)}


@pytest.mark.parametrize(
    ("router", "precision", "capability", "kernels", "refused"),
    [
        ("dsmoe", "fp32", (9, 0), "auto", None),
        ("dsmoe", "bf16", (8, 9), "auto", None),
        ("dsmoe", "bf16", (9, 0), "torch", None),
        ("dsmoe", "fp32", (9, 0), "torch", "in fp32 wait for this device .*DIFFUSION_MOE_KERNELS is torch"),
        ("dsmoe", "bf16", (7, 5), "auto", r"in bf16 wait for this device .*not on 7\.5; .*8\.0 is needed"),
        ("ec", "fp32", (7, 5), "auto", None),
        ("dense", "fp32", (7, 5), "auto", None),
    ],
)
def test_a_graph_is_refused_only_where_no_kernel_can_serve_it(
    router, precision, capability, kernels, refused, monkeypatch
):
    monkeypatch.setattr(backend, "_has_triton", lambda: True)
    monkeypatch.setattr(backend, "_capability", lambda index: capability)
    config = make_model(router).settings
    settings = dataclasses.replace(SETTINGS, precision=precision, acceleration="graph")
    expectation = nullcontext() if refused is None else pytest.raises(ValueError, match=refused)
    with backend.use(kernels), expectation as error:
        acceleration.check_acceleration(config, settings, torch.device("cuda", 0))
    assert refused is None or ("\n" not in str(error.value) and "use acceleration compile or none" in str(error.value))


def test_other_thresholds_and_limits_need_another_graph(monkeypatch):
    """One network that is used with other settings answers with these."""
    graphs, model = Graphs(monkeypatch), make_model("diffmoe")
    settings = dataclasses.replace(SETTINGS, guidance_scale=1.0, capacity_limit=4.0, threshold_scale=0.9)
    network = acceleration.accelerated(model, dataclasses.replace(settings, acceleration="graph"))
    for change in ({}, {"capacity_limit": 0.5}, {"threshold_scale": 1.1}, {}):
        chosen = dataclasses.replace(settings, **change)
        expected = generate(model, class_schedule(6, 10), 6, chosen)
        images = generate(model, class_schedule(6, 10), 6, chosen, network=network)
        torch.testing.assert_close(images, expected)
    assert len(graphs.captures) == 3


def test_only_the_graphs_used_last_are_kept(monkeypatch):
    graphs, model = Graphs(monkeypatch), make_model("dense")
    replayed = acceleration.accelerated(model, dataclasses.replace(SETTINGS, acceleration="graph"))
    most = acceleration.MOST_GRAPHS

    def call(images):
        replayed(torch.zeros(images, 1, 8, 8), torch.tensor(0.5), torch.zeros(images, dtype=torch.long))

    for images in range(1, most + 1):
        call(images)
    call(1)  # used again, so the graph of 2 images is the oldest
    call(most + 1)
    assert len(graphs.captures) == most + 1 and len(replayed.captured) == most
    call(1)
    assert len(graphs.captures) == most + 1
    call(2)
    assert len(graphs.captures) == most + 2
