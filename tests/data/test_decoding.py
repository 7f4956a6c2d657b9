"""One decoder for every file that Pillow reads: what comes out is what a viewer shows."""

import io
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps

from diffusion_moe.config import DataConfig
from diffusion_moe.data import load_dataset
from diffusion_moe.data.decoding import (
    cover_and_crop,
    decode_image,
    image_suffixes,
    open_image,
    parse_background,
    upright_size,
)

RAMP = np.linspace(0, 1, 256).reshape(16, 16)


def encoded(image, form, **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def levels(content, channels=1):
    return np.array(decode_image(content, channels))


def as_tiff(values, sample_format=1, photometric=1):
    """A TIFF of integers, which Pillow does not write of all types, by hand."""
    values = np.ascontiguousarray(values)
    entries = [
        *((256, 4, values.shape[1]), (257, 4, values.shape[0]), (258, 3, 8 * values.itemsize), (259, 3, 1)),
        *((262, 3, photometric), (273, 4, 8), (277, 3, 1), (278, 4, values.shape[0]), (279, 4, values.nbytes)),
        (339, 3, sample_format),
    ]
    directory = len(entries).to_bytes(2, "little") + b"".join(
        tag.to_bytes(2, "little") + kind.to_bytes(2, "little") + (1).to_bytes(4, "little") + value.to_bytes(4, "little")
        for tag, kind, value in entries
    )
    header = b"II*\0" + (8 + values.nbytes).to_bytes(4, "little")
    return header + values.tobytes() + directory + bytes(4)


def as_fits(values):
    """A FITS file of int32, whose first row is the lowest."""
    cards = (
        "SIMPLE  = T",
        "BITPIX  = 32",
        "NAXIS   = 2",
        f"NAXIS1  = {values.shape[1]}",
        f"NAXIS2  = {values.shape[0]}",
    )
    header = "".join(f"{card:80}" for card in (*cards, "END")).ljust(2880)
    return header.encode() + values[::-1].astype(">i4").tobytes()


WHITE = {
    "int32 FITS": lambda: as_fits(np.rint(RAMP * (2**31 - 1)).astype(np.int32)),
    "uint16 PNG": lambda: encoded(Image.fromarray(np.rint(RAMP * 65535).astype(np.uint16)), "PNG"),
    "uint16 TIFF": lambda: as_tiff(np.rint(RAMP * 65535).astype(np.uint16)),
    "uint16 TIFF, 0 is white": lambda: as_tiff(np.rint((1 - RAMP) * 65535).astype(np.uint16), photometric=0),
    "int16 TIFF": lambda: as_tiff(np.rint(RAMP * 32767).astype(np.int16), sample_format=2),
    "uint32 TIFF": lambda: as_tiff(np.rint(RAMP * (2**32 - 1)).astype(np.uint32)),
    "int32 TIFF": lambda: as_tiff(np.rint(RAMP * (2**31 - 1)).astype(np.int32), sample_format=2),
    "uint16 PGM": lambda: b"P5 16 16 65535\n" + np.rint(RAMP * 65535).astype(">u2").tobytes(),
    "10 bits PGM": lambda: b"P5 16 16 1023\n" + np.rint(RAMP * 1023).astype(">u2").tobytes(),
    "float TIFF": lambda: encoded(Image.fromarray(RAMP.astype(np.float32)), "TIFF"),
    "uint8 PNG": lambda: encoded(Image.fromarray(np.rint(RAMP * 255).astype(np.uint8)), "PNG"),
}


@pytest.mark.parametrize("kind", WHITE)
def test_types_are_scaled_by_their_own_range(kind):
    np.testing.assert_allclose(levels(WHITE[kind]()), RAMP * 255, atol=0.51)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (RAMP * 2, "its values go from 0 to 2, but floats are read from 0 to 1; scale them"),
        (RAMP - 0.5, r"from -0\.5 to 0\.5"),
        (np.where(RAMP > 0.9, np.nan, RAMP), "from nan to nan"),
    ],
)
def test_other_ranges_are_refused(values, expected):
    with pytest.raises(ValueError, match=expected):
        levels(encoded(Image.fromarray(values.astype(np.float32)), "TIFF"))


