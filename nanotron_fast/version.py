"""The package's version, where it is written down."""

__version__ = "0.1.0"
