"""Where a view lies in its image."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

__all__ = ["GEOMETRY_NAME", "ViewParameters", "recorded"]

#: Extra (samples, 5) that says where a view lies in its image, see ``codecs.copies.WHOLE``. Stored where copies are predicted.
GEOMETRY_NAME = "view_geometry"


Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class ViewParameters:
    """What was drawn for one view of one image; with the image, all that its rendering depends on.

    Attributes:
        left: Left edge of the crop as a fraction of the image's width: 0 is the image's left edge, 1 its right one.
        top: Upper edge as a fraction of the image's height.
        right: Right edge as a fraction of the image's width, greater than ``left``.
        bottom: Lower edge as a fraction of the image's height, greater than ``top``. Random crops lie within 0 to 1. So
            does the evaluation's centre crop, mapped back from the resized to the original image, except where the
            crop is larger than the resized image: what lies outside is black.
        flip: Whether left and right are exchanged, after cropping.
        brightness: Factor of ``PIL.ImageEnhance.Brightness``; 1.0 changes nothing.
        contrast: Factor of ``PIL.ImageEnhance.Contrast``; 1.0 changes nothing.
        saturation: Factor of ``PIL.ImageEnhance.Color``; 1.0 changes nothing.
    """

    left: float
    top: float
    right: float
    bottom: float
    flip: bool = False
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0

    def geometry(self) -> tuple[float, float, float, float, float]:
        """Return ``(left, top, right, bottom, flip)``: where pixels came from, as fractions; flip is 0.0 or 1.0."""
        return self.left, self.top, self.right, self.bottom, float(self.flip)


_recorder: ContextVar[list[ViewParameters] | None] = ContextVar("_recorder", default=None)


@contextmanager
def recorded() -> Iterator[list[ViewParameters]]:
    """Collect the parameters of every image that a call of an ``ImageTransform`` renders in this context.

    Yields:
        A list that grows by one entry per image, in the order of rendering. It is empty after a call of any other
        transform. Of nested contexts the innermost collects. Other threads do not write to it: each has its own.
    """
    found: list[ViewParameters] = []
    token = _recorder.set(found)
    try:
        yield found
    finally:
        _recorder.reset(token)


#: Stands for what nobody knows.
WHOLE_IMAGE = ViewParameters(0.0, 0.0, 1.0, 1.0)
