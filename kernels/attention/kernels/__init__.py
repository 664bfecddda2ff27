"""Attention's Triton kernels."""
