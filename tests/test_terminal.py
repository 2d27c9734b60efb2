"""What both programs say, and what they refuse before anything heavy is imported."""

import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from teacher_cache.format import CacheError, open_cache
from teacher_cache.format.reachable import check_reachable
from teacher_cache.terminal import early_checks
from teacher_cache.terminal.entry import CommandLine, run_command
from teacher_cache.terminal.escape import printable, printable_lines
from teacher_cache.terminal.progress import Progress, duration
from teacher_cache.terminal.stop_signals import Stopped, stop_signals

ROOT = Path(__file__).parent.parent
TEACHER = str(ROOT / "tools" / "tiny-teacher")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.44, "0.4 s"), (9.94, "9.9 s"), (42.4, "42 s"), (59.7, "1 min"), (557, "9 min 17 s"),
        (3600, "1 h"), (3600 * 5 + 179, "5 h 2 min"), (86400 * 2 + 3600 * 4 + 5, "2 d 4 h"),
    ],
)  # fmt: skip
def test_durations_are_for_people(seconds, text):
    assert duration(seconds) == text


HOSTILE = "\x1b]0;owned\x07 a\u202eb\nc\x9bd\udcff"


def test_strangers_text_moves_no_cursor_and_turns_no_line():
    assert printable(HOSTILE) == r"\x1b]0;owned\x07 a\u202eb\nc\x9bd\xff"
    assert printable_lines(f"id {HOSTILE}\tend") == "id " + (
        "\\x1b]0;owned\\x07 a\\u202eb\nc\\x9bd\\xff\tend"
    )
    assert printable("größe 数 😀") == "größe 数 😀"
    long = printable("x" * 10_000)
    assert len(long) < 250
    assert long.endswith("(10,000 characters)")


def test_a_display_says_what_is_done_and_when_it_will_end(caplog):
    caplog.set_level(logging.INFO)
    with Progress("captured", 200, "traces") as shown:
        shown.set(50, "6,000 tokens")
        time.sleep(1.2)
    first, last = [record.getMessage() for record in caplog.records]
    assert re.fullmatch(r"captured 50/200 traces \| 6,000 tokens \| eta \d.*", first)
    assert last.startswith("captured 50/200 traces | 6,000 tokens | ")


def test_what_takes_a_moment_is_not_worth_a_word(caplog):
    caplog.set_level(logging.INFO)
    with Progress("sealing"):
        pass
    assert caplog.records == []


def send_twice(gap_s, block):
    """Two signals, one of them inside a block; what is raised, and what the switch knows."""
    with stop_signals() as switch, block(switch):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(gap_s)
        os.kill(os.getpid(), signal.SIGTERM)
    return switch


def test_a_signal_is_raised_at_once_held_or_noted():
    with pytest.raises(Stopped) as stopped, stop_signals():
        os.kill(os.getpid(), signal.SIGINT)
    assert stopped.value.signum == signal.SIGINT
    reached = []
    with pytest.raises(Stopped), stop_signals() as switch:
        with switch.held():
            os.kill(os.getpid(), signal.SIGTERM)
            reached.append("the end of the write")
        reached.append("what comes after it")
    assert reached == ["the end of the write"]


def test_the_second_signal_insists_but_the_echo_of_the_first_does_not():
    assert send_twice(0, lambda switch: switch.noted()).signum == signal.SIGTERM
    with pytest.raises(Stopped):
        send_twice(1.1, lambda switch: switch.noted())


WAITS = """
import os
from teacher_cache.terminal import entry

entry._load = lambda line: (lambda group: print(os.environ["OMP_WAIT_POLICY"]) or 0, None)
entry.run_program(entry.CommandLine("cache-teacher", "", ()))
"""


@pytest.mark.parametrize("chosen", [None, "active"])
def test_threads_that_wait_do_not_spin_unless_the_user_says_so(chosen):
    environment = {name: v for name, v in os.environ.items() if name != "OMP_WAIT_POLICY"}
    if chosen is not None:
        environment["OMP_WAIT_POLICY"] = chosen
    ended = subprocess.run(
        [sys.executable, "-c", WAITS], env=environment, capture_output=True, text=True, check=True
    )
    assert ended.stdout.strip() == (chosen or "passive")


