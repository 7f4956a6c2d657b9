"""Checkpoints in the published formats, read and written by one table a format."""

from .convert import Converted, read_published, write_published
from .formats import FORMATS, detect_format, make_layout
from .layout import Layout, Row, from_published, to_published
from .settings import read_settings, write_settings

__all__ = [
    "FORMATS",
    "Converted",
    "Layout",
    "Row",
    "detect_format",
    "from_published",
    "make_layout",
    "read_published",
    "read_settings",
    "to_published",
    "write_published",
    "write_settings",
]
