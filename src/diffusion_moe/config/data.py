"""Settings of the data set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .require import require

FolderClasses = Literal["top", "leaf", "none"]
"""Which folders of a folder of images are its classes."""


ShapesLayout = Literal["free", "grid"]
"""Where scenes of coloured shapes have their objects."""


_OF_FILES = ("folder", "huggingface", "webdataset")
"""Values of data.kind whose images are files to decode."""


_OF_ONE_KIND = {
    "classes": "folder",
    **dict.fromkeys(("split", "subset", "revision", "image_column", "label_column"), "huggingface"),
    "normalize": "latents",
    "shapes_layout": "shapes",
}
"""Fields of `DataConfig` that one kind alone reads."""


@dataclass(frozen=True)
class DataConfig:
    """The images."""

    kind: Literal["digits", "shapes", "folder", "huggingface", "webdataset", "latents"] = "digits"
    """digits: scikit-learn's 1,797 handwritten digits; shapes: 100,000 drawn scenes of coloured shapes with captions;
    folder: a folder of images, with classes (see classes) or captions in metadata.jsonl; huggingface: a data set of
    the hub or one saved on the disk; webdataset: tars; latents: a cache that `diffusion-moe encode` wrote."""
    path: str | None = None
    """The folder (kind: folder, latents), or a tar or a folder of tars (webdataset). For huggingface a hub id, a folder
    that save_to_disk made, a folder of parquet files, or one parquet file."""
    classes: FolderClasses | None = None
    """top: every folder at the top is a class, with all images below it; leaf: every innermost folder is one, named by
    its path; none: no classes; null: top, or none with data.caption_column (kind: folder). Folders train and val (or
    test) at the top that hold the same classes are the training and the held-out split."""
    split: str = "train"
    """Split to train on, as the data set names it; also a part, as train[:10%] (kind: huggingface)."""
    subset: str | None = None
    """Configuration of a data set that has several (kind: huggingface)."""
    revision: str | None = None
    """Branch, tag or commit of a hub id (kind: huggingface)."""
    image_column: str = "image"
    """Column of the images (kind: huggingface)."""
    label_column: str | None = "label"
    """Column of the classes: names, or numbers with or without names; null: no classes (kind: huggingface)."""
    caption_column: str | None = None
    """Captions, a text or a list of texts an image: column (kind: huggingface), key of metadata.jsonl (folder), or txt
    or a key of the json files (webdataset); null: none."""
    text_encoder: str | None = None
    """Hub id or folder of the text encoder for the captions, which are encoded once in memory; null: captions are not
    read, or (kind: latents) are in the cache."""
    text_length: int = 77
    """Tokens that captions are cut to (text_encoder)."""
    text_precision: Literal["fp32", "bf16"] = "fp32"
    """What the text encoder computes in (text_encoder)."""
    image_size: int = 8
    """Height and width that images are resized and center-cropped to, in pixels (kind: folder, huggingface,
    webdataset), or that shapes are drawn at (kind: shapes)."""
    buckets: tuple[str, ...] = ()
    """Sizes HEIGHTxWIDTH in pixels, in place of image_size: each image is resized and cropped to the one of the nearest
    aspect ratio, and a batch is of one size (kind: folder, huggingface, webdataset)."""
    shapes_layout: ShapesLayout = "free"
    """free: shapes anywhere; grid: each at one of nine places, which is learned faster (kind: shapes)."""
    channels: Literal[1, 3] = 1
    """1 for grey, 3 for colour (kind: folder, huggingface, webdataset, shapes)."""
    background: str = "white"
    """Colour under transparent images, a name or #rrggbb (kind: folder, huggingface, webdataset)."""
    normalize: Literal["scaling", "channel"] = "scaling"
    """scaling: as the VAE's config says; channel: each channel to mean 0 and standard deviation 1 by the cache's
    statistics (kind: latents)."""
    flip: bool = False
    """Mirror half of the training images left to right."""
    on_corrupt: Literal["error", "skip"] = "error"
    """An unreadable image ends the run with its name, or is counted, listed and replaced by the next one
    (in a latent cache: left out)."""
    test_fraction: float = 0.2
    """Share of each class held out from training; the split is the same for every seed."""
    num_workers: int = 0
    """Processes that load images; the batches are the same for any number."""

    def __post_init__(self) -> None:
        # Latents need it too, but their recipes cannot know it.
        require(
            self.kind not in _OF_FILES or self.path is not None, f"data.path is missing; data.kind {self.kind} needs it"
        )
        of_kinds: dict[str, tuple[str, ...]] = {name: (kind,) for name, kind in _OF_ONE_KIND.items()}
        of_kinds |= dict.fromkeys(("caption_column", "background", "buckets"), _OF_FILES)
        for name, kinds in of_kinds.items():
            value, usual = getattr(self, name), type(self).__dataclass_fields__[name].default
            shown = ", ".join(value) if isinstance(value, tuple) else value
            require(
                self.kind in kinds or value == usual,
                f"data.{name} is {shown}, but data.kind {self.kind} has no use for it; leave it out",
            )
        require(
            self.text_encoder is None or self.kind != "latents",
            f"data.text_encoder is {self.text_encoder}, but data.kind latents has its captions encoded; leave it out",
        )
        for text in self.buckets:
            height, _, width = text.partition("x")
            require(
                height.isdecimal() and width.isdecimal() and int(height) * int(width) > 0,
                f"data.buckets holds {text!r}; give sizes such as 256x384",
            )
        require(self.text_length > 0, f"data.text_length is {self.text_length}; it must be positive")
        require(self.image_size > 0, f"data.image_size is {self.image_size}; it must be positive")
        require(0 <= self.test_fraction < 1, f"data.test_fraction is {self.test_fraction}; choose from 0 to below 1")
        require(self.num_workers >= 0, f"data.num_workers is {self.num_workers}; use 0 for none")

    @property
    def bucket_sizes(self) -> tuple[tuple[int, int], ...]:
        """Height and width of each bucket."""
        pairs = [text.split("x") for text in self.buckets]
        return tuple((int(height), int(width)) for height, width in pairs)
