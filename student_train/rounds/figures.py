"""Figures of finished rounds, from their files. No torch here."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from student_train.rounds.config import RoundsConfig
from student_train.rounds.stages import Stage, round_folder
from teacher_cache.format import Cache, Trace, open_cache
from teacher_cache.format.checksums import publish_record, read_record


@dataclass(frozen=True)
class OwnFigures:
    """A student's own traces against the teacher that scored them."""

    num_traces: int
    mean_tokens: float  # that the student wrote, per trace
    unfinished_share: float  # of the traces
    # KL(student, teacher) per token on these traces, nats, and its standard error by trace: the
    # mean of log q - log p of the tokens, which are samples of q. None at another temperature.
    kl: float | None
    kl_error: float | None
    cache_bytes: int

    @classmethod
    def of(cls, cache: Cache) -> "OwnFigures":
        """Read every trace once."""
        num_tokens, gaps, num_cut = [], [], 0
        for trace in cache.read_held(cache.traces):
            sampled = _sampled_gaps(trace)
            num_tokens.append(len(sampled))
            gaps.append(float(sampled.sum()))
            num_cut += trace.finish_reason == "length"
        rollout = cache.header.rollout or {}
        is_plain = rollout.get("temperature") == 1 and rollout.get("top_p") == 1
        lengths, sums = np.array(num_tokens), np.array(gaps)
        kl = float(sums.sum() / lengths.sum())
        spread = sums - kl * lengths  # of a ratio of sums
        error = float(np.sqrt((spread**2).sum()) / lengths.sum())
        return cls(
            num_traces=len(num_tokens),
            mean_tokens=float(lengths.mean()),
            unfinished_share=num_cut / len(num_tokens),
            kl=kl if is_plain else None,
            kl_error=error if is_plain else None,
            cache_bytes=cache.catalog.total("size_bytes"),
        )


def _sampled_gaps(trace: Trace) -> NDArray[np.float64]:
    """Log q - log p of each token that the student sampled, nats."""
    if trace.student_logprob is None:
        raise ValueError(f"trace {trace.trace_id!r} has no student_logprob")
    token_of_entry = trace.token_of_entry
    is_target = trace.top_ids == trace.token_ids[token_of_entry]
    gaps = np.full(len(trace), np.nan)
    places = token_of_entry[is_target]
    gaps[places] = trace.student_logprob[places] - trace.top_logprobs[is_target]
    found: NDArray[np.float64] = gaps[~np.isnan(gaps)]
    return found


def figures_of(config: RoundsConfig, done: list[Stage]) -> list[dict[str, Any]]:
    """One row per round with a finished stage, round 0 first.

    Raises:
        DamagedFileError: If a record is damaged.
        CacheError: If a round's cache cannot be read.
    """
    rows: list[dict[str, Any]] = []
    for number in sorted({stage.number for stage in done}):
        records = {s.name: s.record() for s in done if s.number == number}
        folder = round_folder(config, number)
        row: dict[str, Any] = {
            "round": number,
            "seconds": {name: record["seconds"] for name, record in records.items()},
        }
        if "score" in records:
            row["own"] = _own_figures(folder)
        if "run" in records:
            remedy = f"Remove {folder / 'run'} and {folder / 'run.json'}."
            row["run"] = read_record(folder / "run" / "result.json", remedy)["metrics"]
        if "evaluate" in records:
            row["answers"] = records["evaluate"]["result"]["answers"]
        rows.append(row)
    return rows


def _own_figures(folder: Path) -> dict[str, Any]:
    """Figures of a round's own traces, measured once; the cache may be removed afterwards."""
    file, cache_folder = folder / "own.json", folder / "cache"
    if cache_folder.exists():
        cache = open_cache(cache_folder)
        if not file.exists() or _known(file)["cache"] != cache.fingerprint:
            publish_record(file, {"cache": cache.fingerprint, **asdict(OwnFigures.of(cache))})
    return {name: value for name, value in _known(file).items() if name != "cache"}


def _known(file: Path) -> dict[str, Any]:
    return read_record(file, f"Remove {file}: it is made again from the round's cache.")
