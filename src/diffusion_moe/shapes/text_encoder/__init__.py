"""The command `text-encoder`: a small text encoder and its tokenizer, made from nothing for the coloured shapes."""
