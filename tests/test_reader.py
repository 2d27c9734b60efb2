"""A reader trusts commit records alone, checks every byte it uses, and names what is wrong."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pytest
from fakes import make_cache, make_header, make_trace, make_traces

from teacher_cache.format import (
    CacheError,
    CacheFormatError,
    CacheMismatchError,
    CacheWriter,
    FinishedTrace,
    open_cache,
)
from teacher_cache.format.catalog import CATALOG_FILE
from teacher_cache.format.commit import ShardCommit, block_of, parse_commit
from teacher_cache.format.header import content_hash


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pristine") / "cache"
    make_cache(folder, make_traces(8))
    return folder


@pytest.fixture
def folder(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "cache")


def shard_files(folder):
    return sorted((folder / "shards").glob("*.arrow"))


def read_everything(folder):
    cache = open_cache(str(folder))
    for index, shard in enumerate(cache.shards):
        cache.read(index, {row: info.n_total for row, info in enumerate(shard.traces)})


@pytest.mark.slow
def test_every_flipped_bit_in_what_is_read_is_noticed(folder):
    file = shard_files(folder)[0]
    original = file.read_bytes()
    commit = open_cache(str(folder)).shards[0]
    end = commit.prefix_bytes(len(commit.blocks))
    for position in np.random.default_rng(0).integers(0, end, 60):
        damaged = bytearray(original)
        damaged[position] ^= 1 << (position % 8)
        file.write_bytes(damaged)
        with pytest.raises(CacheFormatError, match=rf"{commit.name}.*band \d+ is damaged"):
            read_everything(folder)


def test_a_missing_shard_is_refused_by_name(folder):
    shard_files(folder)[1].unlink()
    with pytest.raises(
        CacheFormatError, match=rf"shard {shard_files(folder)[0].stem[:2]}.*missing"
    ):
        open_cache(str(folder))


def test_a_shard_without_its_commit_record_does_not_exist(folder):
    cache = open_cache(str(folder))
    record = folder / "shards" / f"{cache.shards[0].name}.json"
    record.unlink()
    with pytest.raises(CacheFormatError, match=f"commit record of shard '{cache.shards[0].name}'"):
        open_cache(str(folder))


def test_a_shard_cut_short_is_refused(folder):
    file = shard_files(folder)[0]
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CacheFormatError, match="only partly copied"):
        open_cache(str(folder))


@pytest.mark.parametrize("key", ["size_bytes", "sha256", "traces", "blocks"])
def test_a_changed_commit_record_is_refused(folder, key):
    (folder / CATALOG_FILE).unlink()  # which holds the same facts
    file = sorted((folder / "shards").glob("*.json"))[0]
    record = json.loads(file.read_text())
    record[key] = record[key] * 2
    file.write_text(json.dumps(record))
    with pytest.raises(CacheFormatError, match="checksum does not match"):
        open_cache(str(folder))


@pytest.mark.parametrize("indent", [None, 2])
def test_a_commit_record_may_be_written_in_any_way(folder, indent):
    """As SPEC.md has it: this writer's is the text that is hashed, which is read faster."""
    (folder / CATALOG_FILE).unlink()
    expected = list(open_cache(str(folder)).shards)
    for file in (folder / "shards").glob("*.json"):
        record = json.loads(file.read_text())
        swapped = {"checksum": record.pop("checksum"), **dict(reversed(record.items()))}
        file.write_text(json.dumps(swapped, indent=indent))
    assert list(open_cache(str(folder)).shards) == expected


