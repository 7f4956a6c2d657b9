"""The images of a folder: which files, in which classes, which of them are held out, and what is left out and why.

Training, `encode`, `stats`, `evaluate` and `inspect` all list a folder here. No file is opened.

- Every folder at the top is a class with all images below it (`top`); or every innermost folder is one, named by its
  path (`leaf`); or there are no classes (`none`).
- `train/` and `val/` (or `test/`) at the top that hold the same classes are the splits.
- Classes, folders and files are in natural order. Links are followed; a file is never twice in one class.
- What is not listed is counted, with its reason.
"""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..config import FolderClasses
from .decoding import image_suffixes
from .natural import natural_key

TRAIN = ("train", "training")
HELD_OUT = ("val", "valid", "validation", "test", "testing")
"""Names of the folders that may hold a held-out split, the preferred ones first."""
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
"""Files that may hold captions."""
EXAMPLES = 3
"""Names that a message gives of each kind of file that is left out."""

HIDDEN = "hidden files and folders"
NO_IMAGE = "files of other kinds"
NO_FILE = "links to nothing, and what is neither file nor folder"
BESIDE = "images beside the class folders"
EMPTY = "folders without images"
AGAIN = "links to what its class holds already"
OTHER_SPLIT = "images outside of the two splits"


class LeftOut:
    """Counts of what is not listed by reason, with a few names of each."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.examples: dict[str, list[str]] = {}

    def add(self, reason: str, name: str, count: int = 1) -> None:
        """Count files of one reason; `name` is one of them, or the folder that they are in."""
        self.counts[reason] = self.counts.get(reason, 0) + count
        examples = self.examples.setdefault(reason, [])
        if len(examples) < EXAMPLES:
            examples.append(name)

    def __str__(self) -> str:
        """One line, as "images beside the class folders: 1 (loose.png)"; empty if nothing is left out."""
        parts = []
        for reason, count in self.counts.items():
            names = ", ".join(printable(name) for name in self.examples[reason])
            parts.append(f"{reason}: {count} ({names}{', ...' if count > len(self.examples[reason]) else ''})")
        return "; ".join(parts)


@dataclass(frozen=True)
class Listing:
    """The images of a folder."""

    folder: Path
    files: list[str]
    """Path of each image in the folder, class by class."""
    labels: np.ndarray
    """Class of each image, int64."""
    class_names: list[str]
    held_out: np.ndarray | None
    """Whether each image is of the held-out split, bool; None where the folder does not say."""
    left_out: LeftOut
    metadata: list[str]
    """Paths in the folder of files that may hold captions."""
    links: int = 0
    """Images that are links, or lie in a folder that is one."""
    split_folders: tuple[str, str] | None = None
    """Folder of the training split and of the held-out one, where `held_out` is known."""

    def notes(self) -> list[str]:
        """Lines for the user: how the folder is split, and what is left out."""
        lines = []
        if self.split_folders is not None and self.held_out is not None:
            train, held_out = self.split_folders
            count = int(self.held_out.sum())
            lines.append(
                f"{self.folder}: {printable(train)}/ is the training split ({len(self.files) - count} images), "
                f"{printable(held_out)}/ is held out ({count} images); data.test_fraction is not used"
            )
        if self.links:
            lines.append(f"{self.folder}: {self.links} images are links, each listed where it stands")
        if self.left_out.counts:
            lines.append(f"{self.folder}: left out: {self.left_out}")
        return lines


def printable(name: str) -> str:
    """A file's name with replacement characters where it is not UTF-8."""
    return os.fsencode(name).decode("utf-8", "replace")


def hash_names(names: Iterator[str], labels: np.ndarray) -> str:
    """SHA-256 of names and classes in order; it does not see what is in a file."""
    digest = hashlib.sha256(labels.astype("<i8").tobytes())
    for name in names:
        digest.update(name.encode("utf-8", "surrogateescape") + b"\n")
    return digest.hexdigest()


