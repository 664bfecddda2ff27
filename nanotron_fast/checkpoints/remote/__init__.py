"""Checkpoints in object stores and on the Hub: read by ranges, written by whole files."""
