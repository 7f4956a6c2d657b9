"""Paths from noise to data, losses, solvers and guidance, as pure functions."""
