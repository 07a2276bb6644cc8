"""Image processors with the oldest versions of transformers."""

from __future__ import annotations

import sys

import transformers
from packaging.version import Version
from transformers.utils import is_torchvision_available


def name_without_torchvision() -> None:
    """Let ``transformers.AutoImageProcessor`` be named where torchvision is not there.

    Before 5.19 transformers asks for torchvision by that name, though processors that use Pillow do without. Users of these
    versions have it installed; beside torch for CPUs its wheels cannot be imported.
    """
    if Version(transformers.__version__) < Version("5.19") and not is_torchvision_available():
        from transformers.models.auto.image_processing_auto import AutoImageProcessor

        # What was imported first may be another object: transformers takes its own place.
        sys.modules["transformers"].AutoImageProcessor = AutoImageProcessor
