"""GenEval's files: lines of our own making in its format, read; images written as its scorer finds them."""

import json
import re

import numpy as np
import pytest
import torch
from geneval import Required, missing, read_prompts, sample_all, write_images
from PIL import Image

LINES = [
    {"tag": "single_object", "include": [{"class": "lamp", "count": 1}], "prompt": "a photo of a lamp"},
    {
        "tag": "counting",
        "include": [{"class": "spoon", "count": 2}],
        "exclude": [{"class": "spoon", "count": 3}],
        "prompt": "a photo of two spoons",
    },
    {
        "tag": "position",
        "include": [{"class": "hat", "count": 1}, {"class": "bee", "count": 1, "position": ["left of", 0]}],
        "prompt": "a photo of a bee left of a hat",
    },
    {
        "tag": "color_attr",
        "include": [{"class": "cup", "count": 1, "color": "red"}, {"class": "box", "count": 1, "color": "blue"}],
        "prompt": "a photo of a red cup and a blue box",
    },
]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return path


def images_of(number, count=4):
    return torch.full((count, 3, 8, 8), number / 10) + torch.arange(count)[:, None, None, None] / 100


def found_by_the_scorer(folder):
    """As GenEval's scorer walks it: numbered folders, one JSON object each, files whose names begin as NUMBER.png."""
    results = []
    for place in folder.iterdir():
        if not place.is_dir() or not place.name.isdigit():
            continue
        with (place / "metadata.jsonl").open() as stream:
            metadata = json.load(stream)
        names = [path for path in (place / "samples").iterdir() if re.match(r"\d+\.png", path.name)]
        results += [(int(place.name), metadata, path) for path in names]
    return sorted(results, key=lambda result: (result[0], result[2].name))


def test_prompts_are_read_as_values(file):
    prompts = read_prompts(file)
    assert [p.tag for p in prompts] == ["single_object", "counting", "position", "color_attr"]
    assert prompts[1].include == (Required("spoon", 2),)
    assert prompts[1].exclude == (Required("spoon", 3),)
    assert prompts[2].include[1] == Required("bee", 1, position=("left of", 0))
    assert prompts[3].include == (Required("cup", 1, "red"), Required("box", 1, "blue"))
    assert prompts[0].prompt == "a photo of a lamp"
    assert [json.loads(p.line) for p in prompts] == LINES


def test_the_scorer_finds_every_image_with_its_line(file, tmp_path):
    prompts, folder = read_prompts(file), tmp_path / "images"
    assert sample_all(folder, prompts, lambda text, number: images_of(number), log=lambda line: None) == 4
    results = found_by_the_scorer(folder)
    assert [(number, path.name) for number, _, path in results] == [
        (number, f"{k:04}.png") for number in range(4) for k in range(4)
    ]
    assert [metadata for _, metadata, _ in results[::4]] == LINES
    for number, _, path in results:
        image = Image.open(path)
        assert (image.mode, image.size) == ("RGB", (8, 8))
        value = round((number / 10 + int(path.stem) / 100 + 1) * 127.5)
        assert np.unique(np.array(image)).tolist() == [value]
    grid = np.array(Image.open(folder / "00002" / "grid.png"))
    assert grid.shape == (8 + 2, 4 * 9 + 1, 3)
    assert sorted(path.name for path in folder.iterdir()) == ["00000", "00001", "00002", "00003"]


def test_a_stopped_call_goes_on_and_keeps_what_is_there(file, tmp_path):
    prompts, folder, drawn = read_prompts(file), tmp_path / "images", []

    def draw(text, number):
        drawn.append(text)
        if len(drawn) == 3:
            raise KeyboardInterrupt
        return images_of(number)

    with pytest.raises(KeyboardInterrupt):
        sample_all(folder, prompts, draw, log=lambda line: None)
    (folder / "00002" / "samples").mkdir(parents=True)
    (folder / "00002" / "samples" / "0007.png").write_bytes(b"half of an image")
    before = (folder / "00001" / "samples" / "0003.png").stat().st_mtime_ns
    assert missing(folder, prompts) == [2, 3]
    assert sample_all(folder, prompts, draw, log=lambda line: None) == 2
    assert drawn == [p.prompt for p in (*prompts[:3], *prompts[2:])]
    assert (folder / "00001" / "samples" / "0003.png").stat().st_mtime_ns == before
    assert len(found_by_the_scorer(folder)) == 16
    assert missing(folder, prompts) == []


def test_images_of_other_prompts_are_not_mixed_in(file, tmp_path):
    prompts, folder = read_prompts(file), tmp_path / "images"
    write_images(folder, 1, prompts[0], images_of(0))
    with pytest.raises(ValueError, match=r"00001/metadata.jsonl belongs to another prompt than 'a photo of two"):
        missing(folder, prompts)
    with pytest.raises(ValueError, match="00001 holds images already; choose another folder"):
        write_images(folder, 1, prompts[1], images_of(1))
    with pytest.raises(ValueError, match="00001 is beyond the 1 prompts; choose another folder"):
        missing(folder, prompts[:1])


def test_grey_images_are_refused(file, tmp_path):
    with pytest.raises(ValueError, match=r"images have the shape \(4, 1, 8, 8\); give \(images, 3, height, width\)"):
        write_images(tmp_path, 0, read_prompts(file)[0], torch.zeros(4, 1, 8, 8))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: this is no JSON"),
        ("[1]", "line 2: this is no object but list"),
        ('{"tag": "colors", "include": []}', "line 2: prompt is None; it must be a text"),
        ('{"tag": "colors", "prompt": "a cup"}', "line 2: include is missing or empty"),
        ('{"tag": "x", "prompt": "a cup", "include": "cup"}', "line 2: include is 'cup'; it must be a list of objects"),
        (
            '{"tag": "x", "prompt": "a", "include": [{"class": "cup"}]}',
            "count is None in include; it must be",
        ),
        (
            '{"tag": "x", "prompt": "a", "include": [{"class": 3, "count": 1}]}',
            "class is 3 in include; it must be",
        ),
        (
            '{"tag": "x", "prompt": "a", "include": [{"class": "cup", "count": 1, "position": ["above", "0"]}]}',
            "position is .'above', '0'. in include; it must be a relation and the index of an entry",
        ),
        (
            '{"tag": "x", "prompt": "a", "include": [{"class": "cup", "count": 1, "position": ["above", 0]}]}',
            "include 0 is above entry 0; name an earlier one",
        ),
    ],
)
def test_a_line_that_is_not_as_the_format_says_is_named(file, line, message):
    first = file.read_text().split("\n")[0]
    file.write_text(f"{first}\n{line}\n")
    with pytest.raises(ValueError, match=message):
        read_prompts(file)


def test_a_file_without_prompts_is_refused(tmp_path):
    path = tmp_path / "prompts.jsonl"
    with pytest.raises(ValueError, match=r"there is no file .*prompts.jsonl; give GenEval's evaluation_metadata.jsonl"):
        read_prompts(path)
    path.write_text("\n\n")
    with pytest.raises(ValueError, match="holds no prompts"):
        read_prompts(path)
    path.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match="is no text in UTF-8"):
        read_prompts(path)
