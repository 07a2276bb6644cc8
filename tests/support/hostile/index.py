"""Hostile ``index.json``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_freezecache.cache.index import shard_name

from .cases import case
from .tools import document_of, raw_index, seal, set_extras


def _index_case(name: str, base: str = "lossless", **changes: Any) -> None:
    def tamper(cache: Path) -> None:
        seal(cache, **changes)

    tamper.__name__ = name
    case(base)(tamper)


_index_case("index_claims_a_billion_samples", num_samples=10**9)
_index_case("index_claims_a_billion_samples_in_one_chunk", num_samples=10**9, chunk_size=10**9)
_index_case("index_claims_a_million_views", num_views=10**6)
_index_case("index_with_a_huge_number", num_samples=10**30)
_index_case("index_with_a_huge_chunk", chunk_size=10**12)
_index_case("index_with_a_float_for_a_count", chunk_size=3.0)
_index_case("index_with_a_boolean_for_a_count", shard_chunks=True)
_index_case("index_with_a_text_for_a_count", num_views="2")
_index_case("index_with_a_negative_count", shard_chunks=-2)
_index_case("index_with_a_list_for_a_count", split_point=[2])
_index_case("index_with_a_text_for_a_seed", layout_seed="3")
_index_case("index_with_an_absurd_number_of_tokens", num_tokens=10**9)
_index_case("index_with_a_text_for_the_number_of_tokens", num_tokens="2")
_index_case(
    "index_with_a_file_record_that_says_more", files={"index.json": {"bytes": 1, "sha256": "0" * 64, "mode": 7}}
)
_index_case("index_with_an_absurd_hidden_shape", hidden_shape=[10**6, 10**6])
_index_case("index_with_hidden_states_of_no_axes", hidden_shape=[])
_index_case("index_with_an_absurd_image_shape", image_shape=[3, 10**9, 10**9])
_index_case("index_with_a_text_for_an_image_shape", image_shape="abc")
_index_case("index_with_a_number_for_an_image_shape", image_shape=224)
_index_case("index_without_an_image_shape", image_shape=None)
_index_case("index_with_an_unknown_dtype", dtype="F8_E4M3")
_index_case("index_with_a_list_for_a_dtype", dtype=["F32"])
_index_case("index_with_fingerprint_components_that_are_no_texts", fingerprint={"data": 7})
_index_case("index_with_a_list_for_a_fingerprint", fingerprint=["data"])
_index_case("index_with_an_entry_that_no_cache_has", command="rm")
_index_case("index_with_a_text_for_a_codec", codec="lossless")
_index_case("index_with_an_unknown_codec", codec={"name": "zip", "configuration": {}})
_index_case("index_of_another_format_version", format_version=3)
_index_case("index_of_a_boolean_format_version", format_version=True)
_index_case("index_with_a_text_for_files", files="all")
_index_case("index_with_nan_in_its_calibration", base="int8", calibration={"distortion": float("nan")})
for _name, _extra in {
    "of_an_unknown_dtype": {"name": "labels", "dtype": "nn", "shape": []},
    "of_a_quantized_dtype": {"name": "labels", "dtype": "qint32", "shape": []},
    "of_a_huge_shape": {"name": "labels", "dtype": "int64", "shape": [2**20, 2**20]},
    "of_many_axes": {"name": "labels", "dtype": "int64", "shape": [1] * 10_000},
    "of_a_negative_shape": {"name": "labels", "dtype": "int64", "shape": [-1]},
    "of_a_boolean_shape": {"name": "labels", "dtype": "int64", "shape": [True]},
    "named_as_the_hidden_states": {"name": "hidden_states", "dtype": "int64", "shape": []},
    "named_as_a_packed_array": {"name": "packed.values", "dtype": "int64", "shape": []},
    "named_as_another": {"name": "mask", "dtype": "int64", "shape": []},
    "named_by_a_number": {"name": 7, "dtype": "int64", "shape": []},
    "with_an_entry_too_many": {"name": "labels", "dtype": "int64", "shape": [], "hook": "x"},
}.items():

    def _tamper(cache: Path, extra: dict[str, Any] = _extra) -> None:
        set_extras(cache, **extra)

    _tamper.__name__ = f"extra_{_name}"
    case()(_tamper)

for _name, _path in {
    "the_folder_above": "../x",
    "an_absolute_path": "/etc/passwd",
    "a_detour": "view-00/../../x",
    "a_shard_by_a_detour": "view-00/../view-00/shard-00000.safetensors",
    "a_zero_byte": "view-00/shard-00000.safetensors\0",
}.items():

    def _rename(cache: Path, path: str = _path) -> None:
        document = document_of(cache)
        document["files"][path] = document["files"].pop(shard_name(0, 0))
        seal(cache, document, records=False)

    _rename.__name__ = f"index_names_{_name}"
    case()(_rename)


@case()
def rows_of_a_data_set_of_absurd_size(cache: Path) -> None:
    count = document_of(cache)["num_samples"]
    seal(cache, rows=[0, count, 2**40])


@case()
def rows_that_are_not_as_many_as_samples(cache: Path) -> None:
    seal(cache, rows=[0, document_of(cache)["num_samples"] - 1, 100])


@case()
def rows_beyond_the_last(cache: Path) -> None:
    count = document_of(cache)["num_samples"]
    seal(cache, rows=[count, 2 * count, 2 * count - 1])


@case()
def rows_that_are_texts(cache: Path) -> None:
    seal(cache, rows=["0", "8", "16"])


@case()
def rows_that_are_not_those_of_the_shards(cache: Path) -> None:
    count = document_of(cache)["num_samples"]
    seal(cache, rows=[count, 2 * count, 2 * count])


@case()
def index_nested_deeply(cache: Path) -> None:
    raw_index(cache, copies="[" * 100_000 + "]" * 100_000)


@case()
def index_nested_by_a_hundred(cache: Path) -> None:
    """Deep enough for Python's own recursion further on."""
    nested: Any = {}
    for _ in range(100):
        nested = {"a": nested}
    seal(cache, calibration=nested)


