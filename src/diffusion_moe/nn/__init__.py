"""Ordinary layers: attention, embeddings, positions, normalisation."""
