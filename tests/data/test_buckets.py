"""Images of several sizes: which size an image gets, what is cropped, and the order of their batches."""

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_moe.config import DataConfig
from diffusion_moe.data import Segment, batches_from, load_dataset, positions_of
from diffusion_moe.data.decoding import cover_and_crop
from diffusion_moe.data.image_files import nearest_bucket

SIZES = [(8, 8), (4, 12), (12, 4)]


@pytest.mark.parametrize(
    ("height", "width", "expected"), [(10, 10, 0), (9, 10, 0), (10, 40, 1), (100, 30, 2), (2, 3, 0), (10, 18, 1)]
)
def test_the_nearest_aspect_ratio(height, width, expected):
    assert nearest_bucket(height, width, SIZES) == expected


def test_the_centre_of_the_smallest_image_that_covers():
    columns = np.tile(np.arange(12, dtype=np.uint8) * 20, (4, 1))
    cropped = np.array(cover_and_crop(Image.fromarray(columns), 4, 6))
    assert np.array_equal(cropped, columns[:, 3:9])


BUCKETS = np.array([0] * 30 + [1] * 20 + [2] * 10)


def stream(step, last, **changes):
    options = {"size": 60, "batch_size": 8, "seed": 3, "buckets": BUCKETS} | changes
    return list(batches_from(step, last, **options))


def test_batches_are_of_one_bucket_and_every_image_comes_once_an_epoch():
    batches = stream(0, 400)
    assert all(len({int(BUCKETS[sample.image]) for sample in batch}) == 1 for batch in batches)
    samples = [sample for batch in batches for sample in batch]
    for bucket in range(3):
        images = np.flatnonzero(bucket == BUCKETS).tolist()
        own = [sample for sample in samples if sample.image in images]
        for epoch in range(own[-1].epoch):
            assert sorted(sample.image for sample in own if sample.epoch == epoch) == images
        assert len(own) / len(samples) == pytest.approx(len(images) / 60, abs=0.06)
    assert stream(0, 400, seed=4) != batches


def test_the_order_is_a_function_of_the_step_for_any_number_of_processes():
    whole = stream(0, 30)
    assert stream(17, 30) == whole[17:]
    assert stream(0, 50)[:30] == whole
    parts = [stream(0, 30, positions=positions_of(8, 1, rank, 2)[0]) for rank in range(2)]
    assert [a + b for a, b in zip(*parts)] == whole


def test_batches_of_another_size_continue_the_stream_of_each_bucket():
    segments = [Segment(0, 8), Segment(20, 6), Segment(90, 16)]
    whole, plain = stream(0, 200, batch_size=segments), stream(0, 200)
    assert whole[:20] == plain[:20] and [len(batch) for batch in whole[19:21] + whole[89:91]] == [8, 6, 6, 16]
    for bucket in range(3):
        images = np.flatnonzero(bucket == BUCKETS).tolist()
        own = [sample[:2] for batch in whole for sample in batch if sample.image in images]
        expected = [sample[:2] for batch in stream(0, 1000) for sample in batch if sample.image in images]
        assert own == expected[: len(own)]
    assert stream(57, 200, batch_size=segments) == whole[57:]


@pytest.fixture
def pictures(tmp_path):
    """Six wide and six high pictures of a grey level each."""
    (tmp_path / "pictures" / "all").mkdir(parents=True)
    for i in range(12):
        size = (10, 30) if i % 2 else (30, 10)
        Image.fromarray(np.full(size, 20 * i, dtype=np.uint8)).save(tmp_path / "pictures" / "all" / f"{i:02d}.png")
    return tmp_path / "pictures"


def config(path, **changes):
    return DataConfig(kind="folder", path=str(path), test_fraction=0.0, buckets=("4x12", "12x4"), **changes)


def test_images_take_the_size_of_their_bucket(pictures):
    data = load_dataset(config(pictures), "train")
    assert data.buckets.tolist() == [1 - i % 2 for i in range(12)]
    assert data.read([1, 3]).images.shape == (2, 1, 4, 12) and data.read([0, 4]).images.shape == (2, 1, 12, 4)
    torch.testing.assert_close(data.read([1, 3]).images[1], torch.full((1, 4, 12), 60 / 127.5 - 1))
    with pytest.raises(ValueError, match="several sizes, which cannot be one batch"):
        data.read([0, 1])


def test_a_replacement_of_an_unreadable_image_takes_its_size(pictures):
    (pictures / "all" / "03.png").write_bytes(b"broken")
    data = load_dataset(config(pictures, on_corrupt="skip"), "train")
    assert data.buckets[3] == 0 and data.read([1, 3]).images.shape == (2, 1, 4, 12)


def test_sizes_that_are_none():
    with pytest.raises(ValueError, match=r"data\.buckets holds '8'; give sizes such as 256x384"):
        DataConfig(kind="folder", path="a", buckets=("8",))
    with pytest.raises(ValueError, match=r"data\.buckets is 8x8, which is not supported for data\.kind digits"):
        DataConfig(buckets=("8x8",))
