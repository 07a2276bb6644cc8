"""Codecs: how the hidden states of a chunk become bytes, and back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..errors import UnsupportedSetupError
from .base import (
    DTYPES,
    Codec,
    Step,
    dtype_name,
)
from .cast import Cast
from .entropy import Zstd
from .pack import Pack
from .pipeline import (
    LosslessCodec,
    Pipeline,
)
from .planes import Planes
from .predictor import Predictor
from .quantize import Quantize
from .select import Select
from .transform import Transform
from .view_codec import CopyCodec, ViewCodec

__all__ = [
    "CODECS",
    "DTYPES",
    "PRESETS",
    "Cast",
    "Codec",
    "CopyCodec",
    "LosslessCodec",
    "Pack",
    "Pipeline",
    "Planes",
    "Predictor",
    "Quantize",
    "Select",
    "Step",
    "Transform",
    "ViewCodec",
    "Zstd",
    "codec_from_dict",
    "dtype_name",
    "make_codec",
]

#: Extension point: name -> class of a step, of which pipelines are made.
CODECS: dict[str, type[Step]] = {cls.name: cls for cls in (Cast, Select, Quantize, Transform, Planes, Pack, Zstd)}

#: Name -> codec that a user can ask for by it.
PRESETS: dict[str, Codec] = {
    "lossless": LosslessCodec(),
    "fp16": Pipeline((Cast("F16"), Planes(), Zstd())),
    "bf16": Pipeline((Cast("BF16"), Planes(), Zstd())),
    "int8": Pipeline((Quantize(8), Pack(), Zstd(matches="skip"))),
    "int4": Pipeline((Quantize(4), Pack(), Zstd(matches="skip"))),
    "transform": Pipeline((Transform(), Pack(), Zstd(matches="skip"))),
}


def make_codec(codec: str | Codec | Sequence[Step | Mapping[str, Any]]) -> Codec:
    """Return the codec that a user asks for.

    Args:
        codec: The name of a preset; or a codec; or the steps of a pipeline, as objects or as ``{"name",
            "configuration"}``, also as a JSON string.

    Raises:
        UnsupportedSetupError: Unknown name, a configuration that does not fit, or steps in an order that cannot work.
    """
    if isinstance(codec, Codec):
        return codec
    if isinstance(codec, str):
        if codec in PRESETS:
            return PRESETS[codec]
        if not codec.lstrip().startswith("["):
            raise UnsupportedSetupError(
                f"Unknown codec {codec!r}; known are {sorted(PRESETS)}, in CacheConfig also 'auto', or a JSON list of steps from {sorted(CODECS)}."
            )
        try:
            codec = json.loads(codec)
        except ValueError as error:
            raise UnsupportedSetupError(f"The codec {codec!r} is not valid JSON: {error}.") from error
    if not isinstance(codec, Sequence):
        raise UnsupportedSetupError(f"A codec is a name or a list of steps, got {codec!r}.")
    steps = [step.to_dict() if isinstance(step, Step) else step for step in codec]
    made = codec_from_dict({"name": Pipeline.name, "configuration": {"steps": steps}})
    tensors = {
        f"{position}.{name}": tensor
        for position, step in enumerate(codec)
        if isinstance(step, Transform)
        for name, tensor in step.tensors().items()
    }
    return codec_from_dict(made.to_dict(), tensors) if tensors else made


#: Longest pipeline that is read; all that are written are shorter.
_MAX_STEPS = 16


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 500 else f"{text[:497]}..."


def _step(data: Any, tensors: Mapping[str, Tensor]) -> Step:
    name, configuration = (data.get("name"), data.get("configuration", {})) if isinstance(data, Mapping) else (data, {})
    if not isinstance(name, str) or name not in CODECS:
        raise UnsupportedSetupError(f"Unknown codec {_short(name)} in a pipeline; known are {sorted(CODECS)}.")
    try:
        return CODECS[name](**configuration, **tensors)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise UnsupportedSetupError(
            f"Codec {name!r} does not take the configuration {_short(configuration)}: {error}"
        ) from error


def codec_from_dict(data: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> Codec:
    """Return the codec stored as ``{"name": ..., "configuration": {...}}``.

    Args:
        data: What ``Codec.to_dict`` gave.
        tensors: What ``Codec.tensors`` gave, for a codec that is fitted.

    Raises:
        UnsupportedSetupError: Unknown name, a configuration that does not fit, or other tensors than it was fitted with.
    """
    if not isinstance(data, Mapping):
        raise UnsupportedSetupError(f"A codec is stored as name and configuration, got {_short(data)}.")
    name, configuration = data.get("name"), data.get("configuration", {})
    if name not in (LosslessCodec.name, Pipeline.name):
        raise UnsupportedSetupError(f"Unknown codec {_short(name)}; known are {[LosslessCodec.name, Pipeline.name]}.")
    try:
        if name == LosslessCodec.name:
            return LosslessCodec(**configuration)
        if configuration.keys() != {"steps"}:
            raise ValueError("expected the one entry 'steps'")
        if len(configuration["steps"]) > _MAX_STEPS:
            raise ValueError(f"{len(configuration['steps'])} steps, expected at most {_MAX_STEPS}")
        owned: dict[int, dict[str, Tensor]] = {}
        for key, tensor in (tensors or {}).items():
            position, own = key.split(".", 1)
            owned.setdefault(int(position), {})[own] = tensor
        return Pipeline(
            tuple(_step(step, owned.get(position, {})) for position, step in enumerate(configuration["steps"]))
        )
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UnsupportedSetupError(
            f"Codec {name!r} does not take the configuration {_short(configuration)}: {error}"
        ) from error
