"""--num-replicas: a real Ray cluster on this machine, and one of its actors killed."""

import json
import os
import re
import signal
import time

import numpy as np
import psutil
import pytest
from caches import read_all
from commands import arguments, write_rows
from forked import CACHE_TEACHER, Forked, run_forked
from small_teachers import make_small_model

from teacher_cache.format import open_cache

COLUMNS = ("token_ids", "k", "top_ids", "top_logits", "tail_logit")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As many threads with Ray as without: their number changes the last bit of a sum."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def capture_of(one_thread, tmp_path_factory):
    """The command line of a capture of 120 traces, and the traces without Ray."""
    folder = tmp_path_factory.mktemp("cluster")
    (folder / "model").mkdir()
    make_small_model(folder / "model")
    rows = [{"id": f"p{n}", "prompt": f"a {n % 30} b"} for n in range(120)]
    prompts = write_rows(folder / "prompts.jsonl", rows)

    def call(out, *more):
        return arguments(folder / "model", prompts, out, "--max-new-tokens", "60", *more)

    run_forked(CACHE_TEACHER, *call(folder / "alone"), expect=0)
    return call, read_all(open_cache(str(folder / "alone")))


def journal_sizes(out):
    return {file.name: file.stat().st_size for file in out.glob("journal/w[01]-*.journal")}


def start_and_wait_for_traces(call, out):
    """A run with two actors, once both have finished some traces in it."""
    before = journal_sizes(out)
    process = Forked(CACHE_TEACHER, *call)
    deadline_s = time.monotonic() + 200
    while time.monotonic() < deadline_s and process.poll() is None:
        grown = [size - before.get(name, 0) for name, size in journal_sizes(out).items()]
        if len(grown) == 2 and min(grown) > 2000:
            return process
        time.sleep(0.05)
    process.kill()
    raise AssertionError(process.communicate()[1])


def actors_of(process):
    """The processes of a run's actors."""
    return [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if child.name().startswith("ray::Replica") or "ray::Replica" in " ".join(child.cmdline())
    ]


def assert_equal(found, expected):
    assert sorted(found) == sorted(expected)
    for name, trace in expected.items():
        for column in COLUMNS:
            np.testing.assert_array_equal(getattr(found[name], column), getattr(trace, column))


@pytest.mark.slow
def test_a_stopped_cluster_goes_on_replaces_a_killed_actor_and_loses_nothing(capture_of, tmp_path):
    call, expected = capture_of
    out = tmp_path / "cache"
    args = call(out, "--num-replicas", 2)
    process = start_and_wait_for_traces(args, out)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=200)
    assert process.returncode == 128 + signal.SIGTERM
    assert "run the same command again to resume" in said

    process = start_and_wait_for_traces(args, out)
    actors = actors_of(process)
    assert len(actors) == 2
    os.kill(actors[0].pid, signal.SIGKILL)
    said, noise = process.communicate(timeout=200)
    assert process.returncode == 0, noise
    assert "another takes its place" in noise
    num_new, num_kept = map(
        int, re.match(rf"{out}: (\d+) traces captured now .* (\d+) were", said).groups()
    )
    assert num_kept > 0
    assert num_new + num_kept == 120
    assert said.count("\n") == 1
    assert "complete and sealed" in said
    seal = json.loads((out / "cache.json").read_text())["seal"]
    assert (seal["num_traces"], seal["num_duplicates"]) == (120, 0)
    assert_equal(read_all(open_cache(str(out))), expected)


@pytest.mark.slow
def test_an_error_of_an_actor_is_one_line(capture_of, tmp_path):
    call, _ = capture_of
    model = tmp_path / "model"
    model.mkdir()
    make_small_model(model)
    (model / "model.safetensors").unlink()
    args = call(tmp_path / "cache", "--num-replicas", 2)
    args[args.index("--model") + 1] = str(model)
    done = run_forked(CACHE_TEACHER, *args, expect=1)
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("cache-teacher: ")]
    assert line.startswith(f"cache-teacher: model {str(model)!r}: ")
