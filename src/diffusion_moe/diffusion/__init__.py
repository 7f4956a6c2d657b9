"""The path from noise to data, the loss on it, and the way back: solvers and guidance. Pure functions."""
