"""Reading a latent cache whose numbers are known."""

import json
import pickle

import numpy as np
import pytest
import torch

from diffusion_moe.config import DataConfig
from diffusion_moe.data import batches_from, load_dataset, positions_of
from diffusion_moe.data.dataset import load_batches
from diffusion_moe.data.latent_space import LatentScaling, LatentSpace
from diffusion_moe.data.latents import CacheHeader, CachePlan, LatentShard, shard_path
from diffusion_moe.randomness import normal, uniform

IMAGES, SHARD, SHAPE = 11, 4, (3, 2, 2)
SHIFT, SCALE = 0.25, 0.5


def write_cache(folder, skipped=(5,), **changes):
    """A cache of random latents, and its array (images, views, parts, C, H, W); classes are 0, 1, 0, 1, ..."""
    store, flip = changes.get("store", "moments"), changes.get("flip", True)
    plan = CachePlan(
        space=LatentSpace("a-vae", "0" * 64, LatentScaling((SHIFT,), (SCALE,))),
        data={"path": "pictures", "sha256": "1" * 64},
        images=IMAGES,
        class_names=("cat", "dog"),
        image_size=16,
        latent_shape=SHAPE,
        store=store,
        flip=flip,
        seed=0,
        precision="fp32",
        shard_images=SHARD,
    )
    kept = [i for i in range(IMAGES) if i not in skipped]
    values = np.random.RandomState(0).uniform(0.1, 2, (len(kept), *plan.image_shape)).astype("<f2")
    (folder / "shards").mkdir(parents=True)
    shards = []
    for number in range(plan.shards):
        rows = [row for row, i in enumerate(kept) if i in plan.indices(number)]
        shard_path(folder, number).write_bytes(values[rows].tobytes())
        shards.append(LatentShard(len(rows), "2" * 64))
    header = CacheHeader(
        plan,
        labels=np.array([i % 2 for i in kept]),
        skipped=tuple((i, f"{i}.png") for i in skipped),
        channel_mean=(1.0, 2.0, 3.0),
        channel_std=(0.5, 1.0, 2.0),
        shards=tuple(shards),
    )
    (folder / "latents.json").write_text(json.dumps(header.to_dict()))
    return torch.from_numpy(values.astype(np.float32))


def config(folder, **changes):
    return DataConfig(kind="latents", path=str(folder), **({"test_fraction": 0.0} | changes))


def test_reading_gives_the_scaled_means_and_the_classes_in_order(tmp_path):
    values = write_cache(tmp_path)
    batch = load_dataset(config(tmp_path), "train").read_all()
    assert batch.images.dtype == torch.float32
    torch.testing.assert_close(batch.images, (values[:, 0, 0] - SHIFT) * SCALE)
    assert batch.labels.tolist() == [0, 1, 0, 1, 0, 0, 1, 0, 1, 0]


@pytest.mark.parametrize("skipped", [(), (4, 5, 6, 7), (0, 1, 2, 3), (8, 9, 10)])
def test_empty_and_short_shards_are_passed_over(tmp_path, skipped):
    values = write_cache(tmp_path, skipped)
    images = load_dataset(config(tmp_path), "train").read_all().images
    torch.testing.assert_close(images, (values[:, 0, 0] - SHIFT) * SCALE)


def test_a_sampled_latent_is_mean_plus_std_times_noise_of_seed_epoch_and_index(tmp_path):
    values, seed = write_cache(tmp_path), 3
    data = load_dataset(config(tmp_path, flip=True), "train", seed=seed)
    indices, epochs = torch.tensor([7, 0, 7, 9]), torch.tensor([0, 1, 1, 2])
    sampled = data.read_augmented(indices, epochs).images
    noise = normal(seed, "posterior", epochs, indices, SHAPE)
    view = (uniform(seed, "flip", epochs, indices) < 0.5).long()
    mean, std = values[indices, view].unbind(1)
    torch.testing.assert_close(sampled, (mean + std * noise - SHIFT) * SCALE, rtol=0, atol=1e-6)
    alone = data.read_augmented(indices[2:3], epochs[2:3]).images
    assert torch.equal(alone, sampled[2:3])


def test_both_views_are_sampled_and_without_flip_only_the_first(tmp_path):
    values = write_cache(tmp_path, store="samples")
    for flip, expected in ((True, {0, 1}), (False, {0})):
        data = load_dataset(config(tmp_path, flip=flip), "train")
        seen = set()
        for epoch in range(8):
            latent = data.read_augmented(torch.tensor([3]), torch.tensor([epoch])).images[0]
            seen |= {view for view in (0, 1) if torch.allclose(latent, (values[3, view, 0] - SHIFT) * SCALE)}
        assert seen == expected


def test_stored_samples_are_given_as_they_are(tmp_path):
    values = write_cache(tmp_path, store="samples", flip=False)
    data = load_dataset(config(tmp_path), "train")
    sampled = data.read_augmented(torch.arange(10), torch.arange(10)).images
    torch.testing.assert_close(sampled, (values[:, 0, 0] - SHIFT) * SCALE)


