"""What the trainers of one process need not find out twice: a sweep makes one after the other over the same data and cache.

What is remembered has a name of all that it depends on, as far as that can be known; where something cannot, nothing is
remembered. Nothing here outlives the process.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

__all__ = ["Remembered", "forget_all"]

Value = TypeVar("Value")

_ALL: list[Remembered[object]] = []


class Remembered(Generic[Value]):
    """Values by name, of which the least recently used is forgotten when there are too many.

    Args:
        most: So many are kept.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._values: OrderedDict[Hashable, Value] = OrderedDict()
        _ALL.append(self)  # type: ignore[arg-type]

    def get(self, name: Hashable) -> Value | None:
        """Return the value of a name; ``None`` if there is none, and for the name ``None``."""
        if name is None or name not in self._values:
            return None
        self._values.move_to_end(name)
        return self._values[name]

    def keep(self, name: Hashable, value: Value) -> None:
        """Remember a value; not under the name ``None``."""
        if name is None:
            return
        self._values[name] = value
        self._values.move_to_end(name)
        while len(self._values) > self.most:
            self._values.popitem(last=False)

    def clear(self) -> None:
        """Forget all values."""
        self._values.clear()


def forget_all() -> None:
    """Forget all that was remembered in this process."""
    for each in _ALL:
        each.clear()
