"""Messages on files that cannot be read as a checkpoint, by their first bytes."""

from __future__ import annotations

import codecs
import pickletools
import zipfile
from pathlib import Path

GIVE = "give a file that torch.save or safetensors wrote (.pt, .pth, .bin, .ckpt or .safetensors)"
AGAIN = "fetch or save it again"
IMAGES = (b"\x89PNG\r\n", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\0", b"MM\0*")
ZIP, GIT_LFS = b"PK", b"version https://git-lfs"
OLD = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""First bytes of files of torch.save before 1.6: a pickled number."""
TORCH_ADVICE = "weights_only"
"""Word in torch.load's errors that advise the user to run code."""
HEAD_BYTES = 4096


def refusal(path: Path, error: Exception) -> str:
    """Message on one line: what is wrong with a file whose reading raised `error`, and the remedy."""
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError as unreadable:  # not `error`, which may be one of torch's about the content
        return f"cannot read {path}: {unreadable.strerror}; {GIVE}"
    if not head:
        return f"{path} is empty, so it is no checkpoint; {AGAIN}"
    if head.startswith(GIT_LFS):
        return f"{path} is a pointer of Git LFS, no checkpoint; fetch the file itself with git lfs pull"
    if head.startswith(IMAGES) or (head[:4], head[8:12]) == (b"RIFF", b"WEBP"):
        return f"{path} is an image, no checkpoint; {GIVE}"
    if path.suffix == ".safetensors":
        return f"{path} {_instead_of_safetensors(path, head)}"
    if head.startswith(ZIP):
        return f"{path} {_of_zip(path, error)}"
    if _is_text(head):
        return f"{path} is a text file, no checkpoint; {GIVE}"
    if _header_of_safetensors(head):
        return f"{path} is a safetensors file; let its name end in .safetensors"
    if head.startswith(OLD):
        return f"{path} {_unreadable(error)}"
    if _is_pickle(path):
        return f"{path} is a pickle, but none that torch.save wrote, so it is no checkpoint; {GIVE}"
    return f"{path} is no checkpoint; {GIVE}"


def _instead_of_safetensors(path: Path, head: bytes) -> str:
    if head.startswith((ZIP, OLD)):
        return "is a file of torch.save, no safetensors file; let its name end in .pt"
    if _is_text(head):
        return f"is a text file, no checkpoint; {GIVE}"
    length = _header_of_safetensors(head)
    if length is None:
        return f"is no safetensors file; {GIVE}"
    what = "its header ends too early" if 8 + length > path.stat().st_size else "it holds less or more than it says"
    return f"is cut off or damaged: {what}; {AGAIN}"


def _of_zip(path: Path, error: Exception) -> str:
    if not zipfile.is_zipfile(path):
        return f"is cut off or damaged, a zip archive without its end; {AGAIN}"
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.rsplit("/", 1)[-1] for name in archive.namelist()}
    except (OSError, ValueError, zipfile.BadZipFile):
        return f"is damaged, a zip archive whose list of files cannot be read; {AGAIN}"
    if "constants.pkl" in names:
        return "is a TorchScript program, no checkpoint; save its state_dict() with torch.save"
    if "data.pkl" not in names:
        return f"is a zip archive, but none that torch.save wrote, so it is no checkpoint; {GIVE}"
    return _unreadable(error)


def _unreadable(error: Exception) -> str:
    """Message on a file that torch.save seems to have written."""
    reason = " ".join(str(error).split()).split(". ")[0][:200]
    if isinstance(error, ImportError | AttributeError):
        return f"needs code that is not here ({reason}); save its tensors alone where that code is"
    return f"is cut off or damaged{f' ({reason})' if reason and TORCH_ADVICE not in reason else ''}; {AGAIN}"


def _header_of_safetensors(head: bytes) -> int | None:
    """Length of the header if the file may have one: eight bytes of length, then JSON."""
    return int.from_bytes(head[:8], "little") if head[8:9] == b"{" else None


def _is_text(head: bytes) -> bool:
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)  # the last character may be cut off
    except UnicodeDecodeError:
        return False
    return all(character.isprintable() or character in "\t\n\r\f\x1b\ufeff" for character in text)


def _is_pickle(path: Path) -> bool:
    """True if the file is a pickle to its end; no code of it is run."""
    try:
        with path.open("rb") as file:
            return sum(1 for _ in pickletools.genops(file)) > 1
    except Exception:  # pickletools may raise anything
        return False
