"""Decoder of image files for training, `encode`, `stats`, `evaluate` and `inspect`.

An image may be turned by EXIF, transparent, in CMYK, with 16 bits or a colour profile. It is decoded as a viewer shows
it, to 8-bit grey or sRGB.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from contextlib import suppress
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageColor, ImageOps
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, SAMPLEFORMAT

NOT_READ = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}
"""Formats that Pillow cannot decode, or hands to another program (EPS to Ghostscript)."""
COMMON = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""Formats to try first, which makes opening a file several times faster."""
WHITE_IS_ZERO, SIGNED = 0, 2
"""Values of TIFF's tags PHOTOMETRIC_INTERPRETATION and SAMPLEFORMAT."""

# Pillow warns of large images, broken EXIF and the like; the decoder raises errors for those that matter.
warnings.filterwarnings("ignore", module=r"PIL\.")


@cache
def image_formats() -> tuple[str, ...]:
    """Pillow's names of the formats to read, in the order in which they are tried."""
    Image.init()
    return (*COMMON, *sorted(set(Image.OPEN) - NOT_READ - set(COMMON)))


@cache
def image_suffixes() -> frozenset[str]:
    """Endings of image files, lower case, with their dot."""
    formats = {*image_formats(), "MPO"}  # which the reader of JPEG opens
    return frozenset(ending for ending, name in Image.registered_extensions().items() if name in formats)


def parse_background(name: str) -> tuple[int, int, int]:
    """A colour by name or as #rrggbb, 0 to 255.

    Raises:
        ValueError: the name is neither.
    """
    try:
        red, green, blue = ImageColor.getrgb(name)[:3]
    except ValueError as error:
        raise ValueError(f"data.background is {name!r}; give a colour such as white or #8040ff") from error
    return red, green, blue


def open_image(source: str | Path | bytes) -> Image.Image:
    """Open an image file by path or content, and read its header.

    Raises:
        ValueError: the file is not an image, or too large; the message does not name it.
        OSError: the file cannot be read.
    """
    try:
        return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=image_formats())
    except Image.DecompressionBombError as error:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise ValueError(
            f"it has more than {limit} pixels, Pillow's limit against files made to fill the memory; make it smaller"
        ) from error
    except Image.UnidentifiedImageError as error:
        empty = not (source if isinstance(source, bytes) else Path(source).stat().st_size)
        raise ValueError("it is empty" if empty else "it is not an image that Pillow reads") from error


def upright_size(opened: Image.Image) -> tuple[int, int]:
    """Height and width of an opened image as a viewer shows it, from its header."""
    width, height = opened.size
    # Pillow turns TIFF itself. In a PNG without EXIF before the pixels it would decode all of them to look behind.
    if opened.format == "TIFF" or (
        opened.format == "PNG" and opened.info.keys().isdisjoint({"exif", "xmp", "XML:com.adobe.xmp"})
    ):
        return height, width
    with suppress(Exception):  # broken EXIF
        if opened.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8):
            return width, height
    return height, width


def decode_image(
    source: str | Path | bytes, channels: int, background: tuple[int, int, int] = (255, 255, 255)
) -> Image.Image:
    """Decode an image file as a viewer shows it: mode L (1 channel) or RGB (3 channels).

    EXIF's orientation is applied, a colour profile converted to sRGB, transparency laid over `background`. Integers of
    16 or 32 bits are scaled by the range of their type, floats from [0, 1]. An animation gives its first frame.

    Args:
        source: path or content of the file.
        channels: 1 for grey, 3 for colour.
        background: RGB, 0 to 255.

    Raises:
        ValueError, OSError: the file cannot be decoded; the message does not name it. Damaged files may raise others.
    """
    with open_image(source) as opened:
        opened.load()
        profile = opened.info.get("icc_profile")
        image: Image.Image = opened
        with suppress(Exception):  # Pillow raises almost anything on broken EXIF: then the image stays as stored
            image = ImageOps.exif_transpose(opened)
        image = _eight_bits(image, opened)
    image, alpha = _split_alpha(image)
    image = _in_srgb(image, profile)
    if alpha is not None:
        image = Image.composite(image.convert("RGB"), Image.new("RGB", image.size, background), alpha)
    return image.convert("RGB" if channels == 3 else "L")


