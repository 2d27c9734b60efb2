"""Text files as rows: JSON Lines or one JSON array, plain or compressed, read in pieces."""

import codecs
import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from teacher_cache.sources.rejects import BadRow, Reason, SourceError
from teacher_cache.sources.row import Row
from teacher_cache.sources.tables import ARROW_FILE_MAGIC, ARROW_STREAM_MAGIC, PARQUET_MAGIC

_CHUNK_BYTES = 1 << 20
# Limit for a line or element: a small compressed file may hold one that fills all memory.
MAX_ROW_BYTES = 64 << 20
_LITERAL = 16  # characters that a number or escape may lack at the end of a chunk
_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
COMPRESSIONS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}  # by a file's first bytes


def compression_of(head: bytes) -> str | None:
    """The compression that a file's first bytes show."""
    return next((name for magic, name in COMPRESSIONS.items() if head.startswith(magic)), None)


def text_rows(path: Path, head: bytes) -> Iterator[Row]:
    """Rows of a text file; numbers count lines of JSONL, or elements of an array, from 1.

    Raises:
        SourceError: If the file is cut short, or an array is broken.
    """
    try:
        yield from _rows(path, _chunks(path, compression_of(head)))
    except OSError as error:
        if compression_of(head) is None:
            raise
        raise SourceError(
            f"{path}: the compressed file is damaged or cut short ({error}); fetch it again"
        ) from error


def _chunks(path: Path, compression: str | None) -> Iterator[bytes]:
    with pa.OSFile(str(path)) as file:
        stream = file if compression is None else pa.CompressedInputStream(file, compression)
        while chunk := stream.read(_CHUNK_BYTES):
            yield chunk


def _rows(path: Path, chunks: Iterator[bytes]) -> Iterator[Row]:
    first = next(chunks, b"")
    if first.startswith(_UTF16_MARKS):
        raise SourceError(f"{path}: expected UTF-8 text, found UTF-16; convert the file")
    first = first.removeprefix(codecs.BOM_UTF8)
    if first.startswith((PARQUET_MAGIC, ARROW_FILE_MAGIC, ARROW_STREAM_MAGIC)):
        raise SourceError(f"{path}: compressed tables cannot be read; decompress it")
    if b"\0" in first[:4096]:
        raise SourceError(
            f"{path}: expected JSON text, Parquet or Arrow, found other binary data "
            f"(first bytes {first[:8].hex(' ')})"
        )
    if first.lstrip().startswith(b"["):
        for number, element in enumerate(_elements(path, first, chunks), start=1):
            yield Row(str(path), number, element)
    else:
        for number, line in enumerate(_lines(path, first, chunks), start=1):
            if line.strip():
                yield Row(str(path), number, line)


def _lines(path: Path, first: bytes, chunks: Iterator[bytes]) -> Iterator[bytes]:
    pieces: list[bytes] = []  # of an incomplete line
    number, num_bytes = 1, 0
    chunk = first
    while chunk:
        *whole, rest = chunk.split(b"\n")
        for line in whole:
            pieces.append(line)
            yield b"".join(pieces)
            pieces, num_bytes = [], 0
            number += 1
        pieces.append(rest)
        num_bytes += len(rest)
        if num_bytes > MAX_ROW_BYTES:
            raise _too_long(path, number)
        chunk = next(chunks, b"")
    yield b"".join(pieces)


def _too_long(path: Path, number: int) -> SourceError:
    return SourceError(
        f"{path}:{number}: the row is longer than {MAX_ROW_BYTES >> 20} MiB; expected one object "
        "per line, each a prompt or a trace"
    )


def _elements(path: Path, first: bytes, chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Yield the text of each element of a JSON array."""
    decoder = json.JSONDecoder()
    utf8 = codecs.getincrementaldecoder("utf-8")()
    number, at_end = 1, False
    try:
        text = utf8.decode(first).lstrip().removeprefix("[").lstrip()
        while True:
            try:
                if text.startswith("]"):
                    _check_nothing_follows(path, text[1:], chunks)
                    return
                _, end = decoder.raw_decode(text)
                rest = text[end:].lstrip()
                if rest[:1] not in (",", "]"):
                    raise json.JSONDecodeError("Expecting ',' delimiter", text, end)
            except RecursionError as error:
                raise SourceError(f"{path}:{number}: not JSON: nested too deep") from error
            except json.JSONDecodeError as error:
                if at_end or not _may_be_cut(error, text):
                    raise SourceError(
                        f"{path}:{number}: not JSON: {error.msg}; an array cannot be read past a "
                        "broken element, so fix it or write one object per line"
                    ) from error
                # Doubled each time, so that one long element is not scanned too often.
                more = [next(chunks, b"") for _ in range(1 + len(text) // _CHUNK_BYTES)]
                at_end = not more[-1]
                if len(text) > MAX_ROW_BYTES:
                    raise _too_long(path, number) from error
                text += utf8.decode(b"".join(more), final=at_end)
                continue
            yield text[:end].encode()
            number += 1
            text = rest.removeprefix(",").lstrip() if rest[0] == "," else rest
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}:{number}: not UTF-8: {error.reason}") from error


def _check_nothing_follows(path: Path, text: str, chunks: Iterator[bytes]) -> None:
    if text.strip() or any(chunk.strip() for chunk in chunks):
        raise SourceError(
            f"{path}: more text follows the end of a JSON array; write one array, or one object "
            "per line"
        )


def _may_be_cut(error: json.JSONDecodeError, text: str) -> bool:
    """Whether more text could complete the JSON."""
    return error.msg.startswith("Unterminated string") or error.pos >= len(text) - _LITERAL


def _no_constant(name: str) -> None:
    """Read NaN and the infinities, which Python writes but JSON lacks, as null."""
    del name


def parse_line(line: bytes) -> object:
    """Parse a line of JSONL.

    Raises:
        BadRow: If it is not valid JSON.
    """
    try:
        value = json.loads(line.decode(), parse_constant=_no_constant)
        if b"\\u" in line:
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeDecodeError as error:
        raise BadRow(Reason.NOT_UTF8, f"not UTF-8: {error.reason}") from error
    except UnicodeEncodeError as error:
        raise BadRow(Reason.NOT_UTF8, "half a surrogate pair, which is not a character") from error
    except (ValueError, RecursionError) as error:
        raise BadRow(Reason.NOT_JSON, f"not JSON: {error}; expected one object per line") from error
