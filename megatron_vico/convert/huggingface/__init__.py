"""Folders in one of the Hugging Face layouts."""
