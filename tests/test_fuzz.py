"""Files from a stranger: a clear refusal or a right read, never anything else."""

import collections
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import zstandard
from fakes import make_cache, make_header, make_traces

from teacher_cache.format import CacheFormatError, CacheWriter, FinishedTrace, open_cache
from teacher_cache.format.commit import block_of
from teacher_cache.format.header import content_hash
from teacher_cache.format.reading.decode import decode_bands
from teacher_cache.format.reading.ipc import declared_bytes
from teacher_cache.format.writing.journal import read_journal

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
import soak


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_thousand_changed_files_are_refused_or_read_right(tmp_path, seed):
    outcomes, findings = soak.fuzz(1000, seed, tmp_path)
    assert findings == []
    assert sum(count for name, count in outcomes.items() if name.endswith("refused")) > 500


def uncompressed(target):
    """The same shard with its buffers as they are, so that a changed byte is a changed value."""
    sink, ends = pa.BufferOutputStream(), [0]
    with (
        pa.ipc.open_file(target.shard) as reader,
        pa.ipc.new_file(sink, reader.schema) as writer,
    ):
        for band in range(reader.num_record_batches):
            writer.write_batch(reader.get_batch(band))
            ends.append(sink.tell())
    data = sink.getvalue().to_pybytes()
    blocks = tuple(
        block_of(data[first:end], first, old.num_rows, old.num_tokens)
        for first, end, old in zip(ends[:-1], ends[1:], target.commit.blocks, strict=True)
    )
    return data, replace(target.commit, blocks=blocks, size_bytes=len(data))


def changed_values(data, commit, case, seed=5):
    """Bytes changed anywhere, or behind the first band: most of the file is its dictionary."""
    begin = (0, commit.blocks[1].offset)[case % 2]
    return data[:begin] + soak.changed_bytes(data[begin:], np.random.default_rng([seed, case]))


@pytest.mark.slow
def test_changed_values_of_every_column_are_refused_or_hold_every_promise(tmp_path):
    target = soak.Target(tmp_path / "cache")
    data, commit = uncompressed(target)
    soak.read_as_promised(data, commit, target.header)
    reasons = collections.Counter()
    for case in range(1200):
        try:
            soak.read_as_promised(changed_values(data, commit, case), commit, target.header)
        except CacheFormatError as error:
            reasons.update(reason for reason in REASONS if reason in str(error))
    assert set(reasons) == set(REASONS)


REASONS = (  # each is reached
    "not readable as Arrow",
    "points outside its dictionary",
    "lie outside it",
    "wrong lengths",
    "must not rise within a token",
    "outside the vocabulary",
    "differs from the commit record",
    "the distributions belong to other tokens",
)


@pytest.fixture
def folder(tmp_path):
    make_cache(tmp_path / "cache", make_traces(3), num_bands=3)
    return tmp_path / "cache"


def parts(folder):
    cache = open_cache(str(folder))
    (commit,) = cache.shards
    return cache, commit, (folder / "shards" / f"{commit.name}.arrow").read_bytes()


@pytest.mark.slow
def test_a_shard_cut_at_every_byte_is_refused(folder):
    cache, commit, data = parts(folder)
    end = commit.prefix_bytes(len(commit.blocks))
    for length in range(0, end - 1):
        with pytest.raises(CacheFormatError):
            decode_bands(pa.py_buffer(data[:length]), commit, 3, cache.header, "shard")
    decode_bands(pa.py_buffer(data[:end]), commit, 3, cache.header, "shard")


@pytest.mark.slow
def test_a_buffer_that_declares_a_huge_length_is_refused_before_it_is_allocated(folder):
    cache, commit, data = parts(folder)
    declared = declared_bytes(memoryview(data)[8:], 3)
    tokens = sum(trace.n_total for trace in commit.traces)
    assert declared >= 9 * tokens
    refused = 0
    for place in range(8, len(data) - 8, 8):
        length = int.from_bytes(data[place : place + 8], "little", signed=True)
        if not 0 < length < 100_000:
            continue
        changed = data[:place] + (1 << 40).to_bytes(8, "little") + data[place + 8 :]
        try:
            decode_bands(pa.py_buffer(changed), commit, 3, cache.header, "shard")
        except CacheFormatError as error:
            refused += "its buffers declare" in str(error)
    assert refused > 10
    assert pa.default_memory_pool().max_memory() < 1 << 32


