"""Data sets of `datasets`, saved on the disk in the ways there are."""

import io

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from diffusion_moe.config import DataConfig
from diffusion_moe.data import load_dataset

LEVELS = [10, 60, 110, 160, 210, 250]
LABELS = [2, 0, 1, 2, 0, 1]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Keep the cache of `datasets` in the folder of the test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")


def png(level):
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), level, dtype=np.uint8)).save(file, "png")
    return file.getvalue()


@pytest.fixture
def table():
    """Six images of one grey level each, with named classes."""
    features = datasets.Features(
        {"picture": datasets.Image(), "animal": datasets.ClassLabel(names=["cat", "dog", "hen"])}
    )
    images = [{"bytes": png(level), "path": f"{level}.png"} for level in LEVELS]
    return datasets.Dataset.from_dict({"picture": images, "animal": LABELS}, features=features)


def config(path, **changes):
    usual = {"image_column": "picture", "label_column": "animal", "test_fraction": 0.0, "channels": 3}
    return DataConfig(kind="huggingface", path=str(path), **(usual | changes))


def save(table, folder, way):
    """The data set in one way of saving it; its path."""
    if way == "save_to_disk":
        table.save_to_disk(folder / "saved")
        return folder / "saved"
    if way == "splits":
        datasets.DatasetDict({"train": table, "other": table.select([0])}).save_to_disk(folder / "saved")
        return folder / "saved"
    (folder / "saved").mkdir()
    table.to_parquet(folder / "saved" / "train-00000-of-00001.parquet")
    return folder / "saved" if way == "folder of parquet" else folder / "saved" / "train-00000-of-00001.parquet"


@pytest.mark.parametrize("way", ["save_to_disk", "splits", "folder of parquet", "parquet file"])
def test_images_and_classes_come_back_in_order(tmp_path, table, way):
    data = load_dataset(config(save(table, tmp_path, way)), "train")
    batch = data.read_all()
    assert data.class_names == ["cat", "dog", "hen"]
    assert batch.labels.tolist() == LABELS
    expected = torch.tensor(LEVELS).float()[:, None, None, None].expand(6, 3, 8, 8) / 127.5 - 1
    torch.testing.assert_close(batch.images, expected)


def test_splits_are_chosen_by_name_and_parts_by_slice(tmp_path, table):
    saved = save(table, tmp_path, "splits")
    assert len(load_dataset(config(saved, split="other"), "train")) == 1
    with pytest.raises(ValueError, match=r"data\.split is test, but it has the splits train, other"):
        load_dataset(config(saved, split="test"), "train")
    (tmp_path / "more").mkdir()
    files = save(table, tmp_path / "more", "folder of parquet")
    assert load_dataset(config(files, split="train[:50%]"), "train").labels.tolist() == LABELS[:3]
    with pytest.raises(ValueError, match='Unknown split "test"'):
        load_dataset(config(files, split="test"), "train")


def test_a_folder_of_images_can_be_read_too(tmp_path):
    for name, level in (("cat", 20), ("dog", 200)):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        (tmp_path / "pictures" / name / "0.png").write_bytes(png(level))
    changes = {"image_column": "image", "label_column": "label"}
    data = load_dataset(config(tmp_path / "pictures", **changes), "train")
    assert data.class_names == ["cat", "dog"]
    torch.testing.assert_close(data.read_all().images[:, 0, 0, 0], torch.tensor([20.0, 200.0]) / 127.5 - 1)


@pytest.mark.parametrize(
    ("values", "names", "labels"),
    [
        (["dog", "cat", "dog", "ant"], ["ant", "cat", "dog"], [2, 1, 2, 0]),
        ([10, 2, 2, 30], ["2", "10", "30"], [1, 0, 0, 2]),
        ([True, False, False, True], ["False", "True"], [1, 0, 0, 1]),
    ],
)
@pytest.mark.parametrize("records", [True, False])
def test_unnamed_labels_are_sorted_and_images_may_be_bare_bytes(tmp_path, values, names, labels, records):
    contents = [png(level) for level in LEVELS[:4]]
    images = [{"bytes": content, "path": None} for content in contents] if records else contents
    pq.write_table(pa.table({"image": images, "label": values}), tmp_path / "x.parquet")
    data = load_dataset(config(tmp_path / "x.parquet", image_column="image", label_column="label"), "train")
    batch = data.read_all()
    assert data.class_names == names
    assert batch.labels.tolist() == labels
    torch.testing.assert_close(batch.images[:, 0, 0, 0], torch.tensor(LEVELS[:4]).float() / 127.5 - 1)


def test_without_a_label_column_there_is_one_class(tmp_path, table):
    data = load_dataset(config(save(table, tmp_path, "save_to_disk"), label_column=None), "train")
    assert data.class_names == ["all"]
    assert data.labels.tolist() == [0] * 6


