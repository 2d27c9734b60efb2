"""Tests in large numbers: damaged and hostile files, and captures that are killed.

    python tools/soak.py fuzz --cases 100000 --seed 0
    python tools/soak.py kills --kills 500 --seed 0 --workers 3
    python tools/soak.py stops
    python tools/soak.py mistakes
    python tools/soak.py faults

Every case of `fuzz` changes a shard, a commit record, a cache header or a journal, makes the
checksums agree where that lets the change reach further, and reads. It must end in a CacheError
with a message, or in values that hold every promise of the format. Anything else, more memory
than a shard may take, or the death of the process is a finding; case N of seed S is always the
same. soak_kills.py describes `kills`, soak_stops.py `stops`, soak_mistakes.py `mistakes`,
soak_faults.py `faults`.
"""

from __future__ import annotations

import argparse
import collections
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import soak_faults
import soak_kills
import soak_mistakes
import soak_stops
import zstandard

from teacher_cache.format import (
    CacheError,
    CacheHeader,
    CacheWriter,
    FinishedTrace,
    KeepPolicy,
    Trace,
    keep_entries,
    open_cache,
    seal_cache,
)
from teacher_cache.format.commit import ShardCommit, check_commit, parse_commit
from teacher_cache.format.header import content_hash
from teacher_cache.format.manifest import parse_manifest
from teacher_cache.format.reading.decode import assemble, decode_bands
from teacher_cache.format.writing.journal import read_journal

VOCAB_SIZE = 300
NASTY: tuple[Any, ...] = (
    None, True, -1, 0, 1, 255, 256, 2**31, 2**63, -(2**63), 1e308, float("nan"), float("inf"), "",
    "../../etc/passwd", "..", "/", "a/b", "a\0b", "\ud800", "w0-00000",
    [], {}, [[]], [None], "x" * 99,
)  # fmt: skip
HUGE = (2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1, -1, -(2**63), 0)


