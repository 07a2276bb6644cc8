"""A reader of caches, written from ``docs/format.md`` alone: NumPy, zstandard and the standard library.

It trusts the cache: limits, hashes and checks beyond what decoding needs are left out.
"""

from __future__ import annotations

import itertools
import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

Array = np.ndarray
FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}
EXTRAS = {"bool": "?", "float16": "<f2", "float32": "<f4", "float64": "<f8"} | {
    f"{sign}int{8 * size}": f"<{sign[:1] or 'i'}{size}" for sign in ("", "u") for size in (1, 2, 4, 8)
}


def decompress(frame: bytes) -> bytes:
    return zstandard.ZstdDecompressor().decompress(frame)


def read_safetensors(path: Path) -> tuple[dict[str, str], dict[str, bytes]]:
    """Return the metadata, and the bytes of each tensor."""
    raw = path.read_bytes()
    (length,) = struct.unpack_from("<Q", raw)
    header = json.loads(raw[8 : 8 + length])
    metadata = header.pop("__metadata__")
    start = 8 + length
    return metadata, {
        name: raw[start + tensor["data_offsets"][0] : start + tensor["data_offsets"][1]]
        for name, tensor in header.items()
    }


def join_planes(strings: list[bytes], dtype: str, shape: tuple[int, ...]) -> Array:
    """Undo ``planes``; a shape may begin with -1."""
    planes = np.stack([np.frombuffer(string, np.uint8) for string in strings], 1)
    return np.ascontiguousarray(planes).view(dtype).reshape(shape)


