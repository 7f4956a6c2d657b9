"""Select the pictures of a clip-art collection that a person would call pictures, as a folder to train on.

    python examples/pictures.py COLLECTION PATH

COLLECTION holds `png/CLASS/...` and, for titles, `svg/CLASS/...`, as Debian's openclipart does; or it holds the class
folders itself. PATH becomes an ordinary folder: `CLASS/NAME.png` and `metadata.jsonl` with a caption a picture.
The same collection gives the same folder, byte for byte.

The rule, in the order in which it is applied:

1. Pictures in the folders of `DROPPED` and with the words of `DROPPED_WORDS` in their names are dropped.
2. The white frame is cut off, and the rest laid on a white square with a margin of a sixteenth.
3. Pictures more than `LONGEST` times as long as wide, smaller than `SMALLEST` pixels, or almost empty at 32 x 32 pixels
   are dropped.
4. Of pictures that hardly differ at 16 x 16 pixels, also mirrored, the first one is kept.
5. Of a folder with more than `MOST` pictures, as many are kept, evenly spaced in the order of their names.
6. Classes with fewer than `FEWEST` pictures are dropped.
"""

from __future__ import annotations

import argparse
import json
import re
import warnings
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

DROPPED = (
    "buttons",
    "computer/buttons",
    "logos",
    "shapes/arrows",
    "shapes/callouts",
    "shapes/flowchart",
    "shapes/jigsaw",
    "shapes/stars",
    "signs_and_symbols/led",
    "special",
    "unsorted/duplicates",
)
"""Folders of buttons, flags, patterns and geometry."""
POOLED = ("signs_and_symbols/flags",)
"""Folders that count as one with all folders below them, where the number of pictures is limited."""
ICONS = "computer/icons"
"""A folder that is a class of its own, `icons`; all others are in the class of their folder at the top."""
DROPPED_WORDS = frozenset({"button", "buttons", "cardback", "frame", "border", "template"})
SIZE = 128
"""Height and width of a picture in pixels."""
LONGEST = 4.0
SMALLEST = 24
INK = 0.1
"""Difference to white, from 0 to 1, from which a pixel counts as drawn."""
LEAST_INK, LEAST_SPREAD = 0.06, 0.05
"""Smallest share of drawn pixels, and smallest standard deviation of grey, at 32 x 32 pixels."""
SAME = 0.035
"""Root mean square difference of two pictures at 16 x 16 pixels up to which they are the same one."""
MOST, FEWEST = 200, 16


class Picture(NamedTuple):
    """A picture that passes the rules for a single one."""

    path: Path
    """In the collection's pictures."""
    image: Image.Image
    """The square, RGB."""
    small: np.ndarray
    """At 16 x 16 pixels, from 0 to 1."""


def select(collection: Path, target: Path, workers: int = 0) -> Counter[str]:
    """Write the folder of pictures.

    Args:
        collection: the clip art.
        target: the folder to write; it must not exist, or be empty.
        workers: processes that read images; 0: this one alone.

    Returns:
        Pictures of each class, and those dropped by reason, as "dropped: too small".

    Raises:
        ValueError: there are no pictures, or the target is not empty.
    """
    root = collection / "png" if (collection / "png").is_dir() else collection
    if target.is_dir() and any(target.iterdir()):
        raise ValueError(f"{target} is not empty; choose another folder")
    paths = sorted((path.relative_to(root) for path in root.rglob("*.png")), key=lambda path: path.as_posix())
    if not paths:
        raise ValueError(f"{collection} holds no PNG files; give a folder with a folder a class")
    counts: Counter[str] = Counter()
    named = [path for path in paths if not _dropped_by_name(path)]
    counts["dropped: folder or name"] = len(paths) - len(named)
    chosen = _limit(_distinct(_read_all(root, named, workers, counts), counts), counts)
    titles = _titles(collection / "svg" if (collection / "svg").is_dir() else root)
    _write(target, chosen, titles, counts)
    return counts


def class_of(path: Path) -> str:
    """The class of a picture by its path in the collection."""
    return "icons" if path.as_posix().startswith(f"{ICONS}/") else path.parts[0]


def _dropped_by_name(path: Path) -> bool:
    folder = path.parent.as_posix()
    in_dropped = any(folder == name or folder.startswith(f"{name}/") for name in DROPPED)
    return len(path.parts) < 2 or in_dropped or not DROPPED_WORDS.isdisjoint(_words(path.stem))


def _words(name: str) -> list[str]:
    return [word for word in re.split(r"[\W_]+", name.lower()) if word]


def _read_all(root: Path, paths: list[Path], workers: int, counts: Counter[str]) -> Iterator[Picture]:
    files = [root / path for path in paths]
    if workers:
        with ProcessPoolExecutor(workers) as pool:
            read = list(pool.map(square, files, chunksize=32))
    else:
        read = [square(file) for file in files]
    for path, result in zip(paths, read):
        if isinstance(result, str):
            counts[f"dropped: {result}"] += 1
        else:
            yield Picture(path, result, _pixels(result, 16))


