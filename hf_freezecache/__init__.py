"""Fine-tune vision transformers from a cache of their own frozen prefix.

Most scripts need three names: `FreezeCacheTrainer`, which takes the place of ``transformers.Trainer``, `FreezeConfig` and
`CacheConfig`. `CachedDataset` and `SuffixModel` train from a cache that somebody else computed; `split_model` splits a
model for purposes of your own. Every error raised on purpose is a `FreezeCacheError`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import (
        CacheConfig,
        FreezeConfig,
    )
    from .dataset import CachedDataset
    from .errors import FreezeCacheError
    from .model.split import (
        Split,
        split_model,
    )
    from .model.suffix import SuffixModel
    from .trainer import FreezeCacheTrainer

__all__ = [
    "CacheConfig",
    "CachedDataset",
    "FreezeCacheError",
    "FreezeCacheTrainer",
    "FreezeConfig",
    "Split",
    "SuffixModel",
    "__version__",
    "split_model",
]

__version__ = "0.1.0"

# Public name -> its module, loaded when the name is first asked for (PEP 562): the command line answers --help without torch.
_HOME = {
    "CacheConfig": "config",
    "CachedDataset": "dataset",
    "FreezeCacheError": "errors",
    "FreezeCacheTrainer": "trainer",
    "FreezeConfig": "config",
    "Split": "model.split",
    "SuffixModel": "model.suffix",
    "split_model": "model.split",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
