"""Captions of every kind of data set, in memory and in a cache, and which one is sampled."""

import io
import json
import tarfile

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_moe.cli import main
from diffusion_moe.config import DataConfig
from diffusion_moe.data import load_dataset
from diffusion_moe.data.order import SampledImage
from diffusion_moe.text import load_encoder


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")


def png(level, size=(8, 8)):
    file = io.BytesIO()
    Image.fromarray(np.full((*size, 3), level, dtype=np.uint8)).save(file, "png")
    return file.getvalue()


def add(tar, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def config(path, **changes):
    usual = {"image_size": 8, "channels": 3, "test_fraction": 0.0}
    return DataConfig(path=str(path), **usual | changes)


def test_folders_with_metadata(captioned_folder):
    data = load_dataset(config(captioned_folder, kind="folder", caption_column="text"), "train")
    assert len(data) == 24 and data.captions(4) == ("a green square", "a photo of a large green square")
    assert data.read([4]).images[0, :, 0, 0].tolist() == [-1, 1, -1]
    with pytest.raises(ValueError, match=r"data\.caption_column is words, but .* has the columns file_name, text"):
        load_dataset(config(captioned_folder, kind="folder", caption_column="words"), "train")


def test_columns_of_one_text_or_several(tmp_path):
    images = [{"bytes": png(level), "path": None} for level in (0, 255)]
    features = datasets.Features({"image": datasets.Image(), "one": datasets.Value("string")})
    table = datasets.Dataset.from_dict({"image": images, "one": ["a red", "a blue"]}, features=features)
    table.to_parquet(tmp_path / "data.parquet")
    own = {"kind": "huggingface", "label_column": None}
    data = load_dataset(config(tmp_path / "data.parquet", **own, caption_column="one"), "train")
    assert [data.captions(i) for i in range(2)] == [("a red",), ("a blue",)]
    with pytest.raises(ValueError, match=r"data\.caption_column is none, but"):
        load_dataset(config(tmp_path / "data.parquet", **own, caption_column="none"), "train")
    table.add_column("many", [["a", "b"], []]).save_to_disk(tmp_path / "saved")
    data = load_dataset(config(tmp_path / "saved", **own, caption_column="many"), "train")
    assert data.captions(0) == ("a", "b")
    with pytest.raises(ValueError, match=r"data\.caption_column many in row 1: expected a text or a list of texts"):
        data.captions(1)


@pytest.fixture
def tars(tmp_path):
    """Two tars; the second in a folder of its own names, with a stray file."""
    folder = tmp_path / "tars"
    folder.mkdir()
    with tarfile.open(folder / "00.tar", "w") as tar:
        for i, level in enumerate((0, 100)):
            add(tar, f"{i}.png", png(level))
            add(tar, f"{i}.txt", f"a red circle {i}".encode())
            add(tar, f"{i}.json", json.dumps({"captions": [f"first {i}", f"second {i}"]}).encode())
    with tarfile.open(folder / "01.tar", "w") as tar:
        add(tar, "part.one/7.json", json.dumps({"captions": "third"}).encode())
        add(tar, "part.one/7.png", png(200))
        add(tar, "part.one/7.txt", b"a blue one\n")
        add(tar, "notes.md", b"nothing")
    return folder


def test_webdataset_tars_are_read_in_any_order(tars):
    data = load_dataset(config(tars, kind="webdataset", caption_column="txt"), "train")
    levels = data.read([2, 0, 1]).images[:, 0, 0, 0]
    torch.testing.assert_close(levels, torch.tensor([200, 0, 100]) / 127.5 - 1)
    assert [data.captions(i) for i in range(3)] == [("a red circle 0",), ("a red circle 1",), ("a blue one",)]
    assert data.name(2).endswith("row 2 of " + str(tars) + " (01.tar/part.one/7.png)")
    many = load_dataset(config(tars, kind="webdataset", caption_column="captions"), "train")
    assert [many.captions(i) for i in range(3)] == [("first 0", "second 0"), ("first 1", "second 1"), ("third",)]
    one = load_dataset(config(tars / "01.tar", kind="webdataset"), "train")
    assert len(one) == 1 and one.captions(0) == () and one.identity() != data.identity()


def test_tars_that_cannot_be_used(tars, tmp_path):
    with pytest.raises(ValueError, match=r"sample 0 of .*00\.tar has no caption 'title'"):
        load_dataset(config(tars, kind="webdataset", caption_column="title"), "train")
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match=r"holds no \.tar files"):
        load_dataset(config(tmp_path / "none", kind="webdataset"), "train")
    (tars / "00.tar").write_bytes(b"broken" * 100)
    with pytest.raises(ValueError, match=r"00\.tar cannot be read as an uncompressed tar"):
        load_dataset(config(tars, kind="webdataset"), "train")


def sampled(epochs, images=24):
    return [SampledImage(i, epoch, i) for epoch in epochs for i in range(images)]


