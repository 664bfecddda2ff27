"""Checkpoints as models: planned, converted, compared, inspected and loaded."""
