"""Backbones, their presets and their sizes."""
