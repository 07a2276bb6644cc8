"""What one image takes here and now, by rendering a few and running them through a few blocks."""

from __future__ import annotations

import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from ..cache.encoder import encoding_threads
from ..codecs import make_codec
from ..compression.base_view import requested_codec
from ..data.seeding import preserved_random_state
from ..model.devices import finish_device
from ..model.split import Splits
from ..model.threads import available_cores
from .stage_cache import StageCache

__all__ = ["Rates", "Rendering", "measure_rates", "measure_rendering"]

#: The most images that are rendered.
_ROWS = 8
#: Measuring may take so much of what a stage without a cache takes, or one image: of rendering, and of running images through the
#: blocks, where a step of training takes up to three passes for one of these.
_SHARE, _SHARE_OF_BLOCKS = 0.01, 0.015
#: The most blocks that are timed together: the rest take as long.
_BLOCKS = 4
#: No further image is rendered after this. What is measured must cost far less than what it decides about.
_RENDER_SECONDS = 0.2
#: Encoding with a fitted codec takes so many times what encoding without loss does. Source: building is 1.2 and 1.5 times rendering
#: and prefix (recipes/benchmarks/epoch_cost.py).
_LOSSY_ENCODING = 2.5


@dataclass(frozen=True)
class Rates:
    """What one image takes, in seconds.

    Attributes:
        render: Reading a row and rendering one view, on average over those that are stored: an epoch without a cache shows one of them.
        render_all: Reading a row and rendering all views that are stored.
        block: A forward pass through one block.
        encode: Encoding one view.
        decode: Decoding one view.
        stored_bytes: Bytes of one view, stored without loss; not seconds.
        decoded_bytes: Bytes of one view as memory holds it while training; not seconds.
        write: Writing one view to disk.
        read: Reading one view from disk, which worker processes do not share out; 0 where files stay in memory.
        embed: Collating, moving to the device, and a forward pass through what stands before the blocks.
        cores: Cores of a CPU that the model computes on, and worker processes as well; 0 beside an accelerator. No seconds.
        waiting: Share of rendering that takes no core, as where images are fetched; no seconds.
        encoders: Threads that encode the chunks of a cache while the blocks compute; 0 if that is done in between.
    """

    render: float
    render_all: float
    block: float
    encode: float
    decode: float
    stored_bytes: float = 0.0
    decoded_bytes: float = 0.0
    write: float = 0.0
    read: float = 0.0
    embed: float = 0.0
    cores: int = 0
    waiting: float = 0.0
    encoders: int = 0

    def prefix(self, split_point: int, start: int = 0) -> float:
        """Return the seconds from the images, or from the block ``start``, to a split point."""
        return self.block * (split_point - start) + (self.embed if start == 0 else 0.0)

    def together(self, ahead: float, computing: float, workers: int, waiting: float = 0.0) -> float:
        """Return what a step takes whose data worker processes prepare while the one before computes.

        Args:
            ahead: Seconds in which one process prepares the data.
            computing: Seconds of computing, on all cores.
            workers: Processes that prepare data.
            waiting: Share of ``ahead`` that takes no core.
        """
        if workers == 0:
            return ahead + computing
        busy = ahead * (1 - waiting) / self.cores if self.cores else 0.0
        return max(ahead / workers, computing + busy)

    def while_encoding(self, building: float, encoding: float, num_caches: int) -> float:
        """Return what a build takes that encodes the states of each cache, in threads of its own if that is how it is done.

        Args:
            building: Seconds of what comes before.
            encoding: Seconds in which one thread encodes the states of one cache.
            num_caches: Caches that are written.
        """
        if self.encoders == 0:
            return building + encoding * num_caches
        return max(encoding / self.encoders, building + (encoding * num_caches / self.cores if self.cores else 0.0))


@dataclass(frozen=True)
class Rendering:
    """A few rows, rendered, and what one takes.

    Attributes:
        render: As in ``Rates``.
        render_all: As in ``Rates``.
        waiting: As in ``Rates``.
        examples: A view of each row, as the transform gives it.
    """

    render: float
    render_all: float
    waiting: float
    examples: list[Any]


def measure_rendering(cache: StageCache, images: float = math.inf) -> Rendering:
    """Render a few rows, and all of their views.

    Args:
        cache: Of the stage that is to come.
        images: As in ``measure_rates``.

    Raises:
        FreezeCacheError: A row cannot be rendered.
    """
    data, num_views = cache.chooser.data, cache.config.num_views
    # The base view may be another transform's than the others.
    shown = (0, 1) if num_views > 1 else (0,)
    rows = data.layout.order[: _at_most(_SHARE * images / (len(shown) + num_views / 2), 1, _ROWS)].tolist()
    with preserved_random_state():
        views, busy = data.views.reading_once(), time.process_time()
        seconds, examples = zip(
            *(_per_row(lambda row, view=view: views[row, view], rows) for view in shown),  # type: ignore[misc]
            strict=True,
        )
        busy = (time.process_time() - busy) / sum(map(len, examples))
        render = (seconds[0] + (num_views - 1) * seconds[-1]) / num_views
        render_all = num_views * render
        if num_views > 1 and views.reads_once:
            render_all, _ = _per_row(lambda row: views.render_views(row, range(num_views)), rows)
    took = statistics.mean(seconds)
    return Rendering(render, render_all, min(max(1 - busy / took, 0.0), 1.0) if took > 0 else 0.0, examples[-1])


