"""Folders of images as people have them: every file is listed in its class, or counted with its reason."""

import os
import time

import numpy as np
import pytest

from diffusion_moe.config import DataConfig
from diffusion_moe.data import load_dataset
from diffusion_moe.data.folder import NO_CAPTION
from diffusion_moe.data.listing import AGAIN, BESIDE, EMPTY, HIDDEN, NO_FILE, NO_IMAGE, OTHER_SPLIT, list_images


@pytest.fixture
def make(tmp_path):
    """Makes a folder of empty files with these paths; listing opens none of them."""

    def make(*paths):
        for path in paths:
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).touch()
        return tmp_path

    return make


def classes_of(listing):
    """Class names and counts, in the order of the labels."""
    return dict(zip(listing.class_names, np.bincount(listing.labels).tolist(), strict=True))


def each(folder, count, ending="png"):
    return [f"{folder}/{i}.{ending}" for i in range(count)]


def test_words_in_names_do_not_matter(make):
    names = ("trains", "test tubes", "validation stamps", "cars", "train-01", "val", "eval test")
    folder = make(*(f"{name}/{i} {word}.png" for name in names for i, word in enumerate(("test", "a train at night"))))
    assert classes_of(list_images(folder)) == dict.fromkeys(
        ("cars", "eval test", "test tubes", "train-01", "trains", "val", "validation stamps"), 2
    )


NESTED = [*each("animals", 4), *each("animals/birds", 4), *each("animals/mammals", 4), *each("food", 4), "loose.png"]


def test_folders_at_the_top_are_classes_with_all_below(make):
    listing = list_images(make(*NESTED))
    assert classes_of(listing) == {"animals": 12, "food": 4}
    assert listing.left_out.counts == {BESIDE: 1}
    assert listing.notes() == [f"{listing.folder}: left out: images beside the class folders: 1 (loose.png)"]


def test_innermost_folders_are_classes_by_their_paths(make):
    listing = list_images(make(*NESTED, "animals/mammals/.thumbs/0.png"), "leaf")
    assert classes_of(listing) == {"animals/birds": 4, "animals/mammals": 4, "food": 4}
    assert listing.left_out.counts == {BESIDE: 5, HIDDEN: 1}


def test_without_classes_every_image_counts(make):
    listing = list_images(make(*NESTED), "none")
    assert classes_of(listing) == {"all": 17}
    assert not listing.left_out.counts


def test_classes_and_files_are_in_natural_order(make):
    folder = make(*(f"{name}/{i}.png" for name in range(12) for i in (10, 9, 1)), "B/1.png", "a/1.png", "c/1.png")
    listing = list_images(folder)
    assert listing.class_names == [*map(str, range(12)), "a", "B", "c"]
    assert listing.files[:4] == ["0/1.png", "0/9.png", "0/10.png", "1/1.png"]


def test_links_are_followed_and_no_file_is_twice_in_a_class(make, tmp_path):
    folder = make(*each("animals", 3), *each("food/fruit", 2), *each("far/away", 2))
    far = (folder / "far").rename(tmp_path.parent / f"{tmp_path.name}-far") / "away"
    (folder / "food" / "elsewhere.png").symlink_to("../animals/0.png")
    (folder / "food" / "again.png").symlink_to("../animals/0.png")
    (folder / "animals" / "copy.png").symlink_to("0.png")
    (folder / "food" / "nothing.png").symlink_to("gone.png")
    (folder / "food" / "round").symlink_to("..")
    (folder / "food" / "twice").symlink_to("fruit")
    (folder / "from far").symlink_to(far)
    listing = list_images(folder)
    assert classes_of(listing) == {"animals": 3, "food": 3, "from far": 2}
    assert listing.links == 3
    assert [path for path in listing.files if path.startswith("food")] == [
        "food/again.png",
        "food/fruit/0.png",
        "food/fruit/1.png",
    ]
    # food/elsewhere.png, animals/copy.png, food/round and food/twice
    assert listing.left_out.counts == {AGAIN: 4, NO_FILE: 1}


def test_hidden_files_other_kinds_and_empty_folders_are_counted(make):
    folder = make(
        "a/1.PNG", "a/2.JPeG", "a/3.tif", "a/4.webp", "a/.DS_Store", ".git/x.png", "a/notes.txt", "a/clip.mpg"
    )
    (folder / "b").mkdir()
    listing = list_images(folder)
    assert listing.files == ["a/1.PNG", "a/2.JPeG", "a/3.tif", "a/4.webp"]
    assert listing.left_out.counts == {HIDDEN: 2, NO_IMAGE: 2, EMPTY: 1}
    assert "files of other kinds: 2 (a/" in str(listing.left_out)


@pytest.mark.parametrize(("train", "held_out"), [("train", "val"), ("Training", "TEST"), ("train", "validation")])
def test_folders_train_and_val_with_equal_classes_are_the_splits(make, train, held_out):
    folder = make(*(path for n in ("cat", "dog") for path in (*each(f"{train}/{n}", 4), *each(f"{held_out}/{n}", 2))))
    listing = list_images(folder)
    assert classes_of(listing) == {"cat": 6, "dog": 6}
    assert [path for path, out in zip(listing.files, listing.held_out) if out] == [
        f"{held_out}/{name}/{i}.png" for name in ("cat", "dog") for i in range(2)
    ]
    (note,) = listing.notes()
    assert f"{train}/ is the training split (8 images), {held_out}/ is held out (4 images)" in note
    config = DataConfig(kind="folder", path=str(folder), test_fraction=0.5)
    assert [len(load_dataset(config, split)) for split in ("train", "test")] == [8, 4]


