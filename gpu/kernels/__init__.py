"""Triton kernels behind :mod:`trimkv_edge.gpu.ops`."""