@case()
def index_of_a_million_lists(cache: Path) -> None:
    raw_index(cache, copies="[" + "[]," * 5_000_000 + "[]]")


@case()
def index_of_millions_of_texts(cache: Path) -> None:
    raw_index(cache, copies="[" + '"ab",' * 3_000_000 + '"ab"]')


@case()
def index_of_one_long_text(cache: Path) -> None:
    seal(cache, split_point="\U0001f600" + "a" * 15_000_000)


@case()
def index_of_60_megabytes(cache: Path) -> None:
    (cache / "index.json").write_bytes(b"[" + b"{}," * (20 * 2**20) + b"{}]")


@case()
def index_with_a_number_of_a_million_digits(cache: Path) -> None:
    raw_index(cache, num_samples="1" * 1_000_000)


@case()
def index_with_nan_and_infinity(cache: Path) -> None:
    raw_index(cache, num_samples="Infinity", chunk_size="NaN")


@case()
def index_with_an_infinite_size(cache: Path) -> None:
    seal(cache, split_point=float("inf"))


@case()
def index_with_a_key_twice(cache: Path) -> None:
    text = (cache / "index.json").read_text()
    (cache / "index.json").write_text(text.replace('\n "num_views": 2,', '\n "num_views": 2,\n "num_views": 2,'))


@case()
def index_with_files_of_exabytes(cache: Path) -> None:
    """So that a billion samples seem to be there."""
    document = document_of(cache)
    for record in document["files"].values():
        record["bytes"] = 2**60
    seal(cache, document, records=False, num_samples=10**9, chunk_size=10**9)


@case()
def index_with_a_header_larger_than_its_shard(cache: Path) -> None:
    document = document_of(cache)
    document["files"][shard_name(0, 0)]["header_bytes"] = 2**40
    seal(cache, document, records=False)


@case()
def index_with_a_text_for_a_size(cache: Path) -> None:
    document = document_of(cache)
    document["files"][shard_name(0, 0)]["bytes"] = "4096"
    seal(cache, document, records=False)


@case()
def index_with_a_hash_that_is_none(cache: Path) -> None:
    document = document_of(cache)
    document["files"][shard_name(0, 0)]["header_sha256"] = None
    seal(cache, document, records=False)
