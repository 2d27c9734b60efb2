"""verify finds whatever is wrong, all of it; repair takes it out, and a capture makes it again."""

import dataclasses
import hashlib
import json
import os
import shutil
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pyarrow.fs as pafs
import pytest
import zstandard
from caches import ARRAYS, read_all
from click.testing import CliRunner
from fakes import make_cache, make_header, make_trace, make_traces

from teacher_cache.capture.generate import generate
from teacher_cache.cli.group import cli
from teacher_cache.format import (
    CacheError,
    CacheFormatError,
    CacheMismatchError,
    CacheWriter,
    FinishedTrace,
    ShardCommit,
    TraceInfo,
    open_cache,
    seal_cache,
)
from teacher_cache.format.checking import repair as repair_module
from teacher_cache.format.checking import verify as verify_module
from teacher_cache.format.checking.repair import repair_cache
from teacher_cache.format.checking.verify import verify_cache
from teacher_cache.format.shares import InputShare, ShareRecord, publish_share, read_shares
from teacher_cache.format.store import Store, open_store
from teacher_cache.format.writing.shard import encode_shard

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
import soak_flips

GOLDEN = Path(__file__).parent / "data" / "golden-v1"
FIELDS = {"réponse": "½ é", "score": 1e-05}  # escapes and exponents: JSON ignores their case


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pristine") / "cache"
    make_cache(folder, [replace(trace, fields=FIELDS) for trace in make_traces(8)], num_bands=4)
    return folder


@pytest.fixture
def folder(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "cache")


def errors(folder):
    return [f"{finding.file}: {finding.text}" for finding in verify_cache(str(folder)).errors]


def notes(folder):
    found = verify_cache(str(folder))
    assert found.errors == []
    return [f"{finding.file}: {finding.text}" for finding in found.notes]


def run(*args):
    return CliRunner().invoke(cli, [str(arg) for arg in args], catch_exceptions=False)


def write_unchecked(folder, traces, *, header=None, shard_header=None, **changes):
    """A sealed cache whose checksums are right and whose content nobody looked at."""
    header = header or make_header()
    CacheWriter(folder, header).finish()
    shard = encode_shard(traces, shard_header or header)
    names = [field.name for field in dataclasses.fields(TraceInfo)]
    infos = [
        TraceInfo(**{n: getattr(t, n, {"source_hash": "source"}.get(n)) for n in names})
        for t in traces
    ]
    commit = ShardCommit(
        name="w0-00000",
        header_fingerprint=header.fingerprint,
        size_bytes=len(shard.data),
        sha256=hashlib.sha256(shard.data).hexdigest(),
        num_entries=sum(trace.num_entries for trace in traces),
        num_clamped_tails=0,
        num_clamped_logits=0,
        blocks=shard.blocks,
        traces=tuple(infos),
    )
    (folder / "shards" / "w0-00000.arrow").write_bytes(shard.data)
    (folder / "shards" / "w0-00000.json").write_bytes(replace(commit, **changes).to_bytes())
    seal_cache(folder)
    return folder


@pytest.mark.parametrize("path", [str(GOLDEN), GOLDEN.resolve().as_uri()])
def test_a_whole_cache_is_verified_wherever_it_is(path):
    found = verify_cache(path)
    assert found.errors == []
    assert (found.sealed, found.num_shards, found.num_traces) == (True, 2, 4)
    assert (found.num_tokens, found.num_entries) == (129, 966)


def test_an_unsealed_cache_is_verified_with_its_journal(tmp_path):
    with CacheWriter(tmp_path, make_header(), shard_bytes=6000) as writer:
        for trace in make_traces(8):
            writer.append(FinishedTrace(trace, "source"))
    found = verify_cache(str(tmp_path))
    assert (found.errors, found.notes, found.sealed) == ([], [], False)
    assert found.num_shards > 0
    assert found.num_journalled > 0
    assert found.num_traces + found.num_journalled == 8


@pytest.mark.slow
def test_each_of_200_flipped_bits_is_found_in_its_file(folder):
    flips = soak_flips.flip_bits(folder, num_flips=200, seed=0)
    assert len(flips.by_file) > 4
    assert flips.missed == []
    assert flips.elsewhere == []