def test_negative_integers_are_refused():
    with pytest.raises(ValueError, match="from -5 to 7, but integers are read from 0 up"):
        levels(as_tiff(np.array([[-5, 7]], np.int32), sample_format=2))


GREEN_ON_HIDDEN_RED = np.zeros((4, 4, 4), np.uint8)
GREEN_ON_HIDDEN_RED[..., 0] = 255
GREEN_ON_HIDDEN_RED[1:3, 1:3] = [0, 255, 0, 255]


@pytest.mark.parametrize("background", ["white", "black", "#204060"])
@pytest.mark.parametrize("kind", ["RGBA", "palette", "palette with several levels", "premultiplied"])
def test_transparency_lies_over_the_background(kind, background):
    image = Image.fromarray(GREEN_ON_HIDDEN_RED)
    if kind == "RGBA":
        content = encoded(image, "PNG")
    elif kind == "palette":
        content = encoded(image.convert("P", palette=Image.Palette.ADAPTIVE), "GIF", transparency=0)
        palette = Image.new("P", (4, 4))
        palette.putpalette([255, 0, 0, 0, 255, 0])
        palette.putdata([int(pixel[1] > 0) for pixel in image.getdata()])
        content = encoded(palette, "PNG", transparency=0)
    elif kind == "palette with several levels":
        content = encoded(image.quantize(), "PNG")
    else:
        content = encoded(image, "WEBP", lossless=True, exact=True)
    expected = np.full((4, 4, 3), parse_background(background), np.uint8)
    expected[1:3, 1:3] = [0, 255, 0]
    np.testing.assert_array_equal(np.array(decode_image(content, 3, parse_background(background))), expected)


def test_half_transparent_is_half_background():
    content = encoded(Image.new("LA", (2, 2), (0, 128)), "PNG")
    assert levels(content).tolist() == [[127, 127]] * 2
    assert np.array(decode_image(content, 1, (0, 0, 0))).max() == 0


def test_one_transparent_level_of_16_bits():
    content = encoded(Image.fromarray(np.array([[0, 65535]], np.uint16)), "PNG")
    chunk = b"tRNS" + (0).to_bytes(2, "big")
    import zlib

    start = content.index(b"IDAT") - 4
    content = content[:start] + (2).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big") + content[start:]
    assert np.array(decode_image(content, 1, (100, 100, 100))).tolist() == [[100, 255]]


def test_a_wrong_background_is_one_line():
    with pytest.raises(ValueError, match=r"data.background is 'wite'; give a colour such as white or #8040ff"):
        parse_background("wite")


MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16")
TURNS = {
    **{1: [], 2: [Image.Transpose.FLIP_LEFT_RIGHT], 3: [Image.Transpose.ROTATE_180]},
    **{4: [Image.Transpose.FLIP_TOP_BOTTOM], 5: [Image.Transpose.TRANSPOSE], 6: [Image.Transpose.ROTATE_270]},
    **{7: [Image.Transpose.TRANSVERSE], 8: [Image.Transpose.ROTATE_90]},
}


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(MODES),
    *(st.integers(1, 9),) * 2,
    st.sampled_from(sorted(TURNS)),
    st.sampled_from([1, 3]),
    st.integers(0, 2**32 - 1),
)
def test_any_mode_size_and_orientation(mode, height, width, orientation, channels, seed):
    """The upright image of the same file without orientation, turned by hand; and it covers what it is cropped to."""
    rng = np.random.default_rng(seed)
    if mode == "I;16":
        stored = Image.fromarray(rng.integers(0, 2**16, (height, width), dtype=np.uint16))
    else:
        shape = (height, width, {"LA": 2, "RGB": 3, "P": 3, "RGBA": 4, "CMYK": 4}.get(mode, 1))
        pixels = (
            rng.integers(0, 256, shape, dtype=np.uint8).squeeze(2)
            if shape[2] == 1
            else rng.integers(0, 256, shape, dtype=np.uint8)
        )
        stored = Image.fromarray(pixels, "CMYK") if mode == "CMYK" else Image.fromarray(pixels)
        stored = stored if stored.mode == mode else stored.convert(mode)
    form = "TIFF" if mode == "CMYK" else "PNG"
    exif = Image.Exif()
    exif[0x0112] = orientation
    plain = decode_image(encoded(stored, form), channels)
    turned = encoded(stored, form, exif=exif)
    expected = plain
    for step in TURNS[orientation]:
        expected = expected.transpose(step)
    found = decode_image(turned, channels)
    assert found.mode == ("L" if channels == 1 else "RGB")
    np.testing.assert_array_equal(np.array(found), np.array(expected))
    with open_image(turned) as opened:
        assert upright_size(opened) == (found.height, found.width)
    assert cover_and_crop(found, 3, 5).size == (5, 3)
    if mode == "RGB" and channels == 3:
        np.testing.assert_array_equal(np.array(plain), np.array(stored))


def test_broken_exif_is_no_reason_to_stop():
    content = encoded(Image.new("RGB", (3, 2), "red"), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x05broken")
    assert levels(content, 3).shape == (2, 3, 3)


def swapped_profile():
    """sRGB with the signatures of its red and blue primaries swapped, so that its red is blue, under another name."""
    content = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    tags = content[132 : 132 + 12 * int.from_bytes(content[128:132], "big")]
    swapped = tags.replace(b"rXYZ", b"----").replace(b"bXYZ", b"rXYZ").replace(b"----", b"bXYZ")
    assert swapped != tags
    content = content.replace(tags, swapped)
    return content.replace("sRGB".encode("utf-16-be"), "RGBs".encode("utf-16-be"))


def test_profiles_become_srgb():
    swapped = swapped_profile()
    image = Image.new("RGB", (2, 2), (250, 10, 20))
    for source in (image, image.convert("P", palette=Image.Palette.ADAPTIVE), image.convert("RGBA")):
        found = levels(encoded(source, "PNG", icc_profile=swapped), 3)
        assert np.abs(found[0, 0].astype(int) - [20, 10, 250]).max() <= 3
    assert levels(encoded(image, "PNG", icc_profile=b"broken"), 3)[0, 0].tolist() == [250, 10, 20]
    grey = Image.new("L", (2, 2), 77)  # with a profile for three colours, which viewers ignore
    assert levels(encoded(grey, "PNG", icc_profile=swapped)).tolist() == [[77, 77]] * 2


def test_the_first_frame_of_an_animation():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    for form in ("GIF", "WEBP", "PNG", "TIFF"):
        options = {"lossless": True} if form == "WEBP" else {}
        content = encoded(frames[0], form, save_all=True, append_images=frames[1:], **options)
        assert levels(content, 3)[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b"", "it is empty"), (b"<html>404</html>", "it is not an image that Pillow reads")],
)
def test_files_that_are_no_images_are_refused_with_the_reason(content, expected):
    with pytest.raises(ValueError, match=expected):
        levels(content)


def test_no_other_program_runs_for_a_file_of_any_name():
    """EPS is handed to Ghostscript by Pillow; here it is not read, whatever its ending."""
    content = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\n"
    with pytest.raises(ValueError, match="not an image that Pillow reads"):
        levels(content)
    assert {".jpg", ".png", ".webp", ".tif", ".bmp", ".gif", ".avif", ".jp2", ".tga"} <= image_suffixes()
    assert not {".eps", ".ps", ".mpg", ".h5", ".txt", ".json", ""} & image_suffixes()


