"""Rate against distortion of codecs for hidden states: the library's, and general compressors for float arrays.

    python recipes/benchmarks/rate_distortion.py --model DIR --data DIR --out FILE.json --plot FILE.png

Hidden states are fp32, from the first rows of ``test.parquet``: the first half fits, the second half measures.
Distortion is KL(exact logits || logits from decoded states), the mean over images, in nats. Every codec with a knob is
brought as close below ``--target-kl`` as its knob allows; what is compared is the bits per element there. All tokens
are stored and all bytes count: frames, eight bytes each for their offsets and, with ``transform``, the fitted state,
which is spread over no more images than were measured (``frames_only`` leaves it out).

Peers: ``zfpy``, ``pysz`` (SZ3) and ``blosc2``, each skipped, and said to be, if it is not installed. SZ3 and zfp may
choose from several layouts of the array, SZ3 also from its predictors: the smallest at equal root-mean-square error on
the first half is tuned, and the second if it is close; the smaller one counts. ``int_naive`` is one step per channel,
bytes and zstd; ``int_packed`` the same integers in the library's own packing. Cast codecs have no knob.

``transform`` keeps the prefix tokens, of which the prediction depends most, in fp16. So that it is not compared only with
peers that do not, those named ``..._apart`` do the same: prefix tokens in fp16, planes and zstd, the patches as before.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import io
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import torch
from PIL import Image
from record import save, spread
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageClassification, set_seed

from hf_freezecache import split_model
from hf_freezecache.codecs import (
    Codec,
    Pack,
    Planes,
    Quantize,
    Transform,
    Zstd,
    make_codec,
)
from hf_freezecache.codecs.entropy import compress_frame
from hf_freezecache.model.tokens import token_grid

SEED = 0
PEERS = ("zfpy", "pysz", "blosc2")
OFFSET_BYTES = 8  # per frame
GRADIENT_WEIGHT = 0.5
OCTAVES = (-1.0, -0.5, 0.0, 0.5, 1.0)  # of the knob around the tuned one, for the curves
CLOSE = 0.2  # bits per element within which two layouts are both tuned
LEAST_KL, RANGE = 1e-12, 12.0  # below: rounding; octaves that a knob may lie from its start

#: Name -> order of the axes (samples, tokens, channels), and how they are merged. Patches as a 4-D grid were tried:
#: 2 to 4% larger than the best of these with SZ3, and worse than 2-D with zfp.
LAYOUTS: dict[str, tuple[tuple[int, int, int], Callable[[tuple[int, ...]], tuple[int, ...]]]] = {
    "samples, tokens, channels": ((0, 1, 2), lambda shape: shape),
    "tokens, channels": ((0, 1, 2), lambda shape: (shape[0] * shape[1], shape[2])),
    "channels, tokens": ((2, 0, 1), lambda shape: (shape[0], shape[1] * shape[2])),
    "flat, channel by channel": ((2, 0, 1), lambda shape: (math.prod(shape),)),
    "flat, channel by channel of each sample": ((0, 2, 1), lambda shape: (math.prod(shape),)),
}

Frames = Sequence[bytes]


@dataclass
class Coder:
    """A codec at one setting of its knob."""

    encode: Callable[[Tensor], Frames]
    decode: Callable[[Frames, tuple[int, ...]], Tensor]
    settings: dict[str, Any] = field(default_factory=dict)
    state_bytes: int = 0


def of_library(codec: Codec, **settings: Any) -> Coder:
    state = sum(len(compress_frame(b"".join(Planes().encode(t)), 9)) for t in codec.tensors().values())
    return Coder(
        codec.encode,
        lambda frames, shape: codec.dequantize(codec.entropy_decode(frames, shape, torch.float32), torch.float32),
        settings,
        state + len(json.dumps(codec.to_dict())),
    )


def in_layout(
    layout: str, compress: Callable[[Any], Any], decompress: Callable[[Any, tuple[int, ...]], Any], **settings: Any
) -> Coder:
    """Return the coder of a compressor of float32 arrays, which is given the chunk in a layout."""
    order, merge = LAYOUTS[layout]

    def encode(states: Tensor) -> Frames:
        array = np.ascontiguousarray(states.numpy().transpose(order))
        return [bytes(compress(array.reshape(merge(array.shape))))]

    def decode(frames: Frames, shape: tuple[int, ...]) -> Tensor:
        permuted = tuple(shape[axis] for axis in order)
        array = np.asarray(decompress(frames[0], merge(permuted))).astype(np.float32).reshape(permuted)
        return torch.from_numpy(np.ascontiguousarray(array.transpose(np.argsort(order))))

    return Coder(encode, decode, {"layout": layout, **settings}, state_bytes=OFFSET_BYTES)  # the knob


def sz3(layout: str, algorithm: str, bound: float) -> Coder:
    pysz = importlib.import_module("pysz")
    config = pysz.szConfig()
    config.errorBoundMode, config.absErrorBound = pysz.szErrorBoundMode.ABS, bound
    config.cmprAlgo = getattr(pysz.szAlgorithm, algorithm)

    def decompress(frame: bytes, shape: tuple[int, ...]) -> Any:
        return pysz.sz.decompress(np.frombuffer(frame, np.uint8), np.float32, shape)[0]

    return in_layout(
        layout,
        lambda array: pysz.sz.compress(array, config)[0].tobytes(),
        decompress,
        algorithm=algorithm,
        error_bound=bound,
    )


def zfp(layout: str, tolerance: float) -> Coder:
    """zfp rounds a tolerance down to a power of two; states in units of the tolerance give it a continuous knob."""
    zfpy = importlib.import_module("zfpy")
    unit = np.float32(tolerance)
    return in_layout(
        layout,
        lambda array: zfpy.compress_numpy(array / unit, tolerance=1.0),
        lambda frame, shape: zfpy.decompress_numpy(frame) * unit,
        tolerance=tolerance,
    )


def blosc(layout: str, bits: int | None) -> Coder:
    """Bit shuffling and zstd, of fp16 or of fp32 truncated to some bits of mantissa."""
    blosc2 = importlib.import_module("blosc2")
    dtype = np.dtype(np.float16 if bits is None else np.float32)
    filters = [] if bits is None else [(blosc2.Filter.TRUNC_PREC, bits)]
    filters.append((blosc2.Filter.BITSHUFFLE, 0))
    parameters = blosc2.CParams(
        codec=blosc2.Codec.ZSTD,
        clevel=5,
        typesize=dtype.itemsize,
        nthreads=1,
        filters=[name for name, _ in filters],
        filters_meta=[meta for _, meta in filters],
    )
    return in_layout(
        layout,
        lambda array: blosc2.compress2(array.astype(dtype), cparams=parameters),
        lambda frame, shape: np.frombuffer(blosc2.decompress2(frame), dtype),
        precision="fp16" if bits is None else f"{bits} mantissa bits",
    )


def prefix_apart(coder: Coder, prefix_tokens: int) -> Coder:
    """Return the coder for patches, with prefix tokens in fp16 beside them."""
    beside = make_codec("fp16")
    count = len(beside.max_frame_bytes((1, 1, 1), torch.float32))

    def encode(states: Tensor) -> Frames:
        prefix, patches = states[:, :prefix_tokens].contiguous(), states[:, prefix_tokens:].contiguous()
        return [*beside.encode(prefix), *coder.encode(patches)]

    def decode(frames: Frames, shape: tuple[int, ...]) -> Tensor:
        samples, tokens, hidden = shape
        prefix = beside.decode(frames[:count], (samples, prefix_tokens, hidden), torch.float32)
        return torch.cat([prefix, coder.decode(frames[count:], (samples, tokens - prefix_tokens, hidden))], dim=1)

    return Coder(encode, decode, {**coder.settings, "prefix_tokens": "fp16"}, coder.state_bytes)


class Bench:
    """One split point: hidden states of both halves and what the model makes of them."""

    def __init__(
        self, model: Any, pixels: Tensor, file_bytes: float, split_point: int, args: argparse.Namespace
    ) -> None:
        self.args, self.file_bytes = args, file_bytes
        self.split = split_model(model, split_point)
        with torch.no_grad():
            states = torch.cat([self.split.prefix(batch) for batch in pixels.split(args.chunk_size)])
            self.fit_half, self.measured = states.float().contiguous().split(len(states) // 2)
            self.chunks = self.measured.split(args.chunk_size)
            self.exact = torch.cat([self.split.suffix(chunk).logits for chunk in self.chunks]).double().log_softmax(1)
        self.prefix_tokens, self.grid = token_grid(states.shape[1], self.split.image_shape, model.config)

    def gradients(self) -> Tensor:
        """Of the log-likelihood of labels drawn from the model's own prediction, on the first half."""
        generator = torch.Generator().manual_seed(SEED)
        found = []
        for chunk in self.fit_half.split(self.args.chunk_size):
            states = chunk.clone().requires_grad_()
            logits = self.split.suffix(states).logits
            labels = torch.multinomial(logits.detach().softmax(1), 1, generator=generator)[:, 0]
            loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
            found += torch.autograd.grad(loss, states)
        return torch.cat(found)

    def transform(self, weight: float) -> Transform:
        gradients = self.gradients() if weight else None
        return Transform(gradient_weight=weight).fit(self.fit_half, self.prefix_tokens, self.grid, gradients)

    def measure(self, coder: Coder) -> dict[str, Any]:
        """Encode and decode the second half; return rate and distortion."""
        frames = [coder.encode(chunk) for chunk in self.chunks]
        pairs = zip(frames, self.chunks, strict=True)
        decoded = [coder.decode(found, tuple(chunk.shape)) for found, chunk in pairs]
        with torch.no_grad():
            logits = torch.cat([self.split.suffix(chunk).logits for chunk in decoded]).double().log_softmax(1)
        kl = (self.exact.exp() * (self.exact - logits)).sum(1)
        stored = sum(len(frame) + OFFSET_BYTES for chunk in frames for frame in chunk)
        images, elements = len(self.measured), self.measured.numel()
        total = stored + coder.state_bytes
        error = torch.cat(decoded) - self.measured
        return {
            "settings": coder.settings,
            "bits_per_element": 8 * total / elements,
            "bits_per_element_frames_only": 8 * stored / elements,
            "kib_per_image": total / images / 1024,
            "ratio_to_image_file": total / images / self.file_bytes,
            "state_bytes": coder.state_bytes,
            "kl": float(kl.mean()),
            "kl_standard_error": float(kl.std() / math.sqrt(images)),
            "agreement": float((logits.argmax(1) == self.exact.argmax(1)).double().mean()),
            "relative_error": float(error.norm() / self.measured.norm()),
        }

    def rms_rate(self, coder: Coder) -> float:
        """Return bits per element plus the binary logarithm of the error, on the first chunk of the first half."""
        chunk = self.fit_half[: self.args.chunk_size]
        frames = coder.encode(chunk)
        error = float((coder.decode(frames, tuple(chunk.shape)) - chunk).square().mean().sqrt())
        return 8 * sum(map(len, frames)) / chunk.numel() + math.log2(max(error, 1e-30))

    # ---- Knobs ----

    def tune(self, make: Callable[[float], Coder], start: float) -> tuple[dict[str, Any], float]:
        """Return what was measured at the largest divergence within the target, and the knob there.

        Bisection in the logarithm of the knob, with guesses from the last two points where they lie inside the bracket.
        """
        target = self.args.target_kl
        low: tuple[float, float] | None = None
        high: tuple[float, float] | None = None
        best: tuple[dict[str, Any], float] | None = None
        finest: tuple[dict[str, Any], float] | None = None
        octave = 0.0
        for _ in range(self.args.steps):
            knob = start * 2**octave
            result = self.measure(make(knob))
            kl = max(result["kl"], LEAST_KL)
            if kl <= target:
                low = (octave, math.log2(kl)) if low is None else max(low, (octave, math.log2(kl)))
                best = (result, knob) if best is None or kl > best[0]["kl"] else best
            else:
                high = (octave, math.log2(kl)) if high is None else min(high, (octave, math.log2(kl)))
            finest = (result, knob) if finest is None or kl < finest[0]["kl"] else finest
            if 0.99 * target <= kl <= target:
                break
            aim = math.log2(0.995 * target)
            if low and high and low[0] < high[0]:
                share = (aim - low[1]) / max(high[1] - low[1], 1e-9)
                octave = low[0] + (high[0] - low[0]) * min(max(share, 0.05), 0.95)
            else:  # the divergence grows about with the square of the error
                octave += min(max((aim - math.log2(kl)) / 2, -3), 3) + (0.1 if kl <= target else -0.1)
                octave = min(max(octave, -RANGE), RANGE)
        assert finest is not None
        return best or finest

    def tune_whole(self, make: Callable[[int], Coder], least: int, most: int) -> dict[str, Any]:
        """Return what was measured at the smallest whole number within the target, or at the largest."""
        results: dict[int, dict[str, Any]] = {}
        while least < most:
            middle = (least + most) // 2
            results[middle] = self.measure(make(middle))
            least, most = (least, middle) if results[middle]["kl"] <= self.args.target_kl else (middle + 1, most)
        return results.get(most) or self.measure(make(most))


