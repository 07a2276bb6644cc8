"""What a cache depends on, component by component, so that an error can name what differs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

__all__ = ["CODE", "Fingerprint"]

#: Components that name the user's code, which renders what is stored.
CODE = frozenset({"transform", "data collator"})


class Fingerprint:
    """The identity of a cache.

    Args:
        components: Name of a component, in words a user knows -> its value or hash.
    """

    def __init__(self, components: Mapping[str, str]) -> None:
        self.components = dict(components)

    @property
    def digest(self) -> str:
        """SHA-256 over all components, 64 hexadecimal digits."""
        return hashlib.sha256(json.dumps(self.components, sort_keys=True).encode()).hexdigest()

    def __eq__(self, other: object) -> bool:
        """Say whether two fingerprints have the same components."""
        return isinstance(other, Fingerprint) and self.components == other.components

    def __hash__(self) -> int:
        """Return a hash of the components."""
        return hash(self.digest)

    def difference(self, other: Fingerprint) -> list[str]:
        """Return the names of the components in which two fingerprints differ, sorted."""
        names = self.components.keys() | other.components.keys()
        return sorted(name for name in names if self.components.get(name) != other.components.get(name))

    def is_rendered_alike(self, other: Fingerprint, also: Mapping[str, str]) -> bool:
        """Say whether two caches are of the same code.

        Args:
            other: The other cache's.
            also: Components of code that the other may be of, instead.
        """
        different = CODE & set(self.difference(other))
        return all(other.components.get(name) == also.get(name) for name in different)