def test_a_third_split_and_loose_files_beside_splits_are_counted(make):
    folder = make(*(path for s in ("train", "val", "test") for path in each(f"{s}/cat", 3)), "x.png", "other/y.png")
    listing = list_images(folder)
    assert (len(listing.files), int(listing.held_out.sum())) == (6, 3)
    assert listing.left_out.counts == {OTHER_SPLIT: 5}


def test_splits_of_other_classes(make):
    folder = make(*each("train/cat", 2), *each("train/dog", 2), *each("val/cat", 2))
    with pytest.raises(ValueError, match=r"splits train/ and val/, but only one of them has the class dog; give both"):
        list_images(folder)
    assert classes_of(list_images(folder / "train")) == {"cat": 2, "dog": 2}


def test_train_and_test_may_be_classes(make):
    folder = make(*each("train/steam", 2), *each("train/diesel", 2), *each("test/tubes", 3))
    assert classes_of(list_images(folder)) == {"test": 3, "train": 4}


def test_splits_without_classes(make):
    folder = make(*each("train", 3), *each("test", 2))
    listing = list_images(folder, "none")
    assert listing.held_out.tolist().count(True) == 2
    assert list_images(make(*each("cars", 1)), "none").held_out is None  # then they are folders like any other


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["1.png", "2.png"], "holds 2 images, but no class folders; .* or set data.classes to none"),
        (["a/notes.txt"], r"holds no images \(left out: files of other kinds: 1 \(a/notes.txt\).*\); give a folder"),
    ],
)
def test_what_cannot_be_listed_is_one_line(make, paths, expected):
    with pytest.raises(ValueError, match=expected) as caught:
        load_dataset(DataConfig(kind="folder", path=str(make(*paths))), "train")
    assert "\n" not in str(caught.value)
    assert "data.path" in str(caught.value)


def test_names_that_are_not_utf8_are_listed_and_shown(make, tmp_path):
    try:
        make("a/1.png").joinpath(os.fsdecode(b"a/\xff.png")).touch()
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    data = load_dataset(DataConfig(kind="folder", path=str(tmp_path), test_fraction=0), "train")
    assert [data.name(i).removeprefix(f"{tmp_path}/") for i in range(2)] == ["a/1.png", "a/�.png"]
    assert len(data.identity()) == 64


def test_the_hash_sees_names_classes_and_order(make):
    folder = make(*each("a", 3), *each("b", 3))
    config = DataConfig(kind="folder", path=str(folder))
    before = load_dataset(config, "train").identity()
    assert load_dataset(config, "test", seed=5).identity() == before
    (folder / "a" / "0.png").rename(folder / "b" / "00.png")
    assert load_dataset(config, "train").identity() != before


def test_ten_thousand_files_are_ready_in_a_second(make):
    """Processor time, which a busy machine does not change; it takes about a third of the second."""
    folder = make(*(f"{name}/{i}.jpg" for name in range(20) for i in range(500)))
    load_dataset(DataConfig(kind="folder", path=str(folder)), "train")  # imports
    start = time.process_time()
    assert len(load_dataset(DataConfig(kind="folder", path=str(folder), test_fraction=0), "train")) == 10_000
    assert time.process_time() - start < 1


def test_metadata_gives_captions_with_or_without_classes(make):
    folder = make(*each("a", 2), *each("b", 3))
    lines = [f'{{"file_name": "{name}", "text": "about {name}"}}' for name in ("a/0.png", "a/1.png", "b/2.png")]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n\n")
    config = {"kind": "folder", "path": str(folder), "caption_column": "text", "test_fraction": 0.0}
    plain = load_dataset(DataConfig(**config), "train")
    assert plain.class_names == ["all"]
    assert [plain.captions(i) for i in range(3)] == [("about a/0.png",), ("about a/1.png",), ("about b/2.png",)]
    assert dict(plain.table.left_out) == {NO_CAPTION: 2}
    assert load_dataset(DataConfig(**config, classes="top"), "train").labels.tolist() == [0, 0, 1]
    (folder / "b" / "metadata.csv").write_text("file_name,text\n0.png,zero\n")
    assert load_dataset(DataConfig(**config), "train").captions(2) == ("zero",)
    (folder / "b" / "metadata.csv").write_text("file_name,text\n2.png,again\n")
    with pytest.raises(ValueError, match=r"describes b/2.png, which is described before; remove one"):
        load_dataset(DataConfig(**config), "train")
    (folder / "b" / "metadata.csv").write_text("file_name\n0.png,more\n")
    with pytest.raises(ValueError, match=r"metadata.csv has the columns file_name, None in row 1, and no text"):
        load_dataset(DataConfig(**config), "train")
    (folder / "b" / "metadata.csv").write_text("file_name,text\n../../x.png,out\n")
    with pytest.raises(ValueError, match=r"describe 1 images that are not listed, as \.\./x.png; add the files"):
        load_dataset(DataConfig(**config), "train")