@pytest.mark.parametrize("name", ["cache.json", "shards/w000-00000.json"])
def test_a_changed_case_that_no_value_shows_is_found(tmp_path, name):
    traces = [replace(trace, fields=FIELDS) for trace in make_traces(2)]
    with CacheWriter(tmp_path, make_header(), config=FIELDS, worker="w000") as writer:
        for trace in traces:
            writer.append(FinishedTrace(trace, "source"))
        writer.finish()
    for old, new in ((b"\\u00e9", b"\\u00E9"), (b"1e-05", b"1E-05")):
        file = tmp_path / name
        original = file.read_bytes()
        changed = original.replace(old, new, 1)
        assert changed != original
        file.write_bytes(changed)
        assert errors(tmp_path) == [
            f"{name}: a letter of an escape or a number has changed its case"
        ]
        file.write_bytes(original)


def test_damage_to_the_name_of_the_checksum_is_found(folder):
    file = folder / "cache.json"
    file.write_text(file.read_text().replace('"checksum"', '"chezksum"'))
    assert errors(folder) == ["cache.json: expected the key `checksum`, found 'chezksum' instead"]


def test_everything_that_is_wrong_is_listed(folder):
    first, second = sorted((folder / "shards").glob("*.arrow"))
    data = bytearray(first.read_bytes())
    for block in open_cache(str(folder)).shards[0].blocks[1:3]:
        data[block.offset + 9] ^= 1
    first.write_bytes(data)
    second.unlink()
    (folder / "cache.json").write_text("{}")
    said = "\n".join(errors(folder))
    assert "cache.json: not a cache header" in said
    assert "shards/w000-00000.arrow: band 1 (bytes" in said
    assert "shards/w000-00000.arrow: band 2 (bytes" in said
    assert "shards/w000-00000.arrow: sha256" in said
    assert "shards/w001-00000.arrow: is missing" in said
    assert len(errors(folder)) == 5


def test_a_missing_or_exchanged_commit_record_is_found(folder):
    first, second = sorted((folder / "shards").glob("*.json"))
    first.unlink()
    assert errors(folder) == [
        "shards/w000-00000.json: the seal lists this commit record, but it is missing"
    ]
    first.write_bytes(second.read_bytes())
    assert "expected the record of 'w000-00000', got 'w001-00000'" in errors(folder)[0]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32-be", "utf-8-sig"])
def test_a_header_in_another_encoding_is_found_and_refused(folder, encoding):
    file = folder / "cache.json"
    file.write_bytes(file.read_text().encode(encoding))
    (error,) = errors(folder)
    assert error.startswith("cache.json: not readable")
    with pytest.raises(CacheFormatError, match="not a cache header"):
        open_cache(folder)


def test_a_file_whose_name_is_not_utf8_is_named(folder):
    (folder / "shards" / os.fsdecode(b"\xff.arrow")).write_text("x")
    (note,) = notes(folder)
    assert note.startswith("shards/\udcff.arrow: has no commit record")
    with pytest.raises(CacheError, match="name is not UTF-8"):
        open_cache(folder / os.fsdecode(b"\xff"))
    done = run("verify", folder)
    assert done.exit_code == 0
    assert r"shards/\xff.arrow" in done.stderr


@pytest.mark.parametrize("kind", ["cache.json", "record", "shard", "journal", "parts"])
def test_a_pipe_in_the_place_of_a_file_keeps_nobody_waiting(folder, kind):
    shard = next((folder / "shards").glob("*.arrow"))
    (folder / "parts").mkdir()
    file = {
        "cache.json": folder / "cache.json",
        "record": shard.with_suffix(".json"),
        "shard": shard,
        "journal": folder / "journal" / "w0-00009.journal",
        "parts": folder / "parts" / "w0of2.json",
    }[kind]
    file.unlink(missing_ok=True)
    os.mkfifo(file)
    found = []
    reader = threading.Thread(target=lambda: found.extend(errors(folder)), daemon=True)
    reader.start()
    reader.join(20)
    assert not reader.is_alive()
    # The record of a part that is not a file is as good as missing.
    assert all(file.name in error for error in found)
    assert len(found) == (kind != "parts")


@pytest.mark.parametrize("total", ["num_traces", "num_tokens", "num_duplicates"])
def test_a_wrong_total_of_the_seal_is_found(folder, total):
    file = folder / "cache.json"
    record = json.loads(file.read_text())
    del record["checksum"]
    record["seal"][total] += 1
    file.write_text(json.dumps(record))
    (error,) = errors(folder)
    assert error.startswith(f"cache.json: the seal says {total} ")


def test_a_header_without_checksum_that_no_shard_shares_is_the_damage(folder):
    file = folder / "cache.json"
    record = json.loads(file.read_text())
    del record["checksum"]
    record["header"]["teacher"] = "tabla"
    file.write_text(json.dumps(record))
    (error,) = errors(folder)
    assert error.startswith("cache.json: its header ")