@pytest.mark.slow
def test_a_dictionary_that_changes_behind_the_first_band_is_refused(folder):
    cache, commit, data = parts(folder)
    sink, ends = pa.BufferOutputStream(), [8]
    sink.write(data[:8])
    with pa.ipc.open_file(data) as reader, pa.ipc.new_stream(sink, reader.schema) as writer:
        place = reader.schema.get_field_index("top_ids")
        for band in range(3):
            batch = reader.get_batch(band)
            column = batch["top_ids"]
            found = column.values.dictionary.to_numpy()
            values = pa.DictionaryArray.from_arrays(
                column.values.indices, np.roll(found, band) if band == 2 else found
            )
            lists = pa.ListArray.from_arrays(column.offsets, values)
            writer.write_batch(batch.set_column(place, reader.schema.field(place), lists))
            ends.append(sink.tell())
    with pytest.raises(CacheFormatError, match="a dictionary follows the first record batch"):
        decode_bands(sink.getvalue(), commit, 3, cache.header, "shard")
    decode_bands(sink.getvalue().slice(0, ends[2]), commit, 2, cache.header, "shard")


def resealed(folder, manifest):
    manifest["seal"]["fingerprint"] = content_hash(manifest["seal"]["shards"])
    (folder / "cache.json").write_text(json.dumps(manifest))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["../w000-00000", "..", "a/b", "", "a\0b", "/etc/passwd"])
def test_a_shards_name_that_leads_elsewhere_is_refused(folder, name):
    manifest = json.loads((folder / "cache.json").read_text())
    manifest["seal"]["shards"][0][0] = name
    resealed(folder, manifest)
    with pytest.raises(CacheFormatError, match="is not a valid shard name"):
        open_cache(str(folder))


@pytest.mark.slow
def test_a_shard_listed_twice_is_refused(folder):
    manifest = json.loads((folder / "cache.json").read_text())
    manifest["seal"]["shards"] *= 2
    resealed(folder, manifest)
    with pytest.raises(CacheFormatError, match="every shard once"):
        open_cache(str(folder))


@pytest.mark.slow
def test_a_symbolic_link_to_the_shard_is_read_and_one_to_anything_else_is_refused(folder):
    _, commit, _ = parts(folder)
    file = folder / "shards" / f"{commit.name}.arrow"
    elsewhere = shutil.move(file, folder / "elsewhere")
    file.symlink_to(elsewhere)  # as in the Hugging Face cache
    cache = open_cache(str(folder))
    cache.read(0, {0: 1})
    file.unlink()
    for target in ("/dev/zero", str(folder), str(file), "nowhere"):
        file.symlink_to(target)
        with pytest.raises(CacheFormatError, match=commit.name):
            open_cache(str(folder))
        file.unlink()


@pytest.mark.slow
def test_ids_that_stand_twice_in_a_token_are_not_written(tmp_path):
    (trace,) = make_traces(1)
    at = int(np.flatnonzero(trace.k > 2)[0])
    first = int(trace.k[:at].sum())
    ids = trace.top_ids.copy()
    others = [i for i in range(first, first + trace.k[at]) if ids[i] != trace.token_ids[at]]
    ids[others[0]] = ids[others[1]]
    with (
        CacheWriter(tmp_path, make_header()) as writer,
        pytest.raises(ValueError, match=rf"token {at} has a repeated id"),
    ):
        writer.append(FinishedTrace(type(trace)(**{**vars(trace), "top_ids": ids}), "source"))


@pytest.mark.slow
def test_a_journal_that_would_decompress_without_bound_ends_there(tmp_path):
    header = json.dumps({"header_fingerprint": "f"}).encode()
    file = tmp_path / "x.journal"
    compressor = zstandard.ZstdCompressor(level=1).compressobj()  # declares no size
    bomb = compressor.compress(bytes(1 << 24)) + compressor.flush()
    file.write_bytes(zstandard.compress(header) + bomb)
    assert list(read_journal(file, "f")) == []
