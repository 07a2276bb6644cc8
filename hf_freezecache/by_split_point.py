"""Numbers that a user gives by split point: rates of learning, and of codecs."""

from __future__ import annotations

from collections.abc import Sequence

from .errors import UnsupportedSetupError

__all__ = ["MOST_LR_SCALE", "parse_by_split_point", "parse_lr_scale"]

#: Largest number in ``lr_scale``.
MOST_LR_SCALE = 1000


def parse_by_split_point(
    name: str, text: str, most: float, expected: str, first: int = 0
) -> Sequence[tuple[int, float]]:
    """Read ``"2.5"``, or ``"0:4.0,6:2.5"``: from which split point on which number.

    Args:
        name: Name of the setting.
        text: Its value.
        most: The largest number.
        expected: What is expected, in words, with an example.
        first: From which split point on a number alone holds.

    Raises:
        UnsupportedSetupError: The text cannot be read; the message says why.
    """
    pairs = []
    for entry in text.split(","):
        start, _, number = entry.rpartition(":") if entry != text or ":" in entry else (str(first), "", entry)
        try:
            pair = (int(start), float(number))
        except ValueError:
            pair = (-1, -1.0)
        if pair[0] < 0 or not 0 < pair[1] <= most:
            raise UnsupportedSetupError(f"{name}={text!r} has the entry {entry!r}; expected {expected}.")
        pairs.append(pair)
    starts = [start for start, _ in pairs]
    if starts != sorted(set(starts)):
        raise UnsupportedSetupError(f"{name}={text!r} must name rising split points, each once.")
    return pairs


def parse_lr_scale(lr_scale: str) -> Sequence[tuple[int, float]] | None:
    """Read ``"2.5"``, ``"6:1.5,9:2.5"`` or ``"auto"``: from which split point on learning rates are multiplied by what.

    Returns:
        The pairs; ``None`` for ``"auto"``. A number alone holds from split point 1 on.

    Raises:
        UnsupportedSetupError: The text cannot be read; the message says why.
    """
    if lr_scale == "auto":
        return None
    expected = "'auto', one number above 0 and up to 1000, e.g. '2.5', or split_point:number pairs, e.g. '6:1.5,9:2.5'"
    return parse_by_split_point("lr_scale", lr_scale, MOST_LR_SCALE, expected, first=1)
