"""Whole training steps, ours beside others': `benchmarks/bench_train.py` is the entry."""
