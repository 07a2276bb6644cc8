"""How fast can a cache be read: by threads, codec, width and size of chunks, beside the limit of each part?

    python recipes/benchmarks/reading.py --json recipes/benchmarks/results/reading.json

Writes caches of made-up hidden states, whose coefficients fall off somewhat as those of a vision transformer do: by the transform
codec at ``--bits`` per element, and without loss. Then reads each in the order of training, batch by batch, with 0 threads (as
needed), 1, 2, ..., and throws the batches away. Rounds take all settings in turns. Beside that, each part alone on one thread:
reading files that the system has in memory, zstd, unpacking, and copying samples into batches.
"""

from __future__ import annotations

import argparse
import itertools
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from made_up import SEED, build
from record import save, spread
from torch import Tensor
from torch.utils.data import DataLoader

from hf_freezecache.cache.index import shard_name
from hf_freezecache.cache.reader import CacheReader
from hf_freezecache.cache.shard_file import read_chunk_frames
from hf_freezecache.codecs import Codec, make_codec
from hf_freezecache.codecs.entropy import decompress_frame
from hf_freezecache.compression.step_search import roundtrip
from hf_freezecache.data.chunk_samples import ChunkSamples
from hf_freezecache.data.collators import collate_cached
from hf_freezecache.data.sampler import ChunkSampler
from hf_freezecache.dataset import CachedDataset

WINDOW = 8
#: Samples that a codec is fitted on and that caches hold again and again; tries of a quantization step in search of a rate.
SAMPLES, TRIES = 128, 10


def make_states(tokens: int, hidden: int) -> Tensor:
    """Return states (SAMPLES, tokens, hidden) of a class token and a grid of patches: smooth over the grid, few strong channels."""
    generator = torch.Generator().manual_seed(SEED)
    side = math.isqrt(tokens - 1)
    frequency = torch.fft.fftfreq(side)[:, None] ** 2 + torch.fft.fftfreq(side) ** 2
    noise = torch.randn(SAMPLES, hidden, side, side, generator=generator)
    smooth = torch.fft.ifft2(torch.fft.fft2(noise) / (1 / side**2 + frequency) ** 0.5).real
    patches = smooth.flatten(2).transpose(1, 2) * (1.0 + torch.arange(hidden)) ** -0.5
    mixing = torch.linalg.qr(torch.randn(hidden, hidden, generator=generator))[0]
    return torch.cat([patches.mean(1, keepdim=True), patches], 1) @ mixing


def at_rate(states: Tensor, bits: float, chunk_size: int) -> Codec:
    """Return the transform codec with the step that gives so many bits per element."""
    side = math.isqrt(states.shape[1] - 1)
    codec = make_codec("transform").fit(states, 1, (side, side))
    assert codec.step_size is not None
    low, high = math.log2(codec.step_size) - 12, math.log2(codec.step_size) + 6
    for _ in range(TRIES):
        middle = (low + high) / 2
        found = roundtrip(codec.with_step_size(2**middle), states[:chunk_size], chunk_size)[1]
        low, high = (middle, high) if found > bits else (low, middle)
    return codec.with_step_size(2**high)


def read_epochs(reader: CacheReader, threads: int, batch_size: int, epochs: int) -> float:
    """Read so many epochs; return samples per second, the start of the first included."""
    dataset = CachedDataset(reader, WINDOW + min(batch_size, WINDOW), packed=True)
    sampler = ChunkSampler([reader.layout], SEED, SEED, 1, WINDOW)
    dataset.read_ahead(sampler, threads=threads)
    loader = DataLoader(dataset, batch_size, sampler=sampler, collate_fn=collate_cached)
    began, seen = time.perf_counter(), 0
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        seen += sum(len(batch["labels"]) for batch in loader)
    assert seen == epochs * len(dataset)
    assert dataset.decoded_chunks == epochs * reader.layout.num_chunks
    return seen / (time.perf_counter() - began)


