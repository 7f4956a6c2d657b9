"""Needs of a recipe before it is run: parameters, compute, memory, disk and time."""