class Target:
    """A small cache and its parts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        rng = np.random.default_rng(0)
        header = make_header()
        traces = [make_trace(f"t{number}", length, rng) for number, length in enumerate((1, 9, 40))]
        with CacheWriter(folder, header) as writer:
            for trace in traces:
                writer.append(FinishedTrace(trace, "source"))
            self.journal = next((folder / "journal").glob("*.journal")).read_bytes()
            writer.finish()
        seal_cache(folder)
        cache = open_cache(str(folder))
        self.header = cache.header
        self.commit: ShardCommit = cache.shards[0]
        self.shard = (folder / "shards" / f"{self.commit.name}.arrow").read_bytes()
        self.record = json.loads((folder / "shards" / f"{self.commit.name}.json").read_text())
        self.manifest = json.loads((folder / "cache.json").read_text())
        self.whole = cache.read(0, {row: t.n_total for row, t in enumerate(self.commit.traces)})


def make_header() -> CacheHeader:
    return CacheHeader(
        mode="score", teacher="none", teacher_revision=None, teacher_fingerprint="", engine="none",
        engine_version="", dtype="float32", head_dtype="float32", vocab_size=VOCAB_SIZE,
        tokenizer_size=VOCAB_SIZE, tokenizer_fingerprint="", chat_template_hash="",
        think_open_ids=(), think_close_ids=(), terminal_token_ids=(), sampling=None, top_k=8,
        mass=0.99, capture_prompt=True, num_bands=4,
    )  # fmt: skip


def make_trace(trace_id: str, num_tokens: int, rng: np.random.Generator) -> Trace:
    logits = np.sort(rng.normal(0, 4, (num_tokens - 1, 20)), axis=1)[:, ::-1]
    logprobs = (logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)).astype(np.float32)
    ids = np.argsort(rng.random((num_tokens - 1, VOCAB_SIZE)), axis=1)[:, :20].astype(np.int32)
    place = rng.integers(0, 20, (num_tokens - 1, 1))
    rows = [
        np.concatenate([np.take_along_axis(a, place, axis=1), a], axis=1) for a in (ids, logprobs)
    ]
    kept = keep_entries(rows[0], rows[1], KeepPolicy(8, 0.99))
    return Trace(
        trace_id=trace_id,
        token_ids=np.concatenate([[5], rows[0][:, 0]]).astype(np.int32),
        n_total=num_tokens,
        cot_start=num_tokens // 3,
        answer_start=num_tokens // 2,
        k=np.concatenate([[0], kept.k]).astype(np.uint8),
        top_ids=kept.top_ids,
        top_logits=kept.top_logits,
        tail_logit=np.concatenate([[0.0], kept.tail_logit]).astype(np.float32),
        fields={"answer": "7"},
    )


def changed_bytes(data: bytes, rng: np.random.Generator) -> bytes:
    """Flip, overwrite, move, cut or repeat some bytes; aligned words are set to huge values."""
    found = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        if len(found) < 16:
            break
        place = int(rng.integers(len(found) - 8))
        kind = int(rng.integers(7))
        if kind == 0:
            found[place] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            found[place] = int(rng.integers(256))
        elif kind == 2:
            word = HUGE[int(rng.integers(len(HUGE)))]
            place -= place % 8
            found[place : place + 8] = word.to_bytes(8, "little", signed=True)
        elif kind == 3:
            place -= place % 4
            found[place : place + 4] = int(rng.integers(-(2**31), 2**31)).to_bytes(
                4, "little", signed=True
            )
        elif kind == 4:
            del found[int(rng.integers(len(found))) :]
        elif kind == 5:
            other, length = int(rng.integers(len(found))), int(rng.integers(1, 64))
            found[place : place + length] = found[other : other + length]
        else:
            found[place : place + 8] = bytes(8)
    return bytes(found)


def changed_json(value: object, rng: np.random.Generator) -> Any:  # noqa: ANN401 (any JSON)
    """Replace, remove or repeat one part of a JSON value, at any depth."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        name = list(value)[int(rng.integers(len(value)))]
        if rng.random() < 0.1:
            return {key: item for key, item in value.items() if key != name}
        return {**value, name: changed_json(value[name], rng)}
    if isinstance(value, list) and value and rng.random() < 0.9:
        place = int(rng.integers(len(value)))
        if rng.random() < 0.2:
            return value[:place] + value[place:][: int(rng.integers(2))] * 2
        return [*value[:place], changed_json(value[place], rng), *value[place + 1 :]]
    if isinstance(value, int) and rng.random() < 0.5:
        return value + int(rng.integers(-3, 4))
    return NASTY[int(rng.integers(len(NASTY)))]


def fuzz_shard(target: Target, rng: np.random.Generator) -> None:
    """Changed bytes under a record that agrees with them, as from a stranger."""
    data = changed_bytes(target.shard, rng)
    read_as_promised(data, target.commit, target.header)


def fuzz_record(target: Target, rng: np.random.Generator) -> None:
    """A changed commit record with a right checksum, then the shard read with it."""
    record = {key: value for key, value in target.record.items() if key != "checksum"}
    record = changed_json(record, rng)
    if isinstance(record, dict) and rng.random() < 0.9:
        record["checksum"] = content_hash(record)
    commit = parse_commit(json.dumps(record).encode(), target.commit.name)
    check_commit(commit, target.header)
    read_as_promised(target.shard, commit, target.header)


def fuzz_manifest(target: Target, rng: np.random.Generator) -> None:
    """A changed `cache.json` over the right files."""
    manifest = changed_json(target.manifest, rng)
    if isinstance(manifest, dict) and isinstance(manifest.get("seal"), dict):
        manifest["seal"]["fingerprint"] = content_hash(manifest["seal"].get("shards"))
    parsed = parse_manifest(json.dumps(manifest).encode(), "cache.json")
    check_commit(target.commit, parsed.header)
    read_as_promised(target.shard, target.commit, parsed.header)


def fuzz_files(target: Target, rng: np.random.Generator) -> None:
    """Changed bytes on the disk, checksums as they were: refused, or not read at all."""
    name = ("cache.json", f"shards/{target.commit.name}.json", f"shards/{target.commit.name}.arrow")
    file = target.folder / name[int(rng.integers(3))]
    original = file.read_bytes()
    file.write_bytes(changed_bytes(original, rng))
    try:
        cache = open_cache(str(target.folder))
        rows = {row: trace.n_total for row, trace in enumerate(cache.shards[0].traces)}
        for row, trace in cache.read(0, rows).items():
            right = target.whole[row]
            same = trace.top_ids.tobytes() == right.top_ids.tobytes()
            if not same or trace.tail_logit.tobytes() != right.tail_logit.tobytes():
                raise AssertionError(f"{name}: read other values than were written")
    finally:
        file.write_bytes(original)


