"""Sizes, codecs and distortion in words, for the command line and for cards."""

from __future__ import annotations

from typing import Any

__all__ = ["codec_words", "distortion_words", "size_words"]


def size_words(num_bytes: float) -> str:
    """Return a size in B, KiB, MiB or GiB."""
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} GiB"


def codec_words(codec: dict[str, Any]) -> str:
    """Return a codec, ``{"name", "configuration"}``, in one line."""
    from ..codecs import PRESETS  # here, since it imports torch

    if codec == PRESETS["lossless"].to_dict():
        return "lossless"
    words = []
    for step in codec["configuration"]["steps"]:
        settings = ", ".join(
            f"{name} {f'({len(value)} of them)' if isinstance(value, list) and len(value) > 4 else value}"
            for name, value in step["configuration"].items()
            if name != "state"
        )
        words.append(f"{step['name']} ({settings})" if settings else step["name"])
    return " > ".join(words)


def distortion_words(calibration: dict[str, Any]) -> str:
    """Return what calibration measured of a lossy codec, in one line."""
    agreement = "" if calibration["agreement"] is None else f"agreement {calibration['agreement']:.1%}, "
    return (
        f"{calibration['distortion']:.3g} ({calibration['measure']}), {agreement}relative error "
        f"{calibration['relative_error']:.3f}, on {calibration['num_test']} held-out images, states from the "
        f"{calibration['source']}"
    )
