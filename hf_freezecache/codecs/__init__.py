"""Codecs: how the hidden states of a chunk become bytes, and back."""

from .base import DTYPES, Step, dtype_name
from .cast import Cast
from .codec import Codec
from .entropy import Zstd
from .pack import Pack
from .planes import Planes
from .predictor import Predictor
from .quantize import Quantize
from .registry import PRESETS, STEPS, codec_from_dict, make_codec
from .select import Select
from .transform import Transform
from .view_codec import CopyCodec, ViewCodec

__all__ = [
    "DTYPES",
    "PRESETS",
    "STEPS",
    "Cast",
    "Codec",
    "CopyCodec",
    "Pack",
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
