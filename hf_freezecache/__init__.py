"""Fine-tune vision transformers from a cache of their own frozen prefix."""

from .config import CacheConfig, FreezeConfig
from .dataset import CachedDataset
from .errors import FreezeCacheError
from .splitting import Split, split_model
from .suffix import SuffixModel
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

__version__ = "0.1.0.dev0"
