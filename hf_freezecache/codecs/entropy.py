"""Entropy coding: zstd frames that carry their content size and checksum, and are checked before they are decoded."""

from __future__ import annotations

import zstandard

from .base import Buffer

__all__ = ["check_frame", "compress_frame", "decompress_frame"]


def compress_frame(data: Buffer, level: int) -> bytes:
    """Return one zstd frame with content size and checksum."""
    return zstandard.ZstdCompressor(level=level, write_checksum=True, write_content_size=True).compress(data)


def decompress_frame(frame: Buffer, expected_bytes: int) -> bytes:
    """Decode one frame.

    Args:
        frame: Exactly one zstd frame.
        expected_bytes: Size of its content. No more memory than this is taken.

    Raises:
        ValueError: The frame lacks a checksum, claims another size, is damaged, or is followed by something else.
    """
    try:
        parameters = zstandard.get_frame_parameters(frame)
        if not parameters.has_checksum or parameters.dict_id:
            raise ValueError("zstd frame without a checksum or with a dictionary")
        if parameters.content_size != expected_bytes:
            raise ValueError(f"zstd frame claims {parameters.content_size} bytes, expected {expected_bytes}")
        if expected_bytes == 0:
            # The library returns early for empty content, without looking at the rest of the frame.
            if bytes(frame) != compress_frame(b"", 1):
                raise ValueError("damaged zstd frame of no content")
            return b""
        # Content of the claimed size is the most the one-shot decoder allocates.
        content = zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ValueError(f"damaged zstd frame ({error})") from error
    if len(content) != expected_bytes:
        raise ValueError(f"zstd frame holds {len(content)} bytes, expected {expected_bytes}")
    return content


def check_frame(frame: Buffer) -> None:
    """Check that a frame is whole, against its own size and checksum, in bounded memory.

    Raises:
        ValueError: It is not.
    """
    try:
        parameters = zstandard.get_frame_parameters(frame)
        if not parameters.has_checksum:
            raise ValueError("zstd frame without a checksum")
        found = 0
        with zstandard.ZstdDecompressor().stream_reader(frame) as reader:
            while block := reader.read(2**20):
                found += len(block)
    except zstandard.ZstdError as error:
        raise ValueError(f"damaged zstd frame ({error})") from error
    if found != parameters.content_size:
        raise ValueError(f"zstd frame holds {found} bytes, claims {parameters.content_size}")
