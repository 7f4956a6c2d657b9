"""A sheet of some images of each class, as training sees them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..config import DataConfig
from ..data.decoding import cover_and_crop, decode_image, parse_background
from ..data.image_table import ImageTable

COLUMNS = 12
"""Images of a class."""
CELL = 64
"""Least side of an image on the sheet, in pixels."""
NAME_WIDTH = 200  # pixels
GAP = 4  # pixels
MAX_CLASSES = 100
"""Classes on one sheet, evenly chosen if there are more."""


def write_contact_sheet(path: Path, config: DataConfig, table: ImageTable, readable: np.ndarray) -> int:
    """Write a PNG with a row of readable, evenly chosen images for each class; returns the number of rows.

    Args:
        path: the PNG file.
        config: size, channels and background of the images.
        table: the images.
        readable: True for images that can be read, bool.
    """
    labels = _evenly(np.arange(len(table.class_names)), MAX_CLASSES)
    scale = max(1, CELL // config.image_size)
    cell = config.image_size * scale
    sheet = Image.new("RGB", (NAME_WIDTH + COLUMNS * (cell + GAP) + GAP, len(labels) * (cell + GAP) + GAP), "white")
    pen = ImageDraw.Draw(sheet)
    # matplotlib's font has Greek and Cyrillic letters too.
    font = ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", 13)
    background = parse_background(config.background)
    for line, label in enumerate(labels):
        top = GAP + line * (cell + GAP)
        members = np.flatnonzero((table.labels == label) & readable)
        pen.text((GAP, top), f"{table.class_names[label][:26]}\n{len(members)} images", fill="black", font=font)
        for column, index in enumerate(_evenly(members, COLUMNS)):
            image = decode_image(table.image(index).source, config.channels, background)
            image = cover_and_crop(image, config.image_size, config.image_size)
            sheet.paste(image.resize((cell, cell), Image.Resampling.NEAREST), (NAME_WIDTH + column * (cell + GAP), top))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    return len(labels)


def _evenly(values: np.ndarray, wanted: int) -> Sequence[int]:
    count = min(len(values), wanted)
    return values[np.arange(count) * len(values) // max(1, count)].tolist()
