"""`inspect` on folders as people have them: what it says is what training sees."""

import io
import json
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from diffusion_moe.cli import main
from diffusion_moe.config import DataConfig
from diffusion_moe.data import load_dataset
from diffusion_moe.inspection.examine import examine

RNG = np.random.default_rng(0)


def photo(height=40, width=48):
    return Image.fromarray(RNG.integers(0, 255, (height, width, 3), dtype=np.uint8))


def save(image, path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def inspected(capsys):
    """Runs the command and returns its JSON."""

    def inspected(folder, *options):
        assert main(["inspect", str(folder), "--json", *options]) == 0
        return json.loads(capsys.readouterr().out)

    return inspected


def test_modes_as_training_sees_them(tmp_path, inspected):
    """16-bit grey, EXIF, hidden colours, floats and CMYK: pixels as a viewer shows them."""
    ramp = np.linspace(0, 65535, 32 * 32).reshape(32, 32)
    halves = np.zeros((32, 64, 3), np.uint8)
    halves[:, :32], halves[:, 32:] = [255, 0, 0], [0, 0, 255]
    glass = np.zeros((32, 32, 4), np.uint8)
    glass[..., 0] = 255
    glass[8:24, 8:24] = [0, 255, 0, 255]
    exif = Image.Exif()
    exif[0x0112] = 6
    save(Image.fromarray(ramp.astype(np.uint16)), tmp_path / "modes/a/grey16.png")
    save(Image.fromarray(halves), tmp_path / "modes/a/exif6.jpg", exif=exif, quality=95)
    save(Image.fromarray(glass), tmp_path / "modes/a/rgba.png")
    save(Image.fromarray(glass).convert("P"), tmp_path / "modes/a/palette.png", transparency=0)
    save(Image.fromarray((ramp / 65535).astype(np.float32)), tmp_path / "modes/b/float.tiff")
    save(Image.fromarray(halves).convert("CMYK"), tmp_path / "modes/b/cmyk.jpg", quality=95)
    found = inspected(tmp_path / "modes", "--pixels", str(tmp_path / "out" / "x.npz"), "--data.background", "#0000ff")
    assert found["modes"] == {"RGB": 1, "I;16": 1, "P": 1, "RGBA": 1, "F": 1, "CMYK": 1}
    assert found["classes"] == {"a": 4, "b": 2} and not found["unreadable"]
    with np.load(tmp_path / "out" / "x.npz") as arrays:
        images = dict(zip(arrays["files"].tolist(), arrays["images"].astype(int)))
        assert arrays["images"].dtype == np.uint8 and arrays["labels"].tolist() == [0, 0, 0, 0, 1, 1]
    expected = np.rint(ramp / 65535 * 255)
    for name in ("a/grey16.png", "b/float.tiff"):
        assert np.abs(images[name] - expected[..., None]).max() <= 1
        assert len(np.unique(images[name])) == 256
    assert np.abs(images["a/exif6.jpg"][2, 16] - [255, 0, 0]).max() < 10
    assert np.abs(images["a/exif6.jpg"][-3, 16] - [0, 0, 255]).max() < 10
    assert np.abs(images["b/cmyk.jpg"][16, 2] - [255, 0, 0]).max() < 10
    assert np.abs(images["b/cmyk.jpg"][16, -3] - [0, 0, 255]).max() < 10
    for name in ("a/rgba.png", "a/palette.png"):
        assert images[name][..., 0].max() == 0  # no hidden red
        assert images[name][16, 16].tolist() == [0, 255, 0] and images[name][0, 0].tolist() == [0, 0, 255]


def test_words_that_look_like_splits(tmp_path, inspected):
    for name in ("trains", "test tubes", "validation stamps", "cars"):
        for number in range(5):
            save(photo(), tmp_path / name / f"{number}.png")
        save(photo(), tmp_path / name / "a train in the evening.png")
    found = inspected(tmp_path)
    assert found["images"] == 24
    assert found["classes"] == {"cars": 6, "test tubes": 6, "trains": 6, "validation stamps": 6}


def test_nested_folders_links_and_loose_files(tmp_path, inspected):
    for name in ("animals/birds", "animals/mammals", "animals", "food"):
        for number in range(4):
            save(photo(), tmp_path / name / f"{number}.png")
    (tmp_path / "food/link.png").symlink_to("../animals/0.png")
    save(photo(), tmp_path / "loose.png")
    found = inspected(tmp_path)
    assert found["classes"] == {"animals": 12, "food": 5}
    assert found["ignored"] == {"images beside the class folders": 1}
    assert found["notes"][0].endswith("1 images are links, each listed where the link is")
    assert found["duplicates"]["examples"] == [["animals/0.png", "food/link.png"]]
    leaf = inspected(tmp_path, "--data.classes", "leaf")
    assert leaf["classes"] == {"animals/birds": 4, "animals/mammals": 4, "food": 5}
    assert leaf["ignored"] == {"images beside the class folders": 5}


def test_numbers_as_names(tmp_path, inspected):
    for name in range(12):
        for number in range(3):
            save(Image.fromarray(np.full((32, 32, 3), 20 * name, np.uint8)), tmp_path / str(name) / f"{number}.png")
    found = inspected(tmp_path)
    assert list(found["classes"].items()) == [(str(name), 3) for name in range(12)]
    assert (found["duplicates"]["groups"], found["duplicates"]["images"]) == (12, 24)
    assert found["duplicates"]["groups_across_split"] == 12 and found["duplicates"]["groups_across_classes"] == 0


def test_splits_made_on_purpose(tmp_path, inspected):
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            for number in range(4):
                save(photo(), tmp_path / split / name / f"{number}.png")
    found = inspected(tmp_path)
    assert (found["images"], found["held_out"], found["classes"]) == (16, 8, {"cat": 8, "dog": 8})
    assert "train/ is the training split (8 images), val/ is held out (8 images)" in found["notes"][0]


def test_damage_is_named_once_with_its_reason(tmp_path, inspected):
    for number in range(4):
        save(photo(), tmp_path / "a" / f"{number}.png")
    (tmp_path / "a/zero.png").write_bytes(b"")
    (tmp_path / "a/page.jpg").write_text("<html>404</html>")
    (tmp_path / "a/half.png").write_bytes(png(photo())[:3000])
    found = inspected(tmp_path, "--pixels", str(tmp_path / "x.npz"), "--output", str(tmp_path / "out"))
    assert found["unreadable"] == {
        "a/half.png": "image file is truncated",
        "a/page.jpg": "it is not an image that Pillow reads",
        "a/zero.png": "it is empty",
    }
    with np.load(tmp_path / "x.npz") as arrays:
        assert arrays["files"].tolist() == [f"a/{number}.png" for number in range(4)]
    assert (tmp_path / "out" / "contact-sheet.png").is_file()


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_file_is_unreadable_exactly_where_training_cannot_read_it(tmp_path, form):
    """Cut after every so many bytes: the quick look says what decoding says."""
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    photo(20, 30).save(file, form, **({"exif": exif} if form in ("PNG", "JPEG", "WEBP") else {}))
    content = file.getvalue()
    (tmp_path / "a").mkdir()
    path = tmp_path / "a" / f"x.{form.lower()}"
    for end in sorted({*range(0, len(content), max(1, len(content) // 25)), len(content) - 1, len(content)}):
        path.write_bytes(content[:end])
        data = load_dataset(DataConfig(kind="folder", path=str(tmp_path), test_fraction=0, on_corrupt="skip"), "train")
        found = examine(content[:end])
        assert bool(found.problem) == (data.decode(0) is None), (end, len(content), found.problem)
    assert (found.width, found.height) == ((20, 30) if form in ("PNG", "JPEG", "WEBP") else (30, 20))


def test_text_for_people_and_a_sheet_in_the_order_of_the_classes(tmp_path, capsys):
    for name, level in (("b10", 200), ("b9", 20)):
        for number in range(3):
            save(Image.fromarray(np.full((4, 4), level, np.uint8)), tmp_path / "in" / name / f"{number}.png")
    options = ["--data.channels=1", "--data.image_size=8", f"--output={tmp_path / 'out'}"]
    assert main(["inspect", str(tmp_path / "in"), *options]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == f"{tmp_path / 'in'}: 6 images in 2 classes, 2 of them held out"
    assert [line.split() for line in out[2:4]] == [["0", "b9", "3", "1"], ["1", "b10", "3", "1"]]
    assert "smaller than data.image_size 8, and so enlarged: 6" in out
    sheet = np.array(Image.open(tmp_path / "out" / "contact-sheet.png"))
    assert sheet[30, 220].tolist() == [20] * 3 and sheet[100, 220].tolist() == [200] * 3
    assert sheet[30, 220 + 3 * 68].tolist() == [255] * 3  # three images a class


def test_many_files_by_several_processes_are_those_of_one(tmp_path, inspected, monkeypatch):
    for number in range(200):
        save(photo(3, 4), tmp_path / "in" / f"{number % 3}" / f"{number}.png")
    found = inspected(tmp_path / "in", f"--pixels={tmp_path / 'x.npz'}", "--data.image_size=4")
    monkeypatch.setattr("diffusion_moe.inspection.examine.sys", SimpleNamespace(platform="other"))
    assert inspected(tmp_path / "in", f"--pixels={tmp_path / 'y.npz'}", "--data.image_size=4") == found
    data = load_dataset(
        DataConfig(kind="folder", path=str(tmp_path / "in"), image_size=4, channels=3, test_fraction=0), "train"
    )
    with np.load(tmp_path / "x.npz") as one, np.load(tmp_path / "y.npz") as other:
        np.testing.assert_array_equal(one["images"], other["images"])
        trained_on = (data.read_all().images.permute(0, 2, 3, 1) + 1) * 127.5
        np.testing.assert_allclose(trained_on.numpy(), one["images"], atol=1e-4)


def test_tars_and_tables(tmp_path, inspected):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for number in range(3):
            for name, content in ((f"{number}.png", png(photo())), (f"{number}.cls", str(number % 2).encode())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    found = inspected(tmp_path / "0.tar", "--data.kind=webdataset")
    assert found["classes"] == {"0": 2, "1": 1}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["{}", "--data.kind=digits"], "data.kind is digits; inspect looks at folder"),
        (["{}/gone"], "gone is not a folder; give a folder of images"),
        (["{}", "--pixels=x.bin"], "pixels is x.bin; give a file that ends in .npz"),
        (["{}", "--data.path=y"], "--data.path and"),
        (["{}", "--data.background=wite"], "data.background is 'wite'"),
        (["{}", "--data.buckets=[8x8]", "--pixels=x.npz"], "data.buckets makes images of several sizes"),
        (["--json"], "the path is missing; usage: diffusion-moe inspect PATH"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, arguments, expected):
    save(photo(), tmp_path / "a" / "0.png")
    assert main(["inspect", *(text.format(tmp_path) for text in arguments)]) == 2
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1


def test_it_needs_no_torch():
    import subprocess
    import sys

    code = "import sys, diffusion_moe.inspection.inspect, diffusion_moe.data.folder; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