def list_images(folder: Path, classes: FolderClasses = "top") -> Listing:
    """List a folder's images.

    Args:
        folder: where they are.
        classes: which folders are the classes.

    Raises:
        ValueError: the folder is missing or holds no images or classes, or its splits hold different classes.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give a folder of images")
    left_out = LeftOut()
    found = _scan(str(folder), left_out)
    splits = _find_splits(found, classes, folder)
    if splits is None:
        groups, split_of = _group(found, classes, "", left_out), None
        if not groups:
            raise ValueError(_nothing_listed(folder, left_out))
    else:
        groups, split_of = defaultdict(list), splits
        for part in splits:
            for name, images in _group(found, classes, part, left_out).items():
                groups[name] += images
        for other in (f for f in found if _top(f.path) not in splits and f.images):
            left_out.add(OTHER_SPLIT, other.path or other.images[0], len(other.images))
    return _assemble(folder, groups, split_of, found, left_out)


class _Folder(NamedTuple):
    """One folder's own files."""

    path: str
    """In the listed folder, with slashes; empty for itself."""
    real: str
    """Where it is, links resolved."""
    images: list[str]
    """Names of its images, in natural order."""
    links: Mapping[str, str]
    """Of its images that are links, where the file is."""
    metadata: list[str]
    linked: bool
    """Whether a link leads here."""


class _Image(NamedTuple):
    folder: _Folder
    name: str

    @property
    def path(self) -> str:
        return f"{self.folder.path}/{self.name}" if self.folder.path else self.name

    @property
    def is_link(self) -> bool:
        return self.folder.linked or self.name in self.folder.links

    @property
    def real(self) -> str:
        return self.folder.links.get(self.name) or f"{self.folder.real}/{self.name}"


@dataclass
class _Scan:
    """The folders still to be looked into: those reached by links come last, so that none is taken for a copy."""

    root: str
    """Real path of the folder that is listed."""
    plain: list[tuple[str, str]] = field(default_factory=list)
    """Path in the listed folder, and real path."""
    linked: list[tuple[str, str]] = field(default_factory=list)
    visited: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    """Real paths of the folders below each folder at the top."""

    def __iter__(self) -> Iterator[tuple[str, str]]:
        while self.plain or self.linked:
            yield self.plain.pop() if self.plain else self.linked.pop(0)


def _scan(root: str, left_out: LeftOut) -> list[_Folder]:
    """All folders with their files, in natural order of their paths."""
    found, todo = [], _Scan(real_root := os.path.realpath(root), [("", real_root)])
    for path, real in todo:
        visited = todo.visited[_top(path)]
        if real in visited or (path and real in todo.visited[""]):  # a link to a folder above would never end
            left_out.add(AGAIN, path)
            continue
        visited.add(real)
        found.append(_read_folder(root, path, real, todo, left_out))
    return sorted(found, key=lambda folder: _path_key(folder.path))


def _read_folder(root: str, path: str, real: str, todo: _Scan, left_out: LeftOut) -> _Folder:
    suffixes, images, links, metadata = image_suffixes(), [], {}, []
    with os.scandir(f"{root}/{path}") as entries:
        for entry in entries:
            name = entry.name
            inside = f"{path}/{name}" if path else name
            if name.startswith("."):
                left_out.add(HIDDEN, inside)
            elif entry.is_dir():
                if entry.is_symlink():
                    todo.linked.append((inside, os.path.realpath(entry.path)))
                else:
                    todo.plain.append((inside, f"{real}/{name}"))
            elif not entry.is_file():
                left_out.add(NO_FILE, inside)
            elif name[name.rfind(".") :].lower() in suffixes:
                images.append(name)
                if entry.is_symlink():
                    links[name] = os.path.realpath(entry.path)
            elif name in METADATA:
                metadata.append(inside)
            else:
                left_out.add(NO_IMAGE, inside)
    linked = real != f"{todo.root}/{path}".rstrip("/")
    return _Folder(path, real, sorted(images, key=natural_key), links, metadata, linked)


def _path_key(path: str) -> list[tuple[Any, str]]:
    return [natural_key(part) for part in path.split("/")]


def _top(path: str) -> str:
    return path.partition("/")[0]


