"""Imported once by the server from which child processes of tests are forked. It starts no thread."""

from __future__ import annotations

import datasets  # noqa: F401
import torch
import transformers

import hf_freezecache
from hf_freezecache import trainer  # noqa: F401
from hf_freezecache.hub import pull, push  # noqa: F401

transformers.AutoModelForImageClassification  # noqa: B018  (imported when it is first named)
hf_freezecache.FreezeCacheTrainer  # noqa: B018
torch.set_num_threads(1)
