"""Texts for models that take them: encoders of `transformers`, and their features in memory and in files."""

from .encoder import TextEncoder, load_encoder
from .features import TextFeatures, TextSpace

__all__ = ["TextEncoder", "TextFeatures", "TextSpace", "load_encoder"]
