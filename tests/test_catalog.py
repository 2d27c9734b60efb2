"""The catalogue of a sealed cache: the same facts as the commit records, in columns."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import duckdb
import numpy as np
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fakes import make_cache, make_header, make_traces
from hypothesis import given, settings
from hypothesis import strategies as st

from student_train.data.traces import open_data
from student_train.data.where import Where
from teacher_cache.format import (
    CacheFormatError,
    CacheWriter,
    FinishedTrace,
    open_cache,
    seal_cache,
)
from teacher_cache.format.catalog import CATALOG_FILE, Catalog
from teacher_cache.format.catalog_fields import json_of_fields, with_typed_fields
from teacher_cache.format.catalog_rows import catalog_of
from teacher_cache.format.checking.repair import repair_cache
from teacher_cache.format.checking.verify import verify_cache
from teacher_cache.format.checksums import sha256_of
from teacher_cache.format.commit import ShardCommit, TraceInfo, block_of
from teacher_cache.format.manifest import MANIFEST_NAME

FIELDS = [
    {"verdict": "correct", "level": 3, "score": 0.5, "Answer": "7"},
    {"verdict": "wrong", "level": None, "score": 1, "answer": "\ud800"},
    {"verdict": "correct", "tags": ["a"], "big": 1 << 70, "solved": True},
    {},
    {"verdict": "wrong", "level": 5, "n_total": 3, "nan": float("inf")},
]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("catalog") / "cache"
    traces = [replace(t, fields=FIELDS[i % 5]) for i, t in enumerate(make_traces(11))]
    make_cache(folder, traces)
    return folder


@pytest.fixture
def folder(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "cache")


def without_catalog(folder):
    """The cache as an earlier version sealed it."""
    record = json.loads((folder / MANIFEST_NAME).read_bytes())
    del record["seal"]["catalog"], record["checksum"]
    (folder / MANIFEST_NAME).write_text(json.dumps(record))
    (folder / CATALOG_FILE).unlink()
    return folder


def test_a_cache_reads_the_same_with_and_without_its_catalogue(pristine, folder, caplog):
    with_it, without = open_cache(pristine), open_cache(without_catalog(folder))
    assert "fields" in with_it.catalog.schema.names
    assert "fields" not in without.catalog.schema.names
    assert list(with_it.infos) == list(without.infos)
    assert [dict(info.fields) for info in with_it.infos[:5]] == FIELDS
    assert list(with_it.shards) == list(without.shards)
    assert list(with_it.traces) == list(without.traces)
    assert with_it.fingerprint == without.fingerprint
    assert with_it["t7"].fields == with_it.infos[7].fields
    assert not caplog.records


def test_a_record_made_from_the_catalogue_is_the_committed_one(folder):
    for commit in open_cache(folder).shards:
        record = json.loads((folder / "shards" / f"{commit.name}.json").read_bytes())
        assert json.loads(commit.to_bytes()) == record
        assert commit.checksum == record["checksum"]


@pytest.mark.parametrize("damage", ["missing", "cut", "flipped"])
def test_without_a_usable_catalogue_the_records_are_read_and_it_is_said(folder, damage, caplog):
    file = folder / CATALOG_FILE
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    expected = list(open_cache(folder).infos)
    file.unlink()
    if damage != "missing":
        file.write_bytes(data[:-1] if damage == "cut" else data)
    with caplog.at_level(logging.WARNING):
        assert list(open_cache(folder).infos) == expected
    assert "reading every commit record instead" in caplog.text
    (error,) = verify_cache(folder).errors
    assert error.file == CATALOG_FILE


def test_verify_compares_the_catalogue_with_the_records(folder):
    table = pq.read_table(folder / CATALOG_FILE)
    column = pa.array(["0" * 32] * table.num_rows)
    table = table.set_column(table.schema.get_field_index("source_hash"), "source_hash", column)
    pq.write_table(table, folder / CATALOG_FILE)
    record = json.loads((folder / MANIFEST_NAME).read_bytes())
    data = (folder / CATALOG_FILE).read_bytes()
    record["seal"]["catalog"] = {
        "size_bytes": len(data), "sha256": sha256_of(folder / CATALOG_FILE),
    }  # fmt: skip
    del record["checksum"]
    (folder / MANIFEST_NAME).write_text(json.dumps(record))
    (error,) = verify_cache(folder).errors
    assert "differs from the commit record" in error.text


def test_a_trace_in_two_shards_counts_in_the_first(tmp_path):
    traces = make_traces(4)
    writers = [CacheWriter(tmp_path, make_header(), worker=name) for name in ("a", "b")]
    for writer, own in zip(writers, (traces[:3], traces[1:]), strict=True):
        for trace in own:
            writer.append(FinishedTrace(trace, "source"))
        writer.finish()
    seal = seal_cache(tmp_path).seal
    assert (seal.num_traces, seal.num_duplicates) == (4, 2)
    cache = open_cache(tmp_path)
    assert list(cache.traces) == [(0, 0), (0, 1), (0, 2), (1, 2)]
    count = duckdb.sql(f"SELECT sum(is_duplicate::int), count(*) FROM '{tmp_path}/{CATALOG_FILE}'")
    assert count.fetchall() == [(2, 6)]


def test_duckdb_and_polars_answer_questions(pristine):
    file = pristine / CATALOG_FILE
    by_verdict = duckdb.sql(
        f"SELECT fields.verdict, count(*), sum(n_total) FROM '{file}' WHERE NOT is_duplicate "
        "GROUP BY ALL ORDER BY 1 NULLS LAST"
    ).fetchall()
    infos = open_cache(pristine).infos
    for verdict, count, num_tokens in by_verdict:
        mine = [info for info in infos if info.fields.get("verdict") == verdict]
        assert (count, num_tokens) == (len(mine), sum(info.n_total for info in mine))
    blocks = duckdb.sql(
        f"SELECT shard, unnest(shard_record.blocks, recursive := true) FROM '{file}' "
        "WHERE shard_record IS NOT NULL"
    ).fetchall()
    assert len(blocks) == 3 * 20
    frame = polars.read_parquet(file)
    assert frame["n_total"].sum() == sum(info.n_total for info in infos)


def test_the_questions_of_the_guide_have_answers(pristine):
    guide = (Path(__file__).parent.parent / "teacher_cache/README.md").read_text()
    queries = guide.split("```sql\n")[1].split("```")[0].split(";")[:-1]
    right, cut, blocks = (
        duckdb.sql(query.replace("cache/catalog.parquet", str(pristine / CATALOG_FILE))).fetchall()
        for query in queries
    )
    assert sum(count for _, count, _ in right) == 11
    assert cut == []
    assert [length for _, length, _ in blocks[:20]] == [
        block.length for block in open_cache(pristine).shards[0].blocks
    ]


CONDITIONS = [
    'verdict == "correct"',
    'verdict != "wrong" and n_total < 45',
    'fields["level"] is not None and fields["level"] > 3',
    "not verdict or solved",
    'level in [3, None] or fields["n_total"] == 3',
    '24 < n_total < 50 and tags["0"] is None and tags[0] == "a"',
    'tags is not None and tags[0] in ["a"] and -n_total < -30',
    "score",
    "fields",
    "big == None or trace_id == 't2'",
]


@pytest.mark.parametrize("text", CONDITIONS)
def test_a_condition_holds_for_the_same_traces_in_columns(pristine, folder, text):
    where = Where.parse(text)
    for path in (pristine, without_catalog(folder)):
        cache = open_cache(path)
        found = where.holds_for(cache.catalog, cache.catalog.counted).tolist()
        assert found == [where.holds(info) for info in cache.infos]
    assert any(found)


def test_a_condition_that_cannot_be_decided_names_the_first_trace(pristine):
    with pytest.raises(ValueError, match="cannot be decided for trace 't1'"):
        open_data([pristine], where="level > 3")


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(), inner, max_size=2),
    max_leaves=3,
)
ANY_FIELDS = st.dictionaries(st.sampled_from(["a", "A", "b", "fields", "", "é"]), JSON_VALUES)


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(st.lists(ANY_FIELDS, min_size=1, max_size=8))
def test_any_fields_come_back_as_they_were(rows):
    infos = [TraceInfo(f"t{i}", 5, 1, 3, "stop", "hash", own) for i, own in enumerate(rows)]
    header = make_header(num_bands=1)
    commit = ShardCommit(
        name="w0-0", header_fingerprint=header.fingerprint, size_bytes=9, sha256="", num_entries=0,
        num_clamped_tails=0, num_clamped_logits=0, traces=tuple(infos),
        blocks=(replace(block_of(b"x", 0, len(infos), 5 * len(infos))),),
    )  # fmt: skip
    plain = catalog_of([commit], header, "here")
    typed = Catalog(with_typed_fields(plain.table()), header, "here")
    everything = np.arange(len(rows))
    assert plain.fields(everything) == typed.fields(everything) == rows
    assert [typed.info(index).fields for index in range(len(rows))] == rows
    assert typed.field_names == plain.field_names == {name for own in rows for name in own}
    for name in typed.field_names:
        assert typed.field(name, everything) == [own.get(name) for own in rows]


def test_rows_that_contradict_each_other_are_refused():
    header = make_header(num_bands=1)
    commit = ShardCommit(
        "w0-0", header.fingerprint, 9, "", 0, 0, 0, (block_of(b"x", 0, 1, 5),),
        (TraceInfo("t", 5, 4, 3, "stop", "hash"),),
    )  # fmt: skip
    with pytest.raises(CacheFormatError, match="contradict"):
        catalog_of([commit], header, "here")


@pytest.mark.slow
def test_more_text_than_an_arrow_array_holds_is_read(folder):
    """Chunks share their memory: 200 MB stand for 2.3 GB."""
    cache = open_cache(without_catalog(folder))
    text = json.dumps({"solution": "x" * (200 << 20)})
    columns = {name: cache.catalog.column(name) for name in cache.catalog.schema.names}
    one = pa.array([text])
    columns["fields_json"] = pa.chunked_array([one] * cache.catalog.num_rows)
    catalog = Catalog(pa.table(columns), cache.header, "here")
    assert len(catalog.infos(np.array([9]))[0].fields["solution"]) == 200 << 20


def test_fields_without_any_value_have_no_column():
    table = pa.table({"fields_json": json_of_fields([{}, {"a": None}])})
    assert with_typed_fields(table).schema.names == ["fields_json"]


@pytest.mark.parametrize("damage", ["removed", "flipped"])
def test_a_repair_makes_a_lost_catalogue_again_and_the_seal_stays(folder, damage, caplog):
    file, sealed = folder / CATALOG_FILE, open_cache(folder).manifest
    if damage == "removed":
        file.unlink()
    else:
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    done = repair_cache(folder, verify_cache(folder))
    assert (done.removed, done.has_new_catalog) == ({}, True)
    caplog.clear()
    again = open_cache(folder)
    assert caplog.text == ""
    assert again.manifest.seal.fingerprint == sealed.seal.fingerprint
    assert again.manifest.noise == sealed.noise
    assert verify_cache(folder).errors == []
