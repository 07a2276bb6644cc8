"""A host memory apart from the CPU: weights that are sent there have 64 bits, so that no layer takes them with the others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch

from hf_freezecache.training import offload


@contextmanager
def other_place() -> Iterator[None]:
    """Let the CPU be a device with memory of its own."""
    with (
        mock.patch.object(offload, "_is_apart", return_value=True),
        mock.patch.object(offload, "_to_host", lambda tensor: tensor.double()),
        mock.patch.object(offload, "_to_device", lambda tensor, device: tensor.float()),
    ):
        yield


def places_of(model: torch.nn.Module) -> dict[str, str]:
    """Return where each parameter is."""
    return {name: "host" if p.dtype == torch.float64 else "device" for name, p in model.named_parameters()}
