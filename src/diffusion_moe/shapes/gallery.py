"""A gallery of prompts, their images and scores."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..pixels import to_uint8
from .prompts import Prompt
from .scorer import ImageScore

SIDE, MARGIN, FRAME, LINE, LINES = 128, 12, 4, 14, 5
"""Pixels of an image, between cells, around an image and of a line of text; and the lines below an image."""
INDENT = 18
"""Pixels from the mark to the text."""
PAPER, INK, FAINT, RIGHT, WRONG = "white", "#202020", "#707070", "#1a9850", "#d73027"


def make_gallery(
    prompts: Sequence[Prompt], images: Tensor, scores: Sequence[ImageScore], columns: int = 6
) -> Image.Image:
    """Render each image above its prompt, marked as correct (a green tick) or wrong (a red cross, with the reason).

    Args:
        images: (B, 3, H, W), [-1, 1].

    Raises:
        ValueError: there are none, or their numbers differ.
    """
    if not len(prompts) == len(images) == len(scores) > 0:
        raise ValueError(
            f"there are {len(prompts)} prompts, {len(images)} images and {len(scores)} scores; give one of each"
        )
    rows, columns = math.ceil(len(prompts) / columns), min(columns, len(prompts))
    width, height = SIDE + 2 * FRAME + MARGIN, SIDE + 2 * FRAME + LINES * LINE + MARGIN
    canvas = Image.new("RGB", (columns * width + MARGIN, rows * height + MARGIN), PAPER)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(11)
    for cell, (prompt, pixels, score) in enumerate(zip(prompts, to_uint8(images), scores)):
        left, top = MARGIN + cell % columns * width, MARGIN + cell // columns * height
        colour, inner = RIGHT if score.correct else WRONG, SIDE + 2 * FRAME
        draw.rectangle((left, top, left + inner - 1, top + inner - 1), fill=colour)
        tile = Image.fromarray(pixels.permute(1, 2, 0).numpy()).resize((SIDE, SIDE), Image.Resampling.NEAREST)
        canvas.paste(tile, (left + FRAME, top + FRAME))
        _mark(draw, left, top + inner + 3, score.correct)
        lines = [(line, INK) for line in _wrap(draw, prompt.text, inner - INDENT, font)]
        lines += [(line, WRONG) for line in _wrap(draw, score.reason, inner - INDENT, font)]
        for number, (line, ink) in enumerate(lines[:LINES]):
            draw.text((left + INDENT, top + inner + 2 + number * LINE), line, fill=ink, font=font)
    return canvas


def _mark(draw: ImageDraw.ImageDraw, x: int, y: int, correct: bool) -> None:
    """A tick or a cross beside the text, 12 pixels wide."""
    if correct:
        draw.line(((x + 1, y + 6), (x + 4, y + 10), (x + 11, y + 1)), fill=RIGHT, width=3)
    else:
        draw.line(((x + 2, y + 2), (x + 10, y + 10)), fill=WRONG, width=3)
        draw.line(((x + 10, y + 2), (x + 2, y + 10)), fill=WRONG, width=3)


def _wrap(
    draw: ImageDraw.ImageDraw, text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> list[str]:
    """Lines of whole words that fit into `width` pixels."""
    lines: list[str] = []
    for word in text.split():
        if lines and draw.textlength(f"{lines[-1]} {word}", font=font) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines
