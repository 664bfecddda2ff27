"""What a minute on a GPU is to tell: one command that measures the most valuable facts first.

`benchmarks/run_gpu.py` is its entry. The runner imports neither torch nor triton; everything that
could crash or hang runs in a process of its own, forked from one that has imported them.
"""
