"""What differs between kinds of devices."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["finish_device"]


def finish_device(device: torch.device) -> None:
    """Wait until a device has done what it was given: accelerators compute while the host goes on. On a CPU nothing is waited for."""
    module: Any = getattr(torch, device.type, None)
    if device.type != "cpu" and hasattr(module, "synchronize"):
        module.synchronize()
