"""The verbs of data sets: `inspect` and `encode`."""

from __future__ import annotations

from collections.abc import Sequence

from ..config import DataConfig, build, find_recipe, names_where, read_sections
from ..encoding.options import EncodeOptions
from ..inspection.options import InspectOptions
from .command_line import CommandLine
from .output import log
from .parsing import parse


def inspect(arguments: Sequence[str]) -> int:
    """Check images before training on them: classes, splits, sizes, unreadable files, copies, what is ignored."""
    usual = read_sections(find_recipe("image-folder"))["data"]
    first = ("path", "the images, as data.path; a folder unless --data.kind says otherwise")
    defaults = {f"data.{name}": value for name, value in usual.items()}
    line = CommandLine("inspect", inspect.__doc__, (InspectOptions,), {"data": DataConfig}, first, defaults=defaults)
    given = parse(line, arguments)
    if "path" in given.sections["data"]:
        raise ValueError(f"--data.path and {given.first} are both given; give the images once")
    data = build(DataConfig, {**usual, **given.sections["data"], "path": given.first}, "data.")
    options = given.options(InspectOptions)
    from ..inspection.inspect import inspect as run_inspection

    run_inspection(data, options, log)
    return 0


def encode(arguments: Sequence[str]) -> int:
    """Encode a data set's images by a VAE into a latent cache to train on; under torchrun, by several processes."""
    usual = {"kind": "folder", "image_size": 256}
    own, first = (EncodeOptions, DataConfig), ("images", "a folder of images, or what --kind huggingface takes")
    hidden = names_where(DataConfig, encode=False)
    line = CommandLine("encode", encode.__doc__, own, first=first, hidden={DataConfig: hidden}, defaults=usual)
    given = parse(line, arguments)
    options = given.options(EncodeOptions)
    data = given.options(DataConfig, usual | {"path": given.first})
    from ..encoding.encode import encode as run_encoding

    log(run_encoding(data, options, log))
    return 0
