"""The noise floor of a capture: what its engine makes of the same tokens a second time.

DIR/noise/w0.json           as worker w0 measured it; the seal carries what all workers found
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from teacher_cache.format.errors import CacheFormatError
from teacher_cache.format.header import UNUSABLE_JSON
from teacher_cache.format.store import Store

NOISE_FOLDER = "noise"


@dataclass(frozen=True)
class NoiseFloor:
    """KL in nats per token from captured rows to rows of the same tokens in another batch.

    Differences below it are the engine's own: they say nothing about a cache.

    Attributes:
        mean: Mean over the tokens compared.
        p99: 99th percentile; of several workers, the largest.
        max: Largest.
        num_traces: Number of traces that were repeated.
        num_tokens: Number of tokens compared.
    """

    mean: float
    p99: float
    max: float
    num_traces: int
    num_tokens: int


def parse_noise(values: Mapping[str, Any]) -> NoiseFloor:
    """Read a noise floor from JSON.

    Raises:
        ValueError: If a value is not a number that it can have.
        LookupError: If one is missing.
    """
    found = NoiseFloor(
        mean=float(values["mean"]),
        p99=float(values["p99"]),
        max=float(values["max"]),
        num_traces=int(values["num_traces"]),
        num_tokens=int(values["num_tokens"]),
    )
    if not all(math.isfinite(value) for value in asdict(found).values()) or found.num_tokens < 1:
        raise ValueError(f"not a noise floor: {values!r}")
    return found


def publish_noise(store: Store, worker: str, noise: NoiseFloor) -> None:
    """Keep what a worker measured, unless an earlier run of it measured more tokens.

    Raises:
        OSError: If it cannot be written.
    """
    store.make_folder(NOISE_FOLDER)
    file = f"{NOISE_FOLDER}/{worker}.json"
    try:
        if parse_noise(json.loads(store.read(file).decode())).num_tokens > noise.num_tokens:
            return
    except (FileNotFoundError, *UNUSABLE_JSON):
        pass  # nothing that could be kept
    store.publish(file, json.dumps(asdict(noise)).encode())


def read_noise(store: Store) -> NoiseFloor | None:
    """The noise floor that all workers of a cache measured; None if none did.

    Raises:
        CacheFormatError: If a record is damaged.
    """
    found = []
    for file in store.sizes(NOISE_FOLDER):
        if not file.endswith(".json"):
            continue
        try:
            found.append(parse_noise(json.loads(store.read(f"{NOISE_FOLDER}/{file}").decode())))
        except UNUSABLE_JSON as error:
            raise CacheFormatError(
                f"{store.where}/{NOISE_FOLDER}/{file}: not a noise floor: {error!r}; delete it, "
                "nothing else depends on it"
            ) from error
    return _of_all(found) if found else None


def _of_all(found: Iterable[NoiseFloor]) -> NoiseFloor:
    each = list(found)
    num_tokens = sum(one.num_tokens for one in each)
    return NoiseFloor(
        mean=sum(one.mean * one.num_tokens for one in each) / num_tokens,
        p99=max(one.p99 for one in each),
        max=max(one.max for one in each),
        num_traces=sum(one.num_traces for one in each),
        num_tokens=num_tokens,
    )
