"""Digits and folders of images."""

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_moe.config import DataConfig
from diffusion_moe.data import batches_from, load_dataset, positions_of
from diffusion_moe.data.dataset import load_batches
from diffusion_moe.data.order import SampledImage


@pytest.fixture
def folder(tmp_path):
    """Two classes of six images; the red channel of image i is 20 i + 10, its left half darker by 10."""
    for name, green in (("cat", 0), ("dog", 255)):
        (tmp_path / name).mkdir()
        for i in range(6):
            pixels = np.zeros((20, 30, 3), dtype=np.uint8)
            pixels[..., 0], pixels[..., 1] = 20 * i + 10, green
            pixels[:, :15, 0] -= 10
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    return tmp_path


def config(path, **changes):
    return DataConfig(kind="folder", path=str(path), image_size=16, channels=3, **changes)


def test_digits_split_is_fixed_disjoint_and_stratified():
    train, test = load_dataset(DataConfig(), "train"), load_dataset(DataConfig(), "test", seed=9)
    assert (len(train), len(test)) == (1438, 359)
    assert np.bincount(test.labels).min() >= 34
    images = torch.cat([train.read_all().images, test.read_all().images]).flatten(1)
    assert images.amin() == -1
    assert images.amax() == 1
    # The digits hold no exact duplicates, so a common image would show as a smaller set.
    assert len(torch.unique(images, dim=0)) == 1797


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    digits, train = load_digits(), load_dataset(DataConfig(test_fraction=0), "train")
    np.testing.assert_allclose((train.read_all().images[:, 0].numpy() + 1) * 8, digits.images)
    np.testing.assert_array_equal(train.labels, digits.target)


def test_folder_gives_classes_by_sub_folder_and_pixels_in_range(folder):
    data = load_dataset(config(folder, test_fraction=0), "train")
    batch = data.read_all()
    assert data.class_names == ["cat", "dog"]
    assert batch.labels.tolist() == [0] * 6 + [1] * 6
    assert batch.images.shape == (12, 3, 16, 16)
    red = (batch.images[:, 0, :, -1].mean(1) + 1) * 127.5
    torch.testing.assert_close(red, torch.tensor([20.0 * i + 10 for i in range(6)] * 2))
    assert batch.images[:6, 1].unique().tolist() == [-1]
    assert batch.images[6:, 1].unique().tolist() == [1]


def test_grey_images_have_one_channel(folder):
    data = load_dataset(DataConfig(kind="folder", path=str(folder), image_size=8, channels=1), "train")
    assert data.read([0]).images.shape == (1, 1, 8, 8)


def test_an_unreadable_image_is_named(folder):
    (folder / "cat" / "3.png").write_bytes(b"not an image")
    data = load_dataset(config(folder, test_fraction=0), "train")
    with pytest.raises(ValueError, match=r"cat/3\.png.*data\.on_corrupt"):
        data.read_all()


def test_an_unreadable_image_is_skipped_and_counted(folder):
    file = folder / "cat" / "3.png"
    file.write_bytes(file.read_bytes()[:60])
    batch = load_dataset(config(folder, test_fraction=0, on_corrupt="skip"), "train").read_all()
    assert batch.skipped == 1
    assert list(batch.skipped_names) == [str(file)]
    torch.testing.assert_close(batch.images[3], batch.images[4])


def test_a_folder_without_a_readable_image_is_an_error(folder):
    for file in folder.glob("*/*.png"):
        file.write_bytes(b"")
    data = load_dataset(config(folder, on_corrupt="skip"), "train")
    with pytest.raises(ValueError, match="no image under"):
        data.read([0])


@pytest.mark.parametrize("break_it", ["missing", "file", "empty"])
def test_a_wrong_path_is_one_clear_line(tmp_path, break_it):
    path = tmp_path / "images"
    if break_it == "file":
        path.write_text("x")
    elif break_it == "empty":
        path.mkdir()
    with pytest.raises(ValueError, match=r"data\.path") as caught:
        load_dataset(config(path), "train")
    assert "\n" not in str(caught.value)


def batches(data, steps, workers, start=0):
    order = batches_from(start, steps, len(data), 5, seed=2)
    return list(load_batches(data, order, workers))


def test_batches_and_flips_are_equal_for_any_worker_count_and_after_resuming(folder):
    data = load_dataset(config(folder, flip=True, test_fraction=0), "train", seed=4)
    alone, spread, resumed = batches(data, 7, 0), batches(data, 7, 2), batches(data, 7, 0, start=3)
    for one, other in zip(alone, spread, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)
    for one, other in zip(alone[3:], resumed, strict=True):
        assert torch.equal(one.images, other.images)


def test_ranks_load_their_part_of_each_batch(folder):
    data = load_dataset(config(folder, flip=True, test_fraction=0), "train", seed=4)
    whole = list(batches_from(0, 5, len(data), 6, seed=2))
    for rank in range(3):
        positions = torch.cat(positions_of(6, 1, rank, 3))
        shares = batches_from(0, 5, len(data), 6, seed=2, positions=positions)
        for batch, share in zip(whole, shares, strict=True):
            expected, part = data.__getitems__(batch), data.__getitems__(share)
            assert torch.equal(part.positions, positions)
            assert torch.equal(part.images, expected.images[positions])
            assert torch.equal(part.labels, expected.labels[positions])


def test_about_half_of_the_images_are_flipped_and_others_each_epoch():
    data = load_dataset(DataConfig(flip=True), "train", seed=4)
    plain = load_dataset(DataConfig(), "train").read_all().images
    epochs = []
    for epoch in range(2):
        augmented = data.__getitems__([SampledImage(image, epoch) for image in range(len(data))]).images
        same, mirrored = (augmented == plain).flatten(1).all(1), (augmented == plain.flip(-1)).flatten(1).all(1)
        assert bool((same | mirrored).all())
        assert mirrored.float().mean().item() == pytest.approx(0.5, abs=0.05)
        epochs.append(mirrored)
    assert not torch.equal(*epochs)