SWALLOWS = """
import sys, time
from teacher_cache.terminal import entry

def load(line):
    def run(group):
        print("here", flush=True)
        end_s = time.monotonic() + 30
        while time.monotonic() < end_s:
            try:
                time.sleep(30)
            except BaseException:
                pass
        return 0
    return run, None

entry._load = load
entry.run_program(entry.CommandLine("cache-teacher", "", ()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_library_that_swallows_the_signal_does_not_keep_us(number):
    process = subprocess.Popen(
        [sys.executable, "-c", SWALLOWS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "here\n"
    start_s = time.monotonic()
    process.send_signal(number)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert time.monotonic() - start_s < 4
    assert said.count("\n") == 1
    assert said.startswith("cache-teacher: stopped by ")


FAILS = """
import sys
from teacher_cache.terminal import entry

def run(group):
    raise {error}

entry._load = lambda line: (run, None)
entry.run_program(entry.CommandLine("cache-teacher", "", ("teacher", "cpu")))
"""


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            "ValueError('--out: wrong')",
            r"cache-teacher: ValueError: --out: wrong; the traceback is",
        ),
        ("KeyError('x')", r"cache-teacher: KeyError: 'x'; the traceback is in \S+\.log"),
        ("RecursionError", "cache-teacher: RecursionError: no message; the traceback is in"),
        ("OSError(28, 'No space left', 'f')", "fix this and run the same command again"),
        ("OSError(17, 'File exists', 'f')", r"cache-teacher: \[Errno 17\] File exists: 'f'$"),
        (
            "ModuleNotFoundError(name='vllm')",
            r"in a checkout of leadspan: pip install '\.\[teacher",
        ),
        ("MemoryError", "cache-teacher: out of memory"),
        ('RuntimeError("can\'t start new thread")', "out of memory: can't start new thread"),
        (r"ValueError('\x1b[31m red')", r"\\x1b\[31m red"),
    ],
)
def test_whatever_goes_wrong_is_one_line(error, said):
    done = subprocess.run(
        [sys.executable, "-c", FAILS.format(error=error)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert re.search(said, done.stderr.strip())
    for log in re.findall(r"\S+\.log", done.stderr):
        assert "Traceback" in Path(log).read_text()
        Path(log).unlink()


def test_our_own_words_need_no_traceback(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["cache-teacher", "inspect", str(tmp_path)])
    line = CommandLine("cache-teacher", "teacher_cache.cli.group:cli", ())
    assert run_command(line) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"cache-teacher: cache: {tmp_path}: no cache here")
    assert "traceback" not in said


OTHERS = """
import os, subprocess, sys, logging
from teacher_cache.terminal import messages

program = messages.configure("cache-teacher")
with messages.others_into_log():
    print("a library's print")
    os.write(2, b"a library's C code\\n")
    subprocess.run(["echo", "a library's child"])
    os.write(2, b"(Core pid=7) ERROR 11-26 17:00:00 [core.py:9] a.OutOfMemoryError: too large\\n")
    os.write(2, b"RuntimeError: initialization failed. See root cause above. Failed: {}\\n")
    logging.getLogger("library").warning("a library's warning")
    logging.getLogger("teacher_cache.x").info("ours")
logging.getLogger("library").info("never said")
logging.getLogger("library").warning("said")
print("a result")
print(program.log_file, messages.last_error_said(), file=sys.stderr)
"""


def test_what_others_say_goes_into_a_log_and_ours_does_not():
    done = subprocess.run(
        [sys.executable, "-c", OTHERS], capture_output=True, text=True, check=True
    )
    assert done.stdout == "a result\n"
    ours, warning, last = done.stderr.splitlines()
    times, said = zip(*(line.rsplit(" ", 1) for line in (ours, warning)), strict=True)
    assert said == ("ours", "said")
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", time) for time in times)
    log, _, error = last.partition(" ")
    assert error == "a.OutOfMemoryError: too large"
    text = Path(log).read_text()
    for source in ("print", "C code", "child", "warning"):
        assert f"a library's {source}\n" in text
    Path(log).unlink()


def test_a_log_file_holds_what_a_terminal_may_show(tmp_path):
    code = (
        "import logging, sys\nfrom pathlib import Path\n"
        "from teacher_cache.terminal import messages\n"
        "messages.configure('x').set_log_file(Path(sys.argv[1]))\n"
        f"logging.getLogger('teacher_cache.x').info({HOSTILE!a})\n"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "log"], check=True, capture_output=True)
    assert r"teacher_cache.x: \x1b]0;owned\x07 a\u202eb" in (tmp_path / "log").read_text()


def test_a_log_file_on_a_full_disk_is_given_up_in_one_line():
    code = (
        "import logging\nfrom pathlib import Path\n"
        "from teacher_cache.terminal import messages\n"
        "messages.configure('x').set_log_file(Path('/dev/full'))\n"
        "for text in ('one', 'two'):\n    logging.getLogger('teacher_cache.x').info(text)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    lines = done.stderr.splitlines()
    assert "/dev/full: nothing more is logged there: [Errno 28] No space left on device" in lines
    assert sorted(line.split(" ")[-1] for line in lines) == ["device", "one", "two"]


ENDS = """
from teacher_cache.terminal import entry, messages

