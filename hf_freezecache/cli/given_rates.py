"""Rates of a machine that is not this one, for ``hf-freezecache plan``: a JSON file that the user writes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..errors import UnsupportedSetupError
from ..passes import passes_of_step
from ..training.image_rates import Rates

__all__ = ["GivenRates", "read_rates", "shown_rates"]

_MB = 1e6


@dataclass(frozen=True)
class GivenRates:
    """What the user knows of a machine; ``None`` of what is to be measured here. MB are of stored hidden states, 1 MB 10^6 bytes.

    Attributes:
        name: The machine, in the user's words.
        rendered_images_per_second: Of one process: reading, decoding and transforming.
        block_passes_per_second: Images times blocks, of one device: a forward pass is one, a backward pass two.
        full_training_images_per_second: The same in other words: of one device that trains all blocks and waits for no images.
        encode_mb_per_second: Encoding of hidden states, of one process.
        decode_mb_per_second: Decoding of hidden states, of one thread.
        write_mb_per_second: Of the disk that holds the caches, all processes together.
        read_mb_per_second: The same of reading. Without it no step waits for the disk.
        devices: Devices that train, each with rendering processes and a copy of the model.
        processes: Processes of each device that render, and threads that read caches. 0: the device waits while images are rendered.
    """

    name: str | None = None
    rendered_images_per_second: float | None = None
    block_passes_per_second: float | None = None
    full_training_images_per_second: float | None = None
    encode_mb_per_second: float | None = None
    decode_mb_per_second: float | None = None
    write_mb_per_second: float | None = None
    read_mb_per_second: float | None = None
    devices: int = 1
    processes: int | None = None

    def __post_init__(self) -> None:
        """Check each value.

        Raises:
            UnsupportedSetupError: A value is not what it must be, or two say the same.
        """
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None and field.default is None:
                continue
            if field.name == "name":
                good, expected = isinstance(value, str), "text"
            elif field.name in ("devices", "processes"):
                least = 1 if field.name == "devices" else 0
                good = type(value) is int and value >= least
                expected = f"a whole number of at least {least}"
            else:
                good = type(value) in (int, float) and 0 < value < math.inf
                expected = "a number above 0"
            if not good:
                raise UnsupportedSetupError(f"rates: {field.name} is {value!r}; expected {expected}.")
        if self.block_passes_per_second is not None and self.full_training_images_per_second is not None:
            raise UnsupportedSetupError(
                "rates: block_passes_per_second and full_training_images_per_second say the same; give one of them."
            )

    def applied(self, measured: Rates, num_blocks: int) -> Rates:
        """Return rates of one image on one of the devices, with what is given in place of what was measured.

        Args:
            measured: What one image takes here.
            num_blocks: Blocks of the model.
        """
        rates = measured
        if (rendered := self.rendered_images_per_second) is not None:
            # Several views share the reading of a row, here as there.
            several = measured.render_all / measured.render if measured.render > 0 else 1.0
            rates = replace(rates, render=1 / rendered, render_all=several / rendered)
        elsewhere: dict[str, Any] = {"embed": 0.0, "cores": 0, "encoders": 1}  # an accelerator, as a rule
        if (passes := self.block_passes_per_second) is not None:
            rates = replace(rates, block=1 / passes, **elsewhere)
        if (images := self.full_training_images_per_second) is not None:
            rates = replace(rates, block=1 / images / passes_of_step(num_blocks, 0), **elsewhere)
        # Devices take turns at one disk.
        for name, sharing in (("encode", 1), ("decode", 1), ("write", self.devices), ("read", self.devices)):
            rate = getattr(self, f"{name}_mb_per_second")
            if rate is not None:
                rates = replace(rates, **{name: sharing * measured.stored_bytes / _MB / rate})
        return rates


def read_rates(path: Path) -> GivenRates:
    """Read rates from a JSON file: an object of some of the attributes of ``GivenRates``.

    Raises:
        UnsupportedSetupError: The file holds something else, or a value is out of its range.
        OSError: The file cannot be read.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UnsupportedSetupError(f"{path} is no JSON: {error}. Expected an object of rates.") from error
    known = [field.name for field in fields(GivenRates)]
    if not isinstance(found, Mapping):
        raise UnsupportedSetupError(f"{path} holds {type(found).__name__}; expected an object of: {', '.join(known)}.")
    unknown = sorted(set(found) - set(known))
    if unknown:
        raise UnsupportedSetupError(
            f"{path} holds {unknown[0]!r}, which is no rate; expected some of: {', '.join(known)}."
        )
    try:
        return GivenRates(**found)
    except UnsupportedSetupError as error:
        raise UnsupportedSetupError(f"{path}: {error}") from error


def shown_rates(given: GivenRates, used: Rates) -> dict[str, dict[str, Any]]:
    """Return the rates that predictions rest on, in the units of ``GivenRates``, and where each comes from.

    Args:
        given: What the user gives.
        used: What ``applied`` gave.

    Returns:
        By name, ``value`` and ``source``: ``"given"`` or ``"measured"``. What nothing waits for is left out.
    """
    passes = given.block_passes_per_second or given.full_training_images_per_second

    def size(seconds: float, sharing: int = 1) -> float | None:
        return sharing * used.stored_bytes / _MB / seconds if seconds > 0 else None

    values = {
        "rendered_images_per_second": 1 / used.render if used.render > 0 else None,
        "block_passes_per_second": 1 / used.block if used.block > 0 else None,
        "encode_mb_per_second": size(used.encode),
        "decode_mb_per_second": size(used.decode),
        "write_mb_per_second": size(used.write, given.devices),
        "read_mb_per_second": size(used.read, given.devices),
    }
    return {
        name: {
            "value": value,
            "source": "measured"
            if (passes if name == "block_passes_per_second" else getattr(given, name)) is None
            else "given",
        }
        for name, value in values.items()
        if value is not None
    }
