"""The training data as caches and stages see them."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import datasets
from torch import Tensor
from torch.utils.data import Dataset

from ..config import CacheConfig
from ..errors import UnsupportedSetupError
from .code_walk import CodeWalk, changed_parts
from .collators import CheckedCollator
from .hashing import hash_dataset, hash_object, look_into
from .layout import ChunkLayout
from .views import ViewDataset, with_transform

__all__ = ["TrainingData", "UserCode"]

#: Names of the two kinds of code, as users know them.
_TRANSFORM, _COLLATOR = "transform", "data collator"
#: Data sets around data sets that are looked into.
_NESTED = 8


@dataclass(frozen=True)
class UserCode:
    """The code of the user's own that training data pass through, with its state.

    Attributes:
        dataset: The data set that the user passed, with its transform.
        transforms: The user's ``train_transform`` and ``eval_transform``, or ``(None, None)``.
        collator: The user's collator as it was passed.
        changing: Parts that rendering changes by itself, as a count of calls, by the name of the code they are in.
    """

    dataset: Any
    transforms: tuple[Any, Any]
    collator: Any
    changing: Mapping[str, frozenset[str]] = field(default_factory=dict)

    def of_views(self, num_views: int) -> UserCode:
        """Return the code that renders the first views.

        With one view, ``train_transform`` is none of it: the cache is that of a data set that has ``eval_transform`` as its own.

        Args:
            num_views: How many.
        """
        _, eval_transform = self.transforms
        if num_views > 1 or eval_transform is None or not isinstance(self.dataset, datasets.Dataset):
            return self
        return replace(self, dataset=with_transform(self.dataset, eval_transform), transforms=(None, None))

    def _parts(self) -> dict[str, tuple[Any, str]]:
        formatted = self.dataset.format if isinstance(self.dataset, datasets.Dataset) else _code_of(self.dataset)
        return {
            _TRANSFORM: ((*self.transforms, formatted), "training transform"),
            _COLLATOR: (self.collator, "data collator"),
        }

    def walks(self) -> dict[str, CodeWalk]:
        """Walk over the code as it is now, by name. What cannot be hashed is left out."""
        walks = {}
        for name, (code, what) in self._parts().items():
            with suppress(UnsupportedSetupError):
                walks[name] = look_into(code, what)
        return walks

    def without_what_changed_since(self, before: Mapping[str, CodeWalk]) -> UserCode:
        """Return the same code without the parts that rendering has changed since some walks: they are no inputs.

        Args:
            before: What ``walks`` gave before views were rendered.
        """
        now = self.walks() if before else {}
        return replace(
            self, changing={name: changed_parts(before[name], now[name]) for name in before.keys() & now.keys()}
        )

    def hashes(self, config: CacheConfig) -> dict[str, str]:
        """Return the hashes of the code as it is now, by name.

        Raises:
            UnsupportedSetupError: The transform or the collator cannot be hashed.
        """
        if config.transform_id is not None:
            return {_TRANSFORM: config.transform_id, _COLLATOR: config.transform_id}
        nothing: frozenset[str] = frozenset()
        return {
            name: hash_object(code, what, self.changing.get(name, nothing))
            for name, (code, what) in self._parts().items()
        }


_DATASETS = (Dataset, datasets.Dataset)


def _code_of(dataset: Any) -> Any:
    """Return the code that renders the rows of a data set of the user's own: its class, and transforms as torchvision has them.

    So of the data sets that it holds, as those of a ``Subset`` or a ``ConcatDataset``.
    """
    parts: list[Any] = []
    waiting, seen, known = deque([(dataset, 1)]), {id(dataset)}, set()
    while waiting:
        dataset, depth = waiting.popleft()
        if isinstance(dataset, datasets.Dataset):
            parts.append(dataset.format)
            continue
        held = vars(dataset) if hasattr(dataset, "__dict__") else {}
        transforms = {name: held[name] for name in ("transform", "target_transform", "transforms") if held.get(name)}
        key = (type(dataset), *((name, id(value)) for name, value in transforms.items()))
        if key not in known:  # many parts may be rendered alike
            known.add(key)
            parts.append(transforms)
            parts += [
                vars(type(dataset))[name] for name in ("__getitem__", "__getitems__") if name in vars(type(dataset))
            ]
        for name, value in held.items() if depth < _NESTED else ():
            # A list of data sets has one in front: others may have millions of entries.
            several = isinstance(value, (list, tuple)) and len(value) > 0 and isinstance(value[0], _DATASETS)
            for one in value if several else [value]:
                inner = isinstance(one, _DATASETS) or (name == "dataset" and one is not None)
                if inner and id(one) not in seen:
                    seen.add(id(one))
                    waiting.append((one, depth + 1))
    return parts


@dataclass(frozen=True)
class TrainingData:
    """The training data of one run: what the user passed, and what a look at the first rows told. Complete when made.

    Attributes:
        dataset: The data set that the user passed.
        views: Renders the views.
        collate: The user's collator, with its labels checked.
        code: The user's transforms and collator as they were passed, for hashing: what renders the views that are stored.
        code_of_more: What renders more of them, where that is more code; caches of several views are named by it.
        layout: Which sample lies in which chunk.
        view_seed: Seed of the views.
        has_classes: Whether each label is one of several exclusive classes.
        example_batch: The first rows, rendered and collated: name -> (rows, ...), on the CPU.
        image_shape: (channels, height, width) of the rendered images, or (patches, values) where they come as patches.
        call: Arguments of a forward of the first row, as the trainer's loss calls the model.
        prefix_inputs: Names of the parts of a batch, beside ``pixel_values``, that the frozen blocks take.
        batch_spec: Names, dtypes and shapes of a batch, for the fingerprint.
    """

    dataset: Any
    views: ViewDataset
    collate: CheckedCollator
    code: UserCode
    layout: ChunkLayout
    view_seed: int
    has_classes: bool
    example_batch: dict[str, Tensor]
    image_shape: tuple[int, ...]
    call: dict[str, Any]
    prefix_inputs: frozenset[str]
    batch_spec: str
    code_of_more: UserCode | None = None

    def hashes_of_more(self, config: CacheConfig) -> dict[str, str]:
        """Return the hashes of ``code_of_more``; nothing where that is no more code, or has none: then no cache is named by it."""
        with suppress(UnsupportedSetupError):
            return {} if self.code_of_more is None else self.code_of_more.hashes(config)
        return {}

    def dataset_hash(self, config: CacheConfig) -> str:
        """Return the name of the data set in fingerprints, or its hash. Reads the whole data set.

        Raises:
            UnsupportedSetupError: The data set cannot be hashed.
        """
        return config.dataset_id or hash_dataset(self.dataset)
