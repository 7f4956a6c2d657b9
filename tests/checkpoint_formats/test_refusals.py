"""What `convert` and `init.from_checkpoint` say of files that are no checkpoints: one line with the file and remedy."""

import io
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

from diffusion_moe.checkpoint_formats.files import find_file, read_checkpoint
from diffusion_moe.cli import main
from diffusion_moe.config import InitConfig
from diffusion_moe.initialization import PretrainedSource

TENSORS = {"a.weight": torch.arange(4096.0), "b": torch.ones(3)}


def saved(content, **options):
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def image(form):
    file = io.BytesIO()
    Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(file, form)
    return file.getvalue()


def archive(**files):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as content:
        for name, text in files.items():
            content.writestr(f"x/{name}", text)
    return file.getvalue()


def scripted():
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), file)
    return file.getvalue()


class Runs:
    """A pickle that would make a folder when read."""

    def __reduce__(self):
        return os.mkdir, ("made-by-a-pickle",)


ZIPPED, OLD, SAFE = saved(TENSORS), saved(TENSORS, _use_new_zipfile_serialization=False), save(TENSORS)
GIVE = "give a file that torch.save or safetensors wrote (.pt, .pth, .bin, .ckpt or .safetensors)"
AGAIN, SAVE = "fetch or save it again", "save the model's state_dict() with torch.save"
TRUST = "holds more than tensors, and reading it could run code; add --trust-pickle if you trust its author"
CASES = {
    "text.pt": (b"a text\n", f"is a text file, no checkpoint; {GIVE}"),
    "e.pt": (b"eleven", f"is a text file, no checkpoint; {GIVE}"),
    "umlauts.bin": (("ü" * 5000).encode(), f"is a text file, no checkpoint; {GIVE}"),
    "page.safetensors": (b"<html>not found</html>", f"is a text file, no checkpoint; {GIVE}"),
    "lfs.safetensors": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "is a pointer of Git LFS, no checkpoint; fetch the file itself with git lfs pull",
    ),
    "empty.pt": (b"", f"is empty, so it is no checkpoint; {AGAIN}"),
    "empty.safetensors": (b"", f"is empty, so it is no checkpoint; {AGAIN}"),
    "half.pt": (ZIPPED[: len(ZIPPED) // 2], f"is cut off or damaged, a zip archive without its end; {AGAIN}"),
    "end.pt": (ZIPPED[:-30], f"is cut off or damaged, a zip archive without its end; {AGAIN}"),
    "old.pt": (OLD[: len(OLD) // 2], f"more bytes); {AGAIN}"),
    "start.pt": (OLD[:30], f" bytes); {AGAIN}"),
    "random.pt": (b"\x9f\x80" + np.random.RandomState(0).bytes(3000), f"is no checkpoint; {GIVE}"),
    "zeros.pt": (bytes(4000), f"is no checkpoint; {GIVE}"),
    "photo.png": (image("PNG"), f"is an image, no checkpoint; {GIVE}"),
    "photo.pt": (image("JPEG"), f"is an image, no checkpoint; {GIVE}"),
    "photo.safetensors": (image("WEBP"), f"is an image, no checkpoint; {GIVE}"),
    "half.safetensors": (SAFE[:200], f"is cut off or damaged: it holds less or more than it says; {AGAIN}"),
    "head.safetensors": (SAFE[:40], f"is cut off or damaged: its header ends too early; {AGAIN}"),
    "random.safetensors": (np.random.RandomState(1).bytes(900), f"is no safetensors file; {GIVE}"),
    "zip.safetensors": (ZIPPED, "is a file of torch.save, no safetensors file; let its name end in .pt"),
    "safe.pt": (SAFE, "is a safetensors file; let its name end in .safetensors"),
    "zip.pt": (
        archive(readme="hello"),
        f"is a zip archive, but none that torch.save wrote, so it is no checkpoint; {GIVE}",
    ),
    "script.pt": (scripted(), "is a TorchScript program, no checkpoint; save its state_dict() with torch.save"),
    "pickle.pt": (
        pickle.dumps({"a": np.zeros(3)}),
        f"is a pickle, but none that torch.save wrote, so it is no checkpoint; {GIVE}",
    ),
    "runs.pt": (saved({"model": Runs()}), TRUST),
    "module.pt": (saved(torch.nn.Linear(2, 2)), TRUST),
    "list.pt": (saved([1]), f"holds a value of type list, no dictionary of tensors; {SAVE}"),
    "tensor.pt": (saved(torch.ones(2)), f"holds a value of type Tensor, no dictionary of tensors; {SAVE}"),
    "settings.pt": (saved({"lr": 1, "steps": 2}), f"holds no weights, only lr, steps; {SAVE}"),
    "nothing.pt": (saved({}), f"holds nothing; {SAVE}"),
    "nothing.safetensors": (save({}), f"holds nothing; {SAVE}"),
    "numbered.pt": (saved({1: torch.ones(2)}), f"holds no weights, only 1; {SAVE}"),
    "optimizer.pt": (saved({"ema": {"step": 1}}), f": ema is no dictionary of tensors; {SAVE}"),
}


@pytest.mark.parametrize("name", CASES)
def test_convert_says_what_a_file_is(capsys, recwarn, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    content, expected = CASES[name]
    (tmp_path / name).write_bytes(content)
    status = main(["convert", name, "--output", "out"])
    out, err = capsys.readouterr()
    assert (status, out) == (2, "") and err.startswith(f"diffusion-moe: {name}")
    assert err.endswith(f"{expected}\n") and err.count("\n") == 1
    assert "weights_only" not in err and not [warning for warning in recwarn if "torch" in str(warning.filename)]
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["text.pt", "half.safetensors", "runs.pt"])
def test_start_source_says_the_same(tmp_path, name):
    content, expected = CASES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as caught:
        _ = PretrainedSource(InitConfig(str(tmp_path / name))).config
    options = " (`diffusion-moe convert` takes such options and makes a folder to start from)"
    assert (
        str(caught.value) == f"init.from_checkpoint: {tmp_path / name} {expected}{options if name == 'runs.pt' else ''}"
    )


def test_what_is_trusted_may_need_code_that_is_not_here(tmp_path, monkeypatch):
    import sys
    import types

    module = types.ModuleType("gone")
    module.Settings = type("Settings", (), {"__module__": "gone"})
    monkeypatch.setitem(sys.modules, "gone", module)
    torch.save({"model": TENSORS, "settings": module.Settings()}, tmp_path / "x.pt")
    monkeypatch.delitem(sys.modules, "gone")
    with pytest.raises(
        ValueError, match=r"x.pt needs code that is not here \(No module named 'gone'\); save its tensors"
    ):
        read_checkpoint(tmp_path / "x.pt", "model", trust_pickle=True)
    with pytest.raises(ValueError, match="add --trust-pickle"):
        read_checkpoint(tmp_path / "x.pt", "model")


def test_a_folder_without_a_checkpoint(tmp_path):
    (tmp_path / "notes.txt").write_text("none here")
    with pytest.raises(
        ValueError, match=r"holds no checkpoint file; give a file, or a folder with a file, that ends in .pt, .pth"
    ):
        find_file(str(tmp_path))
    with pytest.raises(ValueError, match=r"holds no checkpoint file other.pt; give"):
        find_file(str(tmp_path), "other.pt")


@given(st.binary(max_size=300), st.sampled_from([b"", b"\x80\x02", b"\x80\x04", ZIPPED[:300], OLD[:40], SAFE[:60]]))
def test_no_bytes_give_anything_but_one_line(tmp_path_factory, content, start):
    for ending in (".pt", ".safetensors"):
        path = tmp_path_factory.getbasetemp() / f"any{ending}"
        path.write_bytes(start + content)
        with pytest.raises(ValueError) as caught:
            read_checkpoint(path)
        line = str(caught.value)
        assert line.startswith(str(path)) and "\n" not in line and "weights_only" not in line


def test_a_good_file_of_any_kind_is_read(tmp_path):
    for name, content in {"zip.pt": ZIPPED, "old.pt": OLD, "safe.safetensors": SAFE}.items():
        (tmp_path / name).write_bytes(content)
        found = read_checkpoint(tmp_path / name)
        assert found.weights == "all" and found.state.keys() == TENSORS.keys()
        assert all(torch.equal(found.state[key], value) for key, value in TENSORS.items())
