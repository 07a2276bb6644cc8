"""Choosing how states are stored, by measurement."""
