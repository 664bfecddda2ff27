"""The operations at production shapes, each beside its reference: a builder for each operation."""