def run(bench: Bench, missing: Sequence[str]) -> dict[str, Any]:
    """Return ``codecs``, ``curves`` and the coders' speed of one split point."""
    spread_of_states = float((bench.fit_half - bench.fit_half.mean((0, 1))).square().mean().sqrt())
    results: dict[str, dict[str, Any]] = {}
    curves: dict[str, list[dict[str, Any]]] = {}
    coders: dict[str, Coder] = {}

    def add(name: str, make: Callable[[Any], Coder], found: dict[str, Any], knob: Any) -> None:
        results[name], coders[name] = found, make(knob)

    def add_tuned(name: str, makers: Sequence[Callable[[float], Coder]], start: float) -> None:
        tuned = [(*bench.tune(make, start), make) for make in makers]
        within = [entry for entry in tuned if entry[0]["kl"] <= bench.args.target_kl] or tuned
        found, knob, make = min(within, key=lambda entry: entry[0]["bits_per_element"])
        add(name, make, found, knob)
        curves[name] = [found if octave == 0 else bench.measure(make(knob * 2**octave)) for octave in OCTAVES]

    def transform_maker(step: Transform) -> Callable[[float], Coder]:
        def make(knob: float) -> Coder:
            codec = make_codec((step.with_step_size(knob), Pack(), Zstd(matches="skip")))
            return of_library(codec, step=knob, gradient_weight=step.gradient_weight)

        return make

    for name, weight in (("transform", 0.0), ("transform_weighted", GRADIENT_WEIGHT)):
        step = bench.transform(weight)
        assert step.step is not None
        add_tuned(name, [transform_maker(step)], step.step)

    def naive(bits: int) -> Coder:
        return of_library(Codec((Quantize(bits), Planes(), Zstd(3))), bits=bits)

    def packed(bits: int) -> Coder:
        return of_library(Codec((Quantize(bits), Pack(), Zstd(matches="skip"))), bits=bits)

    curves["int_naive"] = [bench.measure(naive(bits)) for bits in range(2, 9)]
    fits = [point for point in curves["int_naive"] if point["kl"] <= bench.args.target_kl]
    found = fits[0] if fits else curves["int_naive"][-1]
    bits = found["settings"]["bits"]
    add("int_naive", naive, found, bits)
    add("int_packed", packed, bench.measure(packed(bits)), bits)

    def apart(make: Callable[[Any], Coder]) -> Callable[[Any], Coder]:
        return lambda knob: prefix_apart(make(knob), bench.prefix_tokens)

    if bench.prefix_tokens:
        found = bench.tune_whole(apart(packed), 2, 8)
        add("int_packed_apart", apart(packed), found, found["settings"]["bits"])

    def add_peer(name: str, makers: Sequence[Callable[[float], Coder]], start: float) -> None:
        def smallest(knob: float) -> list[Callable[[float], Coder]]:
            rated = sorted(((bench.rms_rate(make(knob)), make) for make in makers), key=lambda entry: entry[0])[:2]
            return [make for rate, make in rated if rate < rated[0][0] + CLOSE]

        add_tuned(name, smallest(start), start)
        if bench.prefix_tokens:  # which then allow patches a coarser knob
            either = list(dict.fromkeys([*smallest(start), *smallest(2 * start)]))
            add_tuned(f"{name}_apart", [apart(make) for make in either], 2 * start)

    if "pysz" not in missing:
        algorithms = ("INTERP_LORENZO", "LORENZO_REG", "NOPRED")
        makers = [partial(sz3, layout, algorithm) for layout in LAYOUTS for algorithm in algorithms]
        add_peer("sz3", makers, spread_of_states / 2)
    if "zfpy" not in missing:
        add_peer("zfp", [partial(zfp, layout) for layout in LAYOUTS], spread_of_states)
    if "blosc2" not in missing:
        layouts = ("tokens, channels", "channels, tokens")

        # The layout changes the size, not the values.
        def size(coder: Coder) -> int:
            return sum(map(len, coder.encode(bench.fit_half[: bench.args.chunk_size])))

        layout = min(layouts, key=lambda name: size(blosc(name, 4)))
        truncated = bench.tune_whole(lambda bits: blosc(layout, bits), 1, 22)
        half = bench.measure(blosc(min(layouts, key=lambda name: size(blosc(name, None))), None))
        within = [point for point in (truncated, half) if point["kl"] <= bench.args.target_kl] or [truncated, half]
        found = min(within, key=lambda point: point["bits_per_element"])
        precision = found["settings"]["precision"]
        bits = None if precision == "fp16" else int(precision.split()[0])
        add("blosc2", lambda bits: blosc(found["settings"]["layout"], bits), found, bits)
    for name in ("fp16", "bf16"):
        add(name, lambda name: of_library(make_codec(name)), bench.measure(of_library(make_codec(name))), name)

    for name, speeds in rates(bench, coders).items():
        results[name] |= speeds
    for result in results.values():
        result["within_target"] = result["kl"] <= bench.args.target_kl
    compare(results)
    return {"codecs": results, "curves": curves}


