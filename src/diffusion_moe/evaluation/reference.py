"""Statistics of real images in a file, and the check that generated images may be compared with them.

Our own `.npz` holds `mu`, `sigma` (and `mu_s`, `sigma_s` of spatial features) in float64 under the names ADM gave them,
`features` of some of the images for KID, precision and recall, `about` (JSON) and `sha256` over all of it. Published
files hold `mu` and `sigma`, ADM's also `mu_s`, `sigma_s` and images `arr_0`, but not what made them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..run_folder import replace_atomically
from .features import HASH_DIGITS, Extractor, ExtractorIdentity
from .inception import POOL_WIDTH, SPATIAL_WIDTH, Inception
from .metrics import Moments

FORMAT = 1
CLASSIFIER_PREFIX = "classifier."


@dataclass(frozen=True)
class Reference:
    """Statistics of real images."""

    name: str
    """File, or a description in its stead."""
    pool: Moments
    spatial: Moments | None = None
    features_RD: Tensor | None = None
    """Features of some of the images, float32: for KID, precision and recall."""
    extractor: ExtractorIdentity | None = None
    """None: the file does not name it."""
    about: dict[str, Any] = field(default_factory=dict)
    """num_images, image_size (height and width in pixels), data and other metadata of the file."""
    classifier: dict[str, Tensor] = field(default_factory=dict)
    """The weights of the classifier that made it, if one did."""
    sha256: str = ""
    """Start of the SHA-256 over the content."""
    images: Path | None = None
    """An `.npz` with images whose features are not extracted yet."""

    @property
    def published(self) -> bool:
        """True for statistics of another program."""
        return self.extractor is None

    def check(self, extractor: Extractor, image_size: tuple[int, int] | None) -> None:
        """Raise a ValueError for images of this size (None: not known yet) and extractor that do not compare."""
        if self.extractor is not None:
            extractor.identity.check(self.extractor, self.name)
        elif not isinstance(extractor, Inception) or not extractor.published:
            problem, *_ = extractor.warnings() or [f"the extractor is {extractor.identity.name}"]
            raise ValueError(
                f"{self.name} holds published Inception statistics, but {problem}; use the published weights of "
                "inception"
            )
        known: Any = self.about.get("image_size")
        if known is not None and image_size is not None and tuple(known) != image_size:
            raise ValueError(
                f"{self.name} was made of images of {known[0]} x {known[1]} pixels, but these have "
                f"{image_size[0]} x {image_size[1]}; compare images of one size"
            )

    def metadata(self) -> dict[str, Any]:
        """Name, hash and `about`, for a file of scores."""
        return {"name": self.name, "sha256": self.sha256, **self.about}

    def write(self, path: Path) -> Reference:
        """Write the statistics atomically; return them with their hash."""
        arrays = self._arrays()
        digest = _digest(arrays)
        with replace_atomically(path) as file:
            np.savez(file, **(arrays | {"sha256": np.array(digest)}))  # type: ignore[arg-type]
        return dataclasses.replace(self, sha256=digest[:HASH_DIGITS], name=str(path))

    def _arrays(self) -> dict[str, np.ndarray]:
        assert self.extractor is not None
        arrays = {"mu": self.pool.mean_D.numpy(), "sigma": self.pool.covariance_DD.numpy()}
        if self.spatial is not None:
            arrays |= {"mu_s": self.spatial.mean_D.numpy(), "sigma_s": self.spatial.covariance_DD.numpy()}
        if self.features_RD is not None:
            arrays["features"] = self.features_RD.numpy()
        arrays |= {CLASSIFIER_PREFIX + name: tensor.numpy() for name, tensor in self.classifier.items()}
        about = {"format": FORMAT, "extractor": dataclasses.asdict(self.extractor), **self.about}
        return arrays | {"about": np.array(json.dumps(about, sort_keys=True))}


def holds_statistics(path: Path) -> bool:
    """Recognise an `.npz` with mu and sigma."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {"mu.npy", "sigma.npy"} <= set(archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def read_reference(path: Path) -> Reference:
    """Statistics from a file of ours or a published one.

    Raises:
        ValueError: there is none, it is damaged, or it holds no statistics.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}; make one with `diffusion-moe stats DATA --output {path}`")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files if name != "arr_0"}
            has_images = "arr_0" in file.files
    except (OSError, ValueError, EOFError, KeyError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is no readable .npz of statistics ({error})") from error
    if not {"mu", "sigma"} <= arrays.keys():
        raise ValueError(
            f"{path} holds {', '.join(arrays) or 'images'}, but no mu and sigma; make statistics of it with "
            f"`diffusion-moe stats {path} --output FILE.npz`"
        )
    if "about" in arrays:
        return _ours(path, arrays)
    pool, spatial = _moments(path, arrays), _moments(path, arrays, "_s") if "mu_s" in arrays else None
    for moments, width in ((pool, POOL_WIDTH), (spatial, SPATIAL_WIDTH)):
        if moments is not None and len(moments.mean_D) != width:
            found = len(moments.mean_D)
            raise ValueError(f"{path} has {found} features; published statistics of Inception have {width}")
    about, digest = {"made_by": "not said in the file"}, _digest(arrays)[:HASH_DIGITS]
    return Reference(str(path), pool, spatial, about=about, sha256=digest, images=path if has_images else None)


def _ours(path: Path, arrays: dict[str, np.ndarray]) -> Reference:
    expected = str(arrays.pop("sha256", ""))
    if _digest(arrays) != expected:
        raise ValueError(f"{path} is damaged: its content does not have its SHA-256; run `diffusion-moe stats` again")
    try:
        about = json.loads(str(arrays["about"]))
        extractor = ExtractorIdentity(**about.pop("extractor"))
        version = about.pop("format")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} does not name its extractor ({error}); run `diffusion-moe stats` again") from error
    if version != FORMAT:
        raise ValueError(f"{path} has format {version}; this version reads {FORMAT}")
    pool, spatial = _moments(path, arrays), _moments(path, arrays, "_s") if "mu_s" in arrays else None
    features = torch.from_numpy(arrays["features"]) if "features" in arrays else None
    classifier = {
        name.removeprefix(CLASSIFIER_PREFIX): torch.from_numpy(array)
        for name, array in arrays.items()
        if name.startswith(CLASSIFIER_PREFIX)
    }
    return Reference(str(path), pool, spatial, features, extractor, about, classifier, expected[:HASH_DIGITS])


def _moments(path: Path, arrays: dict[str, np.ndarray], ending: str = "") -> Moments:
    """Moments of the pooled features; with the ending _s those of the spatial ones."""
    try:
        mean, covariance = (arrays[name + ending].astype(np.float64) for name in ("mu", "sigma"))
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path}: mu{ending} and sigma{ending} are not both there as numbers") from error
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise ValueError(
            f"{path}: mu{ending} is {mean.shape} and sigma{ending} {covariance.shape}; they do not fit together"
        )
    return Moments(torch.from_numpy(mean), torch.from_numpy(covariance))


def _digest(arrays: dict[str, np.ndarray]) -> str:
    """SHA-256 over names, dtypes and values."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
