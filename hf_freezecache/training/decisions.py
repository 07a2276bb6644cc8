"""Writes into the decision of a stage what became of its cache."""

from __future__ import annotations

from ..codecs import DTYPES
from ..report.record import Decision
from .stage_cache import OpenedCache

__all__ = ["describe_cache"]


def describe_cache(decision: Decision, opened: OpenedCache) -> None:
    """Write into a decision what the cache of its stage is, and what it cost."""
    index, report = opened.reader.index, opened.report
    decision.trained_from = "cache"
    decision.cache = "found" if opened.built_from is None else "built"
    decision.built_from = opened.built_from
    decision.built_ahead = list(opened.built_ahead)
    decision.built_blocks = round(opened.built_blocks, 4)
    decision.calibrated = opened.calibrated
    decision.num_views = len(opened.reader.selection.chosen_views(index))
    decision.codec = dict(index.codec)
    decision.dtype = str(DTYPES[index.dtype]).removeprefix("torch.")
    decision.calibration = index.calibration
    decision.copies_calibration = index.copies_calibration
    decision.cache_bytes = report.total_bytes
    decision.cache_bytes_per_image = report.total_bytes / index.num_samples
    decision.bits_per_element = round(index.bits_per_element, 4)
    decision.built_shards = report.built_shards
    decision.distortion = opened.distortion
    decision.build_seconds = round(report.seconds, 3)
