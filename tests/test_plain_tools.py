"""What other tools see when they open a shard, and what is exported for them."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pytest
from click.testing import CliRunner
from fakes import make_cache, make_traces, write_shards

from teacher_cache.cli.group import cli
from teacher_cache.format import open_cache, seal_cache

COLUMNS = ("token_ids", "k", "top_ids", "top_logits", "tail_logit")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain") / "cache"
    return open_cache(make_cache(folder, make_traces(4)))


@pytest.fixture(scope="module")
def shard(cache):
    return Path(cache.path) / "shards" / f"{cache.shards[0].name}.arrow"


def whole_traces(cache):
    keep = {row: info.n_total for row, info in enumerate(cache.shards[0].traces)}
    return cache.read(0, keep).values()


def assert_rows_are_the_traces(rows, cache):
    """Rows (dicts, in any order) of all bands, put together, are the traces."""
    rows = sorted(rows, key=lambda row: (row["trace_id"], row["start"]))
    for trace in whole_traces(cache):
        mine = [row for row in rows if row["trace_id"] == trace.trace_id]
        assert len(mine) == cache.header.num_bands
        for name in COLUMNS:
            found = np.concatenate([np.asarray(row[name], float) for row in mine])
            np.testing.assert_array_equal(found, getattr(trace, name))


def test_pyarrow_reads_the_file_a_prefix_and_a_dataset(cache, shard):
    assert_rows_are_the_traces(pa.ipc.open_file(str(shard)).read_all().to_pylist(), cache)
    dataset = pyarrow.dataset.dataset(str(shard), format="ipc")
    assert_rows_are_the_traces(dataset.to_table().to_pylist(), cache)
    prefix = shard.read_bytes()[8 : cache.shards[0].prefix_bytes(5)]
    with pa.ipc.open_stream(prefix) as stream:
        bands = {row["band"] for _ in range(5) for row in stream.read_next_batch().to_pylist()}
    assert bands == set(range(5))


def test_pandas_reads_it(cache, shard):
    frame = pa.ipc.open_file(str(shard)).read_pandas()
    assert_rows_are_the_traces(frame.to_dict("records"), cache)


def test_polars_reads_and_scans_it(cache, shard):
    import polars

    assert_rows_are_the_traces(polars.read_ipc(shard).to_dicts(), cache)
    assert_rows_are_the_traces(polars.scan_ipc(shard).collect().to_dicts(), cache)


def test_duckdb_reads_it_through_a_table(cache, shard):
    import duckdb

    table = pa.ipc.open_file(str(shard)).read_all()
    found = duckdb.from_arrow(table).to_arrow_table()
    assert_rows_are_the_traces(found.to_pylist(), cache)


def test_datasets_reads_it(cache, shard, tmp_path):
    import datasets

    found = datasets.load_dataset(
        "arrow", data_files=str(shard), split="train", cache_dir=str(tmp_path)
    )
    assert_rows_are_the_traces(list(found), cache)


def test_datasets_loads_the_folder_by_its_card(tmp_path):
    import datasets

    folder = make_cache(tmp_path / "cache", make_traces(6), traces_per_shard=2)
    found = datasets.load_dataset(folder, split="train", cache_dir=str(tmp_path / "hf"))
    assert_rows_are_the_traces(list(found), open_cache(folder))
    assert len(set(found["trace_id"])) == 6
    card = (tmp_path / "cache" / "README.md").read_text()
    assert "# Logits of table" in card
    assert open_cache(folder).fingerprint in card


def test_a_card_of_the_users_own_stays(tmp_path):
    write_shards(tmp_path, make_traces(2))
    (tmp_path / "README.md").write_text("mine")
    seal_cache(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def export(cache, out, *options):
    run = CliRunner().invoke(cli, ["export", cache.path, str(out), *options])
    assert run.exit_code == 0, run.output
    return out


def test_a_slice_of_a_cache_is_exported(cache, tmp_path):
    import pyarrow.parquet as pq

    by_id = {trace.trace_id: trace for trace in whole_traces(cache)}
    options = ["--trace", "t1", "--trace", "t3", "--lead-span", "0.5"]
    rows = pq.read_table(export(cache, tmp_path / "some.parquet", "--parquet", *options))
    kept = {name: max(1, by_id[name].n_total // 2) for name in ("t1", "t3")}
    found = rows["trace_id"].to_pylist()
    assert {name: found.count(name) for name in set(found)} == kept
    lines = export(cache, tmp_path / "two.jsonl", "--limit", "2").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["t0", "t1"]
    run = CliRunner().invoke(cli, ["export", cache.path, str(tmp_path / "no"), "--trace", "t99"])
    assert "no trace 't99' among 4" in str(run.exception)
    assert {file.name for file in tmp_path.iterdir()} == {"some.parquet", "two.jsonl"}


def test_jsonl_shows_logprobs_to_who_asks(cache, tmp_path):
    out = export(cache, tmp_path / "look.jsonl", "--logprobs", "--limit", "1")
    row = json.loads(out.read_text())
    trace = next(iter(whole_traces(cache)))
    assert row["token_ids"] == trace.token_ids.tolist()
    assert row["top_ids"][0] is row["top_logprobs"][0] is row["tail_mass"][0] is None
    assert [i for ids in row["top_ids"][1:] for i in ids] == trace.top_ids.tolist()
    for logprobs, tail in zip(row["top_logprobs"][1:], row["tail_mass"][1:], strict=True):
        assert np.exp(logprobs).sum() + tail == pytest.approx(1, abs=1e-6)


def test_parquet_export_has_a_row_per_token_with_its_logprobs(cache, tmp_path):
    import pyarrow.parquet as pq

    out = tmp_path / "tokens.parquet"
    run = CliRunner().invoke(cli, ["export", cache.path, str(out), "--parquet"])
    assert run.exit_code == 0, run.output
    assert "4 traces" in run.output
    rows = pq.read_table(out).to_pylist()
    for trace in whole_traces(cache):
        mine = [row for row in rows if row["trace_id"] == trace.trace_id]
        assert [row["position"] for row in mine] == list(range(trace.n_total))
        assert [row["token_id"] for row in mine] == trace.token_ids.tolist()
        assert mine[0]["top_ids"] is None
        assert mine[0]["tail_mass"] is None
        assert [i for row in mine[1:] for i in row["top_ids"]] == trace.top_ids.tolist()
        sections = [row["section"] for row in mine]
        assert sections.count("prompt") == trace.cot_start
        assert sections.count("answer") == trace.n_total - trace.answer_start
        for row in mine[1:]:
            assert np.exp(row["top_logprobs"]).sum() + row["tail_mass"] == pytest.approx(
                1, abs=1e-6
            )
    assert not list(tmp_path.glob(".tmp*"))
