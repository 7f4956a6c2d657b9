"""Text encoders of `transformers` and their features."""

from .encoder import TextEncoder, load_encoder
from .features import TextFeatures, TextSpace

__all__ = ["TextEncoder", "TextFeatures", "TextSpace", "load_encoder"]
