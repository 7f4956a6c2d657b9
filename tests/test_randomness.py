"""Philox against its published answers, and draws that depend on their sample alone."""

import math

import pytest
import torch

from diffusion_moe.randomness import derive_seed, normal, philox4x32, uniform, uniforms

# Random123, kat_vectors, philox4x32 10.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_known_answers(counter, key, expected):
    words = philox4x32(tuple(torch.tensor([word]) for word in counter), key)
    assert tuple(int(word) for word in words) == expected


def test_philox_is_elementwise():
    counters = torch.tensor([counter for counter, _, _ in KNOWN])
    together = torch.stack(philox4x32(tuple(counters.T), (1, 2)), dim=1)
    alone = [torch.cat(philox4x32(tuple(row[:, None]), (1, 2))) for row in counters]
    assert torch.equal(together, torch.stack(alone))


def draw_normal(seed=0, stream="noise", step=3, samples=range(20), shape=(2, 5)):
    return normal(seed, stream, step, torch.tensor(list(samples)), shape)


def draw_uniform(seed=0, stream="noise", step=3, samples=range(20)):
    return uniform(seed, stream, step, torch.tensor(list(samples)))


def draw_uniforms(seed=0, stream="noise", step=3, samples=range(20), count=7):
    return uniforms(seed, stream, step, torch.tensor(list(samples)), count)


@pytest.mark.parametrize("draw", [draw_normal, draw_uniform, draw_uniforms])
def test_a_row_depends_on_its_sample_alone(draw):
    everything = draw()
    for samples in ([7], [19, 0, 7], [7, 7], list(reversed(range(20)))):
        assert torch.equal(draw(samples=samples), everything[samples])


@pytest.mark.parametrize("draw", [draw_normal, draw_uniform, draw_uniforms])
def test_seed_stream_step_and_sample_each_change_every_row(draw):
    base = draw()
    others = [draw(seed=1), draw(stream="time"), draw(step=4), draw(samples=range(20, 40))]
    others.append(draw(samples=[s + 2**32 for s in range(20)]))
    for other in others:
        assert torch.all(other != base)
    assert len(torch.unique(base)) == base.numel()


def test_a_longer_row_begins_with_the_shorter_one():
    assert torch.equal(draw_normal(shape=(7,)), draw_normal(shape=(12,))[:, :7])
    assert torch.equal(draw_normal(shape=(3, 4)).flatten(1), draw_normal(shape=(12,)))


def test_many_uniform_numbers_begin_with_the_single_one():
    assert torch.equal(draw_uniforms()[:, 0], draw_uniform())
    assert torch.equal(draw_uniforms(count=18)[:, :7], draw_uniforms())


def kolmogorov_smirnov(values: torch.Tensor, cdf) -> float:
    """Largest distance of the empirical distribution from `cdf`, times root of the count; above 1.95 once in 1000."""
    ordered, n = cdf(values.double().sort().values), len(values)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    return float(torch.maximum((ordered - steps[:-1]).abs().max(), (ordered - steps[1:]).abs().max())) * n**0.5


N = 100_000


def test_uniform_numbers_are_uniform_and_strictly_inside():
    x = uniform(0, "time", 0, torch.arange(N))
    assert x.dtype == torch.float32 and x.min() > 0 and x.max() < 1
    assert float(x.double().mean()) == pytest.approx(0.5, abs=4 * (1 / 12 / N) ** 0.5)
    assert float(x.double().var()) == pytest.approx(1 / 12, abs=4 * (1 / 180 / N) ** 0.5)
    assert kolmogorov_smirnov(x, lambda v: v) < 1.95


def test_uniform_numbers_of_one_sample_are_uniform_too():
    x = uniforms(0, "places", 0, torch.arange(N // 100), 100)
    assert x.shape == (N // 100, 100)
    assert kolmogorov_smirnov(x.flatten(), lambda v: v) < 1.95
    assert kolmogorov_smirnov(x[0], lambda v: v) < 1.95


@pytest.mark.parametrize("shape", [(1,), (1000,)], ids=["over samples", "within samples"])
def test_normal_numbers_are_normal(shape):
    x = normal(0, "noise", 0, torch.arange(N // math.prod(shape)), shape).flatten().double()
    assert float(x.mean()) == pytest.approx(0, abs=4 / N**0.5)
    assert float(x.var()) == pytest.approx(1, abs=4 * (2 / N) ** 0.5)
    assert float((x**3).mean()) == pytest.approx(0, abs=4 * (15 / N) ** 0.5)
    assert float((x**4).mean()) == pytest.approx(3, abs=4 * (96 / N) ** 0.5)
    assert kolmogorov_smirnov(x, lambda v: torch.special.ndtr(v)) < 1.95
    assert abs(float((x[:-1] * x[1:]).mean())) < 4 / N**0.5


def test_the_extreme_words_stay_inside_the_open_interval():
    """The largest and smallest word of 32 bits, as float32."""
    from diffusion_moe.randomness import _open_unit

    low, high = _open_unit(torch.tensor([0, 0xFFFFFFFF])).float().tolist()
    assert (low, high) == (2.0**-24, 1 - 2.0**-24)


def test_derived_seeds_differ_and_are_stable():
    """The values are part of the format: a run of yesterday continues with them."""
    seeds = {derive_seed(s, stream, i) for s in range(3) for stream in ("a", "b") for i in range(3)}
    assert len(seeds) == 18 and all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(0, "noise") == 9144587515262914129


def test_a_step_for_each_sample_is_the_same_as_one_step_at_a_time():
    steps, samples = torch.tensor([4, 9, 4]), torch.tensor([1, 1, 7])
    each = torch.cat([normal(3, "x", int(t), i[None], (5,)) for t, i in zip(steps, samples, strict=True)])
    assert torch.equal(normal(3, "x", steps, samples, (5,)), each)
