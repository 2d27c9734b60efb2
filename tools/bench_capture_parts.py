"""What bench_capture.py measures with, and models of a given shape for it."""

from __future__ import annotations

import contextlib
import json
import resource
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from teacher_cache import worker
from teacher_cache.engines.vllm import rows
from teacher_cache.format import journal, writer

# Sizes of the published models; the weights are made up where they are asked for.
SHAPES = {
    "qwen3-0.6b": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
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


class PartTimes:
    """CPU seconds of this process's own parts of a capture, by thread clocks.

    Reading the clock takes about as long as the tap does for a token. So its messages are copied
    while the capture runs, and played to it again in one go.
    """

    PARTS = (
        ("rows together", rows.ArrayRows, "arrays"),
        ("choosing entries", worker, "keep_entries"),
        ("journal", journal.Journal, "append"),
        ("compaction", writer, "compact"),
    )
    MAX_MESSAGES = 50_000

    def __init__(self) -> None:
        self.seconds = {"tap": 0.0, **{name: 0.0 for name, _, _ in self.PARTS}}
        self._lock = threading.Lock()
        self._messages: list[tuple[int, int, tuple[Any, Any]]] = []  # whose, how wide, what
        self._num_messages = 0

    @contextlib.contextmanager
    def measured(self) -> Iterator[None]:
        """Count what the parts take inside the block."""
        with contextlib.ExitStack() as stack:
            for name, owner, attribute in self.PARTS:
                timed = self._timed(name, getattr(owner, attribute))
                stack.enter_context(mock.patch.object(owner, attribute, timed))
            add = rows.ArrayRows.add
            stack.enter_context(mock.patch.object(rows.ArrayRows, "add", self._noting(add)))
            yield
        self.seconds["tap"] = self._replay_s() / max(1, len(self._messages)) * self._num_messages

    def _noting(self, add: Callable[..., None]) -> Callable[..., None]:
        def noting(kept: rows.ArrayRows, shipped: tuple[Any, ...]) -> None:
            self._num_messages += 1
            if len(self._messages) < self.MAX_MESSAGES:
                copied = (np.array(shipped[0]), np.array(shipped[1]))
                self._messages.append((id(kept), kept._num_columns, copied))
            add(kept, shipped)

        return noting

    def _replay_s(self) -> float:
        kept = {owner: rows.ArrayRows(width) for owner, width, _ in self._messages}
        begun_s = time.thread_time()
        for owner, _, shipped in self._messages:
            kept[owner].add(shipped)
        return time.thread_time() - begun_s

    def _timed(self, name: str, part: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: object, **named: object) -> object:
            begun_s = time.thread_time()
            try:
                return part(*arguments, **named)
            finally:
                with self._lock:
                    self.seconds[name] += time.thread_time() - begun_s

        return timed


def reset_peak_rss() -> None:
    """Begin to measure this process's peak anew, where the kernel allows it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_rss_bytes() -> int:
    """Since the last reset; since the beginning where there is no /proc."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
