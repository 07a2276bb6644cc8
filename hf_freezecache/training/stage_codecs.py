"""The codecs of a stage: what the user asks for, choosing them, and those that an interrupted build wrote down."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..cache.codec_state import CodecState, load_copies, load_state, save_state
from ..cache.index import CODEC_NAME, COPIES_NAME
from ..cache.reader import CacheReader
from ..cache.shard_writer import CachePlan
from ..codecs import Codec
from ..compression.base_view import CodecChooser, requested_codec
from ..compression.extra_views import choose_copies, keeps_copies
from ..config import CacheConfig
from ..data.seeding import preserved_random_state
from ..errors import CacheCorruptError
from ..model.split import Split

__all__ = ["choose_codecs", "codec_request", "copies_request", "kept_codecs", "name_of_source"]

logger = logging.getLogger(__name__)


def name_of_source(source: CacheReader) -> str:
    """Return how an earlier cache is named as the source of a later one."""
    return f"cache of split point {source.index.split_point}"


def codec_request(config: CacheConfig, split: Split, split_points: Sequence[int]) -> str:
    """Return what the codec is to be, not what calibration made of it: that depends on the head, which may differ."""
    codec, budget, rate = requested_codec(config, split.split_point)
    request: dict[str, Any] = codec.to_dict()
    if not codec.lossless:
        request |= {"distortion": budget, "rate": rate, "calibration samples": config.calibration_samples}
        earlier = [point for point in split_points if 0 < point < split.split_point]
        if config.build_from != "images" and earlier:
            # States may come from a lossy cache of an earlier stage.
            rates = [requested_codec(config, point)[2] for point in earlier]
            request["build from"] = [config.build_from, config.max_distortion, earlier, rates]
    return json.dumps(request, sort_keys=True)


def copies_request(config: CacheConfig) -> dict[str, str]:
    """Return what views beyond the first are to be, if they have a codec of their own."""
    if not config.copies_apart:
        return {}
    request = {
        "copies": config.copies,
        "distortion": config.max_distortion,
        "samples": config.calibration_samples,
        "build from": config.build_from,
        "weight": config.gradient_weight,
    }
    return {"copies": json.dumps(request, sort_keys=True)}


def choose_codecs(
    chooser: CodecChooser, split: Split, plan: CachePlan, directory: Path, source: CacheReader | None
) -> tuple[CachePlan, bool]:
    """Fit and calibrate codecs, and write them down; return the plan with them, and whether to take the source."""
    with preserved_random_state():
        apart = chooser.config.copies_apart
        if apart and source is not None and chooser.config.build_from == "auto":
            source = source if keeps_copies(chooser, split, source) else None
        if plan.codec.lossless:
            state: CodecState[Codec] = CodecState(plan.codec, {})
        else:
            state, source = chooser.choose(split, source)
            plan = dataclasses.replace(plan, codec=state.codec, calibration=state.calibration)
        if apart:
            copies = choose_copies(chooser, split, state, source)
            plan = dataclasses.replace(plan, copies=copies.codec, copies_calibration=copies.calibration)
            save_state(directory / COPIES_NAME, plan.fingerprint.digest, copies)
    chooser.forget_samples()
    if not plan.codec.lossless or plan.calibration is not None:
        # Last: a next start takes this file for the sign that all codecs were chosen.
        save_state(directory / CODEC_NAME, plan.fingerprint.digest, state)
    return plan, source is not None


def kept_codecs(
    config: CacheConfig, plan: CachePlan, directory: Path, source: CacheReader | None
) -> tuple[CachePlan, bool] | None:
    """Return what ``choose_codecs`` does, from the codecs that a killed build wrote down, if all of them are there."""
    digest, sources = plan.fingerprint.digest, set()
    needed = [COPIES_NAME] if config.copies_apart else []
    needed += [] if plan.codec.lossless else [CODEC_NAME]
    if not all((directory / name).is_file() for name in needed):
        return None
    try:
        if CODEC_NAME in needed:
            state = load_state(directory / CODEC_NAME, digest)
            plan = dataclasses.replace(plan, codec=state.codec, calibration=state.calibration)
            sources.add(state.calibration.get("source", "images"))
        if COPIES_NAME in needed:
            copies = load_copies(directory / COPIES_NAME, digest)
            plan = dataclasses.replace(plan, copies=copies.codec, copies_calibration=copies.calibration)
            sources.add(copies.calibration.get("source", "images"))
    except CacheCorruptError as error:
        logger.warning("Calibrating again: %s", error)
        return None
    if sources == {"images"}:
        return plan, False
    if source is not None and sources == {name_of_source(source)}:
        return plan, True
    logger.warning("Beginning anew: the source of this cache (%s) is gone.", ", ".join(sorted(map(str, sources))))
    return None