def parts_of(reader: CacheReader, batch_size: int) -> dict[str, Callable[[], Any]]:
    """Return what reads, undoes zstd, and decodes all chunks; and what copies samples of one chunk into batches."""
    index, layout = reader.index, reader.layout
    places = [divmod(chunk, index.shard_chunks) for chunk in range(layout.num_chunks)]

    def frames(shard: int, position: int) -> list[Any]:
        return read_chunk_frames(reader.storage.file(shard_name(0, shard)), reader._header(0, shard), position)

    loaded = [frames(*place) for place in places]
    chunk = reader.entropy_decode_chunk(0, 0)
    rows = itertools.cycle(range(len(layout.members(0))))
    samples = [(chunk.arrays, row) for row in itertools.islice(rows, layout.num_samples)]
    batches = [ChunkSamples(samples[start : start + batch_size], {}) for start in range(0, len(samples), batch_size)]
    return {
        "files": lambda: [frames(*place) for place in places],
        "zstd": lambda: [decompress_frame(frame, 1 << 40, at_most=True) for some in loaded for frame in some],
        "files_zstd_unpacking": lambda: [reader.entropy_decode_chunk(0, number) for number in range(len(places))],
        "copying": lambda: [collate_cached(batch) for batch in batches],
    }


def measure(reader: CacheReader, arguments: argparse.Namespace) -> dict[str, Any]:
    rates: dict[str, list[float]] = {f"threads_{count}": [] for count in arguments.threads}
    parts = parts_of(reader, arguments.batch_size)
    rates |= {name: [] for name in parts}
    for _ in range(arguments.rounds):
        for count in arguments.threads:
            rates[f"threads_{count}"].append(read_epochs(reader, count, arguments.batch_size, arguments.epochs))
        for name, part in parts.items():
            began = time.perf_counter()
            part()
            rates[name].append(reader.layout.num_samples / (time.perf_counter() - began))
    stored = reader.index.total_bytes / reader.layout.num_samples
    packed = sum(array[0].nbytes for array in reader.entropy_decode_chunk(0, 0).arrays.values())
    found: dict[str, Any] = {
        "stored_bytes_per_image": round(stored),
        "packed_bytes_per_image": packed,
        "images_per_second": {name: spread(values) for name, values in rates.items()},
    }
    if {1, 2} <= set(arguments.threads):
        pairs = zip(rates["threads_2"], rates["threads_1"], strict=True)
        found["two_threads_over_one"] = spread([two / one for two, one in pairs])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, nargs="+", default=[192, 384, 768, 1024, 1536])
    parser.add_argument("--tokens", type=int, default=197, help="one, and a square number of patches")
    parser.add_argument(
        "--chunk-sizes", type=int, nargs="+", default=[32], help="also of 128 samples at the width of 768"
    )
    parser.add_argument("--bits", type=float, nargs="+", default=[2.0], help="bits per element of the transform codec")
    parser.add_argument("--no-lossless", action="store_true", help="leave lossless caches out")
    parser.add_argument("--threads", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--megabytes", type=int, default=600, help="hidden states of a cache, before it is encoded")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, default=None, help="where to write the record")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    codecs: list[float | str] = [*arguments.bits, *([] if arguments.no_lossless else ["lossless"])]
    config = {**vars(arguments), "json": None, "window": WINDOW, "seed": SEED}
    results: dict[str, Any] = {}
    for hidden, chunk_size, wanted in itertools.product(arguments.hidden, arguments.chunk_sizes, codecs):
        states = make_states(arguments.tokens, hidden)
        rows = max(arguments.megabytes * 10**6 // states[0].nbytes, 2 * WINDOW * chunk_size)
        codec = make_codec(wanted) if isinstance(wanted, str) else at_rate(states, wanted, chunk_size)
        with tempfile.TemporaryDirectory() as folder:
            reader = CacheReader(build(Path(folder), rows, states, codec, chunk_size, batch_size=64))
            found = measure(reader, arguments) | {"rows": rows}
        name = f"hidden={hidden} chunk={chunk_size} {wanted if isinstance(wanted, str) else f'{wanted:g} bits'}"
        results[name] = found
        rates = {key: values["median"] for key, values in found["images_per_second"].items()}
        ratio = found.get("two_threads_over_one", {}).get("median")
        print(
            f"{name}: {found['stored_bytes_per_image'] / 1024:.1f} KiB an image; images/s by threads "
            + ", ".join(f"{count}: {rates[f'threads_{count}']:,.0f}" for count in arguments.threads)
            + (f" (two over one {ratio:.2f})" if ratio else "")
            + f"; alone: files {rates['files']:,.0f}, zstd {rates['zstd']:,.0f}, files, zstd and unpacking "
            f"{rates['files_zstd_unpacking']:,.0f}, copying {rates['copying']:,.0f}",
            flush=True,
        )
        if arguments.json is not None:  # each time: one that is stopped leaves what it has
            save(arguments.json, "reading", config, results, quiet=True)


if __name__ == "__main__":
    main()
