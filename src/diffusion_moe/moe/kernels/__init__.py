"""Triton kernels for what stands between the experts' products. Import from here only through `moe.backend`'s consent:
the modules import triton. Each one's oracle is the torch code in the operator that calls it.
"""
