"""A sampler: built from a folder once, after all checks; its images are those of the pure functions."""

from dataclasses import replace

import pytest
import torch

from diffusion_moe import DiT
from diffusion_moe.config import EvaluationConfig
from diffusion_moe.sampling import sampler as module
from diffusion_moe.sampling.generate import SamplingStats, class_schedule, generate
from diffusion_moe.sampling.sampler import Sampler, load_sampler
from diffusion_moe.sampling.source import read_source

SETTINGS = EvaluationConfig(steps=2, batch_size=4, seed=3)


def test_images_and_metadata_of_a_run(run_folder):
    sampler, labels, stats = load_sampler(read_source(run_folder), SETTINGS), class_schedule(7, 10), SamplingStats()
    expected = generate(sampler.model, labels, 7, SETTINGS)
    assert torch.equal(sampler.images(7, labels), expected)
    assert torch.equal(torch.cat(list(sampler.batches(7, labels, first=4, stats=stats))), expected[4:])
    metadata = sampler.metadata(stats)
    known = {"weights": "ema", "training_steps": 40, "ema_decay": 0.995, "seed": 3, "function_evaluations": 2.0}
    assert {key: metadata[key] for key in known} == known
    other = replace(sampler, settings=replace(SETTINGS, seed=4))
    assert not torch.equal(other.images(7, labels), expected)
    assert sampler.image_size == (8, 8)


def test_a_model_in_memory_is_sampled_too(run_folder):
    source = read_source(run_folder)
    model = load_sampler(source).model
    images = Sampler(source, model, SETTINGS).images(5, class_schedule(5, 10))
    assert torch.equal(images, generate(model, class_schedule(5, 10), 5, SETTINGS))


def test_weights_are_read_after_all_checks(run_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "load_weights", None)
    source = read_source(run_folder)
    with pytest.raises(ValueError, match="solver is ddim, but the model's process is flow"):
        load_sampler(source, EvaluationConfig(solver="ddim"))
    with pytest.raises(ValueError, match=r"weights is 0\.7, but .* has no such EMA"):
        load_sampler(replace(source, weights="0.7"))
    size = {"sample_size": 2, "hidden_size": 8, "depth": 1, "num_heads": 1, "router": "dense", "in_channels": 4}
    DiT(num_classes=10, **size).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="generates latents of 4 channels and has no VAE to decode them"):
        load_sampler(read_source(tmp_path))


def test_stats_of_parts_add_up_to_those_of_the_whole(run_folder):
    sampler, labels = load_sampler(read_source(run_folder), SETTINGS), class_schedule(8, 10)
    whole, summed = SamplingStats(), SamplingStats()
    list(sampler.batches(8, labels, stats=whole))
    for first in (0, 4):
        part = SamplingStats()
        list(sampler.batches(first + 4, labels, first=first, stats=part))
        summed.add(part.totals())
    assert summed.totals() == whole.totals() and whole.dropped is None