def square(file: Path) -> Image.Image | str:
    """The drawing of an image file on a white square of `SIZE` pixels; or the reason why it is no picture."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # drawings of 13,000 pixels a side
            with Image.open(file) as opened:
                image = opened.convert("RGBA")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return "unreadable"
    image.thumbnail((4 * SIZE, 4 * SIZE), Image.Resampling.BOX)
    flat = Image.new("RGB", image.size, "white")
    flat.paste(image, mask=image.getchannel("A"))
    drawn = (255 - np.asarray(flat)).max(2) > 255 * INK
    if not drawn.any():
        return "empty"
    rows, columns = (np.flatnonzero(drawn.any(axis)) for axis in (1, 0))
    cut = flat.crop((int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1))
    if max(cut.size) < SMALLEST:
        return "too small"
    if max(cut.size) > LONGEST * min(cut.size):
        return "too long"
    scale = SIZE * 7 / 8 / max(cut.size)
    size = (max(1, round(scale * cut.width)), max(1, round(scale * cut.height)))
    whole = Image.new("RGB", (SIZE, SIZE), "white")
    whole.paste(cut.resize(size, Image.Resampling.LANCZOS), ((SIZE - size[0]) // 2, (SIZE - size[1]) // 2))
    tiny = _pixels(whole, 32)
    if (1 - tiny.min(2) > INK).mean() < LEAST_INK or tiny.mean(2).std() < LEAST_SPREAD:
        return "almost empty at 32 x 32 pixels"
    return whole


def _pixels(image: Image.Image, size: int) -> np.ndarray:
    """Height, width and colour from 0 to 1, float32."""
    return np.asarray(image.resize((size, size), Image.Resampling.BOX), np.float32) / 255


def _distinct(pictures: Iterator[Picture], counts: Counter[str]) -> list[Picture]:
    """The first of those that hardly differ, also mirrored."""
    kept: list[Picture] = []
    table = np.empty((1024, 16 * 16 * 3), np.float32)
    for picture in pictures:
        known = table[: len(kept)]
        views = (picture.small, picture.small[:, ::-1])
        nearest = [((known - view.reshape(-1)) ** 2).mean(1).min(initial=1.0) for view in views]
        if min(nearest) <= SAME**2:
            counts["dropped: like another"] += 1
            continue
        if len(kept) == len(table):
            table = np.concatenate((table, np.empty_like(table)))
        table[len(kept)] = picture.small.reshape(-1)
        kept.append(picture)
    return kept


def _limit(pictures: list[Picture], counts: Counter[str]) -> list[Picture]:
    """At most `MOST` of each folder, and no class with fewer than `FEWEST`."""
    folders: dict[str, list[Picture]] = {}
    for picture in pictures:
        folder = picture.path.parent.as_posix()
        pool = next((name for name in POOLED if folder == name or folder.startswith(f"{name}/")), folder)
        folders.setdefault(pool, []).append(picture)
    kept = []
    for members in folders.values():
        count = min(MOST, len(members))
        kept += [members[i * len(members) // count] for i in range(count)]
        counts["dropped: too many of one folder"] += len(members) - count
    sizes = Counter(class_of(picture.path) for picture in kept)
    large = [picture for picture in kept if sizes[class_of(picture.path)] >= FEWEST]
    counts["dropped: class too small"] += len(kept) - len(large)
    return large


def _titles(root: Path) -> dict[Path, str]:
    """Titles of SVG files by their path without the ending."""
    titles = {}
    for file in sorted(root.rglob("*.svg")):
        title = read_title(file)
        if title:
            titles[file.relative_to(root).with_suffix("")] = title
    return titles


def read_title(file: Path) -> str:
    """The title that an SVG file has; empty without one."""
    try:
        tree = ElementTree.parse(file)
    except (ElementTree.ParseError, OSError, ValueError, LookupError):
        return ""
    found = tree.find(".//{*}Work/{*}title")
    if found is None:
        found = tree.find("{*}title")
    return "" if found is None else " ".join((found.text or "").split())


def caption_of(path: Path, titles: dict[Path, str]) -> str:
    """The title, or the words of the file's name, in lower case and without numbers."""
    text = titles.get(path.with_suffix("")) or path.stem
    words = [word for word in _words(text) if not word.isdigit()]
    return " ".join(words) or path.parts[0].replace("_", " ")


def _write(target: Path, pictures: list[Picture], titles: dict[Path, str], counts: Counter[str]) -> None:
    lines = []
    for picture in pictures:
        class_name = class_of(picture.path)
        name = f"{class_name}/{'-'.join(picture.path.parts[1:])}"
        (target / class_name).mkdir(parents=True, exist_ok=True)
        picture.image.save(target / name, optimize=True)
        lines.append(json.dumps({"file_name": name, "text": caption_of(picture.path, titles)}))
        counts[class_name] += 1
    (target / "metadata.jsonl").write_text("".join(f"{line}\n" for line in lines))


def main() -> None:
    """Select, and print how many pictures each class has and why others were dropped."""
    parser = argparse.ArgumentParser(description="Select the pictures of a clip-art collection")
    parser.add_argument("collection", type=Path, help="folder with png/CLASS and svg/CLASS, or with class folders")
    parser.add_argument("path", type=Path, help="folder to write")
    parser.add_argument("--workers", type=int, default=2, help="processes that read images")
    options = parser.parse_args()
    try:
        counts = select(options.collection, options.path, options.workers)
    except ValueError as error:
        parser.exit(2, f"pictures.py: {error}\n")
    for name, count in counts.items():
        print(f"{name:36}{count:6}")
    kept = sum(count for name, count in counts.items() if not name.startswith("dropped"))
    print(f"{'pictures':36}{kept:6}")


if __name__ == "__main__":
    main()
