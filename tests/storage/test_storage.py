"""Checkpoint files of one process; tests/distributed/test_storage.py has many."""

import errno
import hashlib
import json
import os
import re
import threading
from pathlib import Path

import pytest
import torch
from checkpoints import write
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from diffusion_moe.storage import (
    AsyncWriter,
    CheckpointError,
    Manifest,
    checkpoints_in,
    export,
    files,
    latest,
    manifest,
    plan,
    prune,
    read,
    writing,
)

METADATA = {"step": 7, "recipe": "0f" * 32, "stream": [3, 0.1, None, "ü"]}


def some_tensors():
    """Every dtype, and the shapes that are easily forgotten."""
    generator = torch.Generator().manual_seed(5)
    tensors = {
        f"kind.{name}": torch.randn(3, 5, generator=generator).mul(9).to(dtype) for name, dtype in files.DTYPES.items()
    }
    return tensors | {
        "zero_dim": torch.tensor(2.5, dtype=torch.float64),
        "step": torch.tensor(11),
        "none": torch.zeros(0, 3),
        "transposed": torch.randn(4, 6, generator=generator).T,
        "every_other": torch.randn(8, 3, generator=generator)[::2],
        "odd": torch.tensor([True, False, True]),
        "parameter": torch.nn.Parameter(torch.randn(7, generator=generator)),
    }


def blank(tensors):
    return {name: torch.zeros(tensor.shape, dtype=tensor.dtype) for name, tensor in tensors.items()}


def same(a, b):
    """Equal bit for bit."""
    as_bytes = [
        {name: t.detach().contiguous().reshape(-1).view(torch.uint8) for name, t in tensors.items()}
        for tensors in (a, b)
    ]
    return a.keys() == b.keys() and all(
        torch.equal(one, as_bytes[1][name]) and a[name].shape == b[name].shape for name, one in as_bytes[0].items()
    )


def numbered(value):
    return {"a": torch.full((40, 3), float(value)), "b": torch.tensor(value)}


def load_numbered(path):
    tensors = numbered(0)
    read(path, tensors)
    assert bool((tensors["a"] == tensors["b"]).all())
    return int(tensors["b"])


def test_what_is_written_is_read(tmp_path):
    tensors = some_tensors()
    path = write(tmp_path, 7, tensors, METADATA)
    found = blank(tensors)
    assert read(path, found) == METADATA
    assert same(tensors, found)
    assert not same(tensors, blank(tensors))