def _group(found: list[_Folder], classes: FolderClasses, part: str, left_out: LeftOut) -> dict[str, list[_Image]]:
    """The images of each class, by its name.

    Args:
        part: the folder at the top that holds the classes; empty for the listed folder itself.
    """
    below = [folder for folder in found if not part or _top(folder.path) == part]
    parents = {parent for folder in below if folder.images for parent in _parents(folder.path)}
    groups: dict[str, list[_Image]] = defaultdict(list)
    folders_with_images = set()
    for folder in below:
        path = folder.path[len(part) :].lstrip("/")
        name = {"top": _top(path), "leaf": "" if folder.path in parents else path, "none": "all"}[classes]
        if not folder.images:
            continue
        folders_with_images.add(_top(path))
        if name:
            groups[name] += [_Image(folder, image) for image in folder.images]
        else:
            left_out.add(BESIDE, f"{folder.path}/{folder.images[0]}".lstrip("/"), len(folder.images))
    for folder in below:
        path = folder.path[len(part) :].lstrip("/")
        if path and "/" not in path and path not in folders_with_images:
            left_out.add(EMPTY, folder.path)
    return groups


def _parents(path: str) -> Iterator[str]:
    """Paths of the folders above one."""
    while path:
        path = path.rpartition("/")[0]
        yield path


def _find_splits(found: list[_Folder], classes: FolderClasses, folder: Path) -> tuple[str, str] | None:
    """The folders at the top that are the training and the held-out split.

    Raises:
        ValueError: they look like splits, but hold different classes.
    """
    tops = {_top(each.path) for each in found if each.images}
    train = next((top for name in TRAIN for top in sorted(tops) if top.lower() == name), None)
    held_out = next((top for name in HELD_OUT for top in sorted(tops) if top.lower() == name), None)
    if train is None or held_out is None:
        return None
    if classes == "none":
        known = {*TRAIN, *HELD_OUT}
        return (train, held_out) if all(top.lower() in known for top in tops) else None
    one, other = (set(_group(found, classes, part, LeftOut())) for part in (train, held_out))
    if one and one == other:
        return train, held_out
    if one & other:
        alone = sorted(one ^ other, key=natural_key)
        raise ValueError(
            f"{folder} has the splits {printable(train)}/ and {printable(held_out)}/, but only one of them has "
            f"the class {printable(alone[0])}; give both the same classes, or take {folder / train} alone"
        )
    return None


def _assemble(
    folder: Path,
    groups: Mapping[str, list[_Image]],
    splits: tuple[str, str] | None,
    found: list[_Folder],
    left_out: LeftOut,
) -> Listing:
    names = sorted(groups, key=natural_key)
    files, counts, links = list[str](), list[int](), 0
    for name in names:
        images = _without_copies(groups[name], left_out)
        paths = [image.path for image in images]
        if len({id(image.folder) for image in images}) > 1:
            paths.sort(key=_path_key)
        files += paths
        counts.append(len(images))
        links += sum(image.is_link for image in images)
    held_out = None if splits is None else np.array([_top(file) == splits[1] for file in files])
    return Listing(
        folder=folder,
        files=files,
        labels=np.repeat(np.arange(len(names), dtype=np.int64), counts),
        class_names=[printable(name) for name in names],
        held_out=held_out,
        left_out=left_out,
        metadata=[path for each in found for path in each.metadata],
        links=links,
        split_folders=splits,
    )


def _without_copies(images: list[_Image], left_out: LeftOut) -> list[_Image]:
    """Each file once: a link to another file of the class goes, and the second link to a file elsewhere."""
    if not any(image.is_link for image in images):
        return images
    own, kept = {image.real for image in images if image.name not in image.folder.links}, []
    for image in images:
        if image.name in image.folder.links:
            if image.real in own:
                left_out.add(AGAIN, image.path)
                continue
            own.add(image.real)
        kept.append(image)
    return kept


def _nothing_listed(folder: Path, left_out: LeftOut) -> str:
    beside = left_out.counts.get(BESIDE, 0)
    if beside:
        return (
            f"{folder} holds {beside} images, but no class folders; put the images of each class into a "
            "sub-folder, or set data.classes to none"
        )
    seen = f" (left out: {left_out})" if left_out.counts else ""
    return f"{folder} holds no images{seen}; give a folder of images, one sub-folder a class if there are classes"
