"""Loading processes: forked from a server, for every kind of data, with the batches of a single process."""

import io
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from worker_datasets import Processes, Ranges

from diffusion_moe.config import DataConfig
from diffusion_moe.data import batches_from, load_dataset
from diffusion_moe.data.dataset import load_batches

COMMON = {"image_size": 8, "channels": 3, "test_fraction": 0, "flip": True}


def png(number):
    """Random pixels, 10 x 9, as a file's content."""
    pixels = np.random.default_rng(number).integers(0, 256, (9, 10, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_folder(path):
    """Two classes of four images, each with a caption."""
    for number in range(8):
        (path / "ab"[number % 2]).mkdir(exist_ok=True)
        (path / "ab"[number % 2] / f"{number}.png").write_bytes(png(number))
    return DataConfig(kind="folder", path=str(path), **COMMON)


def write_tars(path):
    """Two tars of four images with classes."""
    for shard in range(2):
        with tarfile.open(path / f"{shard}.tar", "w") as tar:
            for number in range(4):
                for name, content in ((f"{number}.png", png(4 * shard + number)), (f"{number}.cls", b"%d" % shard)):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return DataConfig(kind="webdataset", path=str(path), **COMMON)


def write_parquet(path):
    """A table of eight images with classes."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = {"image": [{"bytes": png(i), "path": None} for i in range(8)], "label": [i % 2 for i in range(8)]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path / "train.parquet")
    return DataConfig(kind="huggingface", path=str(path), **COMMON)


WRITERS = {"folder": write_folder, "webdataset": write_tars, "huggingface": write_parquet}


def assert_equal_batches(data):
    order = list(batches_from(0, 4, len(data), 4, seed=2))
    alone, spread = (list(load_batches(data, order, workers)) for workers in (0, 2))
    for one, other in zip(alone, spread, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.positions, other.positions)
        if one.text is not None:
            assert torch.equal(one.text.features, other.text.features)
            assert torch.equal(one.text.mask, other.text.mask)


@pytest.mark.parametrize("kind", WRITERS)
def test_files_are_the_same_for_any_number_of_workers(tmp_path, kind):
    assert_equal_batches(load_dataset(WRITERS[kind](tmp_path), "train", seed=3))


def test_captions_encoded_in_memory_are_the_same_for_any_number_of_workers(text_encoder_folder):
    images = {"image_size": 16, "channels": 3, "test_fraction": 0.999}
    config = DataConfig(kind="shapes", **images, text_encoder=str(text_encoder_folder), text_length=16)
    data = load_dataset(config, "train", seed=3)
    assert data.texts is not None
    assert_equal_batches(data)


def test_workers_are_not_forks_of_this_process():
    found = list(load_batches(Processes(), [[0]] * 4, 2))
    assert len({process for process, _, _ in found}) == 2
    assert os.getpid() not in {process for process, _, _ in found} | {parent for _, parent, _ in found}
    if "forkserver" in multiprocessing.get_all_start_methods():
        assert len({parent for _, parent, _ in found}) == 1
    assert all(default for _, _, default in found)  # the server alone ignores SIGTERM


def test_many_tensors_need_no_file_each():
    """multiprocessing would send each as a file descriptor."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    data = Ranges(2000)
    resource.setrlimit(resource.RLIMIT_NOFILE, (400, limits[1]))
    try:
        found = list(load_batches(data, [[3, 1999], [4]], 1))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert [tensor.tolist() for tensors, _ in found for tensor in tensors] == [[0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3]]
    assert found[0][1].dtype == torch.bfloat16 and found[0][1].tolist() == [0, 1, 2]


KILLED = """
import os, signal
from diffusion_moe.data.dataset import load_batches
from worker_datasets import Processes

batches = load_batches(Processes(), [[0]] * 4, 2)
next(batches)
print("loaded", flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_and_their_server_end_with_a_killed_process():
    """They share its output, which ends when the last of them has."""
    path = os.pathsep.join((os.environ.get("PYTHONPATH", ""), *sys.path))
    killed = subprocess.run(
        [sys.executable, "-c", KILLED], env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE, timeout=120
    )
    assert killed.returncode == -signal.SIGKILL and killed.stdout == b"loaded\n"