def test_a_shard_of_another_capture_is_found(folder, tmp_path):
    make_cache(tmp_path / "other", make_traces(4), teacher="somebody else", num_bands=4)
    for kind in ("arrow", "json"):
        shutil.copy(tmp_path / "other" / "shards" / f"w000-00000.{kind}", folder / "shards")
    said = errors(folder)
    assert all(error.startswith("shards/w000-00000.json: ") for error in said)
    assert any("expected a shard of capture" in error for error in said)


def with_values(trace, **columns):
    return replace(trace, **{name: np.array(value) for name, value in columns.items()})


def twice_the_same_id(trace):
    at = int(np.flatnonzero(trace.k[1:] > 3)[0]) + 1
    begin, end = int(trace.k[:at].sum()), int(trace.k[: at + 1].sum())
    ids = trace.top_ids.copy()
    others = [place for place in range(begin, end) if ids[place] != trace.token_ids[at]]
    ids[others[1]] = ids[others[0]]
    return with_values(trace, top_ids=ids)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (twice_the_same_id, "has a repeated id"),
        (lambda t: with_values(t, tail_logit=np.where(t.k > 0, -20, 0).astype("f4")), "the floor"),
        (lambda t: with_values(t, tail_logit=t.tail_logit - 2), "has a tail but no entries"),
    ],
)
def test_values_that_break_a_promise_are_found_under_right_checksums(tmp_path, change, text):
    whole, other = make_trace("t0", 40), make_trace("t1", 50)
    write_unchecked(tmp_path, [whole, change(other)])
    (error,) = errors(tmp_path)
    assert error.startswith("shards/w0-00000.arrow: trace 't1'")
    assert text in error


@pytest.mark.parametrize(
    ("policy", "text"),
    [({"top_k": 3}, "more entries than top_k"), ({"top_k": 20}, "fewer entries than its mass")],
)
def test_entries_that_do_not_keep_to_the_policy_are_found(tmp_path, policy, text):
    write_unchecked(tmp_path, [make_trace("t0", 40)], header=make_header(**policy))
    assert text in errors(tmp_path)[0]


@pytest.mark.parametrize("count", ["num_entries", "num_clamped_tails", "num_clamped_logits"])
def test_a_count_that_is_not_that_of_the_shard_is_found(tmp_path, count):
    write_unchecked(tmp_path, [make_trace("t0", 40)], **{count: 100_000})
    (error,) = errors(tmp_path)
    assert "100,000" in error


def test_a_shard_with_another_header_inside_is_found(tmp_path):
    other = make_header(teacher="somebody else")
    write_unchecked(tmp_path, [make_trace("t0", 40)], shard_header=other)
    (error,) = errors(tmp_path)
    assert "the header in its schema" in error


def test_copies_of_a_trace_are_counted_and_must_come_from_one_source(tmp_path):
    for worker, source in (("a", "x"), ("b", "x"), ("c", "y")):
        with CacheWriter(tmp_path / worker, make_header(), worker=worker) as writer:
            writer.append(FinishedTrace(make_trace("t", 30), source))
            writer.finish()
        shutil.copytree(tmp_path / worker / "shards", tmp_path / "all/shards", dirs_exist_ok=True)
    shutil.copy(tmp_path / "a/cache.json", tmp_path / "all")
    found = verify_cache(str(tmp_path / "all"))
    assert (found.num_traces, found.num_duplicates) == (1, 2)
    assert [error.file for error in found.errors] == ["shards/c-00000.json"]
    assert "made from other content than in a-00000" in found.errors[0].text


def test_what_a_crash_leaves_is_told_and_is_no_error(folder):
    shards = folder / "shards"
    shutil.copy(shards / "w000-00000.arrow", shards / "w007-00000.arrow")
    (shards / ".tmp-1234").write_text("half")
    (shards / "notes.txt").write_text("mine")
    assert [note.split(": ")[0] for note in notes(folder)] == [
        "shards/.tmp-1234", "shards/notes.txt", "shards/w007-00000.arrow",
    ]  # fmt: skip


def test_a_shard_that_came_after_the_seal_is_told(folder, tmp_path):
    make_cache(tmp_path / "other", make_traces(12, seed=1), num_bands=4)
    for kind in ("arrow", "json"):
        shutil.copy(tmp_path / "other" / "shards" / f"w002-00000.{kind}", folder / "shards")
    assert [note.split(": ")[1] for note in notes(folder)] == [
        "came after the seal and does not count"
    ] * 2