def rates(bench: Bench, coders: dict[str, Coder]) -> dict[str, dict[str, Any]]:
    """Return images/s of encoding and decoding on one thread, coders in turn, several rounds."""
    chunks = bench.chunks[:2]
    images = sum(map(len, chunks))
    found: dict[str, dict[str, list[float]]] = {name: {"encode": [], "decode": []} for name in coders}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for turn in range(bench.args.rounds):
            order = list(coders)
            for name in order[turn % len(order) :] + order[: turn % len(order)]:
                started = time.perf_counter()
                frames = [coders[name].encode(chunk) for chunk in chunks]
                encoded = time.perf_counter()
                for stored, chunk in zip(frames, chunks, strict=True):
                    coders[name].decode(stored, tuple(chunk.shape))
                found[name]["encode"].append(images / (encoded - started))
                found[name]["decode"].append(images / (time.perf_counter() - encoded))
    finally:
        torch.set_num_threads(threads)
    return {
        name: {f"{way}_images_per_second": spread(values) for way, values in speeds.items()}
        for name, speeds in found.items()
    }


def compare(results: dict[str, dict[str, Any]]) -> None:
    """Add to the library's transforms the ratio of their bits to those of the best peer within the target.

    Twice: against peers as they come, and against all of them, those with the library's treatment of prefix tokens (or its
    packing) among them.
    """
    within = {
        name: result for name, result in results.items() if not name.startswith("transform") and result["within_target"]
    }
    borrowed = {name for name in within if name.endswith("_apart") or name == "int_packed"}
    for suffix, peers in (("", within.keys() - borrowed), ("_of_all", within.keys())):
        if not peers:
            continue
        best = min(sorted(peers), key=lambda name: within[name]["bits_per_element"])
        for name, result in results.items():
            if name.startswith("transform"):
                result[f"best_peer{suffix}"] = best
                result[f"ratio_to_best_peer{suffix}"] = result["bits_per_element"] / within[best]["bits_per_element"]


