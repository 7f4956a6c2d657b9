"""Images of a folder: the files with their classes and splits, and what is left out and why.

Training, `encode`, `stats`, `evaluate` and `inspect` all list a folder here. No file is opened.

- With classes `top` every folder at the top is a class with all images below it; with `leaf` every innermost folder is
  one, named by its path; with `none` there are no classes.
- `train/` and `val/` (or `test/`) at the top that hold the same classes are the splits.
- Classes, folders and files are in natural order. Links are followed; a class holds no file twice.
- What is not listed is counted, with its reason.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..config import FolderClasses
from .decoding import image_suffixes

TRAIN = ("train", "training")
HELD_OUT = ("val", "valid", "validation", "test", "testing")
"""Names of the folders that may hold a held-out split, the preferred ones first."""
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
"""Files that may hold captions."""
EXAMPLES = 3
"""Names that a message gives for each reason."""

HIDDEN = "hidden files and folders"
NO_IMAGE = "files of other kinds"
NO_FILE = "links to nothing, and what is neither file nor folder"
BESIDE = "images beside the class folders"
EMPTY = "folders without images"
AGAIN = "links to what its class holds already"
OTHER_SPLIT = "images outside of the two splits"


def natural_key(name: str) -> tuple[Any, str]:
    """Sort key for natural order, 2 before 10; letters compare without regard to case, equal names by themselves."""
    # Odd parts are the digits, so numbers are compared with numbers only.
    parts = tuple(int(part) if i % 2 else part.casefold() for i, part in enumerate(re.split("([0-9]+)", name)))
    return parts, name


class LeftOut:
    """Number of files that are not listed, by reason, with a few names of each."""

    def __init__(self) -> None:
        self.counts = Counter[str]()
        self.examples: dict[str, list[str]] = defaultdict(list)

    def add(self, reason: str, name: str, count: int = 1) -> None:
        """Count files; `name` is one of them, or their folder."""
        self.counts[reason] += count
        if len(self.examples[reason]) < EXAMPLES:
            self.examples[reason].append(name)

    def __str__(self) -> str:
        """One line, as "images beside the class folders: 1 (loose.png)"; empty if nothing is left out."""
        parts = []
        for reason, count in self.counts.items():
            names = ", ".join(map(printable, self.examples[reason]))
            parts.append(f"{reason}: {count} ({names}{', ...' if count > len(self.examples[reason]) else ''})")
        return "; ".join(parts)


@dataclass(frozen=True)
class Listing:
    """Images of a folder."""

    folder: Path
    files: list[str]
    """Path of each image in the folder, class by class."""
    labels: np.ndarray
    """Class of each image, int64."""
    class_names: list[str]
    held_out: np.ndarray | None
    """True for images of the held-out split, bool; None without splits."""
    left_out: LeftOut
    metadata: list[str]
    """Paths in the folder of files that may hold captions."""
    links: int = 0
    """Images that are links, or are in a folder that is one."""
    split_folders: tuple[str, str] | None = None
    """Folders of the training and of the held-out split."""

    def notes(self) -> list[str]:
        """Lines for the user: how the folder is split, and what is left out."""
        lines = []
        if self.split_folders is not None and self.held_out is not None:
            train, held_out = map(printable, self.split_folders)
            count = int(self.held_out.sum())
            lines.append(
                f"{self.folder}: {train}/ is the training split ({len(self.files) - count} images), "
                f"{held_out}/ is held out ({count} images); data.test_fraction is not used"
            )
        if self.links:
            lines.append(f"{self.folder}: {self.links} images are links, each listed where the link is")
        if self.left_out.counts:
            lines.append(f"{self.folder}: left out: {self.left_out}")
        return lines


def printable(name: str) -> str:
    """A file's name with replacement characters for bytes that are not UTF-8."""
    return os.fsencode(name).decode("utf-8", "replace")


def hash_names(names: Iterable[str], labels: np.ndarray) -> str:
    """SHA-256 of names and classes in order."""
    digest = hashlib.sha256(labels.astype("<i8").tobytes())
    for name in names:
        digest.update(name.encode("utf-8", "surrogateescape") + b"\n")
    return digest.hexdigest()


