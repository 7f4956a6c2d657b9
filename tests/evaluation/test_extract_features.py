"""Extracting features: in parts, resumable, the same bit for bit."""

import pytest
import torch
from torch import nn

from diffusion_moe.evaluation import extract_features
from diffusion_moe.evaluation.features import Extractor, ExtractorIdentity
from diffusion_moe.evaluation.images import Images
from diffusion_moe.evaluation.metrics import FeatureSums
from diffusion_moe.log import ProgressLog


class Numbers(Images):
    """Images of random pixels; reading number `stop_at` fails, as a kill would end it."""

    name, size = "numbers", (4, 4)

    def __init__(self, count, stop_at=None):
        self.count, self.stop_at, self.read_numbers = count, stop_at, []
        self.pixels = torch.randint(0, 256, (count, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator())

    def read(self, numbers, batch_size, stats):
        for start in range(numbers.start, numbers.stop, batch_size):
            stop = min(start + batch_size, numbers.stop)
            if self.stop_at is not None and start <= self.stop_at < stop:
                raise KeyboardInterrupt
            self.read_numbers += range(start, stop)
            stats.batches += 1
            stats.evaluations += 7
            stats.served += 3
            stats.offered += 2
            yield self.pixels[start:stop]

    def identity(self):
        return {"count": self.count}


class Projection(Extractor):
    """Random linear features."""

    channels = 3
    identity = ExtractorIdentity("projection", "w", "none", "all")

    def __init__(self):
        self.module = nn.Linear(48, 6, bias=False)
        nn.init.normal_(self.module.weight, generator=torch.Generator().manual_seed(1))

    def extract(self, images):
        pool = self.module(images.flatten(1) / 255)
        return {"pool": pool, "spatial": pool[:, :2].sin(), "mean": images.float().mean((1, 2, 3))}


def run(images, folder, batch_size=8, log=lambda line: None):
    """The extracted features."""
    with extract_features.extract_features(images, Projection(), batch_size, folder, log) as features:
        return features


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(extract_features, "PART", 20)


def test_all_features_come_in_order_with_what_they_cost(tmp_path):
    images = Numbers(50)
    features = run(images, tmp_path)
    expected = Projection()(images.pixels)
    torch.testing.assert_close(features.pool_SD, expected["pool"])
    torch.testing.assert_close(features.others["mean"], images.pixels.float().mean((1, 2, 3)))
    moments = FeatureSums.of(expected["spatial"]).moments()
    torch.testing.assert_close(features.spatial.covariance_DD, moments.covariance_DD, rtol=1e-5, atol=1e-7)
    # Parts of 16 images are two batches of 8: 7 batches in all, the last one of 2 images.
    assert features.stats.summary() == {"function_evaluations": 7.0, "average_capacity": 1.5}
    assert features.stats.batches == 7
    assert list(tmp_path.iterdir()) == []


def test_interrupted_work_resumes_and_gives_the_same_features_bit_for_bit(tmp_path):
    whole = run(Numbers(50), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(Numbers(50, stop_at=40), tmp_path / "killed")
    (folder,) = (tmp_path / "killed").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == [
        "about.json",
        "part-00000000-00000016.safetensors",
        "part-00000016-00000032.safetensors",
    ]
    again, lines = Numbers(50), []
    features = run(again, tmp_path / "killed", log=lines.append)
    assert lines == ["resuming: 32 of 50 images are done"]
    assert again.read_numbers == list(range(32, 50))
    assert torch.equal(features.pool_SD, whole.pool_SD)
    assert torch.equal(features.spatial.mean_D, whole.spatial.mean_D)
    assert torch.equal(features.spatial.covariance_DD, whole.spatial.covariance_DD)
    assert torch.equal(features.others["mean"], whole.others["mean"])
    assert features.stats.summary() == whole.stats.summary()
    assert features.images_sha256 == whole.images_sha256


def test_parts_are_kept_until_the_result_is_saved(tmp_path):
    with (
        pytest.raises(OSError, match="disk full"),
        extract_features.extract_features(Numbers(20), Projection(), 8, tmp_path, print),
    ):
        raise OSError("disk full")
    again = Numbers(20)
    assert run(again, tmp_path) is not None
    assert again.read_numbers == []


def test_a_damaged_part_is_computed_again(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(Numbers(50, stop_at=40), tmp_path)
    first = next(tmp_path.rglob("part-00000000*"))
    first.write_bytes(first.read_bytes()[:-5])
    again = Numbers(50)
    features = run(again, tmp_path)
    assert again.read_numbers == [*range(16), *range(32, 50)]
    torch.testing.assert_close(features.pool_SD, Projection()(again.pixels)["pool"])


def test_other_work_has_other_parts(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(Numbers(50, stop_at=40), tmp_path)
    for images, batch_size in ((Numbers(51), 8), (Numbers(50), 4)):
        run(images, tmp_path, batch_size)
        assert len(images.read_numbers) == images.count
    assert len(list(tmp_path.iterdir())) == 1  # what was interrupted is still there


def test_images_of_another_size_than_said_are_refused(tmp_path):
    images = Numbers(3)
    images.size = (5, 4)
    with pytest.raises(ValueError, match=r"numbers gave images of \(4, 4\) pixels instead of \(5, 4\)"):
        run(images, tmp_path)


def test_progress_estimates_what_is_left(monkeypatch):
    now, lines = [100.0], []
    monkeypatch.setattr(extract_features.time, "monotonic", lambda: now[0])
    progress = ProgressLog(50_000, lines.append, 10_000, began=100.0, logged=100.0)
    for seconds, done in ((5, 10_100), (20, 12_000), (25, 13_000), (31, 11_550), (400, 50_000)):
        now[0] = 100.0 + seconds
        progress.update(done)
    # 100 images a second, 38,000 to come; then 50 a second, 38,450 to come; nothing about the end.
    assert lines == [
        "12000 of 50000 images; 100 a second; 6 min left",
        "11550 of 50000 images; 50 a second; 13 min left",
    ]