def summary(label: str, name: str, result: dict[str, Any], peers: dict[str, dict[str, Any]]) -> str:
    parts = [
        f"{result['bits_per_element']:.3f} bits/element",
        f"{result['kib_per_image']:.2f} KiB/image",
        f"{result['ratio_to_image_file']:.2f} x image file",
        f"KL {result['kl']:.5f}" + ("" if result["within_target"] else " (OVER TARGET)"),
        f"agreement {result['agreement']:.3f}",
        f"relative error {result['relative_error']:.4f}",
        f"encode {result['encode_images_per_second']['median']:.0f}/s",
        f"decode {result['decode_images_per_second']['median']:.0f}/s",
        f"{result['settings']}" if result["settings"] else "",
    ]
    for key, words in (("best_peer", "best peer"), ("best_peer_of_all", "best with prefix tokens apart")):
        if key in result:
            bits = peers[result[key]]["bits_per_element"]
            parts.insert(1, f"{result[f'ratio_to_{key}']:.3f} x {words} ({result[key]} {bits:.3f})")
    return f"{label} {name}: " + ", ".join(part for part in parts if part)


STYLES = {  # the palette of Okabe and Ito
    "transform": ("#0072B2", "o", "transform"),
    "transform_weighted": ("#D55E00", "s", f"transform, gradient weight {GRADIENT_WEIGHT}"),
    "sz3": ("#009E73", "^", "SZ3"),
    "sz3_apart": ("#009E73", "^", "SZ3, prefix token in fp16"),
    "zfp": ("#CC79A7", "v", "zfp"),
    "zfp_apart": ("#CC79A7", "v", "zfp, prefix token in fp16"),
    "int_naive": ("#666666", "x", "int2 to int8 per channel, zstd"),
}