@pytest.fixture
def journalled(tmp_path):
    with CacheWriter(tmp_path / "open", make_header()) as writer:
        for trace in make_traces(3):
            writer.append(FinishedTrace(trace, "source"))
    return next((tmp_path / "open" / "journal").glob("*.journal"))


def test_a_torn_tail_of_a_journal_is_told(journalled):
    journalled.write_bytes(journalled.read_bytes()[:-5])
    (note,) = notes(journalled.parent.parent)
    assert note.startswith("journal/w0-00000.journal: 2 whole traces, and ")


def test_a_journal_that_holds_nonsense_is_found(journalled):
    with journalled.open("ab") as file:
        file.write(zstandard.ZstdCompressor(write_checksum=True).compress(b"nonsense"))
    (error,) = errors(journalled.parent.parent)
    assert error.startswith("journal/w0-00000.journal: frame 4 is not a trace")


@pytest.mark.slow
def test_a_cache_is_whole_at_every_moment_while_it_is_written(tmp_path):
    found = []

    def write():
        with CacheWriter(tmp_path, make_header(), shard_bytes=4000) as writer:
            for trace in make_traces(40):
                writer.append(FinishedTrace(trace, "source"))
                time.sleep(0.005)  # so that there is something to meet
            writer.finish()

    CacheWriter(tmp_path, make_header()).close()
    thread = threading.Thread(target=write)
    thread.start()
    while thread.is_alive():
        found.append(verify_cache(tmp_path))
    assert len(found) > 1
    assert [one.errors for one in found if one.errors] == []
    assert verify_cache(tmp_path).num_traces == 40


def test_nothing_to_verify_is_said_in_one_line(tmp_path):
    result = CliRunner().invoke(cli, ["verify", str(tmp_path)])
    assert "no cache here" in str(result.exception)


def test_the_command_says_one_line_or_lists_what_is_wrong(folder):
    result = run("verify", folder)
    assert (result.exit_code, result.stdout.count("\n")) == (0, 1)
    assert "2 shards, 8 traces" in result.stdout
    file = folder / "shards" / "w001-00000.arrow"
    file.write_bytes(file.read_bytes()[:-1])
    result = run("verify", folder)
    assert result.exit_code == 1
    assert "shards/w001-00000.arrow: has " in result.stdout
    assert "--repair" in result.stderr
    result = run("verify", folder, "--json")
    assert result.exit_code == 1
    figures = json.loads(result.stdout)
    assert not figures["ok"]
    assert figures["errors"][0]["file"] == "shards/w001-00000.arrow"


def damage(folder, kind):
    file = sorted((folder / "shards").glob(f"*.{'json' if 'record' in kind else 'arrow'}"))[0]
    if "missing" in kind:
        file.unlink()
    elif kind != "cache.json":
        file.write_bytes(file.read_bytes().replace(b"w", b"W", 1)[:-20])
    if kind in ("cache.json", "everything"):
        (folder / "cache.json").write_text("{")


@pytest.mark.parametrize(
    "kind", ["shard", "record", "missing shard", "missing record", "cache.json", "everything"]
)
def test_what_was_repaired_is_captured_again_with_the_same_values(capture_config, asked, kind):
    generate(capture_config)
    expected = read_all(open_cache(str(capture_config.out)))
    before = {path.read_bytes() for path in capture_config.out.glob("shards/*")}
    damage(capture_config.out, kind)
    assert run("verify", capture_config.out).exit_code == 1
    result = run("verify", capture_config.out, "--repair")
    assert result.exit_code == 0
    assert "run the command that made this cache again" in result.stdout
    assert generate(capture_config).sealed
    assert errors(capture_config.out) == []
    found = read_all(open_cache(str(capture_config.out)))
    assert len(open_cache(str(capture_config.out)).traces) == len(found) == 6
    for name, trace in expected.items():
        for column in ARRAYS:
            np.testing.assert_array_equal(getattr(trace, column), getattr(found[name], column))
    if kind not in ("shard", "record"):
        return
    kept = {path.read_bytes() for path in capture_config.out.glob("removed/1-*")}
    assert kept & before  # the half of the pair that was whole is not lost


def test_repair_leaves_whole_shards_alone_and_the_seal_can_be_put_on_again(folder):
    fingerprint = open_cache(str(folder)).fingerprint
    (folder / "cache.json").write_text("")
    repair_cache(folder, verify_cache(folder))
    assert verify_cache(str(folder)).errors == []
    seal_cache(folder)
    assert open_cache(str(folder)).fingerprint == fingerprint


