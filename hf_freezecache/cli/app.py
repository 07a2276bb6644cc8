"""Command line ``hf-freezecache``: build, look into, check, prune, push and pull caches, report on runs, and a demo.

The functions decorated with ``@app.command`` in these modules are its commands. They are thin: the work is done elsewhere.
"""

from __future__ import annotations

from . import cache_commands, hub_commands, run_commands, upkeep_commands  # noqa: F401  (each registers its commands)
from .base import app

__all__ = ["app"]