def list_images(folder: Path, classes: FolderClasses = "top") -> Listing:
    """List a folder's images.

    Raises:
        ValueError: the folder is missing or holds no images or classes, or its splits hold different classes.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give a folder of images")
    left_out = LeftOut()
    found = _scan(str(folder), left_out)
    splits = _find_splits(found, classes, folder)
    groups: dict[str, list[_Folder]] = defaultdict(list)
    for part in splits or ("",):
        for name, folders in _group(found, classes, part, left_out).items():
            groups[name] += folders
    if splits is not None:
        for other in found:
            if other.images and _top(other.path) not in splits:
                left_out.add(OTHER_SPLIT, other.path or other.images[0], len(other.images))
    if not groups and left_out.counts[BESIDE]:
        raise ValueError(
            f"{folder} holds {left_out.counts[BESIDE]} images, but no class folders; put the images of each class into "
            "a sub-folder, or set data.classes to none"
        )
    if not groups:
        seen = f" (left out: {left_out})" if left_out.counts else ""
        raise ValueError(
            f"{folder} holds no images{seen}; give a folder of images, one sub-folder a class if there are classes"
        )
    names = sorted(groups, key=natural_key)
    images = [_images_of(groups[name], left_out) for name in names]
    files = [path for each in images for path, _ in each]
    held_out = None if splits is None else np.array([_top(file) == splits[1] for file in files])
    return Listing(
        folder=folder,
        files=files,
        labels=np.repeat(np.arange(len(names), dtype=np.int64), [len(each) for each in images]),
        class_names=[printable(name) for name in names],
        held_out=held_out,
        left_out=left_out,
        metadata=[path for each in found for path in each.metadata],
        links=sum(is_link for each in images for _, is_link in each),
        split_folders=splits,
    )


@dataclass
class _Folder:
    """The files that are directly in one folder."""

    path: str
    """Path in the listed folder, with slashes; empty for the listed folder."""
    real: str
    """Path with links resolved."""
    linked: bool = False
    """True if its path has a link in it."""
    images: list[str] = field(default_factory=list)
    """Names of its images, in natural order."""
    links: dict[str, str] = field(default_factory=dict)
    """Real path of each image that is a link, by name."""
    metadata: list[str] = field(default_factory=list)


def _scan(root: str, left_out: LeftOut) -> list[_Folder]:
    """All folders, in natural order of their paths."""
    found: list[_Folder] = []
    visited: dict[str, set[str]] = defaultdict(set)  # real paths, by folder at the top
    todo = deque([_Folder("", os.path.realpath(root))])
    while todo:
        folder = todo.popleft()
        top = visited[_top(folder.path)]
        if folder.real in top or (folder.path and folder.real in visited[""]):  # a link upwards would never end
            left_out.add(AGAIN, folder.path)
            continue
        top.add(folder.real)
        found.append(folder)
        _read(root, folder, todo, left_out)
    return sorted(found, key=lambda folder: _path_key(folder.path))


def _read(root: str, folder: _Folder, todo: deque[_Folder], left_out: LeftOut) -> None:
    """Sort a folder's files, and add its sub-folders to those to visit."""
    suffixes = image_suffixes()
    with os.scandir(f"{root}/{folder.path}") as entries:
        for entry in entries:
            name = entry.name
            path = f"{folder.path}/{name}".lstrip("/")
            if name.startswith("."):
                left_out.add(HIDDEN, path)
            elif entry.is_dir():
                # Linked folders come last, so that no plain folder is taken for a copy.
                if entry.is_symlink():
                    todo.append(_Folder(path, os.path.realpath(entry.path), linked=True))
                else:
                    todo.appendleft(_Folder(path, f"{folder.real}/{name}", folder.linked))
            elif not entry.is_file():
                left_out.add(NO_FILE, path)
            elif name[name.rfind(".") :].lower() in suffixes:
                folder.images.append(name)
                if entry.is_symlink():
                    folder.links[name] = os.path.realpath(entry.path)
            elif name in METADATA:
                folder.metadata.append(path)
            else:
                left_out.add(NO_IMAGE, path)
    folder.images.sort(key=natural_key)


def _path_key(path: str) -> list[tuple[Any, str]]:
    return [natural_key(part) for part in path.split("/")]


def _top(path: str) -> str:
    return path.partition("/")[0]


def _group(found: list[_Folder], classes: FolderClasses, part: str, left_out: LeftOut) -> dict[str, list[_Folder]]:
    """Folders with images of each class, by class name.

    Args:
        part: the folder at the top that holds the classes; empty for the listed folder itself.
    """
    below = {folder.path[len(part) :].lstrip("/"): folder for folder in found if not part or _top(folder.path) == part}
    parents = {parent for path, folder in below.items() if folder.images for parent in _parents(path)}
    groups: dict[str, list[_Folder]] = defaultdict(list)
    for path, folder in below.items():
        name = {"top": _top(path), "leaf": "" if path in parents else path, "none": "all"}[classes]
        if folder.images and name:
            groups[name].append(folder)
        elif folder.images:
            left_out.add(BESIDE, f"{folder.path}/{folder.images[0]}".lstrip("/"), len(folder.images))
        elif path and "/" not in path and path not in parents:
            left_out.add(EMPTY, folder.path)
    return groups


def _parents(path: str) -> Iterator[str]:
    """Paths of the folders above one."""
    while path:
        path = path.rpartition("/")[0]
        yield path


def _find_splits(found: list[_Folder], classes: FolderClasses, folder: Path) -> tuple[str, str] | None:
    """Folders at the top that are the training and the held-out split.

    Raises:
        ValueError: they look like splits, but hold different classes.
    """
    tops = {_top(each.path) for each in found if each.images}
    train = next((top for name in TRAIN for top in sorted(tops) if top.lower() == name), None)
    held_out = next((top for name in HELD_OUT for top in sorted(tops) if top.lower() == name), None)
    if train is None or held_out is None:
        return None
    if classes == "none":
        return (train, held_out) if all(top.lower() in TRAIN + HELD_OUT for top in tops) else None
    one, other = (set(_group(found, classes, part, LeftOut())) for part in (train, held_out))
    if one and one == other:
        return train, held_out
    if one & other:
        alone = min(one ^ other, key=natural_key)
        raise ValueError(
            f"{folder} has the splits {printable(train)}/ and {printable(held_out)}/, but only one of them has "
            f"the class {printable(alone)}; give both the same classes, or take {folder / train} alone"
        )
    return None


def _images_of(folders: list[_Folder], left_out: LeftOut) -> list[tuple[str, bool]]:
    """Path of each image of a class, in natural order, and True for links; a file that it holds already is left out."""
    images = []
    plain = (f"{folder.real}/{name}" for folder in folders for name in folder.images if name not in folder.links)
    seen = set(plain) if any(folder.links for folder in folders) else set()
    for folder in folders:
        for name in folder.images:
            path, real = f"{folder.path}/{name}".lstrip("/"), folder.links.get(name)
            if real in seen:
                left_out.add(AGAIN, path)
                continue
            if real is not None:
                seen.add(real)
            images.append((path, folder.linked or real is not None))
    if len(folders) > 1:  # a single folder is sorted already
        images.sort(key=lambda image: _path_key(image[0]))
    return images
