"""The selection of pictures from a collection of clip art, on a small generated one."""

import json
from pathlib import Path

import numpy as np
import pictures
import pytest
from PIL import Image, ImageDraw

from diffusion_moe.cli import main
from diffusion_moe.config import read_recipe
from diffusion_moe.data import load_dataset

TITLED = """<?xml version="1.0"?>
<svg xmlns="http://www.w3.org/2000/svg" xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<metadata><rdf:RDF><Work xmlns="http://web.resource.org/cc/"><title xmlns="http://purl.org/dc/elements/1.1/">
 A Big  Fish, 01</title></Work></rdf:RDF></metadata></svg>"""


def drawing(number, size=200, turn=False):
    """A distinct drawing on transparent ground: coloured squares of a 3 x 3 grid, by the number's bits."""
    image = Image.new("RGBA", (size + 100, size + 40))
    pen, side = ImageDraw.Draw(image), size // 3
    for cell in range(9):
        row, column = divmod(cell, 3)
        color = "red" if number >> cell & 1 else ("blue", "green", "yellow")[column]
        left = (2 - column if turn else column) * side
        pen.rectangle((50 + left, 20 + row * side, 50 + left + side - 1, 20 + (row + 1) * side - 1), fill=color)
    return image


@pytest.fixture
def collection(tmp_path):
    """Twenty fish and twenty boats, and all that the rule drops."""
    root = tmp_path / "collection"

    def save(image, name):
        path = root / "png" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)

    for number in range(20):
        save(drawing(number), f"fish/sea/fish-{number:02d}_someone_01.png")
        save(drawing(511 - number), f"boats/boat-{number:02d}.png")
    save(drawing(3), "fish/sea/same.png")
    save(drawing(3, turn=True), "fish/sea/turned.png")
    save(drawing(3, size=100), "fish/sea/smaller.png")
    save(Image.new("RGBA", (64, 64)), "fish/clear.png")
    save(Image.new("RGB", (64, 64), "white"), "fish/white.png")
    save(drawing(44, size=15), "fish/tiny.png")
    save(drawing(44).resize((900, 40)), "fish/long.png")
    save(drawing(44), "fish/red_button_01.png")
    save(drawing(45), "shapes/stars/star.png")
    save(drawing(46), "rare/one.png")
    save(drawing(47), "beside.png")
    (root / "png" / "fish" / "broken.png").write_bytes(b"no image")
    title = root / "svg" / "fish" / "sea" / "fish-00_someone_01.svg"
    title.parent.mkdir(parents=True)
    title.write_text(TITLED)
    (title.parent / "fish-01_someone_01.svg").write_text("<svg")
    hairlines = Image.new("RGB", (400, 400), "white")
    ImageDraw.Draw(hairlines).line((0, 0, 399, 399), fill="black")
    save(hairlines, "fish/line.png")
    return root


def content(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_no_picture_is_dropped_by_its_reason(collection, tmp_path):
    counts = pictures.select(collection, tmp_path / "out")
    assert counts == {
        "fish": 20,
        "boats": 20,
        "dropped: folder or name": 3,
        "dropped: like another": 3,
        "dropped: empty": 2,
        "dropped: too small": 1,
        "dropped: too long": 1,
        "dropped: almost empty at 32 x 32 pixels": 1,
        "dropped: unreadable": 1,
        "dropped: too many of one folder": 0,
        "dropped: class too small": 1,
    }


def test_pictures_are_squares_without_the_white_frame(collection, tmp_path):
    pictures.select(collection, tmp_path / "out")
    image = Image.open(tmp_path / "out" / "boats" / "boat-00.png")
    assert image.size == (pictures.SIZE, pictures.SIZE) and image.mode == "RGB"
    drawn = np.asarray(image).min(2) < 128
    margin = pictures.SIZE // 16
    rows, columns = np.flatnonzero(drawn.any(1)), np.flatnonzero(drawn.any(0))
    assert (rows[0], rows[-1]) == (columns[0], columns[-1]) == (margin, pictures.SIZE - margin - 1)


def test_captions_are_titles_or_names(collection, tmp_path):
    pictures.select(collection, tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out" / "metadata.jsonl").read_text().splitlines()]
    captions = {line["file_name"]: line["text"] for line in lines}
    assert len(captions) == 40
    assert captions["fish/sea-fish-00_someone_01.png"] == "a big fish"
    assert captions["fish/sea-fish-01_someone_01.png"] == "fish someone"
    assert captions["boats/boat-07.png"] == "boat"


def test_the_folder_is_the_same_for_any_number_of_processes(collection, tmp_path):
    pictures.select(collection, tmp_path / "one")
    pictures.select(collection, tmp_path / "two", workers=2)
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_a_large_folder_keeps_evenly_spaced_pictures(collection, tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "MOST", 10)
    monkeypatch.setattr(pictures, "FEWEST", 5)
    counts = pictures.select(collection, tmp_path / "out")
    assert counts["dropped: too many of one folder"] == 20
    kept = sorted(path.stem for path in (tmp_path / "out" / "boats").iterdir())
    assert kept == [f"boat-{number:02d}" for number in range(0, 20, 2)]


def test_the_folder_trains_with_classes_or_with_captions(collection, tmp_path):
    pictures.select(collection, tmp_path / "out")
    path = f"--data.path={tmp_path / 'out'}"
    data = load_dataset(read_recipe("pictures", [path]).data, "train")
    assert data.class_names == ["boats", "fish"] and len(data) == 36
    assert data.read([0]).images.shape == (1, 3, 32, 32)
    captioned = load_dataset(read_recipe("pictures", [path, "--data.caption_column=text"]).data, "train")
    assert captioned.captions(0) == ("boat",)


def test_mistakes_are_messages(collection, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no PNG files"):
        pictures.select(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(ValueError, match="is not empty; choose another folder"):
        pictures.select(collection, collection)


def test_a_missing_folder_names_the_command_that_makes_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "pictures"]) == 2
    expected = "data.path pictures is not a folder; make it with `examples/pictures.sh pictures`\n"
    assert capsys.readouterr().err.endswith(expected)
    assert not Path("runs").exists()