def decode_pixels(
    source: str | Path | bytes,
    height: int,
    width: int,
    channels: int,
    background: tuple[int, int, int] = (255, 255, 255),
) -> np.ndarray:
    """Decode, resize and crop an image file: (height, width, channels), uint8. Raises as `decode_image`."""
    image = cover_and_crop(decode_image(source, channels, background), height, width)
    return np.array(image).reshape(height, width, channels)


def cover_and_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    """Resize an image to the smallest size that covers `height` x `width`, and crop its centre.

    As ADM (arXiv 2105.05233) prepares the reference images of published scores: halved by averaging while at least
    twice too large, then bicubic.
    """
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    image = image.resize(
        (max(width, round(image.width * scale)), max(height, round(image.height * scale))), Image.Resampling.BICUBIC
    )
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _eight_bits(image: Image.Image, opened: Image.Image) -> Image.Image:
    """Convert a grey image of more bits to mode L or LA; other images are unchanged.

    Args:
        image: the pixels, upright.
        opened: the file, with its tags.

    Raises:
        ValueError: values are outside of the range of images.
    """
    if image.mode not in ("I", "F") and not image.mode.startswith("I;"):
        return image
    values, tags = np.asarray(image), getattr(opened, "tag_v2", {})
    if image.mode == "F":
        white, rule = 1.0, "floats are read from 0 to 1"
    else:
        white, rule = _white(opened, tags), "integers are read from 0 up"
        if white == 2**32 - 1:  # Pillow keeps them in signed numbers
            values = values.view(np.uint32)
    if not (values.min() >= 0 and values.max() <= white):  # NaN fails too
        raise ValueError(f"its values go from {values.min():g} to {values.max():g}, but {rule}; scale them")
    scaled = values / white
    if tags.get(PHOTOMETRIC_INTERPRETATION) == WHITE_IS_ZERO:
        scaled = 1 - scaled
    grey = Image.fromarray(np.rint(scaled * 255).astype(np.uint8))
    transparent = opened.info.get("transparency")
    if isinstance(transparent, int):  # the one level that a PNG may declare transparent
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey


def _white(opened: Image.Image, tags: Mapping[int, Any]) -> int:
    """The integer for white: the largest of the file's type."""
    if tags:
        signed = tags.get(SAMPLEFORMAT, (1,))[0] == SIGNED
        return 2 ** (tags.get(BITSPERSAMPLE, (1,))[0] - signed) - 1
    # Pillow scales a PNM to 16 bits whatever its maximum; mode I of other formats has signed 32 bits.
    return 2**31 - 1 if opened.mode == "I" and opened.format not in ("PPM", "PNG") else 2**16 - 1


def _split_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Colours of an image, L, RGB, CMYK or LAB, and its opacity, mode L, or None if it is opaque."""
    if image.has_transparency_data:
        image = image.convert({"1": "LA", "L": "LA", "La": "LA", "LA": "LA"}.get(image.mode, "RGBA"))
        return image.convert("L" if image.mode == "LA" else "RGB"), image.getchannel("A")
    if image.mode in ("L", "RGB", "CMYK", "LAB"):
        return image, None
    return image.convert("L" if image.mode == "1" else "RGB"), None


def _in_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    transform = _to_srgb(profile, image.mode) if profile else None
    if image.mode == "LAB":
        transform = ImageCms.buildTransform(ImageCms.createProfile("LAB"), _SRGB, "LAB", "RGB")
    return image if transform is None else ImageCms.applyTransform(image, transform) or image


_SRGB = ImageCms.createProfile("sRGB")


@lru_cache(maxsize=64)
def _to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Conversion from a profile; None for sRGB, and for a broken profile, which viewers ignore too."""
    try:
        parsed = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(parsed):
            return None
        return ImageCms.buildTransform(parsed, _SRGB, mode, "RGB")
    except (OSError, ValueError, TypeError, ImageCms.PyCMSError):
        return None
