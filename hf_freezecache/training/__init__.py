"""Stages: what is checked, cached and trained."""