def test_unreadable_rows_are_named_by_number(tmp_path):
    images = [{"bytes": png(9), "path": "a.png"}, {"bytes": b"broken", "path": "b.png"}, None]
    pq.write_table(pa.table({"picture": images, "animal": ["x", "x", "y"]}), tmp_path / "x.parquet")
    path = tmp_path / "x.parquet"
    data = load_dataset(config(path), "train")
    for row, name in ((1, r"row 1 of .*x\.parquet \(b\.png\)"), (2, r"row 2 of .*x\.parquet \(it is empty\)")):
        with pytest.raises(ValueError, match=f"cannot read image {name}"):
            data.read([row])
    batch = load_dataset(config(path, on_corrupt="skip"), "train").read_all()
    assert list(batch.skipped_names) == [f"row 1 of {path} (b.png)", f"row 2 of {path}"]
    assert batch.labels.tolist() == [0, 0, 0]


MISTAKES = {
    "image column": ({"image_column": "img"}, r"data.image_column is img, but .* has the columns picture, animal"),
    "label column": ({"label_column": "y"}, r"data.label_column is y, but .* has the columns picture, animal"),
    "no images": ({"image_column": "number"}, r"data.image_column number of .* holds Value\('int64'\)"),
    "no classes": ({"label_column": "fraction"}, r"data.label_column fraction holds Value\('float64'\); give a column"),
    "empty labels": ({"label_column": "hole"}, r"data.label_column hole is empty \(null or -1\) in some rows"),
    "unnamed classes": ({"label_column": "unknown"}, r"data.label_column unknown is empty"),
    "a revision": ({"revision": "main"}, r"data.revision is main, but .* is no data set of the hub; remove it"),
    "a split": ({"split": "test"}, r"data.split is test, but it was saved without splits; remove it"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_column_is_one_line_that_lists_those_there_are(tmp_path, table, mistake):
    changes, expected = MISTAKES[mistake]
    if mistake not in ("image column", "label column"):
        table = table.add_column("number", [1] * 6).add_column("fraction", [0.5] * 6)
        table = table.add_column("hole", ["a", None] * 3)
        table = table.add_column("unknown", [-1] * 6).cast_column("unknown", datasets.ClassLabel(names=["a"]))
    path = save(table, tmp_path, "save_to_disk")
    with pytest.raises(ValueError, match=expected) as caught:
        load_dataset(config(path, **changes), "train")
    assert "\n" not in str(caught.value)


def test_a_wrong_path_is_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.parquet").write_bytes(b"nothing")
    (tmp_path / "script").mkdir()
    (tmp_path / "script" / "script.py").write_text("raise SystemExit('it ran')")
    cases = {
        "nobody/nothing": "is not there, and the hub's data set of that name cannot be read",
        str(tmp_path / "empty"): "cannot be read: The directory at .* doesn't contain any data files",
        str(tmp_path / "bad.parquet"): "cannot be read",
        str(tmp_path / "script"): "scripts are no longer supported",
    }
    for path, expected in cases.items():
        with pytest.raises(ValueError, match=expected) as caught:
            load_dataset(config(path), "train")
        assert "\n" not in str(caught.value)


def test_options_of_another_kind_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"image_column is picture, which is not supported for data\.kind folder"):
        DataConfig(kind="folder", path="x", image_column="picture")
    with pytest.raises(ValueError, match=r"data\.path is missing; data\.kind huggingface needs it"):
        DataConfig(kind="huggingface")


def test_a_run_trains_on_it_without_classes(tmp_path, table, tiny, capsys):
    from diffusion_moe.cli import main

    path = save(table, tmp_path, "parquet file")
    options = [*tiny, "--data.kind=huggingface", f"--data.path={path}", "--data.image_column=picture"]
    options += ["--data.label_column=null", "--model.num_classes=0", "--data.test_fraction=0", "--training.steps=2"]
    assert main(["train", "digits", "--output_dir", str(tmp_path / "run"), *options, "--data.image_size=8"]) == 0
    assert "trained 2 steps" in capsys.readouterr().out


def test_parquet_files_of_no_split_and_other_splits_are_named(tmp_path, table):
    folder = tmp_path / "tables"
    folder.mkdir()
    for name in ("train-00000-of-00001", "test-00000-of-00001", "more"):
        table.to_parquet(folder / f"{name}.parquet")
    data = load_dataset(config(folder), "train")
    assert len(data) == 6
    assert list(data.notes) == [
        f"{folder}: 1 parquet files belong to no split, as {folder / 'more.parquet'}",
        f"{folder}: the split train is read; there are also test (1 files)",
    ]
