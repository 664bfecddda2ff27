"""A model's architecture and how it is spread over ranks, in words that belong to no format."""
