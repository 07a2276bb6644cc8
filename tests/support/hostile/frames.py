"""Hostile zstd frames."""

from __future__ import annotations

import struct
from pathlib import Path

import zstandard

from hf_freezecache.codecs.entropy import compress_frame

from .cases import GIB, case
from .tools import set_frame, zeros, zstd_frame


@case()
def frame_that_claims_a_terabyte(cache: Path) -> None:
    set_frame(cache, zstd_frame(2**40, zeros(2**17)))


@case()
def frame_of_four_gigabytes_of_zeros(cache: Path) -> None:
    set_frame(cache, zstd_frame(4 * GIB, zeros(4 * GIB)))


@case()
def frame_of_gigabytes_that_states_no_size(cache: Path) -> None:
    set_frame(cache, zstd_frame(None, zeros(4 * GIB)))


@case()
def frame_of_gigabytes_that_states_the_expected_size(cache: Path) -> None:
    set_frame(cache, zstd_frame(18, zeros(4 * GIB)))


@case()
def small_frame_that_states_the_expected_size_and_holds_more(cache: Path) -> None:
    set_frame(cache, zstd_frame(18, zeros(2**17)))


@case()
def labels_of_gigabytes(cache: Path) -> None:
    set_frame(cache, zstd_frame(24, zeros(4 * GIB)), number=4)


@case()
def frame_with_a_huge_window(cache: Path) -> None:
    set_frame(cache, zstd_frame(None, zeros(2**17), window=0xFF))


@case()
def frame_with_something_behind(cache: Path) -> None:
    set_frame(cache, compress_frame(bytes(18), 1) + b"more")


@case()
def frame_behind_a_skippable_one(cache: Path) -> None:
    set_frame(cache, b"\x50\x2a\x4d\x18" + struct.pack("<I", 4) + b"skip" + compress_frame(bytes(18), 1))


@case()
def two_frames_in_one(cache: Path) -> None:
    set_frame(cache, compress_frame(bytes(9), 1) * 2)


@case()
def frame_without_a_checksum(cache: Path) -> None:
    set_frame(cache, zstandard.ZstdCompressor(write_checksum=False, write_content_size=True).compress(bytes(18)))


@case()
def frame_with_a_dictionary(cache: Path) -> None:
    set_frame(cache, b"\x28\xb5\x2f\xfd" + bytes([0x27, 1, 0, 0, 0, 18]) + zeros(2**17) + b"\0\0\0\0")


@case()
def frame_of_nothing(cache: Path) -> None:
    set_frame(cache, b"")


@case()
def frame_of_no_content(cache: Path) -> None:
    set_frame(cache, compress_frame(b"", 1))


@case()
def frame_of_a_byte_too_few(cache: Path) -> None:
    set_frame(cache, compress_frame(bytes(17), 1))