def test_files_are_plain_safetensors_and_hashed(tmp_path):
    tensors = some_tensors()
    path = write(tmp_path, 7, tensors, METADATA)
    manifest = Manifest.read(path)
    (record,) = manifest.files
    data = (path / record.name).read_bytes()
    assert (len(data), hashlib.sha256(data).hexdigest()) == (record.bytes, record.sha256)
    assert same(tensors, load_file(path / record.name))
    with safe_open(path / record.name, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert manifest.step == 7
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000007"}


def test_much_is_split_over_files(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "FILE_BYTES", 100)
    tensors = {str(i): torch.full((i,), i) for i in range(20)}
    path = write(tmp_path, 1, tensors, {})
    sizes = [sum(t.nbytes for t in load_file(file).values()) for file in path.glob("*.safetensors")]
    assert len(sizes) > 10 and max(sizes) == 19 * 8 and sum(sizes) == 8 * sum(range(20))
    found = blank(tensors)
    read(path, found)
    assert same(tensors, found)


def test_what_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must be JSON"):
        write(tmp_path, 1, {}, {"loss": float("nan")})
    with pytest.raises(CheckpointError, match=r"w: a tensor of torch.complex64"):
        write(tmp_path, 1, {"w": torch.zeros(2, dtype=torch.complex64)}, {})
    assert checkpoints_in(tmp_path) == []


def test_other_tensors_are_refused_by_name_and_left_alone(tmp_path):
    path = write(tmp_path, 1, {"a": torch.ones(2), "b": torch.ones(2), "c": torch.ones(2)}, {})
    with pytest.raises(CheckpointError, match=r"lacks d, e, f and 1 more; it also holds b, c$"):
        read(path, {name: torch.zeros(2) for name in "adefg"})
    tensors = {"a": torch.zeros(2), "b": torch.zeros(2, 1), "c": torch.zeros(2, dtype=torch.bfloat16)}
    with pytest.raises(CheckpointError, match=r"its b is float32 \(2,\), not float32 \(2, 1\); its c is float32 .*bfl"):
        read(path, tensors)
    assert all(not tensor.any() for tensor in tensors.values())


def _damage(path, kind):
    (file,), manifest = path.glob("*.safetensors"), path / "manifest.json"
    data, text = file.read_bytes(), manifest.read_text()
    if kind == "truncated":
        file.write_bytes(data[: len(data) // 2])
    elif kind == "bit flipped":
        file.write_bytes(data[:-5] + bytes([data[-5] ^ 1]) + data[-4:])
    elif kind == "header bit flipped":
        file.write_bytes(data[:30] + bytes([data[30] ^ 1]) + data[31:])
    elif kind == "file missing":
        file.unlink()
    elif kind == "manifest missing":
        manifest.unlink()
    elif kind == "manifest cut":
        manifest.write_text(text[:40])
    elif kind == "manifest changed":
        manifest.write_text(text.replace('"step":2', '"step":3'))
    elif kind == "manifest of another":
        manifest.write_text((path.parent / "step-00000001" / "manifest.json").read_text())
    elif kind == "manifest deeply nested":
        manifest.write_text("[" * 100_000)
    else:
        manifest.write_text(kind)


DAMAGES = {
    "truncated": "bytes of",
    "bit flipped": "safetensors is corrupt",
    "header bit flipped": "safetensors is corrupt",
    "file missing": "lacks tensors-00000-000",
    "manifest missing": "no readable manifest.json",
    "manifest cut": "no readable manifest.json",
    "manifest changed": "manifest.json is corrupt",
    "manifest of another": "safetensors is corrupt",
    "manifest deeply nested": "no readable manifest.json",
    "[1, 2]": "no readable manifest.json",
    '{"format": 2}': "has format 2; this version reads format 3",
    '{"format": 3}': "no readable manifest.json",
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_newest_is_reported_and_the_one_before_is_used(tmp_path, kind):
    good, bad = (write(tmp_path, step, numbered(step), {}) for step in (1, 2))
    _damage(bad, kind)
    with pytest.raises(CheckpointError, match=DAMAGES[kind]) as caught:
        load_numbered(bad)
    assert "step-00000002" in str(caught.value) and "\n" not in str(caught.value)
    assert latest(tmp_path, load_numbered) == (good, 1, [str(caught.value)])


def _claim(path, change):
    """Rewrite a manifest, with a digest that fits."""
    body = json.loads((path / "manifest.json").read_text())
    del body["sha256"]
    change(body)
    digest = hashlib.sha256(json.dumps(body, separators=(",", ":")).encode()).hexdigest()
    (path / "manifest.json").write_text(json.dumps(body | {"sha256": digest}))


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body["files"][0].update(name="../step-00000002/tensors-00000-000.safetensors"),
        *(lambda body, name=name: body["files"][0].update(name=name) for name in ("..", ".", "", "manifest.json")),
        lambda body: body["tensors"]["a"].update(shards=[]),
        lambda body: body["tensors"]["a"].update(shards=[[0, [0, 0], [20, 3]], [0, [10, 0], [20, 3]]]),
        lambda body: body["tensors"]["a"].update(shards=[[0, [-1, 0], [40, 3]]]),
        lambda body: body["tensors"]["a"].update(shards=[[1, [0, 0], [40, 3]]]),
        lambda body: body["tensors"]["a"].update(shards=[[0, [0, 0], [20, 3]], [0, [20, 0], [20, 3]]]),
        lambda body: body["tensors"]["a"].update(dtype="I32"),
        lambda body: body["tensors"]["a"].update(dtype="pickle"),
        lambda body: body["tensors"].update(c=body["tensors"]["a"]),
    ],
)
def test_a_manifest_that_claims_what_is_not_there_is_refused(tmp_path, change):
    path = write(tmp_path, 1, numbered(1), {})
    _claim(path, lambda body: None)
    assert load_numbered(path) == 1
    _claim(path, change)
    with pytest.raises(CheckpointError, match="step-00000001"):
        load_numbered(path)


@pytest.mark.parametrize("name", ["..", ""])
def test_a_folder_is_not_taken_for_a_file(tmp_path, name):
    path = write(tmp_path, 1, numbered(1), {})
    _claim(path, lambda body: body["files"][0].update(name=name))
    with pytest.raises(CheckpointError, match=r"no readable manifest.json"):
        Manifest.read(path)


def test_a_tensor_of_too_many_shards_is_refused(tmp_path, monkeypatch):
    path = write(tmp_path, 1, numbered(1), {})
    _claim(path, lambda body: body["tensors"]["a"].update(shards=[[0, [i, 0], [10, 3]] for i in range(0, 40, 10)]))
    assert len(Manifest.read(path).tensors["a"].shards) == 4
    monkeypatch.setattr(manifest, "MAX_SHARDS", 3)
    with pytest.raises(CheckpointError, match=r"no readable manifest.json"):
        Manifest.read(path)


def _paths(value, path=()):
    """Where values stand in JSON."""
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield (*path, key)
            yield from _paths(value[key], (*path, key))


@settings(deadline=None)
@given(data=st.data())
def test_no_manifest_ends_in_another_error(tmp_path_factory, data):
    """Any value of it changed, with a digest that fits: it is refused, or says the same of the tensors."""
    folder = tmp_path_factory.mktemp("claims")
    path = write(folder, 1, numbered(1), {})
    where = data.draw(st.sampled_from(list(_paths(json.loads((path / "manifest.json").read_text())))))
    if where == ("sha256",):
        return
    values = [0, -1, 1, 3, 40, 2**63, 1e300, -0.5, None, True, "", "..", "F32", "x\0", [], {}]
    value = data.draw(st.sampled_from(values))

    def change(body):
        for key in where[:-1]:
            body = body[key]
        body[where[-1]] = value

    _claim(path, change)
    found = latest(folder, load_numbered)
    assert found.loaded == 1 if found.path else len(found.problems) == 1
    output = folder / "out"
    try:
        export(path, "", output)
    except ValueError:
        assert not output.exists()
    else:
        assert same(load_file(output), numbered(1))


def test_none_and_none_good(tmp_path):
    assert latest(tmp_path / "nowhere", load_numbered) == (None, None, [])
    _damage(write(tmp_path, 2, numbered(2), {}), "[]")
    path, loaded, problems = latest(tmp_path, load_numbered)
    assert (path, loaded, len(problems)) == (None, None, 1)


def steps_in(folder):
    return [writing.step_of(path) for path in checkpoints_in(folder)]


@given(taken=st.sets(st.integers(0, 40), min_size=1, max_size=12), keep=st.integers(1, 4), keep_every=st.integers(0, 8))
def test_the_newest_and_every_nth_stay(tmp_path_factory, taken, keep, keep_every):
    folder = tmp_path_factory.mktemp("prune")
    for step in taken:
        path = folder / f"step-{step:08d}"
        path.mkdir()
        (path / "manifest.json").write_text(Manifest(step, {}, (), {}).to_text())
    prune(folder, keep, keep_every)
    newest = sorted(taken, reverse=True)[:keep]
    assert set(steps_in(folder)) == {s for s in taken if s in newest or (keep_every and s % keep_every == 0)}
    assert len(list(folder.iterdir())) == len(steps_in(folder))


def test_damaged_and_later_ones_take_no_good_ones_place(tmp_path):
    for step in range(1, 7):
        path = write(tmp_path, step, numbered(step), {})
        if step in (4, 6):
            _damage(path, "truncated")
    prune(tmp_path, 2, newest=tmp_path / "step-00000005")
    assert steps_in(tmp_path) == [6, 5, 4, 3]
    assert latest(tmp_path, load_numbered)[:2] == (tmp_path / "step-00000005", 5)
    with pytest.raises(ValueError, match="keep is 0"):
        prune(tmp_path, 0)


def test_steps_of_any_length_are_in_order(tmp_path):
    for step in (99_999_999, 100_000_000, 2):
        write(tmp_path, step, numbered(1), {})
    assert steps_in(tmp_path) == [100_000_000, 99_999_999, 2]


def test_a_step_written_again_replaces_the_old_one_only_when_whole(tmp_path, monkeypatch):
    write(tmp_path, 1, numbered(1), {})
    with monkeypatch.context() as patch:
        patch.setattr(writing, "write_safetensors", _no_space)
        with pytest.raises(OSError, match="No space left"):
            write(tmp_path, 1, numbered(2), {})
    assert latest(tmp_path, load_numbered).loaded == 1
    write(tmp_path, 1, numbered(3), {})
    assert latest(tmp_path, load_numbered).loaded == 3
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_interruptions_leave_nothing_that_the_next_save_does_not_mend(tmp_path):
    """Killed while writing step 3, and between putting step 2 aside and giving its name to the new one."""
    for step in (1, 2):
        write(tmp_path, step, numbered(step), {})
    (tmp_path / "step-00000002").rename(tmp_path / "step-00000002.replaced")
    (tmp_path / "step-00000003.partial").mkdir()
    (tmp_path / "step-00000003.partial" / "tensors-00000-000.safetensors").write_bytes(b"half")
    assert latest(tmp_path, load_numbered)[1:] == (2, [])
    write(tmp_path, 4, numbered(4), {})
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-0000000{i}" for i in (1, 2, 4)]
    assert load_numbered(tmp_path / "step-00000002") == 2


def _no_space(*arguments):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_leaves_what_is_saved(make_disk):
    small_disk = make_disk(megabytes=1)
    good = write(small_disk, 1, numbered(1), {})
    big = {"a": torch.zeros(1 << 19)}
    with pytest.raises(OSError, match="No space left") as caught:
        write(small_disk, 2, big, {})
    assert caught.value.errno == errno.ENOSPC and str(caught.value.filename).endswith("step-00000002")
    with (
        pytest.raises(OSError, match="No space left"),
        AsyncWriter(small_disk, keep=1) as writer,
    ):
        writer.save(2, big, {})
    assert [path.name for path in small_disk.iterdir()] == ["step-00000001"]
    assert latest(small_disk, load_numbered) == (good, 1, [])
    write(small_disk, 3, numbered(3), {})
    assert latest(small_disk, load_numbered).loaded == 3


@pytest.fixture
def gate(monkeypatch):
    """Writing waits until the gate is opened."""
    opened = threading.Event()
    really = writing.write_safetensors

    def when_open(path, entries):
        assert opened.wait(30)
        return really(path, entries)

    monkeypatch.setattr(writing, "write_safetensors", when_open)
    return opened


def test_in_the_background_the_state_at_the_call_is_written(tmp_path, gate):
    tensors = some_tensors()
    expected = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    metadata = {"step": [1]}
    with AsyncWriter(tmp_path, keep=2) as writer:
        writer.save(1, tensors, metadata)
        for tensor in tensors.values():
            tensor.detach().zero_()
        metadata["step"].append(2)
        with pytest.raises(TimeoutError):
            writer.wait(timeout_s=0.01)
        assert checkpoints_in(tmp_path) == []
        gate.set()
        path = writer.wait()
        assert path == tmp_path / "step-00000001" and writer.wait() is None
        found = blank(expected)
        assert read(path, found) == {"step": [1]}
        assert same(found, expected)
        writer.save(2, tensors, {})  # into the same memory
    read(tmp_path / "step-00000002", found)
    assert same(found, blank(expected))


def test_the_background_drops_old_checkpoints_and_takes_other_tensors(tmp_path):
    with AsyncWriter(tmp_path, keep=2, keep_every=3) as writer:
        for step in range(1, 8):
            writer.save(step, numbered(step) if step != 6 else {"other": torch.ones(step)}, {})
    assert steps_in(tmp_path) == [7, 6, 3]
    assert load_numbered(tmp_path / "step-00000007") == 7
    other = {"other": torch.zeros(6)}
    read(tmp_path / "step-00000006", other)
    assert other["other"].sum() == 6


def test_a_failure_in_the_background_is_reported_once_and_the_writer_continues(tmp_path, monkeypatch):
    with AsyncWriter(tmp_path, keep=5) as writer:
        writer.save(1, numbered(1), {})
        writer.wait()
        with monkeypatch.context() as patch:
            patch.setattr(writing, "write_safetensors", _no_space)
            writer.save(2, numbered(2), {})
            with pytest.raises(OSError, match=r"cannot write the checkpoint.*No space"):
                writer.save(3, numbered(3), {})
        writer.save(4, numbered(4), {})
    assert steps_in(tmp_path) == [4, 1]


def test_a_failure_in_the_background_hides_no_other_error(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "write_safetensors", _no_space)
    with pytest.raises(KeyError) as caught, AsyncWriter(tmp_path, keep=1) as writer:
        writer.save(1, numbered(1), {})
        raise KeyError("training")
    assert "No space left" in caught.value.__notes__[0]


def test_some_tensors_are_exported_into_one_file(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "FILE_BYTES", 100)
    tensors = some_tensors()
    path = write(tmp_path, 1, {f"ema.{name}": tensor for name, tensor in tensors.items()} | numbered(1), {})
    output = tmp_path / "ema.safetensors"
    export(path, "ema.", output)
    assert same(load_file(output), tensors)
    with pytest.raises(ValueError, match=r"no tensor of .* begins with emma\.; its names begin with a, b, ema"):
        export(path, "emma.", output)
    file = max(path.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="bytes of"):
        export(path, "ema.", output)
    assert same(load_file(output), tensors)
    assert len(list(tmp_path.iterdir())) == 2


def test_the_page_on_checkpoints(tmp_path, monkeypatch, capsys):
    """Its code runs and prints what it says."""
    page = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(block, {})
    (said,) = re.findall(r"print\(.*#(.*)", block)
    assert capsys.readouterr().out.strip() == said.strip()
    assert load_file("ema.safetensors")["w"].tolist() == [[1.0] * 3] * 4