@pytest.mark.parametrize("place", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_a_changed_byte_of_a_commit_record_is_noticed(folder, place):
    (folder / CATALOG_FILE).unlink()
    file = sorted((folder / "shards").glob("*.json"))[0]
    text = bytearray(file.read_bytes())
    number = next(n for n in range(int(len(text) * place), len(text)) if chr(text[n]).isdigit())
    text[number] = ord("1") if text[number] != ord("1") else ord("2")
    file.write_bytes(text)
    with pytest.raises(CacheFormatError, match=r"checksum does not match|not a commit record"):
        open_cache(str(folder))


def test_an_exchanged_commit_record_is_not_the_sealed_one(folder):
    (folder / CATALOG_FILE).unlink()
    file = sorted((folder / "shards").glob("*.json"))[0]
    record = json.loads(file.read_text())
    del record["checksum"]
    record["num_entries"] += 1
    file.write_text(json.dumps({**record, "checksum": content_hash(record)}))
    with pytest.raises(CacheFormatError, match="not the sealed one"):
        open_cache(str(folder))


def test_a_shard_under_anothers_name_is_refused(folder):
    first, second = shard_files(folder)
    one, two = first.read_bytes(), second.read_bytes()
    first.write_bytes(two)
    second.write_bytes(one)
    with pytest.raises(CacheFormatError):
        read_everything(folder)


def test_a_shard_of_another_capture_is_refused(folder, tmp_path):
    make_cache(tmp_path / "other", make_traces(4), teacher="somebody else")
    for kind in ("arrow", "json"):
        name = next((tmp_path / "other" / "shards").glob(f"*.{kind}"))
        shutil.copy(name, folder / "shards" / f"w000-00000.{kind}")
    with pytest.raises((CacheFormatError, CacheMismatchError)):
        open_cache(str(folder))


def test_an_unsealed_cache_needs_permission(tmp_path):
    with CacheWriter(tmp_path, make_header()) as writer:
        writer.append(FinishedTrace(make_trace("a", 30), "source"))
        writer.finish()
    with pytest.raises(CacheMismatchError, match="--allow-unsealed"):
        open_cache(str(tmp_path))
    assert len(open_cache(str(tmp_path), allow_unsealed=True).traces) == 1


@pytest.mark.parametrize("path", ["nowhere", "s3://", "nosuchscheme://x/y"])
def test_a_path_without_a_cache_is_refused(path):
    with pytest.raises(CacheError, match=path.rstrip("/")):
        open_cache(path)


@pytest.mark.parametrize(
    "content", ["", "{}", "[]", '{"format": "other"}', '{"format": "leadspan-cache"}', "null"]
)
def test_a_manifest_that_is_none_is_refused(tmp_path, content):
    (tmp_path / "cache.json").write_text(content)
    with pytest.raises(CacheFormatError, match=r"cache\.json"):
        open_cache(str(tmp_path))


def test_a_newer_format_is_refused_by_number(folder):
    file = folder / "cache.json"
    record = json.loads(file.read_text())
    record["min_reader_version"] = 7
    file.write_text(json.dumps(record))
    with pytest.raises(CacheFormatError, match=r"format version 7.*reads up to 1"):
        open_cache(str(folder))


def test_unknown_keys_are_ignored(folder):
    file = folder / "cache.json"
    record = json.loads(file.read_text())
    record["later"] = record["header"]["later"] = {"anything": 1}
    file.write_text(json.dumps(record))
    read_everything(folder)


def test_asking_for_more_tokens_than_a_trace_has_is_refused(folder):
    cache = open_cache(str(folder))
    with pytest.raises(ValueError, match="tokens, 9999 were asked for"):
        cache.read(0, {0: 9999})


def rewritten(folder, change, *, reorder=list):
    """Replace a column of a shard and forge records that agree with the new bytes."""
    (file, *_), cache = shard_files(folder), open_cache(str(folder))
    commit = cache.shards[0]
    with pa.ipc.open_file(str(file)) as reader:
        batches = [change(reader.get_batch(i)) for i in range(reader.num_record_batches)]
    batches = reorder(batches)
    schema = batches[0].schema
    sink = pa.BufferOutputStream()
    blocks = []
    with pa.ipc.new_file(sink, schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as new:
        for batch, old in zip(batches, commit.blocks, strict=True):
            new.write_batch(batch)
            blocks.append((old, sink.tell()))
    data = bytes(sink.getvalue())
    begin, made = 0, []
    for old, end in blocks:
        made.append(block_of(data[begin:end], begin, old.num_rows, old.num_tokens))
        begin = end
    file.write_bytes(data)
    forged = ShardCommit(**{
        **vars(commit), "blocks": tuple(made), "size_bytes": len(data), "checksum": "",
    })  # fmt: skip
    record = file.with_suffix(".json")
    record.write_bytes(forged.to_bytes())
    manifest = json.loads((folder / "cache.json").read_text())
    manifest["seal"]["shards"][0][1] = parse_commit(record.read_bytes(), commit.name).checksum
    manifest["seal"]["fingerprint"] = content_hash(manifest["seal"]["shards"])
    (folder / "cache.json").write_text(json.dumps(manifest))


def replaced(batch, name, values):
    position = batch.schema.get_field_index(name)
    return batch.set_column(position, batch.schema.field(name), values)


def shifted_entries(batch):
    """The distributions of the next token: what a capture that is off by one would store."""
    tokens = batch["token_ids"]
    return replaced(
        batch,
        "token_ids",
        pa.ListArray.from_arrays(tokens.offsets, pa.array(np.roll(tokens.values.to_numpy(), -1))),
    )


def wrong_start(batch):
    return replaced(batch, "start", pa.array(batch["start"].to_numpy() + 1, pa.int32()))


def wrong_k(batch):
    k = batch["k"]
    values = k.values.to_numpy().copy()
    values[:1] += 1
    return replaced(batch, "k", pa.ListArray.from_arrays(k.offsets, pa.array(values)))


def not_a_number(batch):
    tail = batch["tail_logit"]
    values = pa.array(np.full(len(tail.values), np.nan, np.float32))
    return replaced(batch, "tail_logit", pa.ListArray.from_arrays(tail.offsets, values))


def huge_ids(batch):
    ids = batch["token_ids"]
    values = pa.array(np.full(len(ids.values), 1 << 20, np.int32))
    return replaced(batch, "token_ids", pa.ListArray.from_arrays(ids.offsets, values))


def coded(batch, name, values=None, codes=None):
    """Other values for the dictionary of a column, or other codes into it."""
    column = batch[name]
    inner = column.values
    dictionary = inner.dictionary if values is None else pa.array(values, inner.dictionary.type)
    codes = inner.indices if codes is None else pa.array(codes, inner.indices.type)
    changed = pa.DictionaryArray.from_arrays(codes, dictionary, safe=False)
    return replaced(batch, name, pa.ListArray.from_arrays(column.offsets, changed))


def id_codes_outside(batch):
    codes = batch["top_ids"].values.indices.to_numpy().copy()
    codes[-1:] = len(batch["top_ids"].values.dictionary)
    return coded(batch, "top_ids", codes=codes)


def logit_codes_outside(batch):
    codes = batch["top_logits"].values.indices.to_numpy().copy()
    codes[-1:] = 255
    return coded(batch, "top_logits", codes=codes)


def infinite_logit(batch):
    grid = batch["top_logits"].values.dictionary.to_numpy().copy()
    grid[-1] = -np.inf
    return coded(batch, "top_logits", values=grid)


def logits_not_from_zero(batch):
    grid = batch["top_logits"].values.dictionary.to_numpy() - 1
    return coded(batch, "top_logits", values=grid)


def rising_logits(batch):
    grid = batch["top_logits"].values.dictionary.to_numpy()
    return coded(batch, "top_logits", values=-grid)


def ids_outside(batch):
    ids = batch["top_ids"].values.dictionary.to_numpy().copy()
    ids[-1] = -1
    return coded(batch, "top_ids", values=ids)


def null_ids(batch):
    tokens = batch["token_ids"]
    values = pa.array([None] * len(tokens.values), pa.int32())
    return replaced(batch, "token_ids", pa.ListArray.from_arrays(tokens.offsets, values))


def test_bands_in_another_order_are_refused(folder):
    rewritten(folder, lambda batch: batch, reorder=lambda batches: batches[::-1])
    with pytest.raises(CacheFormatError, match="band 0: column 'band' differs from the commit"):
        read_everything(folder)


def test_unknown_columns_are_ignored(folder):
    before = open_cache(str(folder)).read(0, {0: 20})[0]
    rewritten(folder, lambda batch: batch.append_column("later", pa.array([b"?"] * len(batch))))
    after = open_cache(str(folder)).read(0, {0: 20})[0]
    assert after.top_ids.tolist() == before.top_ids.tolist()


def test_a_column_that_is_missing_or_of_another_type_is_named(folder):
    rewritten(folder, lambda batch: batch.drop_columns(["k"]))
    with pytest.raises(CacheFormatError, match="expected one column 'k', not found"):
        read_everything(folder)
    rewritten(folder, lambda batch: batch.append_column("k", pa.array([1] * len(batch))))
    with pytest.raises(CacheFormatError, match=r"column 'k' of type list<.*uint8.*>, got int64"):
        read_everything(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (id_codes_outside, "column 'top_ids' points outside its dictionary"),
        (logit_codes_outside, "column 'top_logits' points outside its dictionary"),
        (infinite_logit, "top_logits must be finite"),
        (logits_not_from_zero, "the first top_logits of a token must be 0"),
        (rising_logits, "top_logits must not rise"),
        (ids_outside, "top_ids outside the vocabulary"),
        (null_ids, "column 'token_ids' holds nulls"),
        (shifted_entries, "the distributions belong to other tokens"),
        (wrong_start, "column 'start' differs from the commit record"),
        (wrong_k, "wrong lengths"),
        (not_a_number, "tail_logit must be finite"),
        (huge_ids, "outside the vocabulary"),
    ],
)
def test_well_formed_bytes_with_wrong_values_are_refused(folder, change, message):
    rewritten(folder, change)
    with pytest.raises(CacheFormatError, match=message):
        read_everything(folder)


def test_a_rewritten_shard_with_right_values_is_read(folder):
    rewritten(folder, lambda batch: batch)
    read_everything(folder)
