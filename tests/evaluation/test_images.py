"""Images from folders, arrays, data sets and models."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_moe.config import DataConfig, EvaluationConfig
from diffusion_moe.data import load_dataset
from diffusion_moe.evaluation.images import (
    DatasetImages,
    FolderImages,
    GeneratedImages,
    NpzImages,
    digest_of_all,
    digests_of,
    open_images,
)
from diffusion_moe.pixels import to_uint8
from diffusion_moe.sampling.generate import SamplingStats, generate
from diffusion_moe.sampling.sampler import load_sampler
from diffusion_moe.sampling.source import read_source


def random_pixels(*shape):
    """uint8."""
    return np.random.RandomState(0).randint(0, 256, shape, dtype=np.uint8)


def read(images, start, stop, batch_size=3):
    """As one tensor, NCHW."""
    return torch.cat(list(images.read(range(start, stop), batch_size, SamplingStats())))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("name", ["arr_0", "images"])
def test_arrays_are_read_in_ranges_without_being_loaded(tmp_path, save, name):
    pixels = random_pixels(11, 5, 4, 3)
    save(tmp_path / "x.npz", **{name: pixels, "labels": np.arange(11)})
    images = open_images(tmp_path / "x.npz")
    assert (images.count, images.size) == (11, (5, 4))
    np.testing.assert_array_equal(read(images, 4, 11).permute(0, 2, 3, 1), pixels[4:])
    assert [len(batch) for batch in images.read(range(0, 11), 4, SamplingStats())] == [4, 4, 3]


def test_grey_arrays_may_lack_the_channel(tmp_path):
    pixels = random_pixels(3, 5, 4)
    np.savez(tmp_path / "x.npz", images=pixels)
    np.testing.assert_array_equal(read(NpzImages(tmp_path / "x.npz"), 0, 3)[:, 0], pixels)


@pytest.mark.parametrize(
    ("arrays", "expected"),
    [
        ({"images": np.zeros((2, 4, 4, 3), np.float32)}, r"float32 \(2, 4, 4, 3\); images are uint8"),
        ({"images": np.zeros((2, 4, 4, 5), np.uint8)}, "images are uint8"),
        ({"arr_0": np.zeros((0, 4, 4, 3), np.uint8)}, "images are uint8"),
        ({"arr_0": np.asfortranarray(np.zeros((2, 4, 4, 3), np.uint8))}, "images are uint8"),
        ({"arr_0": np.array([{}], dtype=object)}, r"object \(1,\); images are uint8"),
        ({"x": np.zeros(3)}, "no array arr_0 or images"),
    ],
)
def test_other_arrays_are_one_line(tmp_path, arrays, expected):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(ValueError, match=expected):
        NpzImages(tmp_path / "x.npz")


def test_damaged_files_are_one_line(tmp_path):
    (tmp_path / "x.npz").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"cannot read .*x.npz"):
        NpzImages(tmp_path / "x.npz")
    np.savez(tmp_path / "y.npz", images=random_pixels(3, 4, 4, 3))
    content = (tmp_path / "y.npz").read_bytes()
    images = NpzImages(tmp_path / "y.npz")
    (tmp_path / "y.npz").write_bytes(content[:-60] + bytes(60))
    with pytest.raises(ValueError, match=r"cannot read .*y.npz"):
        read(images, 0, 3)


def test_folders_are_read_in_the_order_of_their_paths(tmp_path):
    pixels = random_pixels(4, 6, 5, 3)
    for image, name in zip(pixels, ["b/1.png", "a/2.png", "c.bmp", "a/1.png"]):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / ".hidden").mkdir()
    Image.fromarray(pixels[0]).save(tmp_path / ".hidden" / "0.png")
    images = open_images(tmp_path)
    assert (images.count, images.size) == (4, (6, 5))
    np.testing.assert_array_equal(read(images, 0, 4).permute(0, 2, 3, 1), pixels[[3, 1, 0, 2]])
    grey = FolderImages(tmp_path, channels=1)
    np.testing.assert_array_equal(read(grey, 0, 1)[0, 0], np.array(Image.fromarray(pixels[3]).convert("L")))
    assert read(FolderImages(tmp_path, image_size=3), 0, 4).shape == (4, 3, 3, 3)
    before = images.identity()
    Image.fromarray(pixels[1]).save(tmp_path / "b" / "1.png")
    assert FolderImages(tmp_path).identity() != before


def test_a_folder_of_several_sizes_without_images_or_with_a_broken_one_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="holds no images"):
        FolderImages(tmp_path)
    for name, size in (("1.png", (4, 4)), ("2.png", (4, 5))):
        Image.fromarray(random_pixels(*size, 3)).save(tmp_path / name)
    with pytest.raises(ValueError, match=r"2.png has 4 x 5 pixels, but .*1.png 4 x 4"):
        read(FolderImages(tmp_path), 0, 2)
    (tmp_path / "2.png").write_bytes((tmp_path / "1.png").read_bytes()[:50])
    with pytest.raises(ValueError, match=r"cannot read image .*2.png"):
        read(FolderImages(tmp_path), 0, 2)
    with pytest.raises(ValueError, match=r"is no folder and no .npz file"):
        open_images(tmp_path / "3.png")


def test_a_data_set_gives_its_pixels_back():
    dataset = load_dataset(DataConfig(), "test")
    images = DatasetImages(dataset, "digits")
    assert (images.count, images.size) == (len(dataset), (8, 8))
    torch.testing.assert_close(read(images, 5, 9), to_uint8(dataset.read_all().images[5:9]))
    assert torch.equal(read(DatasetImages(dataset, "digits", threads=2), 5, 40), read(images, 5, 40))


def test_statistics_of_a_data_set_need_every_image(tmp_path):
    for i, image in enumerate(random_pixels(4, 6, 6, 3)):
        (tmp_path / "a").mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / "a" / f"{i}.png")
    (tmp_path / "a" / "2.png").write_bytes(b"broken")
    config = DataConfig(kind="folder", path=str(tmp_path), image_size=6, on_corrupt="skip", test_fraction=0)
    images = DatasetImages(load_dataset(config, "train"), "photos")
    with pytest.raises(ValueError, match="1 of the images 0 to 2 of photos cannot be read"):
        read(images, 0, 4)


def test_generated_images_are_the_same_in_any_range(run_folder):
    settings = EvaluationConfig(num_samples=13, steps=2, batch_size=4)
    sampler = load_sampler(read_source(run_folder), settings)
    images = GeneratedImages(sampler)
    whole = to_uint8(generate(sampler.model, images.labels, 13, settings))
    stats = SamplingStats()
    parts = torch.cat([torch.cat(list(images.read(numbers, 4, stats))) for numbers in (range(0, 8), range(8, 13))])
    assert torch.equal(parts, whole)
    assert stats.summary()["function_evaluations"] == 2
    moved = replace(read_source(run_folder), path=run_folder.parent)
    assert images.identity() == GeneratedImages(load_sampler(moved, settings)).identity()
    other = replace(sampler, settings=replace(settings, seed=1))
    assert images.identity() != GeneratedImages(other).identity()


def test_a_digest_depends_on_every_pixel_and_on_no_batch():
    pixels = torch.from_numpy(random_pixels(9, 3, 4, 4))
    digests = torch.cat([digests_of(part) for part in pixels.split(4)])
    assert torch.equal(digests, digests_of(pixels))
    changed = pixels.clone()
    changed[8, 0, 0, 0] += 1
    assert digest_of_all(digests) != digest_of_all(digests_of(changed))
