"""Where tensors live on disk, in either format. Nothing here knows of models."""
