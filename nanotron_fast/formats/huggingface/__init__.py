"""The Hugging Face format."""
