"""What a cache depends on, part by part, so that a mismatch can be named."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

__all__ = [
    "Fingerprint",
]


class Fingerprint:
    """A hash kept part by part.

    Args:
        parts: Name of the part, in words a user knows -> its value or hash.
    """

    def __init__(self, parts: Mapping[str, str]) -> None:
        self.parts = dict(parts)

    @property
    def digest(self) -> str:
        """SHA-256 over all parts, 64 hexadecimal digits."""
        return hashlib.sha256(json.dumps(self.parts, sort_keys=True).encode()).hexdigest()

    def difference(self, other: Fingerprint) -> list[str]:
        """Return the names of the parts in which two fingerprints differ, sorted."""
        names = self.parts.keys() | other.parts.keys()
        return sorted(name for name in names if self.parts.get(name) != other.parts.get(name))
