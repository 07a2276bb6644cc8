"""Codecs: how the hidden states of a chunk become bytes, and back."""

from __future__ import annotations

from typing import Any

from ..errors import UnsupportedSetupError
from .base import DTYPES, Codec, dtype_name
from .lossless import LosslessCodec

__all__ = ["CODECS", "DTYPES", "Codec", "LosslessCodec", "codec_from_dict", "dtype_name", "make_codec"]

#: Extension point: name -> class of codec.
CODECS: dict[str, type[Codec]] = {LosslessCodec.name: LosslessCodec}


def make_codec(name: str) -> Codec:
    """Return the codec of this name with its default configuration.

    Raises:
        UnsupportedSetupError: There is no codec of this name.
    """
    return codec_from_dict({"name": name, "configuration": {}})


def codec_from_dict(data: dict[str, Any]) -> Codec:
    """Return the codec stored as ``{"name": ..., "configuration": {...}}``.

    Raises:
        UnsupportedSetupError: Unknown name, or a configuration that does not fit.
    """
    name, configuration = data.get("name"), data.get("configuration", {})
    if name not in CODECS:
        raise UnsupportedSetupError(f"Unknown codec {name!r}; known are {sorted(CODECS)}.")
    try:
        return CODECS[name](**configuration)
    except (TypeError, ValueError) as error:
        raise UnsupportedSetupError(
            f"Codec {name!r} does not take the configuration {configuration}: {error}"
        ) from error
