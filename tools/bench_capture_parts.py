"""Instruments of bench_capture.py, and models of a given shape for it."""

from __future__ import annotations

import contextlib
import json
import resource
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import psutil

from teacher_cache.capture import worker_loop
from teacher_cache.engines import TeacherFacts, TeacherRequest, TeacherRows
from teacher_cache.engines.vllm.pages import RowPages
from teacher_cache.engines.vllm.ring import RowRing
from teacher_cache.engines.vllm.worker_rows import WorkerRows
from teacher_cache.format.writing import writer

# Sizes of the published models; weights are random.
SHAPES = {
    "qwen3-0.6b": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
                   "num_attention_heads": 16, "tie_word_embeddings": True},
    "qwen3-1.7b": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28,
                   "num_attention_heads": 16, "tie_word_embeddings": True},
    "qwen3-4b": {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
                 "num_attention_heads": 32, "tie_word_embeddings": True},
    "qwen3-8b": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
                 "num_attention_heads": 32, "tie_word_embeddings": False},
}  # fmt: skip


def shaped_model(shape: str, folder: Path, tokenizer: Path) -> str:
    """A folder with the configuration of a Qwen3 of this size and another model's tokenizer."""
    if shape not in SHAPES:
        raise SystemExit(f"--shape: expected one of {', '.join(SHAPES)}, got {shape}")
    folder.mkdir(parents=True)
    for file in tokenizer.iterdir():
        if file.name not in ("config.json", "model.safetensors", "README.md"):
            shutil.copy(file, folder)
    own = json.loads((tokenizer / "config.json").read_text())
    config = {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 151_936,
        "head_dim": 128, "num_key_value_heads": 8, "max_position_embeddings": 40_960,
        "rms_norm_eps": 1e-6, "rope_theta": 1_000_000, "torch_dtype": "bfloat16",
        "hidden_act": "silu", "eos_token_id": own["eos_token_id"], **SHAPES[shape],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@dataclass
class Recording:
    """Recording of the worker's rows to one capture, in order, to replay without the engine.

    Every event is a call of `WorkerRows`, rows read from the ring, or a finished request.
    """

    num_candidates: int
    room: tuple[int, int]  # requests in flight, and tokens of one
    events: list[tuple[str, Any]] = field(default_factory=list)

    @contextlib.contextmanager
    def made(self) -> Iterator[None]:
        """Record what passes inside the block."""

        def noting(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
            def noted(own: object, *call: Any) -> Any:  # noqa: ANN401 (as the method)
                result = method(own, *call)
                # Rows are views into the ring.
                self.events.append((name, call[0].copy() if name == "add" else call))
                return result

            return noted

        with contextlib.ExitStack() as stack:
            for owner, names in ((WorkerRows, ("rows",)), (RowPages, ("open", "add", "close"))):
                for name in names:
                    noted = noting(name, getattr(owner, name))
                    stack.enter_context(mock.patch.object(owner, name, noted))
            yield

    def note_finished(self, finished: TeacherRows) -> None:
        """Record a finished request; its rows are those that were last put together."""
        nothing = {"row_ids": finished.row_ids[:0], "row_logprobs": finished.row_logprobs[:0]}
        self.events.append(("finished", replace(finished, **nothing, row_tails=None)))


class ReplayedTeacher:
    """A Teacher that replays a recording to another capture of the same requests."""

    def __init__(self, recording: Recording, facts: TeacherFacts, times: PartTimes) -> None:
        self.facts = facts
        self._recording = recording
        self._times = times

    def run(self, requests: Iterable[TeacherRequest]) -> Iterator[TeacherRows]:
        """Every recorded request, in the recorded order."""
        _ = list(requests)  # the caller notes what it has handed out
        reader = WorkerRows(
            num_candidates=self._recording.num_candidates, max_num_seqs=1024, engine_args={}
        )
        reader.set_room(*self._recording.room)
        writer = RowRing.opened(reader._ring.address)
        found = None
        for event, call in self._recording.events:
            if event == "add":
                writer.write(call)
                with self._times.counted("rows from the ring"):
                    reader.drain()
            elif event == "finished":
                ids, logprobs, tails = found
                yield replace(call, row_ids=ids, row_logprobs=logprobs, row_tails=tails)
            elif event == "rows":
                with self._times.counted("rows together"):
                    found = reader.rows(*call) or found
            else:
                getattr(reader._pages, event)(*call)
        reader.close()

    def close(self) -> None:
        """Do nothing: nothing is open."""


class PartTimes:
    """CPU seconds of this process's own parts of a capture, by thread clocks."""

    PARTS = (
        ("choosing entries", worker_loop, "finished_trace"),
        ("checks and journal", writer.CacheWriter, "append"),
        ("compaction", writer, "compact"),
    )

    def __init__(self) -> None:
        self.seconds = {
            "rows from the ring": 0.0,
            "rows together": 0.0,
            **{name: 0.0 for name, _, _ in self.PARTS},
        }
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def measured(self) -> Iterator[None]:
        """Count the time of the parts inside the block."""
        with contextlib.ExitStack() as stack:
            for name, owner, attribute in self.PARTS:
                timed = self._timed(name, getattr(owner, attribute))
                stack.enter_context(mock.patch.object(owner, attribute, timed))
            yield

    @contextlib.contextmanager
    def counted(self, name: str) -> Iterator[None]:
        """Add this thread's time inside the block to a part."""
        begun_s = time.thread_time()
        try:
            yield
        finally:
            with self._lock:
                self.seconds[name] += time.thread_time() - begun_s

    def _timed(self, name: str, part: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: object, **named: object) -> object:
            with self.counted(name):
                return part(*arguments, **named)

        return timed


def cpu_s() -> float:
    """CPU seconds of this process and its children so far."""
    own = psutil.Process()
    total = 0.0
    for process in (own, *own.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def reset_peak_rss() -> None:
    """Reset this process's peak, where the kernel allows it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_rss_bytes() -> int:
    """Peak since the last reset; since the start where there is no /proc."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