def test_channels_can_be_normalised_by_the_statistics_of_the_header(tmp_path):
    values = write_cache(tmp_path)
    data = load_dataset(config(tmp_path, normalize="channel"), "train")
    mean, std = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, 1.0, 2.0])
    torch.testing.assert_close(data.read_all().images, (values[:, 0, 0] - mean[:, None, None]) / std[:, None, None])
    space = LatentSpace.from_dict(data.metadata()["latent_space"])
    torch.testing.assert_close(space.scaling.unscaled(data.read_all().images), values[:, 0, 0])


def test_the_split_is_disjoint_and_by_class(tmp_path):
    write_cache(tmp_path)
    train, test = (load_dataset(config(tmp_path, test_fraction=0.4), split) for split in ("train", "test"))
    assert sorted([*train.selected, *test.selected]) == list(range(10))
    assert np.bincount(test.labels).tolist() == [2, 2]
    everything = load_dataset(config(tmp_path), "train").read_all().images
    assert torch.equal(test.read_all().images, everything[torch.from_numpy(test.selected)])


def batches(data, workers=0, positions=None):
    order = batches_from(0, 5, len(data), 8, seed=2, positions=positions)
    return list(load_batches(data, order, workers))


def test_batches_are_equal_for_any_number_of_workers_and_processes(tmp_path):
    write_cache(tmp_path)
    data = load_dataset(config(tmp_path, flip=True), "train", seed=4)
    alone = batches(data)
    for workers in (1, 2):
        for one, other in zip(alone, batches(data, workers), strict=True):
            assert torch.equal(one.images, other.images)
            assert torch.equal(one.labels, other.labels)
    for world in (2, 4):
        shares = [batches(data, positions=torch.cat(positions_of(8, 2, rank, world))) for rank in range(world)]
        for step, whole in enumerate(alone):
            images, labels, positions = (
                torch.cat([getattr(share[step], name) for share in shares])
                for name in ("images", "labels", "positions")
            )
            assert sorted(positions.tolist()) == list(range(8))
            assert torch.equal(images, whole.images[positions])
            assert torch.equal(labels, whole.labels[positions])


def test_another_process_gets_the_files_and_not_a_copy_of_them(tmp_path):
    write_cache(tmp_path)
    data = load_dataset(config(tmp_path), "train")
    before = len(pickle.dumps(data))
    expected = data.read_all().images
    assert len(pickle.dumps(data)) == before
    assert torch.equal(pickle.loads(pickle.dumps(data)).read_all().images, expected)


def change(**fields):
    def damage(folder):
        content = json.loads((folder / "latents.json").read_text())
        (folder / "latents.json").write_text(json.dumps(content | fields))

    return damage


def drop(name):
    def damage(folder):
        content = json.loads((folder / "latents.json").read_text())
        del content[name]
        (folder / "latents.json").write_text(json.dumps(content))

    return damage


DAMAGES = {
    "no header": (lambda folder: (folder / "latents.json").unlink(), "is no latent cache; make one with"),
    "not JSON": (lambda folder: (folder / "latents.json").write_text("{"), "cannot be read"),
    "another version": (change(version=2), "its version is 2, and this library reads 1"),
    "a field is missing": (drop("latent_shape"), "latent_shape"),
    "negative size": (change(latent_shape=[3, -2, 2]), "a size is not positive"),
    "unfinished": (drop("shards"), "is not finished; run the same `diffusion-moe encode` command again"),
    "count": (change(count=3), "it counts 3 images, 10 labels, 10 in shards"),
    "label out of range": (change(labels=[2] * 10), "a label is out of range"),
    "huge label": (change(labels=[2**80] * 10), "is damaged"),
    "statistics": (change(channel_mean=[0.0]), "another number of channels"),
    "shard missing": (lambda folder: shard_path(folder, 1).unlink(), "has 0 bytes, but should have"),
    "shard cut": (lambda folder: shard_path(folder, 2).write_bytes(b"xx"), "00002.f16 has 2 bytes"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_one_line(tmp_path, damage):
    write_cache(tmp_path)
    damage, expected = DAMAGES[damage]
    damage(tmp_path)
    with pytest.raises(ValueError, match=r".") as caught:
        load_dataset(config(tmp_path), "train")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_recipe_and_cache_disagree_on_is_one_line_with_the_remedy(tmp_path):
    write_cache(tmp_path, flip=False)
    with pytest.raises(ValueError, match=r"no mirrored images; encode with --flip true, or set data.flip to false"):
        load_dataset(config(tmp_path, flip=True), "train")
    with pytest.raises(ValueError, match=r"data\.path is missing.*make one with `diffusion-moe encode"):
        load_dataset(DataConfig(kind="latents"), "train")
    change(channel_std=[0.0, 1.0, 1.0])(tmp_path)
    with pytest.raises(ValueError, match=r"a channel of the latent cache .* is constant"):
        load_dataset(config(tmp_path, normalize="channel"), "train")
    with pytest.raises(ValueError, match=r"data\.normalize is channel, which is not supported for data\.kind digits"):
        DataConfig(normalize="channel")
