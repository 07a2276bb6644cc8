"""Caches as an attacker would write them: every hash, size and checksum fits what was tampered with.

``CASES`` maps a name to a function that turns a copy of a sound cache into a hostile one; importing the package fills it. Run as
``python -m support.hostile``, it reads and verifies all of them in one process and prints what memory that takes.
"""

from . import codecs, files, frames, headers, index, tables, values
from .cases import CASES, GIB, ONLY_VERIFIED, fitted, make_hostile, prefix, read_all, sound_caches
from .tools import Shard, document_of, seal, set_predictor, set_transform
from .values import set_tokens

__all__ = [
    "CASES",
    "GIB",
    "ONLY_VERIFIED",
    "Shard",
    "codecs",
    "document_of",
    "files",
    "fitted",
    "frames",
    "headers",
    "index",
    "make_hostile",
    "prefix",
    "read_all",
    "seal",
    "set_predictor",
    "set_tokens",
    "set_transform",
    "sound_caches",
    "tables",
    "values",
]