def encode(folder, output, vae, text, *more):
    own = ["--image_size=8", "--shard_images=10", "--device=cpu", "--text_length=12"]
    return main(["encode", str(folder), f"--vae={vae}", f"--output={output}", *text, *own, *more])


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", ["t5", "clip"])
def test_cached_features_are_those_encoded_in_memory(
    kind, tmp_path, captioned_folder, vae_folder, make_text_encoder, monkeypatch
):
    encoder = make_text_encoder(kind, tmp_path / "encoder")
    text = ["--captions=text", f"--text_encoder={encoder}"]
    assert encode(captioned_folder, tmp_path / "cache", vae_folder, text) == 0
    own = {"kind": "folder", "caption_column": "text", "text_encoder": str(encoder), "text_length": 12}
    memory = load_dataset(config(captioned_folder, **own), "train", seed=3)
    cache = load_dataset(config(tmp_path / "cache", kind="latents", image_size=8, channels=1), "train", seed=3)
    expected, batch = memory.__getitems__(sampled((0, 1))).text, cache.__getitems__(sampled((0, 1))).text
    assert torch.equal(expected.mask, batch.mask)
    torch.testing.assert_close(batch.features, expected.features, rtol=2e-3, atol=2e-3)
    assert (batch.pooled is None) == (kind == "t5")
    if batch.pooled is not None:
        torch.testing.assert_close(batch.pooled, expected.pooled, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(cache.texts.empty().features, memory.texts.empty().features, rtol=2e-3, atol=2e-3)
    # By two processes, one after the other, in the other order: the same bytes.
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert encode(captioned_folder, tmp_path / "two", vae_folder, text) == 0
    assert contents(tmp_path / "two") == contents(tmp_path / "cache")


def test_captions_may_be_added_later_and_resume_where_they_stopped(
    tmp_path, captioned_folder, vae_folder, text_encoder_folder, make_text_encoder, capsys
):
    cache, text = tmp_path / "cache", ["--captions=text", f"--text_encoder={text_encoder_folder}"]
    # The images of a folder with captions have no classes: encode them so from the start.
    assert encode(captioned_folder, cache, vae_folder, text) == 0
    whole = contents(cache)
    (cache / "captions" / "00001.json").unlink()
    (cache / "captions" / "00002.f16").write_bytes(b"short")
    with pytest.raises(ValueError, match="are not finished, or files are damaged"):
        load_dataset(config(cache, kind="latents", channels=1), "train")
    capsys.readouterr()
    assert encode(captioned_folder, cache, vae_folder, text) == 0
    assert "2 of 3 files to do here" in capsys.readouterr().out
    assert contents(cache) == whole
    other = make_text_encoder("bert", tmp_path / "bert")
    assert encode(captioned_folder, cache, vae_folder, ["--captions=text", f"--text_encoder={other}"]) == 2
    assert "holds other captions (sha256:" in capsys.readouterr().err
    assert encode(captioned_folder, cache, vae_folder, ["--captions=text"]) == 2
    assert "captions is text and text_encoder None; give both or neither" in capsys.readouterr().err


def test_the_sampled_caption_depends_on_seed_epoch_and_image_alone(captioned_folder, text_encoder_folder):
    own = {"kind": "folder", "caption_column": "text", "text_encoder": str(text_encoder_folder), "text_length": 12}
    data = load_dataset(config(captioned_folder, **own), "train", seed=1)
    whole = data.__getitems__(sampled(range(20))).text
    lengths = whole.mask.sum(dim=1).view(20, 24)
    assert set(lengths.flatten().tolist()) == {4, 8}
    assert 0.4 < float((lengths == 4).float().mean()) < 0.6
    part = data.__getitems__(sampled(range(20))[30:33]).text
    assert torch.equal(part.mask.sum(dim=1), lengths.flatten()[30:33])
    again = load_dataset(config(captioned_folder, **own), "train", seed=2).__getitems__(sampled(range(20))).text
    assert not torch.equal(again.mask.sum(dim=1).view(20, 24), lengths)


def test_a_replacement_of_an_image_brings_its_own_caption(tmp_path, captioned_folder, text_encoder_folder):
    import shutil

    shutil.copytree(captioned_folder, tmp_path / "pictures")
    (tmp_path / "pictures" / "00.png").write_bytes(b"broken")
    own = {"kind": "folder", "caption_column": "text", "text_encoder": str(text_encoder_folder), "on_corrupt": "skip"}
    data = load_dataset(config(tmp_path / "pictures", **own), "train")
    text = data.__getitems__([SampledImage(0, 0, 0)]).text
    words = load_encoder(str(text_encoder_folder), 77).encode(["a green square", "a photo of a large green square"])
    expected = words.features[0 if text.mask.sum() == 4 else 1][: int(text.mask.sum())]
    torch.testing.assert_close(text.features[0].float(), expected, rtol=2e-3, atol=2e-3)


def test_captions_that_are_missing_are_refused(captioned_folder, text_encoder_folder):
    with pytest.raises(ValueError, match=r"data\.text_encoder is .*, but the data has no captions"):
        load_dataset(DataConfig(kind="digits", text_encoder=str(text_encoder_folder)), "train")
    with pytest.raises(ValueError, match=r"caption_column is text, which is not supported for data\.kind digits"):
        DataConfig(kind="digits", caption_column="text")
    with pytest.raises(ValueError, match=r"data\.kind latents has encoded captions"):
        DataConfig(kind="latents", text_encoder="some")
