"""Talking to the Hugging Face Hub."""
