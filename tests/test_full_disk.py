"""Disks that are full, limited or read-only: the job stops in one line, a second run goes on."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from caches import assert_same, read_all
from fakes import make_header, make_traces

from teacher_cache.format import CacheWriter, FinishedTrace, open_cache, seal_cache

WRITER = """
    import resource, sys
    from pathlib import Path
    import teacher_cache.cli as cli
    from teacher_cache.cli import capturing
    from fakes import make_header, make_traces
    from teacher_cache.format import CacheWriter, FinishedTrace

    folder, num_traces, limit = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    def capture(config):
        with CacheWriter(folder, make_header(), shard_bytes=30_000) as writer:
            for trace in make_traces(num_traces):
                if trace.trace_id not in writer.finished():
                    writer.append(FinishedTrace(trace, "source"))
                    print(trace.trace_id, flush=True)
            writer.finish()
        sys.exit(0)

    capturing.generate = capture
    sys.argv = ["cache-teacher", "generate", "--model", "m", "--prompts", "p", "--out", "o"]
    cli.program()
"""


# Root may write everywhere; this is root as everybody else.
AS_USER = (
    ("setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override")
    if os.geteuid() == 0
    else ()
)


def run_writer(folder, num_traces, limit_bytes=0, command=()):
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])
    }
    return subprocess.run(
        [
            *command,
            sys.executable,
            "-c",
            textwrap.dedent(WRITER),
            str(folder),
            str(num_traces),
            str(limit_bytes),
        ],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )


def assert_stopped_in_one_line(done, reason):
    assert done.returncode == 1, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"cache-teacher: [Errno {reason}")
    assert "what was finished before is kept" in line
    return line


def assert_goes_on(folder, appended, num_traces):
    """Everything that was appended is there, and a run with a good disk does the rest."""
    with CacheWriter(folder, make_header()) as writer:
        assert set(appended) <= set(writer.finished())
        for trace in make_traces(num_traces):
            if trace.trace_id not in writer.finished():
                writer.append(FinishedTrace(trace, "source"))
        writer.finish()
    seal_cache(folder)
    found = read_all(open_cache(folder))
    assert len(found) == num_traces
    for trace in make_traces(num_traces):
        assert_same(trace, found[trace.trace_id])


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 200 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
def test_a_full_disk_stops_the_job_and_nothing_finished_is_lost(small_disk):
    cache = small_disk / "cache"
    filler = small_disk / "filler"
    filler.write_bytes(bytes(50_000))
    done = run_writer(cache, 150)
    line = assert_stopped_in_one_line(done, "28] No space left on device: ")
    assert str(cache) in line
    appended = done.stdout.split()
    assert 0 < len(appended) < 150
    assert not list((cache / "shards").glob(".tmp-*"))
    readable = open_cache(cache, allow_unsealed=True)  # as it is, on the full disk
    assert len(read_all(readable)) == len(readable.traces)
    subprocess.run(["mount", "-o", "remount,size=10m", str(small_disk)], check=True)
    assert_goes_on(cache, appended, 150)


@pytest.mark.slow
def test_a_file_system_that_turns_read_only_stops_the_job(small_disk):
    cache = small_disk / "cache"
    done = run_writer(cache, 20)
    assert done.returncode == 0, done.stderr
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    line = assert_stopped_in_one_line(run_writer(cache, 40), "30] Read-only file system: ")
    assert str(cache) in line
    assert len(read_all(open_cache(cache, allow_unsealed=True))) == 20
    subprocess.run(["mount", "-o", "remount,rw,size=10m", str(small_disk)], check=True)
    assert_goes_on(cache, [f"t{number}" for number in range(20)], 40)


@pytest.mark.slow
@pytest.mark.parametrize("limit_bytes", [15_000, 32_000], ids=["the journal", "the shard"])
def test_a_file_that_may_not_grow_stops_the_job(tmp_path, limit_bytes):
    done = run_writer(tmp_path / "cache", 200, limit_bytes)
    line = assert_stopped_in_one_line(done, "27] File too large: ")
    assert ("journal" if limit_bytes < 30_000 else ".arrow") in line
    assert_goes_on(tmp_path / "cache", done.stdout.split(), 200)


@pytest.mark.slow
def test_a_folder_that_may_not_be_written_stops_the_job(tmp_path):
    cache = tmp_path / "cache"
    assert run_writer(cache, 5).returncode == 0
    (cache / "journal").chmod(0o500)
    try:
        done = run_writer(cache, 9, command=AS_USER)
        assert_stopped_in_one_line(done, "13] Permission denied: ")
    finally:
        (cache / "journal").chmod(0o700)
    assert_goes_on(cache, [f"t{number}" for number in range(5)], 9)
