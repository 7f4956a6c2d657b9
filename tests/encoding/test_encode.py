"""A cache is the VAE's answers, whoever writes it and however often it is stopped."""

import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from diffusion_moe.cli import main
from diffusion_moe.config import DataConfig
from diffusion_moe.data import load_dataset
from diffusion_moe.data.latents import read_header, shard_path
from diffusion_moe.encoding.encode import encode
from diffusion_moe.encoding.options import EncodeOptions
from diffusion_moe.randomness import normal

SIZE, SHARD = 16, 4


def quietly(line):
    """A log that shows nothing."""


def images_of(folder, **changes):
    return DataConfig(kind="folder", path=str(folder), image_size=SIZE, **changes)


def write(folder, pictures, vae_folder, on_corrupt="error", num_workers=0, **changes):
    options = EncodeOptions(
        vae=str(vae_folder), output=folder, **({"shard_images": SHARD, "batch_size": 3, "device": "cpu"} | changes)
    )
    return encode(images_of(pictures, on_corrupt=on_corrupt, num_workers=num_workers), options, quietly)


def contents(folder):
    """Every visible file by its name."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def stored(folder):
    """The whole cache as one array, (images, views, parts, C, H, W), float32."""
    header = read_header(folder)
    raw = b"".join(shard_path(folder, number).read_bytes() for number in range(header.plan.shards))
    return torch.from_numpy(np.frombuffer(raw, "<f2").reshape(-1, *header.plan.image_shape).astype(np.float32))


@pytest.fixture(scope="module")
def cache(tmp_path_factory, pictures, vae_folder):
    """A finished cache of all pictures."""
    folder = tmp_path_factory.mktemp("cache") / "whole"
    write(folder, pictures, vae_folder)
    return folder


@torch.no_grad()
def posterior(pictures, vae_folder):
    """Means and deviations of all images and of the mirrored ones, (images, views, parts, C, H, W)."""
    vae = AutoencoderKL.from_pretrained(vae_folder).eval()
    data = load_dataset(images_of(pictures, channels=3, test_fraction=0), "train").read_all().images
    views = [vae.encode(images).latent_dist for images in (data, data.flip(-1))]
    return torch.stack([torch.stack((view.mean, view.std), dim=1) for view in views], dim=1)


def test_the_cache_holds_mean_and_deviation_of_each_image_and_its_mirror(cache, pictures, vae_folder):
    torch.testing.assert_close(stored(cache), posterior(pictures, vae_folder), rtol=1e-3, atol=1e-5)
    assert not torch.equal(stored(cache)[:, 0], stored(cache)[:, 1])


def test_the_header_says_what_it_holds(cache, pictures, vae_folder):
    header = read_header(cache)
    plan, values = header.plan, stored(cache).double()
    assert plan.latent_shape == (4, SIZE // 2, SIZE // 2)
    assert plan.class_names == ("ant", "bee")
    assert header.labels.tolist() == [0] * 7 + [1] * 7
    assert [shard.images for shard in header.shards] == [4, 4, 4, 2]
    assert (plan.space.vae, plan.space.scaling.scale, plan.space.scaling.shift) == (str(vae_folder), (0.5,), (0.1,))
    assert (plan.data["path"], plan.image_size, plan.images) == (str(pictures), SIZE, 14)
    mean, std = values[:, :, 0], values[:, :, 1]
    expected = mean.mean((0, 1, 3, 4))
    variance = (mean**2 + std**2).mean((0, 1, 3, 4)) - expected**2
    np.testing.assert_allclose(header.channel_mean, expected, rtol=1e-9)
    np.testing.assert_allclose(header.channel_std, variance.sqrt(), rtol=1e-9)


def test_samples_are_functions_of_seed_view_and_index(tmp_path, pictures, vae_folder):
    write(tmp_path / "cache", pictures, vae_folder, store="samples", seed=5)
    expected = []
    for view, moments in enumerate(posterior(pictures, vae_folder).unbind(1)):
        noise = normal(5, "posterior", view, torch.arange(14), (4, 8, 8))
        expected.append(moments[:, 0] + moments[:, 1] * noise)
    found = stored(tmp_path / "cache")
    assert found.shape == (14, 2, 1, 4, 8, 8)
    torch.testing.assert_close(found[:, :, 0], torch.stack(expected, dim=1), rtol=1e-3, atol=1e-3)


def test_without_flip_there_is_one_view(tmp_path, cache, pictures, vae_folder):
    write(tmp_path / "cache", pictures, vae_folder, flip=False)
    assert torch.equal(stored(tmp_path / "cache"), stored(cache)[:, :1])


@pytest.mark.parametrize("world", [2, 3, 5])
def test_any_number_of_processes_writes_the_same_bytes(tmp_path, cache, pictures, vae_folder, monkeypatch, world):
    lines = []
    for rank in reversed(range(world)):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world))
        lines.append(write(tmp_path / "cache", pictures, vae_folder))
    assert contents(tmp_path / "cache") == contents(cache)
    assert all("files are still to come from others" in line for line in lines[:-1])
    assert "holds the latents of 14 images" in lines[-1]


@pytest.mark.slow
def test_processes_side_by_side_write_the_same_bytes(tmp_path, cache, pictures, vae_folder):
    processes = []
    for rank in range(2):
        environment = {**os.environ, "RANK": str(rank), "WORLD_SIZE": "2"}
        processes.append(start(tmp_path / "cache", pictures, vae_folder, environment))
    assert [process.wait() for process in processes] == [0, 0], processes[0].stdout.read() + processes[1].stdout.read()
    assert contents(tmp_path / "cache") == contents(cache)


def test_loading_processes_change_nothing(tmp_path, cache, pictures, vae_folder):
    write(tmp_path / "cache", pictures, vae_folder, num_workers=2)
    assert contents(tmp_path / "cache") == contents(cache)


def command(folder, pictures, vae_folder, shard_images=SHARD):
    arguments = ["encode", str(pictures), f"--vae={vae_folder}", f"--output={folder}", f"--image_size={SIZE}"]
    return [*arguments, f"--shard-images={shard_images}", "--batch-size=3", "--device=cpu"]


def start(folder, pictures, vae_folder, environment):
    return subprocess.Popen(
        [sys.executable, "-m", "diffusion_moe", *command(folder, pictures, vae_folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**environment, "OMP_NUM_THREADS": "1"},
    )


def test_a_killed_command_resumes_without_a_lost_or_doubled_image(tmp_path, pictures, vae_folder):
    """SIGKILL at a random shard, then by two other processes."""
    write(tmp_path / "whole", pictures, vae_folder, shard_images=1)
    folder, shard = tmp_path / "killed", random.SystemRandom().randrange(10)
    arguments = command(folder, pictures, vae_folder, shard_images=1)
    process = multiprocessing.get_context("fork").Process(target=main, args=(arguments,))
    process.start()
    while process.is_alive() and not shard_path(folder, shard).exists():
        time.sleep(0.001)
    process.kill()
    process.join()
    assert shard_path(folder, shard).exists()
    found = contents(folder)
    if "shards/00013.json" not in found:  # the rare case that it was quicker than the signal
        with pytest.raises(ValueError, match="is not finished; run the same"):
            load_dataset(DataConfig(kind="latents", path=str(folder)), "train")
    kept = {name: (folder / name).stat().st_mtime_ns for name in found if name.endswith(".json") and "shards" in name}
    write(folder, pictures, vae_folder, shard_images=1)
    assert contents(folder) == contents(tmp_path / "whole")
    assert all((folder / name).stat().st_mtime_ns == time for name, time in kept.items()), "done shards stay"


def test_a_shard_that_is_not_whole_or_lost_its_record_is_encoded_again(tmp_path, cache, pictures, vae_folder):
    shutil.copytree(cache, tmp_path / "cache")
    shard_path(tmp_path / "cache", 0).write_bytes(b"cut")
    shard_path(tmp_path / "cache", 1).with_suffix(".json").unlink()
    shard_path(tmp_path / "cache", 2).with_suffix(".json").write_text("{")
    shard_path(tmp_path / "cache", 3).unlink()
    shard_path(tmp_path / "cache", 3).with_name(".00003.f16.partial").write_bytes(b"rest of a killed process")
    write(tmp_path / "cache", pictures, vae_folder)
    assert contents(tmp_path / "cache") == contents(cache)


def test_verify_finds_changed_bytes_and_encodes_them_again(tmp_path, cache, pictures, vae_folder):
    shutil.copytree(cache, tmp_path / "cache")
    path = shard_path(tmp_path / "cache", 1)
    path.write_bytes(bytes(len(path.read_bytes())))
    write(tmp_path / "cache", pictures, vae_folder)
    assert contents(tmp_path / "cache") != contents(cache)
    write(tmp_path / "cache", pictures, vae_folder, verify=True)
    assert contents(tmp_path / "cache") == contents(cache)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_unreadable_image_ends_the_command_with_its_name(tmp_path, broken_pictures, vae_folder, num_workers):
    with pytest.raises(ValueError, match=r"cannot read image .*ant/3\.png") as caught:
        write(tmp_path / "cache", broken_pictures, vae_folder, num_workers=num_workers)
    assert "\n" not in str(caught.value)


def test_unreadable_images_are_left_out_and_listed(tmp_path, cache, broken_pictures, vae_folder):
    line = write(tmp_path / "cache", broken_pictures, vae_folder, on_corrupt="skip", batch_size=1)
    assert "the latents of 12 images; 2 unreadable images are left out" in line
    broken = [str(broken_pictures / name) for name in ("ant/3.png", "bee/0.png")]
    assert (tmp_path / "cache" / "skipped.txt").read_text().splitlines() == broken
    header = read_header(tmp_path / "cache")
    assert header.skipped == ((3, broken[0]), (7, broken[1]))
    assert header.labels.tolist() == [0] * 6 + [1] * 6
    kept = [i for i in range(14) if i not in (3, 7)]
    torch.testing.assert_close(stored(tmp_path / "cache"), stored(cache)[kept], rtol=2e-3, atol=1e-5)


def test_a_data_set_without_a_readable_image_gives_no_cache(tmp_path, broken_pictures, vae_folder):
    for path in broken_pictures.glob("*/*.png"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"no image of .* can be read"):
        write(tmp_path / "cache", broken_pictures, vae_folder, on_corrupt="skip")


@pytest.mark.parametrize(("factor", "shown"), [(1e6, r"\d"), (float("nan"), "nan")])
def test_values_that_float16_cannot_hold_are_named(tmp_path, pictures, vae_folder, factor, shown):
    vae = AutoencoderKL.from_pretrained(vae_folder)
    with torch.no_grad():
        vae.quant_conv.weight.mul_(factor)
    vae.save_pretrained(tmp_path / "large")
    with pytest.raises(ValueError, match=rf"latent of image .*ant/0\.png has a value of {shown}.*up to 65504"):
        write(tmp_path / "cache", pictures, tmp_path / "large")
    with pytest.raises(ValueError, match="is not finished"):
        read_header(tmp_path / "cache")


def test_a_full_disk_is_one_line_and_the_command_resumes_later(tmp_path, cache, pictures, vae_folder, capsys):
    """A limit on the size of files stands for the disk: the fourth shard is shorter than it, the others are not."""
    limit, (soft, hard) = shard_path(cache, 3).stat().st_size + 100, resource.getrlimit(resource.RLIMIT_FSIZE)
    options = [f"--vae={vae_folder}", f"--output={tmp_path / 'cache'}", f"--image_size={SIZE}"]
    options += [f"--shard_images={SHARD}", "--batch_size=3", "--device=cpu"]
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        status = main(["encode", str(pictures), *options])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert status == 1
    assert capsys.readouterr().err == f"diffusion-moe: File too large: {shard_path(tmp_path / 'cache', 0)}\n"
    write(tmp_path / "cache", pictures, vae_folder)
    assert contents(tmp_path / "cache") == contents(cache)


def test_another_cache_is_refused_with_the_difference(tmp_path, cache, pictures, broken_pictures, vae_folder):
    before = contents(cache)
    with pytest.raises(ValueError, match=r"is another cache \(store: moments -> samples\)"):
        write(cache, pictures, vae_folder, store="samples")
    with pytest.raises(ValueError, match=r"is another cache \(flip: True -> False; shard_images: 4 -> 5\)"):
        write(cache, pictures, vae_folder, flip=False, shard_images=5)
    (broken_pictures / "bee" / "6.png").rename(broken_pictures / "bee" / "9.png")
    with pytest.raises(ValueError, match=r"is another cache \(data: "):
        write(cache, broken_pictures, vae_folder)
    vae = AutoencoderKL.from_pretrained(vae_folder)
    with torch.no_grad():
        vae.encoder.conv_in.bias.add_(1)
    vae.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"is another cache \(vae: "):
        write(cache, pictures, tmp_path / "other")
    assert contents(cache) == before


def test_the_same_data_and_vae_at_other_paths_resume(tmp_path, cache, pictures, vae_folder):
    shutil.copytree(cache, tmp_path / "cache")
    shutil.copytree(pictures, tmp_path / "moved")
    shutil.copytree(vae_folder, tmp_path / "vae")
    shard_path(tmp_path / "cache", 2).unlink()
    write(tmp_path / "cache", tmp_path / "moved", tmp_path / "vae")
    assert contents(tmp_path / "cache") == contents(cache)


def test_parquet_is_encoded_as_the_folder_is(tmp_path, cache, pictures, vae_folder, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")
    files = sorted(pictures.glob("*/*.png"))
    rows = [{"photo": {"bytes": path.read_bytes(), "path": path.name}, "kind": path.parent.name} for path in files]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "x.parquet")
    data = DataConfig(
        kind="huggingface",
        path=str(tmp_path / "x.parquet"),
        image_column="photo",
        label_column="kind",
        image_size=SIZE,
    )
    options = EncodeOptions(str(vae_folder), tmp_path / "cache", batch_size=3, shard_images=SHARD, device="cpu")
    encode(data, options, quietly)
    assert torch.equal(stored(tmp_path / "cache"), stored(cache))
    assert read_header(tmp_path / "cache").plan.class_names == ("ant", "bee")


MISTAKES = {
    "no VAE": (["--output=OUT"], "vae"),
    "missing VAE": (["--vae=/no/such", "--output=OUT"], "cannot load the VAE /no/such"),
    "size": (["--vae=VAE", "--output=OUT", "--image_size=15"], "image_size is 15, not divisible by 2"),
    "kind": (
        ["--vae=VAE", "--output=OUT", "--kind=digits"],
        "kind is digits; encode takes folder, huggingface or",
    ),
    "shard": (["--vae=VAE", "--output=OUT", "--shard_images=0"], "shard_images is 0; it must be positive"),
    "output": (["--vae=VAE", "--output=PICTURES"], "holds files but no latents.json"),
    "unheeded": (["--vae=VAE", "--output=OUT", "--test_fraction=0.5"], "there is no --test_fraction"),
    "no GPU": (["--vae=VAE", "--output=OUT", "--device=cuda"], "no CUDA device"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(capsys, tmp_path, pictures, vae_folder, mistake):
    options, expected = MISTAKES[mistake]
    paths = {"OUT": tmp_path / "out", "VAE": vae_folder, "PICTURES": pictures}
    for name, path in paths.items():
        options = [option.replace(f"={name}", f"={path}") for option in options]
    options = options if mistake == "size" else [*options, f"--image_size={SIZE}"]
    assert main(["encode", str(pictures), *options]) == 2
    err = capsys.readouterr().err
    assert expected in err
    assert err.count("\n") == 1
    assert "Traceback" not in err


def test_wrong_variables_are_one_line(tmp_path, pictures, vae_folder, monkeypatch):
    monkeypatch.setenv("RANK", "two")
    with pytest.raises(ValueError, match="the variable RANK is 'two'; expected a number"):
        write(tmp_path / "cache", pictures, vae_folder)
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(ValueError, match="RANK is 2; expected less than WORLD_SIZE 1"):
        write(tmp_path / "cache", pictures, vae_folder)


def test_the_documented_way_to_read_a_shard_works(cache, monkeypatch):
    page = Path(__file__).parents[2] / "docs" / "data.md"
    code = re.search(r"```python\n(.*?)```", page.read_text(), re.DOTALL)[1]
    monkeypatch.chdir(cache.parent)
    (cache.parent / "cache").symlink_to(cache)
    names = {}
    exec(code, names)
    assert torch.equal(torch.from_numpy(names["latents"].astype(np.float32)), stored(cache)[:SHARD])


def test_a_finished_cache_says_so_and_stays(cache, pictures, vae_folder):
    before = contents(cache)
    assert "holds the latents of 14 images" in write(cache, pictures, vae_folder)
    assert contents(cache) == before
    assert json.loads(before["latents.json"])["format"] == "diffusion-moe latents"