def draw(results: dict[str, Any], target: float, path: Path, title: str) -> None:
    """Write a PNG: one panel per split point, divergence against rate.

    Raises:
        ImportError: matplotlib is missing.
    """
    # Without pyplot: no global state, and no window system is asked for.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    columns = min(2, len(results))
    rows = -(-len(results) // columns)
    size = (max(5.2 * columns, 8), 3.9 * rows + 1.1)
    figure = Figure(figsize=size, dpi=120, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))
    FigureCanvasAgg(figure)
    panels = list(np.atleast_1d(figure.subplots(rows, columns, sharex=True, sharey=True)).flat)
    handles: dict[str, Any] = {}
    for axes, (label, result) in zip(panels, results.items(), strict=False):
        for name, points in result["curves"].items():
            color, marker, text = STYLES[name]
            points = sorted((p["bits_per_element"], max(p["kl"], LEAST_KL)) for p in points)
            style = "--" if name.endswith("_apart") else "-"
            face = "white" if name.endswith("_apart") else color
            (handles[text],) = axes.plot(
                *zip(*points, strict=True), style, color=color, marker=marker, markersize=5, markerfacecolor=face
            )
        handles[f"target, {target:g} nats"] = axes.axhline(target, color="black", linewidth=1, linestyle=":")
        axes.set_title(f"{label.removeprefix('k=')} blocks in the prefix", fontsize=11)
        axes.set_yscale("log")
        axes.set_ylim(target / 12, target * 30)
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelbottom=True, labelleft=True)
        axes.set_xlabel("bits per element, all stored bytes")
        axes.set_ylabel("KL of the prediction, nats/image")
    for axes in panels[len(results) :]:
        axes.set_visible(False)
    figure.suptitle(title, fontsize=12)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def load_images(args: argparse.Namespace, size: tuple[int, int]) -> tuple[Tensor, float, list[str]]:
    """Return pixel values, mean bytes of the measured image files, and their formats."""
    rows = pyarrow.parquet.read_table(Path(args.data) / "test.parquet", columns=["image"]).slice(0, args.images)
    files = [image["bytes"] for image in rows["image"].to_pylist()]
    if len(files) < max(args.images, 4):
        raise SystemExit(f"{len(files)} images in {args.data}, expected at least {max(args.images, 4)}")
    settings = AutoImageProcessor.from_pretrained(args.model, backend="pil").to_dict()
    mean, std = (torch.tensor(settings[f"image_{name}"]).view(3, 1, 1) for name in ("mean", "std"))
    pixels, formats = [], set()
    for file in files:
        image = Image.open(io.BytesIO(file))
        formats.add(str(image.format))
        image = image.convert("RGB").resize((size[1], size[0]), int(settings.get("resample", 2)))
        pixels.append((torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255 - mean) / std)
    measured = files[len(files) // 2 :]
    return torch.stack(pixels), sum(map(len, measured)) / len(measured), sorted(formats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a pretrained ViT-like classifier")
    parser.add_argument("--data", required=True, help="folder with test.parquet of a column image")
    parser.add_argument("--images", type=int, default=256, help="even; the first half fits, the second half measures")
    parser.add_argument("--split-points", default="3,6,9,11")
    parser.add_argument("--target-kl", type=float, default=0.01, help="nats per image")
    parser.add_argument("--chunk-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=9, help="most measurements to tune a knob with")
    parser.add_argument("--rounds", type=int, default=3, help="of the measurement of speed")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--plot", type=Path, help="PNG; needs matplotlib")
    args = parser.parse_args()
    if args.images % 2:
        parser.error("--images must be even")
    set_seed(SEED)
    peers = {}
    for peer in PEERS:
        try:
            importlib.import_module(peer)
            peers[peer] = importlib.metadata.version(peer)
        except ImportError as error:
            peers[peer] = f"skipped: {error}"
            print(f"SKIPPED peer {peer}, which is not measured: {error}")
    missing = [peer for peer, version in peers.items() if version.startswith("skipped")]

    model = AutoModelForImageClassification.from_pretrained(args.model).float().eval().requires_grad_(False)
    pixels, file_bytes, formats = load_images(args, split_model(model, 0).image_shape[1:])
    extra = {"seed": SEED, "peers": peers, "image_file_bytes": file_bytes, "image_formats": formats}
    extra |= {"gradient_weight": GRADIENT_WEIGHT, "threads": torch.get_num_threads(), "threads_of_speeds": 1}
    config = {name: str(value) for name, value in vars(args).items() if name not in ("out", "plot")} | extra
    config |= {"model": Path(args.model).name, "data": Path(args.data).name}
    results: dict[str, Any] = {}
    for split_point in map(int, args.split_points.split(",")):
        label = f"k={split_point}"
        found = results[label] = run(Bench(model, pixels, file_bytes, split_point, args), missing)
        for name, result in found["codecs"].items():
            print(summary(label, name, result, found["codecs"]), flush=True)
        save(args.out, "rate_distortion", config, results)
    if args.plot:
        title = f"Rate and distortion of hidden states, {Path(args.model).name}, {args.images // 2} images"
        draw(results, args.target_kl, args.plot, title)
        print(f"plot: {args.plot}")


if __name__ == "__main__":
    main()
