"""Our operations under a transformers model."""