def test_the_bomb_limit_is_one_line_and_warnings_stay_inside(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    Image.new("1", (50, 50)).save(tmp_path / "a" / "large.png")
    Image.new("1", (40, 40)).save(tmp_path / "a" / "warned.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1200)
    data = load_dataset(DataConfig(kind="folder", path=str(tmp_path), test_fraction=0), "train")
    expected = (
        r"cannot read image .*a/large.png \(it has more than 2400 pixels, .*; make it smaller\); remove it, or set"
    )
    with pytest.raises(ValueError, match=expected):
        data.read([0])
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always")
        warnings.filterwarnings("ignore", module=r"PIL\.")  # as importing the decoder does
        data.read([1])
    assert not caught


def test_center_crop_takes_the_middle():
    pixels = np.zeros((10, 30), dtype=np.uint8)
    pixels[:, 10:20] = 200
    assert np.array(cover_and_crop(Image.fromarray(pixels), 10, 10)).min() == 200
    assert cover_and_crop(Image.new("L", (7, 101)), 5, 5).size == (5, 5)


def test_images_twice_too_large_are_halved_by_means_first():
    """ADM's rule: at twice the size and four times it, every pixel is the mean of a square."""
    pixels = np.random.RandomState(0).randint(0, 255, (16, 24), dtype=np.uint8)
    halved = np.array(cover_and_crop(Image.fromarray(pixels), 8, 8))
    means = pixels.reshape(8, 2, 12, 2).mean((1, 3))[:, 2:10]
    np.testing.assert_allclose(halved, means, atol=1.01)  # Pillow rounds rows, then columns
    quartered = np.array(cover_and_crop(Image.fromarray(pixels), 4, 4))
    np.testing.assert_allclose(quartered, pixels.reshape(4, 4, 6, 4).mean((1, 3))[:, 1:5], atol=2.01)
    # One pixel less than twice: bicubic alone.
    smaller = Image.fromarray(pixels[:15, :15])
    np.testing.assert_array_equal(cover_and_crop(smaller, 8, 8), smaller.resize((8, 8), Image.Resampling.BICUBIC))


def test_training_evaluation_and_both_other_kinds_decode_alike(tmp_path):
    """One transparent, turned picture by every way in."""
    import tarfile

    import datasets

    from diffusion_moe.evaluation.images import FolderImages
    from diffusion_moe.pixels import to_uint8
    from diffusion_moe.sampling.generate import SamplingStats

    (tmp_path / "pictures" / "a").mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    file = tmp_path / "pictures" / "a" / "0.png"
    Image.fromarray(np.random.RandomState(0).randint(0, 255, (9, 14, 4), dtype=np.uint8)).save(file, exif=exif)
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        tar.add(file, "0.png")
    table = datasets.Dataset.from_dict({"image": [{"bytes": file.read_bytes(), "path": None}]})
    table.to_parquet(tmp_path / "x.parquet")
    upright = ImageOps.exif_transpose(Image.open(file))
    shown = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright).convert("RGB")
    expected = np.array(cover_and_crop(shown, 9, 9)).transpose(2, 0, 1)[None]
    common = {"image_size": 9, "channels": 3, "test_fraction": 0.0}
    ways = [
        load_dataset(DataConfig(kind="folder", path=str(tmp_path / "pictures"), **common), "train"),
        load_dataset(DataConfig(kind="webdataset", path=str(tmp_path / "0.tar"), **common), "train"),
        load_dataset(
            DataConfig(kind="huggingface", path=str(tmp_path / "x.parquet"), label_column=None, **common), "train"
        ),
    ]
    found = [to_uint8(way.read([0]).images).numpy() for way in ways]
    found += [
        images.numpy()
        for images in FolderImages(tmp_path / "pictures", image_size=9).read(range(1), 1, SamplingStats())
    ]
    np.testing.assert_allclose(found[0], expected, atol=1)  # Pillow's two ways to blend round differently
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])
