"""Samples of chunks: a batch of them is what their dicts would be stacked to."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_freezecache.codecs.array_names import KEPT
from hf_freezecache.data.chunk_samples import ChunkSamples
from hf_freezecache.data.collators import collate_cached

DTYPES = [torch.int8, torch.int16, torch.float16, torch.bfloat16, torch.float32, torch.int64, torch.bool]
TOKENS = 5


def chunk_of(dtype: torch.dtype, rows: int, seed: int, extra: bool) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-100, 100, (rows, 3, TOKENS), generator=generator).to(dtype)
    made = {"packed.values": values, "labels": torch.arange(rows) + 100 * seed}
    return {**made, "packed.b": torch.rand(rows, TOKENS, 2, generator=generator)} if extra else made


def assert_same_batch(found, expected) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name


@given(st.data(), st.sampled_from(DTYPES), st.booleans(), st.booleans())
def test_a_batch_is_the_stack_of_its_samples(data, dtype, some_tokens, packed) -> None:
    chunks = [chunk_of(dtype, rows, seed, extra=seed == 1) for seed, rows in enumerate((1, 4, 3))]
    places = data.draw(st.lists(st.sampled_from([(c, r) for c in chunks for r in range(len(c["labels"]))]), min_size=1))
    positions = None
    if some_tokens:
        subset = st.lists(st.integers(0, TOKENS - 1), min_size=2, max_size=2, unique=True).map(sorted)
        positions = [torch.tensor(data.draw(subset)) for _ in places]
    samples = ChunkSamples(places, {"packed.values": 2, "packed.b": 1}, positions, packed)
    assert len(samples) == len(list(samples)) == len(places)
    found = collate_cached(samples)
    assert_same_batch(found, collate_cached(list(samples)))
    assert (KEPT in found) == (some_tokens and packed)
    assert torch.equal(samples[-1]["labels"], samples[len(samples) - 1 :][0]["labels"])


@pytest.mark.parametrize("kept", [None, [torch.tensor([0, 4]), torch.tensor([1, 2])]])
def test_chunks_of_small_numbers_have_a_narrower_type(kept) -> None:
    narrow, wide = chunk_of(torch.int8, 2, 0, False), chunk_of(torch.int16, 2, 1, False)
    wide["packed.values"] += 1000
    samples = ChunkSamples([(narrow, 1), (wide, 0)], {"packed.values": 2}, kept)
    assert collate_cached(samples)["packed.values"].dtype == torch.int16
    assert_same_batch(collate_cached(samples), collate_cached(list(samples)))


def test_shapes_must_agree() -> None:
    chunks = [{"labels": torch.zeros(2, width)} for width in (1, 3)]
    with pytest.raises(ValueError, match=r"'labels' of different shapes: \[\(1,\), \(3,\)\]"):
        ChunkSamples([(chunk, 0) for chunk in chunks], {}).batch()


def test_a_batch_shares_no_memory_with_its_chunks() -> None:
    chunk = chunk_of(torch.float32, 2, 0, True)
    batch = ChunkSamples([(chunk, 0)], {}).batch()
    before = chunk["packed.values"].clone()
    batch["packed.values"].zero_()
    assert torch.equal(chunk["packed.values"], before)
