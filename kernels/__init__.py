"""Fused training operations, a file or a folder each; installed as `nanotron_fast.kernels`.

This file stays empty but for these lines: with the repository root on `sys.path` it is found
under the name `kernels`, the name of another package, and then it must do nothing.
"""
