"""Other ways of storing the same rows, for comparison only.

`plain_arrow` is the obvious format: int32 ids and float16 logprobs, zstd, 64 entries per token.
`DistillKit` follows the two settings of its README (k = 128 "recommended", k = 50 "budget pick"):
bit-packed ids, the first logprobs in bfloat16, the others as the coefficients of a polynomial in
the rank. The polynomial is fitted in float64 here, which favours it: the published code fits in
float32, where the powers of the rank lose most of their digits.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from teacher_cache.format.codec import round_to_bfloat16

BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Stored:
    """Result of storing rows of logprobs."""

    num_bytes: int
    encode_s: float  # processor time, as below
    decode_s: float  # to dense numpy ids and logprobs
    logprobs: NDArray[np.float32]  # [R, k] as decoded
    ids_equal: bool


def plain_arrow(ids: NDArray[np.int32], logprobs: NDArray[np.float32], k: int) -> Stored:
    """One row per token: fixed-size lists of int32 ids and float16 logprobs."""
    ids, logprobs = ids[:, :k], logprobs[:, :k]
    schema = pa.schema({"ids": pa.list_(pa.int32(), k), "logprobs": pa.list_(pa.float16(), k)})
    options = pa.ipc.IpcWriteOptions(
        compression=pa.Codec("zstd", compression_level=3), use_threads=False
    )
    start = time.process_time()
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema, options=options) as writer:
        for first in range(0, len(ids), BATCH_TOKENS):
            part = slice(first, first + BATCH_TOKENS)
            columns = (ids[part].ravel(), logprobs[part].astype(np.float16).ravel())
            arrays = [pa.FixedSizeListArray.from_arrays(pa.array(c), k) for c in columns]
            writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))
    data = sink.getvalue()
    encoded = time.process_time()
    parts = []
    reading = pa.ipc.IpcReadOptions(use_threads=False)
    with pa.ipc.open_file(data, options=reading) as reader:
        for number in range(reader.num_record_batches):
            batch = reader.get_batch(number)
            parts.append([column.values.to_numpy().reshape(-1, k) for column in batch.columns])
    found_ids, found = (np.concatenate(column) for column in zip(*parts, strict=True))
    found = found.astype(np.float32)
    ended = time.process_time()
    same = np.array_equal(found_ids, ids)
    return Stored(len(data), encoded - start, ended - encoded, found, same)


@dataclass(frozen=True)
class DistillKit:
    """A setting of its `logprob_compressor`, residual bins empty in both that it recommends."""

    name: str
    k: int
    exact_k: int
    powers: tuple[float, ...]  # polynomial terms, 0.5 for the square root

    def store(
        self, ids: NDArray[np.int32], logprobs: NDArray[np.float32], vocab_size: int
    ) -> Stored:
        """Encode and decode rows."""
        ids, logprobs = ids[:, : self.k], logprobs[:, : self.k]
        id_bits = int(np.ceil(np.log2(vocab_size)))
        # The terms of rank t; columns scaled to one so that the fit is as good as float64 allows.
        rank = np.arange(self.k - self.exact_k, dtype=np.float64)
        terms = np.stack([rank**power for power in self.powers])
        scale = terms.max(axis=1, keepdims=True)
        start = time.process_time()
        exact = round_to_bfloat16(np.ascontiguousarray(logprobs[:, : self.exact_k]))
        fit = np.linalg.pinv((terms / scale).T)
        rest = logprobs[:, self.exact_k :].astype(np.float64)
        coefficients = ((rest @ fit.T) / scale[:, 0]).astype(np.float32)
        bits = (ids[:, :, None] >> np.arange(id_bits)) & 1
        packed = np.packbits(bits.astype(np.uint8).reshape(len(ids), -1), axis=1)
        encoded = time.process_time()
        unpacked = np.unpackbits(packed, axis=1, count=self.k * id_bits)
        weights = 1 << np.arange(id_bits)
        found_ids = unpacked.reshape(len(ids), self.k, id_bits) @ weights
        curve = (coefficients.astype(np.float64) @ terms).astype(np.float32)
        found = np.concatenate([exact, curve], axis=1)
        ended = time.process_time()
        num_bytes = packed.nbytes + coefficients.nbytes + exact.nbytes // 2  # bfloat16
        same = np.array_equal(found_ids, ids)
        return Stored(num_bytes, encoded - start, ended - encoded, found, same)


RECOMMENDED = DistillKit("DistillKit k=128", 128, 16, (0, 1, 2, 3, 4, 0.5))
BUDGET = DistillKit("DistillKit k=50 (budget)", 50, 1, (0, 1, 0.5))
