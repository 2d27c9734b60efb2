"""DistillKit's compressed Parquet: bit-packed ids, and logprobs as exact values, polynomial, bins.

Read from its rows and its `compression_config.yaml` alone, with numpy. Two kinds:

- `compressed_logprobs` and `bytepacked_indices`: logprobs by falling value (or their differences),
  the first `exact_k` as they are, the rest a polynomial in their rank, and quantised residuals.
- `packed_indices`, `exact_values` and `coeffs` (the older kind): logits less their mean, which have
  no normaliser.

Letters: R rows, K entries per row, B bytes per row.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teacher_cache.sources import BadRow, Reason, SourceError
from teacher_cache.transform.importing.foreign import ForeignTrace, token_array

CONFIG_NAME = "compression_config.yaml"
COMPRESSED = ("compressed_logprobs", "bytepacked_indices")
LEGACY = ("packed_indices", "exact_values", "coeffs")
_NUMPY_TYPES = {"float16": "<f2", "bfloat16": "<u2", "float32": "<f4", "float64": "<f8"}
_WORD_BITS = 64


@dataclass(frozen=True)
class _Bin:
    scale_dtype: str
    element_bits: int
    num_elements: int


@dataclass(frozen=True)
class DistillKit:
    """How the rows are compressed, as the file beside them says."""

    vocab_size: int
    k: int
    exact_k: int
    exact_dtype: str
    terms: tuple[int | str, ...]  # powers of the rank, `sqrt` and `exp`
    term_dtype: str
    bins: tuple[_Bin, ...]
    is_delta: bool
    is_scaled: bool  # whether ranks go from 0 to 1
    is_legacy: bool

    @classmethod
    def read(cls, file: Path) -> "DistillKit":
        """Read a `compression_config.yaml`, of either kind.

        Raises:
            SourceError: If it is missing, or not such a file.
        """
        import yaml

        try:
            values = yaml.safe_load(file.read_text())
            return cls._from_legacy(values) if "vocab_size" in values else cls._from_values(values)
        except OSError as error:
            raise SourceError(
                f"{file}: {error.strerror}; the rows cannot be read without what their writer put "
                f"beside them: name it with --compression-config"
            ) from error
        except (yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise SourceError(
                f"{file}: not a compression config of DistillKit: {error!r}"
            ) from error

    @classmethod
    def _from_values(cls, values: Mapping[str, Any]) -> "DistillKit":
        bins = tuple(
            _Bin(str(b["scale_dtype"]), int(b["element_bits"]), int(b["num_elements"]))
            for b in values["residual_bins"]
        )
        return cls(
            vocab_size=int(values["d"]),
            k=int(values["k"]),
            exact_k=int(values["exact_k"]),
            exact_dtype=str(values.get("exact_dtype", "float32")),
            terms=tuple(values.get("polynomial_terms") or ()),
            term_dtype=str(values.get("term_dtype", "float32")),
            bins=bins,
            is_delta=bool(values.get("delta_encoding", True)),
            is_scaled=bool(values.get("normalize_t", False)),
            is_legacy=False,
        )

    @classmethod
    def _from_legacy(cls, values: Mapping[str, Any]) -> "DistillKit":
        sign = -1 if values.get("invert_polynomial", True) else 1
        powers = [sign * power for power in range(int(values["polynomial_degree"]) + 1)]
        return cls(
            vocab_size=int(values["vocab_size"]),
            k=int(values["k"]),
            exact_k=int(values["exact_k"]),
            exact_dtype="float16",
            terms=(*powers, "sqrt") if values.get("with_sqrt_term", False) else tuple(powers),
            term_dtype=str(values.get("term_dtype", "float32")),
            bins=(),
            is_delta=False,
            is_scaled=False,
            is_legacy=True,
        )

    def __call__(self, row: Mapping[str, Any]) -> list[ForeignTrace]:
        """The row's trace; raises BadRow."""
        names = LEGACY if self.is_legacy else COMPRESSED
        missing = [name for name in ("input_ids", *names) if row.get(name) is None]
        if missing:
            raise BadRow(
                Reason.UNKNOWN_COLUMNS,
                f"expected columns input_ids, {', '.join(names)} (as {CONFIG_NAME} says), "
                f"not found: {', '.join(missing)}",
            )
        tokens = token_array(row["input_ids"], "input_ids")
        try:
            arrays = [np.array(row[name]) for name in names]
            top_ids, values = self._legacy(*arrays) if self.is_legacy else self._compressed(*arrays)
        except (ValueError, TypeError, IndexError) as error:
            raise BadRow(
                Reason.BAD_DISTRIBUTIONS,
                f"its bytes are not those that {CONFIG_NAME} describes: {error}",
            ) from error
        return [
            ForeignTrace(
                tokens,
                top_ids.astype(np.int32),
                values.astype(np.float32),
                used=("input_ids", *names),
            )
        ]

    @property
    def _id_bits(self) -> int:
        # ceil(log2(d)), which their writer takes in float32.
        return int(np.ceil(np.log2(np.float32(self.vocab_size))))

    def _compressed(
        self, packed_RB: NDArray[Any], ids_RB: NDArray[Any]
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        rest = packed_RB.astype(np.uint8)
        exact, rest = _take(rest, self.exact_k, self.exact_dtype)
        num_approximate = self.k - self.exact_k
        approximate = np.zeros((len(rest), num_approximate), np.float32)
        if self.terms:
            coefficients, rest = _take(rest, len(self.terms), self.term_dtype)
            approximate += coefficients @ self._terms_at_ranks(num_approximate).T
        first = 0
        for part in self.bins:
            scale, rest = _take(rest, 1, part.scale_dtype)
            num_bytes = -(-part.num_elements * part.element_bits // 8)
            codes = _unpacked(rest[:, :num_bytes], part.element_bits, part.num_elements)
            rest = rest[:, num_bytes:]
            approximate[:, first : first + part.num_elements] += (
                _dequantised(codes, part.element_bits) * scale
            )
            first += part.num_elements
        if rest.shape[1]:
            raise ValueError(f"{rest.shape[1]} bytes of a row are left over")
        values = np.concatenate([exact, approximate], axis=1)
        if self.is_delta:
            values = np.cumsum(values, axis=1, dtype=np.float32)
        return _unpacked(ids_RB.astype(np.uint8), self._id_bits, self.k), values

    def _legacy(
        self, words: NDArray[Any], exact: NDArray[Any], coefficients: NDArray[Any]
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        per_word = _WORD_BITS // self._id_bits
        shifts = np.arange(per_word, dtype=np.uint64) * np.uint64(self._id_bits)
        mask = np.uint64((1 << self._id_bits) - 1)
        spread = (words.astype(np.uint64)[:, :, None] >> shifts) & mask
        top_ids = spread.reshape(len(words), -1)[:, : self.k]
        ranks = self._terms_at_ranks(self.k - self.exact_k, start=1)
        approximate = coefficients.astype(np.float32) @ ranks.T
        values = np.concatenate([exact.astype(np.float32), approximate], axis=1)
        if top_ids.shape != values.shape or values.shape[1] != self.k:
            raise ValueError(f"expected {self.k} ids and values, got {top_ids.shape[1:]}")
        return top_ids, values

    def _terms_at_ranks(self, num_ranks: int, start: int = 0) -> NDArray[np.float32]:
        """[num_ranks, terms] value of every term at every rank."""
        ranks = np.arange(start, start + num_ranks, dtype=np.float32)
        if self.is_scaled:
            ranks = np.linspace(0, 1, num_ranks, dtype=np.float32)
        named = {"sqrt": np.sqrt, "exp": np.exp}
        columns = [named[t](ranks) if isinstance(t, str) else ranks**t for t in self.terms]
        return np.stack(columns, axis=-1).astype(np.float32)


def _take(
    rest: NDArray[np.uint8], count: int, dtype: str
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """The first `count` numbers of every row of bytes, and the bytes after them."""
    kind = np.dtype(_NUMPY_TYPES[dtype])
    num_bytes = count * kind.itemsize
    if rest.shape[1] < num_bytes:
        raise ValueError(f"a row has {rest.shape[1]} bytes left where {num_bytes} are needed")
    numbers = np.ascontiguousarray(rest[:, :num_bytes]).view(kind)
    if dtype == "bfloat16":
        numbers = (numbers.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return numbers.astype(np.float32).reshape(len(rest), count), rest[:, num_bytes:]


def _unpacked(packed: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.int64]:
    """[R, count] integers of `bits` bits each, most significant bit first."""
    if packed.shape[1] * 8 < bits * count:
        raise ValueError(f"{packed.shape[1]} bytes do not hold {count} numbers of {bits} bits")
    every_bit = np.unpackbits(packed, axis=1)[:, : bits * count].reshape(len(packed), count, bits)
    powers = np.int64(1) << np.arange(bits - 1, -1, -1, dtype=np.int64)
    return every_bit.astype(np.int64) @ powers


def _dequantised(codes: NDArray[np.int64], bits: int) -> NDArray[np.float32]:
    """Codes as multiples of their bin's scale; one bit is a sign."""
    if bits == 1:
        return codes.astype(np.float32) * 2 - 1
    return (codes - (1 << (bits - 1))).astype(np.float32)
