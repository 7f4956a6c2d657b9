"""Inception v3 of 2015 as torch-fidelity ported it: the features of FID, sFID and the Inception score.

torch-fidelity resizes as TensorFlow 1 did (bilinear, corners at the origin) and reads uint8, as ADM's evaluator does.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import barrier, is_main, to_device
from .features import HASH_DIGITS, INCEPTION, Extractor, ExtractorIdentity

PUBLISHED_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
"""SHA-256 of the weight file that both torch-fidelity and pytorch-fid publish."""
SPATIAL_CHANNELS = 7
POOL_WIDTH, SPATIAL_WIDTH = 2048, SPATIAL_CHANNELS * 17 * 17


class Inception(Extractor):
    """`pool` (S, 2048): the last average pool. `spatial` (S, 2023): seven channels of `mixed_6/conv`, rows first."""

    channels = 3

    def __init__(self, file: Path | None = None) -> None:
        module, download = _torch_fidelity()
        file = file or _downloaded(download)
        try:
            content = file.read_bytes()
        except OSError as error:
            raise ValueError(f"cannot read the Inception weights {file}: {error.strerror}") from error
        digest = hashlib.sha256(content).hexdigest()
        self.module = _load(module, content, file)
        self.published = digest == PUBLISHED_SHA256
        self.identity = ExtractorIdentity(
            INCEPTION, digest[:HASH_DIGITS], "bilinear as TensorFlow 1 to 299", "pool_3 and mixed_6/conv[:7]"
        )

    def extract(self, images: Tensor) -> dict[str, Tensor]:
        seen: list[Tensor] = []
        # The graph's mixed_6/conv is the 1x1 branch of the block that PyTorch's port names Mixed_6d.
        handle = self.module.Mixed_6d.branch1x1.register_forward_hook(lambda _, __, out: seen.append(out))  # type: ignore[union-attr, operator]
        try:
            (pool,) = self.module(images)
        finally:
            handle.remove()
        # TensorFlow's order: height, width, channel. Published statistics have it.
        return {"pool": pool, "spatial": seen[0][:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)}

    def logits(self, pool_SD: Tensor) -> Tensor:
        """Without the layer's bias, as ADM and torch-fidelity score."""
        weight: Any = self.module.fc.weight  # type: ignore[union-attr]
        return torch.cat([(to_device(part, weight.device) @ weight.T).cpu() for part in pool_SD.split(5000)])

    def warnings(self) -> list[str]:
        if self.published:
            return []
        return [
            f"the Inception weights {self.identity.weights} are not the published file (SHA-256 "
            f"{PUBLISHED_SHA256[:HASH_DIGITS]}): these numbers do not compare with published ones"
        ]


def _torch_fidelity() -> tuple[type[nn.Module], str]:
    """The module's class, and the address of its published weights."""
    name = "torch_fidelity.feature_extractor_inceptionv3"
    try:
        found = importlib.import_module(name)
    except (ImportError, RuntimeError, AttributeError) as error:  # a torchvision of another torch raises the latter two
        # The package fails over extractors that need torchvision; by then Inception, which does not, is imported.
        if sys.modules.get(name) is None:
            raise ValueError(
                f"Inception needs torch-fidelity ({error}); install it with `pip install diffusion-moe[eval]`"
            ) from error
        found = sys.modules[name]
    return found.FeatureExtractorInceptionV3, found.URL_INCEPTION_V3


def _downloaded(url: str) -> Path:
    """Path of the published file in torch's cache; one process downloads it if it is missing."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    if is_main() and not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=PUBLISHED_SHA256, progress=False)
        except (OSError, RuntimeError) as error:
            raise ValueError(f"cannot download {url} ({error}); give it with --inception FILE") from error
    barrier()
    return path


def _load(module: type[nn.Module], content: bytes, name: Path) -> nn.Module:
    """The network with the file's weights. torch-fidelity itself would unpickle whatever the file holds."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the error below says it better
            weights = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        safe = io.BytesIO()
        torch.save(weights, safe)
        safe.seek(0)
        return module("inception", ["2048"], feature_extractor_weights_path=safe)
    except Exception as error:  # pickle, zip, shapes and names: each has errors of its own
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{name} holds no weights of torch-fidelity's Inception: {reason}") from error
