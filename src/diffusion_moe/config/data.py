"""Settings of the data set."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from .fields import BELOW_ONE, NOT_NEGATIVE, POSITIVE, Settings, setting

FolderClasses = Literal["top", "leaf", "none"]
"""Folders of a folder of images that are its classes."""
ShapesLayout = Literal["free", "grid"]
"""Positions of the objects in scenes of coloured shapes."""
IMAGE_FILES = ("folder", "huggingface", "webdataset")
"""Values of data.kind whose images are files to decode."""


@dataclass(frozen=True)
class DataConfig(Settings):
    """The data set."""

    kind: Literal["digits", "shapes", "folder", "huggingface", "webdataset", "latents"] = setting("digits", common=True)
    """digits: scikit-learn's 1,797 handwritten digits; shapes: 100,000 rendered scenes of coloured shapes with
    captions; folder: a folder of images, with classes (see data.classes) or captions in metadata.jsonl; huggingface: a
    data set of the hub or one saved on the disk; webdataset: tars; latents: a cache that `encode` wrote."""
    path: str | None = setting(None, common=True, encode=False)
    """Folder (kind: folder, latents), or a tar or a folder of tars (webdataset). For huggingface a hub id, a folder
    that save_to_disk made, a folder of parquet files, or one parquet file."""
    made_by: str | None = setting(None, change="always", encode=False, kinds=("folder",))
    """Command that makes the folder, for the message where it is missing (kind: folder)."""
    classes: FolderClasses | None = setting(None, kinds=("folder",))
    """top: every folder at the top is a class, with all images below it; leaf: every innermost folder is one, named by
    its path; none: no classes; null: top, or none with data.caption_column (kind: folder). Folders train and val (or
    test) at the top that hold the same classes are the training and the held-out split."""
    split: str = setting("train", kinds=("huggingface",))
    """Split to train on, as the data set names it; also a part, as train[:10%] (kind: huggingface)."""
    subset: str | None = setting(None, kinds=("huggingface",))
    """Configuration of a data set that has several (kind: huggingface)."""
    revision: str | None = setting(None, kinds=("huggingface",))
    """Branch, tag or commit of a hub id (kind: huggingface)."""
    image_column: str = setting("image", kinds=("huggingface",))
    """Column of the images (kind: huggingface)."""
    label_column: str | None = setting("label", kinds=("huggingface",))
    """Column of the classes: names, or numbers with or without names; null: no classes (kind: huggingface)."""
    caption_column: str | None = setting(None, encode=False, kinds=IMAGE_FILES)
    """Captions, a text or a list of texts an image: column (kind: huggingface), key of metadata.jsonl (folder), or txt
    or a key of the json files (webdataset); null: none."""
    text_encoder: str | None = setting(None, encode=False)
    """Hub id or folder of the text encoder for the captions, which are encoded once in memory; null: captions are not
    read, or (kind: latents) are in the cache."""
    text_length: int = setting(77, encode=False, valid=POSITIVE)
    """Maximum number of tokens of a caption (text_encoder)."""
    text_precision: Literal["fp32", "bf16"] = setting("fp32", encode=False)
    """Precision of the text encoder (text_encoder)."""
    image_size: int = setting(8, common=True, valid=POSITIVE)
    """Height and width that images are resized and center-cropped to, in pixels (kind: folder, huggingface,
    webdataset), or that shapes are rendered at (kind: shapes)."""
    buckets: tuple[str, ...] = setting((), encode=False, kinds=IMAGE_FILES)
    """Sizes HEIGHTxWIDTH in pixels, instead of image_size: each image is resized and cropped to the one of the nearest
    aspect ratio, and a batch has one size (kind: folder, huggingface, webdataset)."""
    shapes_layout: ShapesLayout = setting("free", kinds=("shapes",))
    """free: shapes anywhere; grid: each at one of nine positions, which is learned faster (kind: shapes)."""
    channels: Literal[1, 3] = setting(1, encode=False)
    """1 for grey, 3 for colour (kind: folder, huggingface, webdataset, shapes)."""
    background: str = setting("white", kinds=IMAGE_FILES)
    """Colour under transparent images, a name or #rrggbb (kind: folder, huggingface, webdataset)."""
    normalize: Literal["scaling", "channel"] = setting("scaling", encode=False, kinds=("latents",))
    """scaling: as the VAE's config says; channel: each channel to mean 0 and standard deviation 1 by the cache's
    statistics (kind: latents)."""
    flip: bool = setting(False, common=True, encode=False)
    """Mirror half of the training images left to right."""
    on_corrupt: Literal["error", "skip"] = setting("error", change="always")
    """Handling of an unreadable image: end the run with its name, or count it, list it and use the next one instead (in
    a latent cache: omit it)."""
    test_fraction: float = setting(0.2, encode=False, valid=BELOW_ONE)
    """Share of each class held out from training; the split is the same for every seed."""
    num_workers: int = setting(0, change="always", common=True, valid=NOT_NEGATIVE)
    """Processes that load images; the batches are the same for any number."""

    def __post_init__(self) -> None:
        # Latents need it too, but their recipes cannot know it.
        if self.kind in IMAGE_FILES and self.path is None:
            raise ValueError(f"data.path is missing; data.kind {self.kind} needs it")
        for field in fields(self):
            if field.metadata["kinds"] and self.kind not in field.metadata["kinds"]:
                self.require_default(field.name, f"which is not supported for data.kind {self.kind}")
        if self.kind == "latents":
            self.require_default("text_encoder", "but data.kind latents has encoded captions")
        for text in self.buckets:
            height, _, width = text.partition("x")
            if not (height.isdecimal() and width.isdecimal() and int(height) * int(width) > 0):
                raise ValueError(f"data.buckets holds {text!r}; give sizes such as 256x384")
        super().__post_init__()

    @property
    def bucket_sizes(self) -> tuple[tuple[int, int], ...]:
        """Height and width of each bucket."""
        pairs = [text.split("x") for text in self.buckets]
        return tuple((int(height), int(width)) for height, width in pairs)
