"""Statistics in files: what they carry, and what may be compared with them."""

import dataclasses

import numpy as np
import pytest
import torch

from diffusion_moe.evaluation.features import ExtractorIdentity
from diffusion_moe.evaluation.metrics import FeatureSums, Moments
from diffusion_moe.evaluation.reference import Reference, holds_statistics, read_reference

IDENTITY = ExtractorIdentity("inception", "0123456789abcdef", "none", "all")


@pytest.fixture
def reference():
    x = torch.randn(30, 6)
    return Reference(
        "here",
        FeatureSums.of(x).moments(),
        FeatureSums.of(x[:, :2]).moments(),
        x[::3].contiguous(),
        IDENTITY,
        {"num_images": 30, "image_size": [4, 4], "data": {"path": "x"}},
        {"head.bias": torch.arange(3.0)},
    )


def equal(a, b):
    """Whether two values hold the same numbers."""
    if isinstance(a, Moments):
        return torch.equal(a.mean_D, b.mean_D) and torch.equal(a.covariance_DD, b.covariance_DD)
    if isinstance(a, dict) and a.keys() == b.keys():
        return all(equal(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_a_file_gives_everything_back(reference, tmp_path):
    written = reference.write(tmp_path / "x.npz")
    found = read_reference(tmp_path / "x.npz")
    for field in dataclasses.fields(Reference):
        assert equal(getattr(found, field.name), getattr(written, field.name)), field.name
    assert equal(found.pool, reference.pool)
    assert len(found.sha256) == 16
    assert reference.write(tmp_path / "again.npz").sha256 == found.sha256
    assert dataclasses.replace(reference, about={}).write(tmp_path / "other.npz").sha256 != found.sha256
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.npz", "other.npz", "x.npz"]


def test_a_changed_file_is_refused(reference, tmp_path):
    reference.write(tmp_path / "x.npz")
    with np.load(tmp_path / "x.npz") as file:
        arrays = dict(file)
    arrays["mu"] = arrays["mu"] + 1e-9
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(ValueError, match="is damaged: its content does not have its SHA-256"):
        read_reference(tmp_path / "x.npz")


def test_published_files_are_read(small_inception, tmp_path, pixels):
    mu, sigma = np.arange(6, dtype=np.float32), np.eye(6, dtype=np.float32)
    np.savez(tmp_path / "adm.npz", mu=mu, sigma=sigma, mu_s=mu[:2], sigma_s=sigma[:2, :2], arr_0=pixels)
    np.savez(tmp_path / "fid.npz", mu=mu, sigma=sigma)
    adm, fid = read_reference(tmp_path / "adm.npz"), read_reference(tmp_path / "fid.npz")
    assert adm.published and adm.images == tmp_path / "adm.npz"
    assert torch.equal(adm.pool.mean_D, torch.arange(6, dtype=torch.float64))
    assert torch.equal(adm.spatial.covariance_DD, torch.eye(2, dtype=torch.float64))
    assert (fid.spatial, fid.images, fid.features_RD) == (None, None, None)
    assert holds_statistics(tmp_path / "fid.npz")
    adm.check(small_inception(), (4, 4))
    with pytest.raises(ValueError, match=r"holds published .*, but the Inception weights .* use the published"):
        adm.check(small_inception(published=False), (4, 4))
    other = small_inception()
    other.__class__ = type("Other", (small_inception.__mro__[2],), {"extract": None})
    with pytest.raises(ValueError, match="holds published Inception statistics, but the extractor is inception; use"):
        adm.check(other, (4, 4))


def test_only_like_is_compared_with_like(reference, small_inception):
    reference.check(small_inception(), (4, 4))
    for changed, expected in (
        ({"weights": "f" * 16}, "here was made by inception with weights ffff.* read by inception with weights 0123"),
        (
            {"resize": "bicubic to 224"},
            "with resizing bicubic to 224, but .* with resizing none",
        ),
        ({"feature": "mean"}, "with features mean"),
    ):
        mixed = dataclasses.replace(reference, extractor=dataclasses.replace(IDENTITY, **changed))
        with pytest.raises(ValueError, match=expected):
            mixed.check(small_inception(), (4, 4))
    with pytest.raises(ValueError, match="of images of 4 x 4 pixels, but these have 8 x 4; compare images of one size"):
        reference.check(small_inception(), (8, 4))


@pytest.mark.parametrize(
    ("arrays", "expected"),
    [
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, r"mu is \(3,\) and sigma \(4, 4\); they do not fit together"),
        ({"mu": np.zeros(3), "sigma": np.eye(3)}, "has 3 features; published statistics of Inception have 2048"),
        ({"images": np.zeros(3)}, "holds images, but no mu and sigma; make statistics of it with"),
        ({"mu": np.array(["a"]), "sigma": np.eye(1)}, "are not both there as numbers"),
        ({"mu": np.zeros(3), "sigma": np.eye(3), "about": np.array("{}")}, "is damaged"),
        ({"mu": np.array([print], dtype=object), "sigma": np.eye(1)}, "is no readable .npz of statistics"),
    ],
)
def test_other_files_are_one_line(tmp_path, arrays, expected):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(ValueError, match=expected) as error:
        read_reference(tmp_path / "x.npz")
    assert "\n" not in str(error.value)


def test_missing_and_broken_files_are_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"there is no file .*x.npz; make one with `diffusion-moe stats DATA"):
        read_reference(tmp_path / "x.npz")
    (tmp_path / "x.npz").write_bytes(b"PK nothing")
    with pytest.raises(ValueError, match=r"is no readable .npz of statistics"):
        read_reference(tmp_path / "x.npz")
    assert not holds_statistics(tmp_path / "x.npz")
