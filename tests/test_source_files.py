"""Rows are the same whatever they are stored in, and are read a part at a time."""

import datetime
import decimal
import gzip
import json
import os
import sys
import types
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from teacher_cache.sources import Input, SourceError, read_ids
from teacher_cache.sources.json_files import parse_line

ROWS = [
    {
        "id": f"r{number}",
        "messages": [{"role": "user", "content": f"{number}?\n[é] {{}}"}],
        "token_ids": list(range(number)),
        "score": number / 4,
        "verdict": None if number % 3 else "right",
    }
    for number in range(200)
]


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def arrow(rows, make_writer, path):
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as sink, make_writer(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=70)


def as_saved_dataset(path):
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(path, num_shards=2)


def as_saved_splits(path):
    import datasets

    splits = {"train": ROWS, "test": ROWS[:3]}
    splits = {name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}
    datasets.DatasetDict(splits).save_to_disk(path)


def as_folder(path):
    path.mkdir()
    (path / "README.md").write_text("# no rows")
    (path / ".cache").mkdir()
    (path / ".cache" / "download.json").write_text("{}")
    (path / "b.jsonl.zst").write_bytes(zstandard.compress(jsonl(ROWS[100:])))
    pq.write_table(pa.Table.from_pylist(ROWS[:100]), path / "a.parquet")


CONTAINERS = {
    "rows.jsonl": lambda path: path.write_bytes(jsonl(ROWS)),
    "rows": lambda path: path.write_bytes(jsonl(ROWS)),
    "bom.jsonl": lambda path: path.write_bytes(b"\xef\xbb\xbf" + jsonl(ROWS)),
    "crlf.jsonl": lambda path: path.write_bytes(jsonl(ROWS).replace(b"\n", b"\r\n").rstrip()),
    "rows.json": lambda path: path.write_text(json.dumps(ROWS)),
    "indented.json": lambda path: path.write_text(json.dumps(ROWS, indent=2, ensure_ascii=False)),
    "rows.jsonl.gz": lambda path: path.write_bytes(gzip.compress(jsonl(ROWS))),
    "rows.jsonl.zst": lambda path: path.write_bytes(zstandard.compress(jsonl(ROWS))),
    "frames.zst": lambda path: path.write_bytes(
        zstandard.compress(jsonl(ROWS[:9])) + zstandard.compress(jsonl(ROWS[9:]))
    ),
    "rows.json.gz": lambda path: path.write_bytes(gzip.compress(json.dumps(ROWS).encode())),
    "rows.parquet": lambda path: pq.write_table(pa.Table.from_pylist(ROWS), path),
    "file.arrow": lambda path: arrow(ROWS, pa.ipc.new_file, path),
    "stream.arrow": lambda path: arrow(ROWS, pa.ipc.new_stream, path),
    "folder": as_folder,
    "saved": as_saved_dataset,
    "splits": as_saved_splits,
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_every_container_gives_the_same_rows(tmp_path, name, monkeypatch):
    monkeypatch.setattr("teacher_cache.sources.json_files._CHUNK_BYTES", 100)
    CONTAINERS[name](tmp_path / name)
    found = list(Input(tmp_path / name))
    values = [
        parse_line(row.content) if isinstance(row.content, bytes) else row.content for row in found
    ]
    assert values == ROWS
    for row in (found[0], found[50], found[-1]):
        assert Path(row.file).is_relative_to(tmp_path / name)
    if (tmp_path / name).is_file():
        assert [row.number for row in found] == list(range(1, 201))


def test_another_split_of_a_saved_dataset_is_read_by_name(tmp_path):
    as_saved_splits(tmp_path / "saved")
    assert len(list(Input(tmp_path / "saved", split="test"))) == 3
    with pytest.raises(SourceError, match=r"no split 'dev', found train, test; name one"):
        list(Input(tmp_path / "saved", split="dev"))


def test_values_that_json_lacks_become_text_or_null(tmp_path):
    rows = [
        {
            "when": datetime.datetime(2026, 1, 2, 3, tzinfo=datetime.UTC),
            "price": decimal.Decimal("1.50"),
            "scores": [1.5, float("nan")],
            "pairs": [("a", 1)],
        }
    ]
    schema = pa.schema([
        ("when", pa.timestamp("us", "UTC")), ("price", pa.decimal128(9, 2)),
        ("scores", pa.list_(pa.float64())), ("pairs", pa.map_(pa.string(), pa.int64())),
    ])  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows, schema), tmp_path / "rows.parquet")
    (row,) = Input(tmp_path / "rows.parquet")
    assert row.content == {
        "when": "2026-01-02T03:00:00+00:00",
        "price": "1.50",
        "scores": [1.5, None],
        "pairs": [["a", 1]],
    }
    assert parse_line(b'{"score": NaN}') == {"score": None}


