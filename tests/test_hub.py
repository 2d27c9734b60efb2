"""Caches on the Hugging Face Hub, read from a stand-in on loopback; and others through fsspec."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from caches import assert_same, read_all
from commands import COMMAND
from fakes import make_cache, make_header, make_traces, write_shards
from hub_server import git_sha1, hub_server

from teacher_cache.format import (
    CacheError,
    CacheMismatchError,
    CacheWriter,
    FinishedTrace,
    open_cache,
    open_store,
    seal_cache,
)
from teacher_cache.format.checking.verify import verify_cache
from teacher_cache.format.records import require_manifest
from teacher_cache.format.writing.card import card_text
from teacher_cache.transform.hub_dataset import HubDataset, Outgoing
from teacher_cache.transform.push import PushConfig, push

URI = "hf://datasets/me/cache"


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "cache"
    return make_cache(folder, make_traces(12, lengths=(200, 300)), traces_per_shard=6)


def run(hub, tmp_path, *args):
    """A command as a process: the Hub's address is read when its library is imported."""
    environment = os.environ | {
        "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
    }  # fmt: skip
    environment.pop("HF_HUB_OFFLINE", None)
    return subprocess.run(
        [*COMMAND, *map(str, args)], env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_a_cache_on_the_hub_is_read_as_a_local_one_and_by_range(local, tmp_path):
    with hub_server(local) as hub:
        done = run(hub, tmp_path, "verify", URI)
        assert done.returncode == 0, done.stderr
        assert "no errors" in done.stdout
        hub.num_bytes.clear()
        hub.num_ranges = 0
        out = tmp_path / "lead.jsonl"
        done = run(hub, tmp_path, "export", URI, out, "--lead-span", "0.1", "--logprobs")
        assert done.returncode == 0, done.stderr
    traces = {trace.trace_id: trace for trace in open_cache(local)}
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == len(traces)
    for row in rows:
        n = len(row["token_ids"])
        assert row["token_ids"] == traces[row["id"]].token_ids[:n].tolist()
    shards = {name: size for name, size in hub.num_bytes.items() if name.endswith(".arrow")}
    assert hub.num_ranges > 0
    assert len(shards) == 2
    for name, num_bytes in shards.items():
        assert num_bytes < 0.6 * Path(local, name).stat().st_size


@pytest.mark.slow
def test_what_the_hub_lacks_is_said_in_one_line(local, tmp_path):
    with hub_server(local) as hub:
        uri = "hf://datasets/me/other"
        done = run(hub, tmp_path, "inspect", uri)
        assert done.returncode == 1, done.stderr
        *progress, last = done.stderr.strip().splitlines()
        assert all(line.endswith("cache-teacher inspect: loading") for line in progress)
        assert f"{uri}: no cache here" in last


@pytest.mark.slow
def test_a_push_resumes_and_leaves_the_whole_cache_there(local, tmp_path):
    arguments = ("push", local, URI, "--license", "apache-2.0")
    with hub_server(tmp_path / "remote") as hub:
        hub.lfs_suffix = ".arrow"  # as the Hub has it of large files and of these
        hub.fail_at_commit = 1  # that of cache.json
        done = run(hub, tmp_path, *arguments)
        assert done.returncode == 1, done.stdout
        assert "the Hub is tired" in done.stderr.splitlines()[-1]
        assert "cache.json" not in hub.sent
        assert len(hub.lfs) == len(list(Path(local).rglob("*.arrow"))) > 0
        num_sent = len(hub.sent)
        done = run(hub, tmp_path, *arguments)
        assert done.returncode == 0, done.stderr
        assert hub.sent[num_sent:] == ["cache.json"]
        assert "1 of them sent now" in done.stdout
        assert "private" in run(hub, tmp_path, *arguments, "--private").stderr
    pushed = open_cache(str(tmp_path / "remote"))
    assert pushed.fingerprint == open_cache(local).fingerprint
    assert verify_cache(pushed.path).errors == []
    assert (tmp_path / "remote" / "README.md").read_text().startswith("---\nlicense: apache-2.0\n")


class Entry:
    """A file of the Hub outside LFS."""

    lfs = None

    def __init__(self, content):
        self.size, self.blob_id = len(content), git_sha1(content)


class FakeHub:
    """`HubDataset` as a dict of files."""

    def __init__(self, files):
        self.files, self.private = files, False

    def __call__(self, uri, repository):
        return self

    def is_private(self):
        return None if self.files is None else self.private

    def make(self, *, private):
        self.files, self.private = {}, private

    def entries(self):
        return {name: Entry(content) for name, content in self.files.items()}

    def text(self, name):
        return self.files[name].decode()

    def send(self, files):
        for file in files:
            is_file = isinstance(file.content, Path)
            self.files[file.name] = file.content.read_bytes() if is_file else file.content


@pytest.fixture
def fake(monkeypatch):
    def made(files):
        hub = FakeHub(files)
        monkeypatch.setattr("teacher_cache.transform.push.HubDataset", hub)
        return hub

    return made


@pytest.mark.parametrize("name", ["notes.txt", "shards/of-another.arrow", "cache.json"])
def test_a_repository_of_other_files_is_left_alone(name, local, fake):
    there = {".gitattributes": b"", "README.md": b"# theirs", name: b"{}"}
    hub = fake(dict(there))
    with pytest.raises(CacheMismatchError, match=f"holds {name}, .*Name another repository"):
        push(PushConfig(cache=Path(local), to=URI))
    assert hub.files == there


def test_a_card_edited_on_the_hub_stays_and_keeps_its_license(local, tmp_path, fake):
    cache = tmp_path / "cache"
    shutil.copytree(local, cache)
    hub = fake(None)
    push(PushConfig(cache=cache, to=URI, license="mit", private=True))
    assert hub.private
    made = (cache / "README.md").read_text()
    licensed = made.replace("---\n", "---\nlicense: mit\n", 1)
    assert hub.files["README.md"].decode() == licensed
    assert push(PushConfig(cache=cache, to=URI)).num_sent == 0
    (cache / "README.md").write_text(made + "edited here\n")
    assert push(PushConfig(cache=cache, to=URI)).num_sent == 1
    assert hub.files["README.md"].decode() == licensed + "edited here\n"
    hub.files["README.md"] = (licensed + "edited there\nlicense: of the text\n").encode()
    assert push(PushConfig(cache=cache, to=URI)).num_sent == 0
    push(PushConfig(cache=cache, to=URI, license="apache-2.0"))
    expected = licensed.replace("mit", "apache-2.0") + "edited there\nlicense: of the text\n"
    assert hub.files["README.md"].decode() == expected
    (cache / "README.md").unlink()
    assert push(PushConfig(cache=cache, to=URI)).num_sent == 0
    with pytest.raises(ValueError, match=r"no README\.md to name it in"):
        push(PushConfig(cache=cache, to=URI, license="mit"))


def test_an_existing_public_repository_is_not_pushed_to_as_private(local, fake):
    hub = fake({})
    with pytest.raises(CacheMismatchError, match="there and public"):
        push(PushConfig(cache=Path(local), to=URI, private=True))
    assert hub.files == {}


def test_an_upload_that_fails_is_told_with_its_cause(monkeypatch):
    hub = HubDataset(URI, "me/cache")

    def failing(*args, **settings):
        raise RuntimeError("Error while uploading 'a' to the Hub.") from OSError("no\nroute")

    monkeypatch.setattr(hub._api, "create_commit", failing)
    with pytest.raises(CacheError, match=r"Error while uploading 'a' to the Hub\. no route \(run"):
        hub.send([Outgoing.of("a", b"a")])


def test_what_is_not_whole_is_not_pushed(tmp_path):
    write_shards(tmp_path / "open", make_traces(2))
    config = PushConfig(cache=tmp_path / "open", to="hf://datasets/me/cache")
    with pytest.raises(CacheError, match="not sealed"):
        push(config)
    make_cache(tmp_path / "torn", make_traces(2))
    shard = next((tmp_path / "torn" / "shards").glob("*.arrow"))
    shard.write_bytes(shard.read_bytes()[:-9])
    with pytest.raises(CacheError, match="damaged, so not sent"):
        push(PushConfig(cache=tmp_path / "torn", to="hf://datasets/me/cache"))
    with pytest.raises(ValueError, match="expected hf://datasets/OWNER/NAME"):
        PushConfig(cache=tmp_path, to="me/cache")


@pytest.mark.parametrize(
    ("changes", "said", "options"),
    [
        ({}, "the mass outside them", "--lead-span 0.5"),
        (
            {"imported": {"tail": "unknown"}, "teacher": "/home/me/models/Big-7B"},
            "without the mass outside them",
            "--lead-span 0.5 --tail renormalise",
        ),
        ({"max_lead_span": 0.3}, "it holds a lead span of 0.3", "--lead-span 0.3"),
        (
            {"lead_spans": {"spans": "0.375:4,1:1", "seed": 3}},
            "it holds the mixture 0.375:4,1:1 of seed 3",
            "--lead-span 0.375:4,1:1 --seed 3",
        ),
    ],
)
def test_the_card_says_what_the_cache_holds_and_how_to_train_on_it(changes, said, options, local):
    header, seal = make_header(**changes), require_manifest(open_store(local)).seal
    card = card_text(header, seal)
    assert said in card
    assert f"--out run {options}\n" in card
    assert "/home/me" not in card
    assert f"# Logits of {header.teacher.rpartition('/')[2]}\n" in card


def test_an_uri_that_pyarrow_does_not_know_goes_through_fsspec(tmp_path):
    traces = make_traces(5)
    uri = "memory://bucket/cache"
    with CacheWriter(uri, make_header(), journal=tmp_path / "journal") as writer:
        for trace in traces:
            writer.append(FinishedTrace(trace, "source"))
        writer.finish()
    seal_cache(uri, journal=tmp_path / "journal")
    found = read_all(open_cache(uri))
    for trace in traces:
        assert_same(found[trace.trace_id], trace)


def test_an_uri_that_nobody_knows_is_refused():
    with pytest.raises(CacheError, match=r"nothing://x/y: cannot be opened: .*nothing"):
        open_store("nothing://x/y")
