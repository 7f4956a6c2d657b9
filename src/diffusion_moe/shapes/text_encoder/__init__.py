"""A small text encoder and its tokenizer, trained from scratch on captions of coloured shapes."""