def damaged(data, path):
    path.write_bytes(data[: len(data) * 2 // 3])


def parquet_bytes(tmp_path):
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "whole")
    return (tmp_path / "whole").read_bytes()


def stream_bytes(tmp_path):
    arrow(ROWS, pa.ipc.new_stream, tmp_path / "whole")
    return (tmp_path / "whole").read_bytes()


BROKEN = {
    "short.jsonl.gz": (lambda p: damaged(gzip.compress(jsonl(ROWS)), p), "damaged or cut short"),
    "short.jsonl.zst": (
        lambda p: damaged(zstandard.compress(jsonl(ROWS)), p),
        "damaged or cut short",
    ),
    "short.parquet": (lambda p: damaged(parquet_bytes(p.parent), p), "damaged or cut short"),
    "short.arrow": (lambda p: damaged(stream_bytes(p.parent), p), "damaged or cut short"),
    "text.parquet": (
        lambda p: p.write_bytes(jsonl(ROWS)),
        "expected Parquet by its name, found text by its content",
    ),
    "parquet.jsonl": (
        lambda p: p.write_bytes(parquet_bytes(p.parent)),
        "expected text by its name, found Parquet by its content",
    ),
    "table.gz": (
        lambda p: p.write_bytes(gzip.compress(parquet_bytes(p.parent))),
        "compressed tables cannot",
    ),
    "picture.jsonl": (lambda p: p.write_bytes(b"\x89PNG\0\0\0"), "found other binary data"),
    "utf16.jsonl": (lambda p: p.write_text('{"a": 1}', "utf-16"), "found UTF-16; convert"),
    "short.json": (lambda p: damaged(json.dumps(ROWS).encode(), p), "not JSON: "),
    "comma.json": (lambda p: p.write_text('[{"a": 1} {"a": 2}]' + " " * 99), ":1: not JSON: Exp"),
    "broken.json": (lambda p: p.write_text('[{"a": 1}, {"a": x}]' + " " * 99), ":2: not JSON: "),
    "after.json": (lambda p: p.write_text('[{"a": 1}]\n[{"a": 2}]'), "more text follows the end"),
    "latin.json": (lambda p: p.write_bytes(b'[{"a": "\xe9"}]'), "not UTF-8"),
    "no-rows": (lambda p: (p.mkdir(), (p / "README.md").touch()), "expected files ending in"),
    "no-dataset": (
        lambda p: (p.mkdir(), (p / "state.json").write_text("{}")),
        "not written by `datasets`",
    ),
    "nowhere/to/be/found": (lambda p: None, "cannot be read: No such file"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_read_to_its_end_is_said(tmp_path, name):
    make, message = BROKEN[name]
    make(tmp_path / name)
    with pytest.raises(SourceError) as caught:
        list(Input(tmp_path / name))
    assert message in str(caught.value)
    assert str(tmp_path / name) in str(caught.value)


def test_rows_before_the_damage_are_not_kept_from_the_reader(tmp_path):
    """Else a bad file of many gigabytes would be held in memory before anything is said."""
    damaged(stream_bytes(tmp_path), tmp_path / "short.arrow")
    rows = iter(Input(tmp_path / "short.arrow"))
    assert [next(rows).number for _ in range(70)] == list(range(1, 71))


def test_files_of_a_folder_that_hold_no_rows_are_named(tmp_path, caplog):
    caplog.set_level("INFO")
    as_folder(tmp_path / "folder")
    assert len(list(Input(tmp_path / "folder"))) == 200
    assert "README.md: skipped" in caplog.text


# Pieces of an array are read in doubled amounts.
@pytest.mark.slow
@pytest.mark.parametrize(("start", "num_mib"), [(b'{"prompt": "', 80), (b'[{"prompt": "', 160)])
def test_a_small_file_that_unpacks_to_one_endless_row_is_refused(tmp_path, start, num_mib):
    file = tmp_path / "bomb.jsonl.zst"
    file.write_bytes(zstandard.compress(start + b"a" * (num_mib << 20)))
    assert file.stat().st_size < 20_000
    with pytest.raises(SourceError, match=r"bomb\.jsonl\.zst:1: the row is longer than 64 MiB"):
        list(Input(file))


def test_a_file_name_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / os.fsdecode(b"\xff.jsonl")).write_bytes(jsonl(ROWS))
    with pytest.raises(SourceError, match="\udcff\\.jsonl: the file's name is not UTF-8"):
        list(Input(tmp_path))


class FakeHub(types.ModuleType):
    def __init__(self):
        super().__init__("datasets")
        self.asked = []

    def load_dataset(self, path, **options):
        self.asked.append((path, options))
        if path == "some/where":
            raise ConnectionError("the hub is not there\nand more")
        return iter([{"id": 1, "score": float("nan")}])


def test_a_hub_id_is_streamed_through_datasets(monkeypatch):
    hub = FakeHub()
    monkeypatch.setitem(sys.modules, "datasets", hub)
    rows = list(Input(Path("open-thoughts/OpenThoughts-114k"), "metadata", "test"))
    assert [row.content for row in rows] == [{"id": 1, "score": None}]
    assert rows[0].file == "open-thoughts/OpenThoughts-114k (metadata, test)"
    options = {"name": "metadata", "split": "test", "streaming": True}
    assert hub.asked == [("open-thoughts/OpenThoughts-114k", options)]
    with pytest.raises(
        SourceError, match=r"some/where \(default, train\): no such file .* not there$"
    ):
        list(Input(Path("some/where")))


def test_a_hub_id_without_datasets_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SourceError, match="no such file or folder; for the hub: pip install"):
        list(Input(Path("some/where")))


@pytest.mark.parametrize("path", ["rows.jsonl", "data/rows.parquet", "/data/rows", "./rows"])
def test_a_path_is_not_taken_for_a_hub_id(monkeypatch, tmp_path, path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SourceError, match="cannot be read: No such file"):
        list(Input(Path(path) if path != "./rows" else Path("../gone/rows")))


def test_ids_are_read_one_a_line(tmp_path):
    file = tmp_path / "ids.txt"
    file.write_text("a b\r\n\n 7 \n")
    assert read_ids(file) == {"a b", "7"}
    file.write_text("\n")
    with pytest.raises(SourceError, match="expected one id per line"):
        read_ids(file)
    with pytest.raises(SourceError, match="cannot be read"):
        read_ids(tmp_path / "nowhere")
