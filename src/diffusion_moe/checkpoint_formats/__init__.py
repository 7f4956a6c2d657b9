"""Checkpoints in the reference formats (those of the papers' code), read and written by one table a format."""

from .convert import Converted, read_reference_checkpoint, write_reference_checkpoint
from .formats import FORMATS, detect_format, make_layout
from .layout import Layout, Row, from_reference, to_reference
from .settings import read_settings, write_settings

__all__ = [
    "FORMATS",
    "Converted",
    "Layout",
    "Row",
    "detect_format",
    "from_reference",
    "make_layout",
    "read_reference_checkpoint",
    "read_settings",
    "to_reference",
    "write_reference_checkpoint",
    "write_settings",
]
