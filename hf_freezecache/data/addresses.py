"""Addresses of objects, as numbers and inside texts: they differ from process to process, and say nothing."""

from __future__ import annotations

import functools
import gc
import re
from collections.abc import Mapping
from typing import Any

__all__ = ["SMALLEST_ADDRESS", "addresses_among", "numbers_in", "without_addresses"]

#: No address of an object is smaller.
SMALLEST_ADDRESS = 2**22
#: Where Python is linked to a fixed place, classes have addresses below this. No other object has: small ones lie elsewhere.
_SMALLEST_OF_OTHERS = 2**32
#: Objects that hold others begin at multiples of the first number, and below the second.
_ALIGNMENT, _LARGEST_ADDRESS = 16, 2**48
#: Of most texts, this says that they hold no address.
_SIX_DIGITS = re.compile("[0-9a-fA-F]{6}")
#: Numbers as long as an address, and their base. One may be part of the other: "Face94123456" has a longer hexadecimal one.
_NUMBERS = (
    (re.compile("(?<![0-9])[0-9]{7,20}(?![0-9])"), 10),
    (re.compile("(?<![0-9a-fA-F])[0-9a-fA-F]{6,16}(?![0-9a-fA-F])"), 16),
)
#: As Python writes an object that has no text of its own. The object need not be there any more.
_WRITTEN = re.compile(" at 0x[0-9a-fA-F]{6,16}(?![0-9a-fA-F])")


def numbers_in(text: str) -> set[int]:
    """Return the numbers in a text that may be addresses, decimal and hexadecimal ones."""
    if _SIX_DIGITS.search(text) is None:
        return set()
    return {int(number, base) for numbers, base in _NUMBERS for number in numbers.findall(text)}


def without_addresses(text: str, addresses: frozenset[int]) -> str:
    """Return a text with a word in place of each of some addresses, and of those in texts that Python gives to objects.

    Args:
        text: Any text.
        addresses: Numbers that are addresses.
    """
    if _SIX_DIGITS.search(text) is None:
        return text
    text = _WRITTEN.sub(" at <address>", text)
    if addresses:
        for numbers, base in _NUMBERS:
            text = numbers.sub(functools.partial(_in_place_of, addresses, base), text)
    return text


def _in_place_of(addresses: frozenset[int], base: int, number: re.Match[str]) -> str:
    return "<address>" if int(number[0], base) in addresses else number[0]


def addresses_among(numbers: set[int], met: Mapping[int, tuple[Any, Any]]) -> frozenset[int]:
    """Return those of some numbers that are addresses of objects, or the hashes that Python makes of addresses.

    Args:
        numbers: Any numbers.
        met: Objects by their addresses, each the first of a pair. All other objects that there are cost some 0.2 s: they are
            looked at only if a number may be the address of one.
    """
    large = {number for number in numbers if number >= _SMALLEST_OF_OTHERS}
    found = {number for number in large if number in met or number << 4 in met}
    found |= {number for number in numbers - large if number in met and isinstance(met[number][0], type)}
    others = {number for number in large - found if number % _ALIGNMENT == 0 and number < _LARGEST_ADDRESS}
    return frozenset(found | {id(each) for each in gc.get_objects() if id(each) in others} if others else found)