def fuzz_journal(target: Target, rng: np.random.Generator) -> None:
    """A changed journal, or changed content in whole frames."""
    data = changed_bytes(target.journal, rng)
    if rng.random() < 0.7:
        frames, rest = [], target.journal
        while rest:
            decompressor = zstandard.ZstdDecompressor().decompressobj()
            frames.append(decompressor.decompress(rest))
            rest = decompressor.unused_data
        place = int(rng.integers(1, len(frames)))
        frames[place] = changed_bytes(frames[place], rng)
        data = b"".join(zstandard.ZstdCompressor(level=1).compress(frame) for frame in frames)
    file = target.folder / "fuzzed.journal"
    file.write_bytes(data)
    for finished in read_journal(file, target.header.fingerprint):
        finished.trace.validate()


def read_as_promised(data: bytes, commit: ShardCommit, header: CacheHeader) -> None:
    """Read all of a shard; everything returned must be a valid trace."""
    size = commit.prefix_bytes(len(commit.blocks))
    prefix = pa.py_buffer(data[:size])
    bands = decode_bands(prefix, commit, len(commit.blocks), header, "shard")
    for row, info in enumerate(commit.traces):
        trace = assemble(commit, row, header.num_held(info.n_total, info.n_held), bands, "shard")
        try:
            trace.validate()
        except ValueError as error:
            if "has a repeated id" not in str(error):  # SPEC.md: readers do not check that
                raise


KINDS: tuple[Callable[[Target, np.random.Generator], None], ...] = (
    fuzz_shard, fuzz_shard, fuzz_shard, fuzz_record, fuzz_manifest, fuzz_files, fuzz_journal,
)  # fmt: skip


def fuzz(num_cases: int, seed: int, folder: Path) -> tuple[dict[str, int], list[str]]:
    """Run cases; return counts of outcomes by kind, and findings."""
    target = Target(folder / "cache")
    outcomes: collections.Counter[str] = collections.Counter()
    findings = []
    for case in range(num_cases):
        rng = np.random.default_rng([seed, case])
        kind = KINDS[int(rng.integers(len(KINDS)))]
        try:
            kind(target, rng)
            outcome = "read"
        except CacheError as error:
            outcome = "refused"
            if not str(error).strip():
                findings.append(f"case {case} ({kind.__name__}): an empty message")
        except Exception as error:
            outcome = "FINDING"
            findings.append(f"case {case} ({kind.__name__}): {error!r}")
        outcomes[f"{kind.__name__} {outcome}"] += 1
    return dict(sorted(outcomes.items())), findings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, dest="command")
    command = commands.add_parser("fuzz")
    command.add_argument("--cases", type=int, default=10_000)
    command.add_argument("--seed", type=int, default=0)
    soak_kills.add_options(commands.add_parser("kills"))
    soak_stops.add_options(commands.add_parser("stops"))
    soak_mistakes.add_options(commands.add_parser("mistakes"))
    soak_faults.add_options(commands.add_parser("faults"))
    arguments = parser.parse_args()
    if arguments.command == "kills":
        soak_kills.main(arguments)
    of_processes = {"stops": soak_stops, "mistakes": soak_mistakes, "faults": soak_faults}
    if chosen := of_processes.get(arguments.command):
        with tempfile.TemporaryDirectory() as folder:
            sys.exit(chosen.main(arguments, Path(folder)) > 0)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        outcomes, findings = fuzz(arguments.cases, arguments.seed, Path(folder))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    for name, count in outcomes.items():
        print(f"{name:28} {count:>9,}")
    print(f"{arguments.cases:,} cases in {time.monotonic() - start:.0f} s, peak {peak:.0f} MiB")
    for finding in findings[:20]:
        print(finding)
    print(f"{len(findings)} findings")
    sys.exit(bool(findings))


if __name__ == "__main__":
    main()
