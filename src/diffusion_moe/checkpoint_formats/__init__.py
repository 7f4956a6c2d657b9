"""Checkpoints in the reference formats (those of the papers' code), read and written by one table a format."""
