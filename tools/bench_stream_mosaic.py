"""The part of bench_stream.py that needs `mosaicml-streaming`, numpy and pyarrow, but not leadspan.

python bench_stream_mosaic.py write TRACES.arrow FOLDER [COMPRESSION]
python bench_stream_mosaic.py read FOLDER LEAD_SPAN     # prints figures as JSON
python bench_stream_mosaic.py order SHARDS TRACES_PER_SHARD BLOCK FILE.npy
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

COLUMNS = {
    "token_ids": "int32", "k": "uint8", "top_ids": "int32", "top_logits": "float32",
    "tail_logit": "float32",
}  # fmt: skip


class Delivered:
    """Counts a reader's data, independently of its order."""

    def __init__(self) -> None:
        self.num_tokens = self.num_entries = self.checksum = 0

    def add(self, arrays: dict[str, NDArray[Any]]) -> None:
        """Take one trace's arrays."""
        self.num_tokens += len(arrays["token_ids"])
        self.num_entries += len(arrays["top_ids"])
        # A part of every column is cheap, and enough to tell that the columns are right.
        for name, dtype in COLUMNS.items():
            part = np.ascontiguousarray(arrays[name][-64:]).astype(dtype, copy=False)
            self.checksum += zlib.crc32(part.tobytes())

    def figures(self) -> dict[str, int]:
        """Figures of the delivered data, and the peak of this process's memory."""
        status = Path("/proc/self/status").read_text()
        return {
            "num_tokens": self.num_tokens,
            "num_entries": self.num_entries,
            "checksum": self.checksum,
            "peak_rss_bytes": int(status.partition("VmHWM:")[2].split()[0]) * 1024,
        }


def write(source: Path, folder: Path, compression: str | None) -> None:
    from streaming import MDSWriter

    columns = {name: f"ndarray:{dtype}" for name, dtype in COLUMNS.items()}
    with (
        pa.ipc.open_file(pa.memory_map(str(source))) as reader,
        MDSWriter(out=str(folder), columns=columns, compression=compression) as writer,
    ):
        for number in range(reader.num_record_batches):
            batch = reader.get_batch(number)
            for row in range(batch.num_rows):
                writer.write(
                    {
                        name: batch[name][row].values.to_numpy().astype(d)
                        for name, d in COLUMNS.items()
                    }
                )


def read(folder: Path, lead_span: float) -> dict[str, Any]:
    from streaming import StreamingDataset

    with tempfile.TemporaryDirectory() as local:
        # As from a remote: compressed files are copied and unpacked once, here.
        compressed = any(folder.glob("*.zstd"))
        place = {"remote": str(folder), "local": local} if compressed else {"local": str(folder)}
        delivered = Delivered()
        before, start_s, start_cpu_s = bytes_asked_for(), time.perf_counter(), time.process_time()
        for sample in StreamingDataset(**place, batch_size=16, shuffle=False):
            keep = max(1, int(len(sample["k"]) * lead_span))
            num_entries = int(sample["k"][:keep].sum(dtype=np.int64))
            per_entry = ("top_ids", "top_logits")
            delivered.add(
                {
                    name: sample[name][: num_entries if name in per_entry else keep]
                    for name in COLUMNS
                }
            )
        return {
            "wall_s": time.perf_counter() - start_s,
            "cpu_s": time.process_time() - start_cpu_s,
            "num_bytes": bytes_asked_for() - before,
            **delivered.figures(),
        }


def order(num_shards: int, traces_per_shard: int, block: int, file: Path) -> None:
    """Write one epoch of `py1e`: the samples' numbers, in order."""
    from streaming.base.shuffle import get_shuffle

    sizes = np.full(num_shards, traces_per_shard)
    np.save(file, get_shuffle("py1e", sizes, 1, 0, 0, block))


def bytes_asked_for() -> int:
    return int(Path("/proc/self/io").read_text().partition("rchar: ")[2].split()[0])


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["write", traces, folder, *compression]:
            write(Path(traces), Path(folder), (compression or [""])[0] or None)
        case ["read", folder, lead_span]:
            print(json.dumps(read(Path(folder), float(lead_span))))
        case ["order", num_shards, traces_per_shard, block, file]:
            order(int(num_shards), int(traces_per_shard), int(block), Path(file))
        case _:
            sys.exit(__doc__)