def unpack(strings: list[bytes], zones: int, shape: tuple[int, int, int]) -> Array:
    """Undo ``pack``."""
    samples, components, positions = shape
    count = max(1, min(zones, positions // 16))
    edges = [round((i / count) ** 2 * positions) for i in range(count + 1)]
    codes = strings[0]
    order = sorted(range(len(codes)), key=lambda cell: codes[cell])
    widths = [edges[cell // components + 1] - edges[cell // components] for cell in order]
    sizes = [0] * 6
    for cell, width in zip(order, widths, strict=True):
        sizes[codes[cell] // 32] += samples * width
    sequence = [0] * sizes[0]
    for kind, (per_byte, base) in {1: (5, 3), 2: (3, 5), 3: (2, 15)}.items():
        digits = [byte // base**j % base - base // 2 for byte in strings[kind] for j in range(per_byte)]
        sequence += digits[: sizes[kind]]
    sequence += np.frombuffer(strings[4], np.int8).tolist()
    sequence += join_planes([strings[5][: sizes[5]], strings[5][sizes[5] :]], "<i2", (-1,)).tolist()
    for start, gaps, coded in ((0, strings[6], strings[7]), (sizes[0], strings[8], strings[9])):
        half = len(coded) // 2
        numbers = iter(join_planes([coded[:half], coded[half:]], "<u2", (-1,)).tolist())
        place = start
        for gap in gaps:
            place += gap
            if gap < 255:
                number = next(numbers)
                sequence[place] += (number + 2) // 2 if number % 2 == 0 else -(number + 1) // 2
                place += 1
    values, place = np.empty(shape, np.int64), 0
    for cell, width in zip(order, widths, strict=True):
        zone, component = divmod(cell, components)
        size = samples * width
        values[:, component, edges[zone] : edges[zone + 1]] = np.reshape(
            sequence[place : place + size], (samples, width)
        )
        place += size
    return values


def dct(size: int) -> Array:
    u, x = np.mgrid[:size, :size]
    matrix = math.sqrt(2 / size) * np.cos(math.pi * (2 * x + 1) * u / (2 * size))
    matrix[0] /= math.sqrt(2)
    return matrix


class Pipeline:
    """Decodes the chunks of one codec."""

    def __init__(self, codec: dict[str, Any], tensors: dict[str, Array]) -> None:
        self.steps = codec["configuration"]["steps"]
        self.tensors = tensors

    def decode(self, frames: list[bytes], shape: tuple[int, int, int], dtype: str) -> Array:
        """Return (samples, tokens, hidden), consuming the frames of hidden states from the list."""
        (samples, tokens, hidden), taken = shape, [dtype]
        main_shape, main_dtype = shape, dtype
        sides: list[list[tuple[str, tuple[int, ...]]]] = []
        for step in self.steps:
            settings = step.get("configuration", {})
            sides.append([])
            if step["name"] == "cast":
                main_dtype = FLOATS[settings["dtype"]]
            elif step["name"] == "quantize":
                wide = "<f8" if taken[-1] == "<f8" else "<f4"
                main_shape, main_dtype, sides[-1] = (samples, hidden, tokens), "<i1", [(wide, (1, hidden))]
            elif step["name"] == "transform":
                prefix = settings["prefix_tokens"]
                main_shape, main_dtype = (samples, hidden, tokens - prefix), "<i2"
                sides[-1] = [("<f2", (samples, prefix, hidden)), ("<i4", (-1,)), (taken[-1], (-1, hidden))]
            elif step["name"] == "planes":
                strings = self._strings(frames, np.dtype(main_dtype).itemsize)
                array = join_planes(strings, main_dtype, main_shape)
            elif step["name"] == "pack":
                array = unpack(self._strings(frames, 10), settings["zones"], main_shape)
            taken.append(main_dtype)
        arrays = [
            [join_planes(self._strings(frames, np.dtype(kind).itemsize), kind, size) for kind, size in step_sides]
            for step_sides in sides
        ]
        for number in reversed(range(len(self.steps))):
            step = self.steps[number]
            if step["name"] == "quantize":
                (scale,) = arrays[number]
                array = array.transpose(0, 2, 1).astype(scale.dtype) * scale[0]
            elif step["name"] == "transform":
                array = self._transform(number, array, *arrays[number], taken[number])
            array = array.astype(taken[number]) if step["name"] in ("cast", "quantize", "transform") else array
        return array

    def _strings(self, frames: list[bytes], count: int) -> list[bytes]:
        return [decompress(frames.pop(0)) for _ in range(count)]

    def _transform(self, number: int, main: Array, prefix: Array, index: Array, exact: Array, dtype: str) -> Array:
        settings = self.steps[number]["configuration"]
        basis, scale, mean = (self.tensors[f"{number}.{name}"].astype("f8") for name in ("basis", "scale", "mean"))
        height, width = settings["grid"]
        waves = np.eye(height * width)
        if height > 1:
            u, v = np.mgrid[:height, :width] / np.array([height, width])[:, None, None]
            order = np.argsort((u**2 + v**2).ravel(), kind="stable")
            waves = np.kron(dct(height), dct(width))[order]

        def patches(coefficients: Array) -> Array:
            return np.swapaxes(coefficients @ waves, -1, -2) @ (basis * scale).T

        states = patches(settings["step"] * main) + patches(settings["step"] / 4 * mean.T)
        states = np.concatenate([prefix.astype("f8"), states], 1).astype(dtype)
        states.reshape(-1, states.shape[2])[index] = exact
        return states


def move(base: Array, base_geometry: Array, geometry: Array, grid: tuple[int, int]) -> Array:
    """Move the patch tokens (patches, hidden) of view 0 to the place of a view."""
    height, width = grid
    if height == 1:
        return base
    moved = base.reshape(height, width, -1)
    for axis, (size, side) in enumerate(((height, 1), (width, 0))):
        (b0, b1), (v0, v1) = (
            (g[side + 2], g[side]) if side == 0 and g[4] > 0.5 else (g[side], g[side + 2])
            for g in (base_geometry.astype("f8"), geometry.astype("f8"))
        )
        start, end = (v0 - b0) / (b1 - b0), (v1 - b0) / (b1 - b0)
        places = (start + (np.arange(size) + 0.5) / size * (end - start)) * size - 0.5
        places = np.clip(places, 0, size - 1)
        below = np.minimum(places.astype(int), size - 2)
        weight = np.expand_dims(places - below, (1, 2) if axis == 0 else (0, 2))
        moved = (1 - weight) * moved.take(below, axis) + weight * moved.take(below + 1, axis)
    return moved.reshape(base.shape)


class Cache:
    """A cache, opened."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.index = json.loads((directory / "index.json").read_text())
        assert (self.index["format"], self.index["format_version"]) == ("hf_freezecache", 2)

    def tensors(self, name: str) -> dict[str, Array]:
        """Return the tensors of the state of a codec."""
        if not (self.directory / name).exists():
            return {}
        metadata, frames = read_safetensors(self.directory / name)
        tensors = {}
        for key, (dtype, shape) in json.loads(metadata["hf_freezecache"])["tensors"].items():
            planes, size = decompress(frames[key]), math.prod(shape)
            strings = [planes[start : start + size] for start in range(0, len(planes), size)]
            tensors[key] = join_planes(strings, EXTRAS[dtype], tuple(shape))
        return tensors

    def chunks(self, view: int) -> Iterator[tuple[list[int], Array, dict[str, Array]]]:
        """Yield sample indices, hidden states and extras of the chunks of a view."""
        index, copies = self.index, self.index.get("copies") if view else None
        tokens, hidden = index["hidden_shape"]
        if copies is None:
            pipeline, predictor = Pipeline(index["codec"], self.tensors("codec.safetensors")), None
        else:
            tensors = self.tensors("copies.safetensors")
            own = {name.removeprefix("codec."): tensor for name, tensor in tensors.items()}
            pipeline, predictor = (
                Pipeline(copies["configuration"]["codec"], own),
                copies["configuration"]["predictor"],
            )
        bases = self.chunks(0) if predictor is not None else None
        for path in sorted((self.directory / f"view-{view:02d}").iterdir()):
            _, shard = read_safetensors(path)
            rows = np.frombuffer(shard["sample_indices"], "<i8")
            bounds = np.frombuffer(shard["frame_offsets"], "<i8").reshape(-(-len(rows) // index["chunk_size"]), -1)
            for place, ends in enumerate(bounds.tolist()):
                members = rows[place * index["chunk_size"] :][: index["chunk_size"]].tolist()
                frames = [shard["frames"][start:end] for start, end in itertools.pairwise(ends)]
                states = pipeline.decode(frames, (len(members), tokens, hidden), FLOATS[index["dtype"]])
                extras = {
                    extra["name"]: np.frombuffer(decompress(frame), EXTRAS[extra["dtype"]]).reshape(
                        len(members), *extra["shape"]
                    )
                    for extra, frame in zip(index["extras"], frames, strict=True)
                }
                if bases is not None:
                    states = self._add_prediction(predictor, tensors, states, extras, next(bases))
                yield members, states, extras

    @staticmethod
    def _add_prediction(predictor: Any, tensors: Any, states: Array, extras: Any, base_chunk: Any) -> Array:
        _, base, base_extras = base_chunk
        prefix, grid = predictor["prefix_tokens"], predictor["grid"]
        gains = tensors["predictor.gains"].astype("f4") * tensors["predictor.scale"]
        result = states.copy()
        for sample, patches in enumerate(base[:, prefix:]):
            geometries = (held["view_geometry"][sample] for held in (base_extras, extras))
            moved = move(patches, *geometries, grid)
            predicted = moved @ gains if predictor["full"] else moved * gains
            result[sample, prefix:] += (predicted + tensors["predictor.mean"]).astype(states.dtype)
        return result
