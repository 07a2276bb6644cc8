"""What steps and codecs there are, and how a codec is made from what a user asks for or a file holds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..errors import UnsupportedSetupError
from .array_names import join_groups, split_groups
from .base import Step
from .cast import Cast
from .codec import Codec
from .entropy import Zstd
from .pack import Pack
from .planes import Planes
from .quantize import Quantize
from .select import Select
from .transform import Transform

__all__ = ["PRESETS", "STEPS", "codec_from_dict", "make_codec"]

#: Extension point: name -> class of a step. ``base`` says how to add one.
STEPS: dict[str, type[Step]] = {cls.name: cls for cls in (Cast, Select, Quantize, Transform, Planes, Pack, Zstd)}

#: Name -> codec that a user can ask for by it.
PRESETS: dict[str, Codec] = {
    "lossless": Codec((Planes(), Zstd())),
    "fp16": Codec((Cast("F16"), Planes(), Zstd())),
    "bf16": Codec((Cast("BF16"), Planes(), Zstd())),
    "int8": Codec((Quantize(8), Pack(), Zstd(matches="skip"))),
    "int4": Codec((Quantize(4), Pack(), Zstd(matches="skip"))),
    "transform": Codec((Transform(), Pack(), Zstd(matches="skip"))),
}

#: Longest codec that is read; all that are written are shorter.
_MAX_STEPS = 16
#: Errors that a class may raise when it is given what a file holds.
_MISFITS = (TypeError, ValueError, AttributeError, ArithmeticError)


def make_codec(codec: str | Codec | Sequence[str | Step | Mapping[str, Any]]) -> Codec:
    """Return the codec that a user asks for.

    Args:
        codec: The name of a preset, or a codec, or a list of steps. A step is an object, a name, or a dict of ``name`` and
            ``configuration``; the last two may also come as one JSON string.

    Raises:
        UnsupportedSetupError: The name is unknown, a configuration does not fit, or the order of steps cannot work.
    """
    if isinstance(codec, Codec):
        return codec
    if isinstance(codec, str):
        if codec in PRESETS:
            return PRESETS[codec]
        if not codec.lstrip().startswith("["):
            raise UnsupportedSetupError(
                f"Unknown codec {codec!r}; known are {sorted(PRESETS)}, in CacheConfig also 'auto', or a JSON list of steps "
                f"from {sorted(STEPS)}."
            )
        try:
            codec = json.loads(codec)
        except ValueError as error:
            raise UnsupportedSetupError(f"The codec {codec!r} is not valid JSON: {error}.") from error
    if not isinstance(codec, Sequence):
        raise UnsupportedSetupError(f"A codec is a name or a list of steps, got {codec!r}.")
    steps = [step.to_dict() if isinstance(step, Step) else step for step in codec]
    tensors = {str(place): step.tensors() for place, step in enumerate(codec) if isinstance(step, Step)}
    return codec_from_dict({"name": Codec.name, "configuration": {"steps": steps}}, join_groups(tensors))


def _refuse(name: str, configuration: Any, error: Exception) -> UnsupportedSetupError:
    return UnsupportedSetupError(f"Codec {name!r} does not take the configuration {_short(configuration)}: {error}")


def _short(value: Any) -> str:
    """Return the repr of a value that a file may hold, at most 500 characters of it."""
    text = repr(value)
    return text if len(text) <= 500 else f"{text[:497]}..."


def _make_step(data: Any, tensors: Mapping[str, Tensor]) -> Step:
    name, configuration = (data.get("name"), data.get("configuration", {})) if isinstance(data, Mapping) else (data, {})
    if not isinstance(name, str) or name not in STEPS:
        raise UnsupportedSetupError(f"Unknown codec {_short(name)} in a pipeline; known are {sorted(STEPS)}.")
    try:
        return STEPS[name](**configuration, **tensors)
    except _MISFITS as error:
        raise _refuse(name, configuration, error) from error


def codec_from_dict(data: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> Codec:
    """Return the codec stored as ``{"name": ..., "configuration": {...}}``.

    Args:
        data: What ``Codec.to_dict`` gave.
        tensors: What ``Codec.tensors`` gave, for a codec that is fitted.

    Raises:
        UnsupportedSetupError: The name is unknown, a configuration does not fit, or the tensors are not those of the fit.
    """
    if not isinstance(data, Mapping):
        raise UnsupportedSetupError(f"A codec is stored as name and configuration, got {_short(data)}.")
    name, configuration = data.get("name"), data.get("configuration", {})
    if name != Codec.name:
        raise UnsupportedSetupError(f"Unknown codec {_short(name)}; codecs are stored as {Codec.name!r}.")
    try:
        if configuration.keys() != {"steps"}:
            raise ValueError("expected the one entry 'steps'")
        if len(configuration["steps"]) > _MAX_STEPS:
            raise ValueError(f"{len(configuration['steps'])} steps, expected at most {_MAX_STEPS}")
        of_steps = split_groups(tensors or {})
        steps = [_make_step(step, of_steps.pop(str(place), {})) for place, step in enumerate(configuration["steps"])]
        if of_steps:
            raise ValueError(f"tensors of the steps {sorted(of_steps)}, which the codec does not have")
        return Codec(tuple(steps))
    except _MISFITS as error:
        raise _refuse(name, configuration, error) from error
