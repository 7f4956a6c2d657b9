"""Generating images, and judging them against real ones."""
