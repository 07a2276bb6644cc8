"""Cutting a model in two, and freezing what is in front."""
