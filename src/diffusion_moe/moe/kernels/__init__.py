"""Triton kernels for everything between the experts' matmuls.

These modules import triton, so import them only after `backend.takes_triton` returned true. The oracle of each kernel
is the torch code in the operator that calls it.
"""
