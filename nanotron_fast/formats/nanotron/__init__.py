"""Nanotron's format."""
