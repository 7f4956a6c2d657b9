"""Pipelines of diffusers for our models. Importing this room alone loads neither torch nor diffusers."""