def measure_rates(
    cache: StageCache,
    splits: Splits,
    split_point: int,
    batch_size: int,
    images: float = math.inf,
    rendering: Rendering | None = None,
) -> Rates:
    """Render a few rows, encode, write and decode what they are at a split, and run a batch of them through a few blocks.

    The batch is one of training, if so many images are worth it: of fewer, each takes longer, up to three times (DeiT-Tiny, one image at
    112 pixels, 2 cores).

    Args:
        cache: Of the stage that is to come.
        splits: Splits of the model.
        split_point: Where the cache would be made.
        batch_size: Images of a batch.
        images: Images that the stage trains on without a cache, those of all epochs: few of them allow little measuring.
        rendering: Rows that are rendered; otherwise a few are.

    Raises:
        FreezeCacheError: A row cannot be rendered, or the frozen blocks fail.
    """
    chooser, config = cache.chooser, cache.config
    data, examples = chooser.data, (rendering := rendering or measure_rendering(cache, images)).examples
    device = next(splits.model.parameters()).device
    with preserved_random_state():
        count = len(examples)
        # Half for the blocks, half for what stands before them, and for the states that are encoded.
        passes = _SHARE_OF_BLOCKS * images * splits.num_blocks / 2
        repeated = _at_most(passes, count, max(batch_size, count))
        depth = _at_most(passes / repeated, 1, min(_BLOCKS, splits.num_blocks))

        def prepare(examples: list[Any]) -> dict[str, Any]:
            batch = data.collate(examples)
            inputs = {name: batch[name] for name in ("pixel_values", *sorted(data.prefix_inputs))}
            return pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), inputs)  # type: ignore[no-any-return]

        def run(split_point: int, inputs: dict[str, Any]) -> Tensor:
            states: Tensor = chooser.run(splits.at(split_point).prefix, **inputs)
            finish_device(device)
            return states

        stored = run(split_point, prepare(examples)).cpu()
        # Images that are there cost nothing more.
        preparing, batch = _timed(lambda: prepare((examples * math.ceil(repeated / count))[:repeated]))
        # The first call allocates, and may compile.
        embed, _ = min((_timed(lambda: run(0, batch)) for _ in range(2)), key=lambda timed: timed[0])
        deep = [_timed(lambda: run(depth, batch))[0] for _ in range(1 if device.type == "cpu" else 2)][-1]
        lossless = make_codec("lossless")
        encode, frames = _timed(lambda: lossless.encode(stored))
        copies = _ROWS // count
        write, _ = _timed(lambda: _write(frames * copies, Path(config.freezecache_dir)))
        decode, _ = _timed(lambda: lossless.decode(frames, stored.shape, stored.dtype))
    size: float = stored.nbytes
    if not requested_codec(config, split_point)[0].lossless:
        encode, write = encode * _LOSSY_ENCODING, write * _LOSSY_ENCODING
        # Integers of a byte, and those of the first view beside what it predicts.
        size = stored.numel() * (2 - 1 / config.num_views)
    return Rates(
        render=rendering.render,
        render_all=rendering.render_all,
        # Other work on the machine must not leave nothing for the blocks.
        block=max(deep - embed, deep / 4) / depth / repeated,
        encode=encode / count,
        decode=decode / count,
        stored_bytes=sum(map(len, frames)) / count,
        decoded_bytes=size / count,
        write=write / count / copies,
        embed=(preparing + embed) / repeated,
        cores=available_cores() if device.type == "cpu" else 0,
        waiting=rendering.waiting,
        encoders=encoding_threads(device),
    )


def _at_most(wanted: float, least: int, most: int) -> int:
    return int(min(max(wanted, least), most))


def _per_row(render: Callable[[int], Any], rows: Sequence[int]) -> tuple[float, list[Any]]:
    """Render rows, at least two if so many are given, for a short while; return the median of the seconds that one took, and what was rendered."""
    seconds: list[float] = []
    rendered = []
    for row in rows:
        if len(seconds) >= 2 and sum(seconds) > _RENDER_SECONDS:
            break
        took, item = _timed(lambda row=row: render(row))  # type: ignore[misc]
        seconds.append(took)
        rendered.append(item)
    return statistics.median(seconds), rendered


def _timed(function: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = function()
    return time.perf_counter() - started, result


def _write(frames: list[bytes], folder: Path) -> None:
    """Write frames to the disk of the caches, as a build does, and remove them."""
    with suppress(OSError):  # building tells
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.writelines(frames)
            file.flush()
            os.fsync(file.fileno())
