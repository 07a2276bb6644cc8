"""Finds caches in folders, and says in figures and in words what one holds."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CacheCorruptError
from ..report.text import codec_words, distortion_words, size_words

if TYPE_CHECKING:
    from ..cache.index import CacheIndex

__all__ = ["describe_cache", "description_lines", "find_caches", "is_cache_name"]

#: Name of a cache's folder, as ``CachePlan.name`` makes it. It marks unfinished caches, which have no index yet.
_CACHE_NAME = re.compile(r"k\d{2,}-[0-9a-f]{16}")


def is_cache_name(name: str) -> bool:
    """Say whether a folder of this name is a cache, finished or not."""
    return _CACHE_NAME.fullmatch(name) is not None


def find_caches(path: Path) -> tuple[list[Path], list[Path]]:
    """Return the caches at or right below a path, and the unfinished ones below it.

    Raises:
        CacheCorruptError: There is no finished cache.
    """
    from ..cache.index import INDEX_NAME, load_index

    if not path.is_dir():
        what = "is a file; give the folder of the cache" if path.exists() else "does not exist"
        raise CacheCorruptError(f"{path} {what}.")
    if (path / INDEX_NAME).exists():
        return [path], []
    folders = sorted(child for child in path.iterdir() if child.is_dir())
    caches = [child for child in folders if (child / INDEX_NAME).exists()]
    unfinished = [child for child in folders if child not in caches and is_cache_name(child.name)]
    if caches:
        return caches, unfinished
    if is_cache_name(path.resolve().name) or any(path.glob("view-*")):
        load_index(path)  # says what is missing, and how to finish the build
    hint = f" It holds {len(unfinished)} unfinished caches, e.g. {unfinished[0]}." if unfinished else ""
    raise CacheCorruptError(f"{path} is no cache: it has no {INDEX_NAME}, and no folder in it has one.{hint}")


def describe_cache(path: Path, index: CacheIndex) -> dict[str, Any]:
    """Return what a cache holds, as ``--json`` prints it."""
    from ..cache.fingerprint import Fingerprint
    from ..codecs import DTYPES
    from ..hub.provenance import read_provenance

    tokens, hidden = index.hidden_shape
    per_view = index.total_bytes / (index.num_samples * index.num_views)
    return {
        "path": str(path),
        "split_point": index.split_point,
        "num_views": index.num_views,
        "num_samples": index.num_samples,
        "image_shape": list(index.image_shape),
        "tokens": tokens,
        "hidden": hidden,
        "dtype": str(DTYPES[index.dtype]).removeprefix("torch."),
        "codec": index.codec,
        "calibration": index.calibration,
        "copies": index.copies,
        "copies_calibration": index.copies_calibration,
        "view_bytes": [index.view_bytes(view) for view in range(index.num_views)],
        "chunk_size": index.chunk_size,
        "shard_chunks": index.shard_chunks,
        "shards": index.num_shards * index.num_views,
        "bytes": index.total_bytes,
        "bytes_per_image": per_view * index.num_views,
        "bytes_per_image_and_view": per_view,
        "bits_per_element": 8 * per_view / (tokens * hidden),
        "extras": [{"name": e.name, "dtype": e.dtype, "shape": list(e.shape)} for e in index.extras],
        "provenance": read_provenance(path).to_dict(),
        "fingerprint": Fingerprint(index.fingerprint).digest,
        "fingerprint_components": index.fingerprint,
    }


def _copies_lines(cache: dict[str, Any]) -> dict[str, str]:
    """Return what ``inspect`` prints of views beyond the first, if these have a codec of their own."""
    copies, calibration = cache["copies"], cache["copies_calibration"]
    if not copies or not calibration:
        return {}
    first, *others = cache["view_bytes"]
    configuration = copies.get("configuration", {})
    predictor = configuration.get("predictor")
    how = calibration.get("storage", "stored apart")
    if predictor is not None:
        kind = "all channels" if predictor.get("full") else "each channel"
        how += f", predicted from the first by {kind}, pull {predictor.get('pull')}"
    return {
        "further views": f"{how}; {sum(others) / len(others) / first:.0%} of the bytes of the first each",
        "  codec": codec_words(configuration["codec"]),
        "  distortion": distortion_words(calibration) if "distortion" in calibration else "not measured",
    }


def description_lines(cache: dict[str, Any]) -> list[str]:
    """Return what ``inspect`` prints of a cache, given what ``describe_cache`` returns of it."""
    from ..codecs import codec_from_dict
    from ..hub.provenance import Provenance

    measured = "exact" if codec_from_dict(cache["codec"]).lossless else "not measured"
    if cache["calibration"]:
        measured = distortion_words(cache["calibration"])
    extras = [f"{e['name']} ({e['dtype']}, {e['shape'] or 'one number'})" for e in cache["extras"]]
    rows = {
        "split point": f"{cache['split_point']} frozen blocks",
        "samples": f"{cache['num_samples']:,} in {cache['num_views']} views",
        "images": " x ".join(map(str, cache["image_shape"]))
        + (" (channels x height x width)" if len(cache["image_shape"]) == 3 else " (patches x values)"),
        "hidden states": f"{cache['tokens']} tokens x {cache['hidden']}, {cache['dtype']}",
        "codec": codec_words(cache["codec"]),
        "distortion": measured,
        **_copies_lines(cache),
        "shards": f"{cache['shards']}, up to {cache['shard_chunks']} chunks of {cache['chunk_size']} samples each",
        "size": f"{size_words(cache['bytes'])} ({cache['bytes']:,} bytes)",
        "per image": f"{size_words(cache['bytes_per_image'])}; {size_words(cache['bytes_per_image_and_view'])} per view",
        "per element": f"{cache['bits_per_element']:.2f} bits, everything counted",
        "extras": ", ".join(extras) or "none",
        **({"made of": made_of} if (made_of := Provenance.from_dict(cache["provenance"]).words()) else {}),
        "fingerprint": cache["fingerprint"],
        **{f"  {part}": value for part, value in cache["fingerprint_components"].items()},
    }
    width = max(map(len, rows))
    return [cache["path"], *(f"  {name:<{width}}  {value}" for name, value in rows.items())]