def test_a_second_repair_does_not_overwrite_what_the_first_removed(folder):
    for number in (1, 2):
        file = folder / "shards" / "w000-00000.arrow"
        data = file.read_bytes()
        file.write_bytes(data[:-number])
        done = repair_cache(folder, verify_cache(folder))
        assert done.removed == {
            name: f"removed/{number}-{Path(name).name}"
            for name in ("cache.json", "shards/w000-00000.json", "shards/w000-00000.arrow")
        }
        moved = folder / done.removed["shards/w000-00000.arrow"]
        assert moved.stat().st_size == len(data) - number
        record = folder / done.removed["shards/w000-00000.json"]
        shutil.copy(record, folder / "shards" / "w000-00000.json")
        file.write_bytes(data)


def test_repair_refuses_while_a_writer_is_at_work(folder):
    (folder / "cache.json").write_text("")
    with (
        CacheWriter(folder.parent / "other", make_header()),
        pytest.raises(CacheMismatchError, match="writes here as worker 'w0'"),
    ):
        (folder / "journal" / "w0.lock").symlink_to(folder.parent / "other/journal/w0.lock")
        repair_cache(folder, verify_cache(folder))


def test_a_repair_that_was_stopped_can_be_repeated(folder, monkeypatch):
    (file, _) = sorted((folder / "shards").glob("*.arrow"))
    file.write_bytes(file.read_bytes()[:-1])
    calls = []

    def stopped(store, name, target):
        calls.append(name)
        if len(calls) == 2:
            raise OSError("stopped here")
        move(store, name, target)

    move = repair_module._move
    monkeypatch.setattr(repair_module, "_move", stopped)
    with pytest.raises(OSError, match="stopped here"):
        repair_cache(folder, verify_cache(folder))
    monkeypatch.undo()
    found = verify_cache(folder)
    assert not found.sealed
    assert found.errors == []  # the shard has lost its record, and does not count
    assert [note.file for note in found.notes] == [f"shards/{file.name}"]


def test_a_remote_cache_is_verified_and_repaired(folder, monkeypatch):
    remote = fsspec.filesystem("memory")
    remote.put(str(folder), "/verified", recursive=True)
    store = Store("memory://verified", pafs.PyFileSystem(pafs.FSSpecHandler(remote)), "/verified")
    for module in (verify_module, repair_module):
        monkeypatch.setattr(module, "open_store", lambda path: store)
    try:
        assert verify_cache("memory://verified").errors == []
        data = remote.cat("/verified/shards/w000-00000.arrow")
        remote.pipe("/verified/shards/w000-00000.arrow", data[:-3])
        done = repair_cache("memory://verified", verify_cache("memory://verified"))
        assert sorted(done.removed) == [
            "cache.json", "shards/w000-00000.arrow", "shards/w000-00000.json",
        ]  # fmt: skip
        found = verify_cache("memory://verified")
        assert (found.errors, found.sealed, found.num_shards) == ([], False, 1)
        assert remote.cat("/verified/removed/1-w000-00000.arrow") == data[:-3]
    finally:
        remote.rm("/verified", recursive=True)


@pytest.fixture
def shared(folder):
    """A cache whose input two workers shared and finished."""
    for index in (0, 1):
        publish_share(
            open_store(folder), InputShare(2, index), ShareRecord("input", 8, 4, finished=True)
        )
    return folder


def test_after_a_repair_no_part_of_a_shared_input_is_finished(shared):
    next((shared / "shards").glob("*.arrow")).unlink()
    repair_cache(shared, verify_cache(shared))
    with pytest.raises(CacheMismatchError, match=r"worker 0/2 has not finished, 1/2 has not"):
        seal_cache(shared)


def test_where_no_trace_is_lost_parts_stay_finished(shared):
    (shared / "cache.json").write_text("")
    repair_cache(shared, verify_cache(shared))
    assert seal_cache(shared).seal.num_traces == 8


@pytest.mark.parametrize("old, new", [('"num_traces": 4', '"num_traces": 5'), ("}", "")])
def test_damaged_records_of_parts_are_found_and_taken_out(shared, old, new):
    record = shared / "parts" / "w1of2.json"
    record.write_text(record.read_text().replace(old, new))
    with pytest.raises(CacheFormatError, match="run that worker's command again"):
        read_shares(open_store(shared))
    (error,) = errors(shared)
    assert error.startswith("parts: parts/w1of2.json: damaged")
    done = repair_cache(shared, verify_cache(shared))
    assert {"parts/w0of2.json", "parts/w1of2.json"} < set(done.removed)
    assert errors(shared) == []