def run(group):
    with messages.others_into_log():
        print("a library's print")
    {end}

entry._load = lambda line: (run, None)
entry.run_program(entry.CommandLine("cache-teacher", "", ()))
"""


@pytest.mark.parametrize(
    ("end", "code", "num_logs"),
    [("return 0", 0, 0), ("raise SystemExit(1)", 1, 0), ("raise OSError(17, 'exists')", 1, 1)],
)
def test_only_a_log_that_a_message_names_stays(tmp_path, end, code, num_logs):
    done = subprocess.run(
        [sys.executable, "-c", ENDS.format(end=end)],
        capture_output=True, text=True, check=False, env=os.environ | {"TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == code
    logs = list(tmp_path.iterdir())
    assert len(logs) == num_logs
    assert all(str(log) in done.stderr for log in logs)


def test_a_misspelt_folder_is_known_as_one(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    early_checks.check_model("tools/tiny-teacher", "--model")
    with pytest.raises(ValueError, match=r"--model: .*did you mean tools/tiny-teacher\?"):
        early_checks.check_model("tools/tiny-techer", "--model")
    with pytest.raises(ValueError, match="no such folder, and not a valid name on the hub"):
        early_checks.check_model("/nowhere", "--model")
    (tmp_path / "hub" / "models--me--teacher").mkdir(parents=True)
    early_checks.check_model("me/teacher", "--model")  # a copy is here
    run = tmp_path / "run" / "model"
    run.mkdir(parents=True)
    (run / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=re.escape(f"its student is {run}")):
        early_checks.check_model(str(run.parent), "--student")
    (run.parent / "config.json").write_text('{"leadspan_run": 1}')  # a run's own, not a model's
    with pytest.raises(ValueError, match=re.escape(f"is a run's; its student is {run}")):
        early_checks.check_model(str(run.parent), "--student")


def test_folders_and_files_to_write_are_looked_at_first(tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(ValueError, match="expected a folder, found a file"):
        early_checks.check_out_folder(file)
    with pytest.raises(ValueError, match=r"expected a folder, found that .* is a file"):
        early_checks.check_out_folder(file / "below")
    early_checks.check_out_folder(tmp_path / "new" / "below")
    with pytest.raises(ValueError, match=r"found other files \(file\)"):
        early_checks.check_out_cache(tmp_path)
    with pytest.raises(ValueError, match=r"already exists.*--force"):
        early_checks.check_out_file(file, "OUT", force=False)
    early_checks.check_out_file(file, "OUT", force=True)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ValueError, match="a device or a pipe"):
        early_checks.check_file(tmp_path / "fifo", "--prompts")


def test_addresses_that_nobody_answers_at_cost_no_minutes(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start_s = time.monotonic()
    with pytest.raises(ValueError, match="--ray-address: nobody answers"):
        early_checks.check_ray_address(f"127.0.0.1:{port}")
    with pytest.raises(CacheError, match=rf"nobody answers at 127.0.0.1:{port}"):
        open_cache(f"s3://key:secret@bucket/x?endpoint_override=127.0.0.1:{port}&scheme=http")
    assert time.monotonic() - start_s < 5
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy")  # it answers for the server
    check_reachable("s3://bucket/other", "s3://bucket/other")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", "/nowhere")
    with pytest.raises(ValueError, match="wandb login"):
        early_checks.check_wandb_login()
