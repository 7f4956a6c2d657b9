"""Scores of images against real ones."""
