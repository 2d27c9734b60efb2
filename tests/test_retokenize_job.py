"""`cache-teacher retokenize`: a whole job on a small teacher, from rows to a trained student."""

import errno
import json
import os
import resource
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from families import trl_templates
from tokenizers import Tokenizer, models
from toy_tokenizers import train
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from student_train.cli.group import cli as training
from teacher_cache.cli.group import cli
from teacher_cache.engines import EngineError
from teacher_cache.format import (
    CacheMismatchError,
    CacheWriter,
    FinishedTrace,
    open_cache,
    seal_cache,
)
from teacher_cache.format.checking.verify import verify_cache
from teacher_cache.sources import SourceError
from teacher_cache.sources.tokenizer import ModelFiles, TeacherTokenizer
from teacher_cache.terminal.stop_signals import Stopped
from teacher_cache.transform.retokenize import run as job
from teacher_cache.transform.retokenize import workers
from teacher_cache.transform.retokenize.configs import RetokenizeConfig
from teacher_cache.transform.retokenize.run import retokenize
from teacher_cache.transform.retokenize.token_bytes import UnsupportedTokenizerError
from teacher_cache.transform.truncate import truncate_cache

WORDS = [
    "the cat sat on the mat, 12345 + 678 = 13023.\n", "naïve 日本語 😀👩\u200d👩 text",
    "def f(x):\n    return x[0] + 1\n", "What is 2+3? It is 5.", "don't    stop\t\tnow",
]  # fmt: skip
ROWS = [
    {
        "id": f"r{number}",
        "level": number,
        "messages": [
            {"role": "user", "content": f"What is {number}+3?"},
            {
                "role": "assistant",
                "reasoning_content": f"{WORDS[number % 5]} so {number} and 3 make {number + 3}.",
                "content": f"It is {number + 3}. {WORDS[(number + 1) % 5]}",
            },
        ],
    }
    for number in range(12)
]


def make_model(folder, style, vocab_size, *, template="qwen3", end="<|im_end|>", pad=0, **special):
    """A folder with a small model, a trained tokenizer, and a real chat template."""
    backend = Tokenizer.from_str(train([*WORDS, *(w * 2 for w in WORDS)], vocab_size, style))
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end, **special)
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    fast.add_tokens(["<think>", "</think>"])
    fast.chat_template = trl_templates()[template]
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast) + pad, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=2048,
        bos_token_id=None, eos_token_id=fast.eos_token_id, initializer_range=0.6,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


COLUMNS = ("token_ids", "k", "top_ids", "top_logits", "tail_logit", "chunk_logprob")


def invoke(group, *args):
    return CliRunner().invoke(group, list(map(str, args)))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("teacher"), "gpt4", 420)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("student"), "gpt2", 330, pad=5)


@pytest.fixture(scope="module")
def source(teacher, rows, tmp_path_factory):
    out = tmp_path_factory.mktemp("source") / "cache"
    score = ["--engine", "transformers", "--dtype", "float32", "--no-capture-prompt"]
    done = invoke(
        cli, "score", "--model", teacher, "--traces", rows, "--out", out, *score, "--top-k", 32
    )
    assert done.exit_code == 0, done.output
    return str(out)


def configured(source, out, student, rows, **changes):
    return RetokenizeConfig(
        cache=source, out=str(out), student=student, rows=rows, **{"processes": 1, **changes}
    )


@pytest.fixture(scope="module")
def made(source, student, rows, tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "cache"
    return retokenize(configured(source, out, student, rows)), str(out)


def traces_of(path):
    cache = open_cache(path, allow_unsealed=True)
    return {
        trace.trace_id: trace
        for shard, commit in enumerate(cache.shards)
        for trace in cache.read(
            shard, {row: cache.num_held(info) for row, info in enumerate(commit.traces)}
        ).values()
    }


@pytest.mark.slow
def test_the_cache_is_an_ordinary_one_in_the_students_tokens(made, source, student):
    report, out = made
    assert (report.num_traces, report.rejects.total) == (12, 0)
    assert not verify_cache(out).errors
    theirs = TeacherTokenizer(ModelFiles(student, None), {})
    header, before = open_cache(out).header, open_cache(source)
    assert header.tokenizer_fingerprint == theirs.fingerprint
    assert header.vocab_size == ModelFiles(student, None).vocab_size()
    assert header.derived["fingerprint"] == before.fingerprint
    assert header.derived["tokenizer_fingerprint"] == before.header.tokenizer_fingerprint
    for number, row in enumerate(ROWS):
        trace = traces_of(out)[row["id"]]
        turn = row["messages"][1]
        prompt = f"<|im_start|>user\nWhat is {number}+3?<|im_end|>\n<|im_start|>assistant\n"
        thought = f"<think>\n{turn['reasoning_content']}\n</think>"
        assert theirs.decode(trace.token_ids[: trace.cot_start]) == prompt
        assert theirs.decode(trace.token_ids[trace.cot_start : trace.answer_start]) == thought
        answer = theirs.decode(trace.token_ids[trace.answer_start :])
        assert answer == f"\n\n{turn['content']}<|im_end|>"
        assert trace.fields["level"] == number
        assert not trace.k[: trace.cot_start].any()
        assert trace.k[trace.cot_start :].astype(bool).mean() > 0.6


def test_messages_that_the_cache_holds_need_no_rows(made, source, student, rows, tmp_path):
    config = RetokenizeConfig(cache=source, out=str(tmp_path / "out"), student=student, processes=1)
    assert retokenize(config).num_traces == 12
    given, held = traces_of(made[1]), traces_of(str(tmp_path / "out"))
    for name, trace in given.items():
        np.testing.assert_array_equal(trace.token_ids, held[name].token_ids)


def test_its_certificate_is_stored_shown_and_usable_as_a_condition(made, student, tmp_path):
    report, out = made
    found = [trace.fields["retokenized"] for trace in traces_of(out).values()]
    for one in found:
        # The student's own probabilities of the text are the teacher's and what is shared.
        difference = one["teacher_nats"] - one["student_nats"] - one["shared_nats"]
        assert difference == pytest.approx(one["chain_rule_error"] * one["num_tokens"], abs=0.5)
        assert abs(one["chain_rule_error"]) < 0.05
        assert 0.6 < one["coverage"] <= 1
    shown = invoke(cli, "inspect", out, "--json")
    assert json.loads(shown.output)["retokenized"] == pytest.approx(report.figures)
    assert "chain-rule error" in invoke(cli, "inspect", out).output


@pytest.mark.slow
def test_chunks_hold_the_teachers_likelihood_of_the_text(made, source, teacher, student):
    theirs, ours = (TeacherTokenizer(ModelFiles(f, None), {}) for f in (teacher, student))
    before = traces_of(source)
    for name, trace in traces_of(made[1]).items():
        old = before[name]
        own = old.top_logprobs[old.top_ids == old.token_ids[old.token_of_entry]]
        assert len(own) == len(old) - old.cot_start
        ends = np.flatnonzero(~np.isnan(trace.chunk_logprob))
        values = trace.chunk_logprob[ends]
        assert (ends[0], values[0]) == (trace.cot_start - 1, 1)
        assert (values[1:] <= 0).all()
        assert ends[-1] == len(trace) - 1
        assert values[1:].sum() == pytest.approx(own.sum(), rel=1e-5)
        for end, summed in zip(ends[1:-1], np.cumsum(values[1:-1]), strict=True):
            text = ours.decode(trace.token_ids[trace.cot_start : end + 1])
            if "\ufffd" in text:  # ends inside a character
                continue
            places = [
                n
                for n in range(1, len(own) + 1)
                if theirs.decode(old.token_ids[old.cot_start : old.cot_start + n]) == text
            ]
            assert len(places) == 1  # a joint of both
            assert summed == pytest.approx(own[: places[0]].sum(), rel=1e-5)


def test_audit_refuses_it_and_says_what_to_do(made, teacher):
    done = invoke(cli, "audit", made[1], "--model", teacher)
    assert isinstance(done.exception, CacheMismatchError)
    assert "Audit the cache that it was made from" in str(done.exception)


@pytest.mark.slow
def test_a_student_trains_on_it(made, student, tmp_path):
    done = invoke(
        training, "run", "--cache", made[1], "--student", student, "--out",
        tmp_path / "run", "--lead-span", "0.5", "--max-steps", "2", "--batch-traces", "4",
        "--where", "retokenized['chain_rule_error'] < 0.05", "--dtype", "float32",
        "--match", "chunks",
    )  # fmt: skip
    assert done.exit_code == 0, (done.output, done.exception)


def test_the_same_tokenizer_gives_the_same_rows(source, teacher, rows, tmp_path):
    retokenize(configured(source, tmp_path / "same", teacher, rows))
    before, after = traces_of(source), traces_of(str(tmp_path / "same"))
    assert before.keys() == after.keys()
    for name, trace in before.items():
        for column in ("token_ids", "k", "top_ids", "top_logits", "tail_logit"):
            np.testing.assert_array_equal(getattr(after[name], column), getattr(trace, column))
        assert (after[name].cot_start, after[name].answer_start) == (
            trace.cot_start, trace.answer_start,
        )  # fmt: skip


@pytest.mark.slow
def test_a_stopped_job_goes_on_and_ends_like_one_that_was_not(
    source, student, rows, made, tmp_path, monkeypatch
):
    monkeypatch.setattr(job, "_CHUNK_ENTRIES", 1)
    convert, calls = workers.make_converter, []

    def stopping(*args):
        real = convert(*args)

        def converted(tasks):
            calls.append(tasks)
            if len(calls) == 5:
                raise Stopped(15)
            return real(tasks)

        return converted

    monkeypatch.setattr(workers, "make_converter", stopping)
    config = configured(source, tmp_path / "out", student, rows)
    retokenize_stopped = retokenize(config)
    assert retokenize_stopped.num_traces == 4
    assert not open_cache(config.out, allow_unsealed=True).sealed
    report = retokenize(config)
    assert (report.num_present, report.num_traces) == (4, 8)
    whole, again = traces_of(made[1]), traces_of(config.out)
    assert whole.keys() == again.keys()
    for name, trace in whole.items():
        np.testing.assert_array_equal(trace.top_ids, again[name].top_ids)
    assert retokenize(config).num_traces == 0


def in_child(work):
    """Run `work` in a forked process; return how that ended, as `os.waitstatus_to_exitcode`."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except OSError as error:
            os._exit(error.errno)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.slow
def test_a_job_killed_again_and_again_ends_like_one_that_was_not(
    source, student, rows, made, tmp_path, monkeypatch
):
    monkeypatch.setattr(job, "_CHUNK_ENTRIES", 2000)
    append, config = CacheWriter.append, configured(source, tmp_path / "out", student, rows)
    for number in (signal.SIGKILL, signal.SIGINT, signal.SIGKILL):
        calls = []

        def append_and_die(writer, finished, number=number, calls=calls):
            append(writer, finished)
            calls.append(finished)
            if len(calls) == 3:
                os.kill(os.getpid(), number)

        monkeypatch.setattr(CacheWriter, "append", append_and_die)
        ended = in_child(lambda: os._exit(retokenize(config).stopped_by or 0))
        assert ended == (-number if number == signal.SIGKILL else number)
    monkeypatch.setattr(CacheWriter, "append", append)
    report = retokenize(config)
    assert (report.num_present, report.num_traces) == (9, 3)
    assert not verify_cache(config.out).errors
    whole, again = traces_of(made[1]), traces_of(config.out)
    assert whole.keys() == again.keys()
    for name, trace in whole.items():
        assert again[name].fields == trace.fields
        for column in COLUMNS:
            assert getattr(again[name], column).tobytes() == getattr(trace, column).tobytes()


@pytest.mark.slow
def test_a_full_disk_stops_a_job_that_goes_on_where_there_is_room(
    source, student, rows, made, tmp_path, monkeypatch
):
    monkeypatch.setattr(job, "_CHUNK_ENTRIES", 2000)
    config = configured(source, tmp_path / "out", student, rows)

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (16_000, resource.RLIM_INFINITY))
        retokenize(config)

    assert in_child(limited) == errno.EFBIG
    report = retokenize(config)
    assert report.num_present > 0
    assert report.num_present + report.num_traces == 12
    whole, again = traces_of(made[1]), traces_of(config.out)
    for name, trace in whole.items():
        assert again[name].top_ids.tobytes() == trace.top_ids.tobytes()


@pytest.mark.slow
def test_several_processes_make_what_one_makes(source, student, rows, made, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "_CHUNK_ENTRIES", 2000)
    config = configured(source, tmp_path / "out", student, rows, processes=2)
    assert retokenize(config).num_traces == 12
    whole, again = traces_of(made[1]), traces_of(config.out)
    for name, trace in whole.items():
        np.testing.assert_array_equal(trace.top_logits, again[name].top_logits)


@pytest.mark.slow
def test_a_cache_truncated_inside_a_character_keeps_the_whole_ones(source, student, rows, tmp_path):
    for span in (0.37, 0.52, 0.63, 0.71, 0.8):
        half = tmp_path / f"half{span}"
        truncate_cache(open_cache(source), half, lead_span=span)
        out = tmp_path / f"out{span}"
        report = retokenize(configured(str(half), out, student, rows))
        assert report.rejects.total == 0
        assert not verify_cache(str(out)).errors
        theirs = TeacherTokenizer(ModelFiles(student, None), {})
        header = open_cache(str(out)).header
        assert header.max_lead_span == span
        whole = {row["id"]: row["messages"][1]["reasoning_content"] for row in ROWS}
        for name, trace in traces_of(str(out)).items():
            written = theirs.decode(trace.token_ids[trace.cot_start :])
            assert (
                f"<think>\n{whole[name]}\n</think>\n\n".startswith(written) or "</think>" in written
            )
            assert len(trace.token_ids) == header.num_held(trace.n_total)
            assert trace.answer_start <= trace.n_total


@pytest.mark.slow
def test_a_student_of_another_family_gets_its_own_marks_and_ends(source, rows, tmp_path):
    student = make_model(
        tmp_path / "student", "llama2", 400, template="llama3", end="<|eot_id|>", pad=3,
        bos_token="<|begin_of_text|>",
    )  # fmt: skip
    config = configured(source, tmp_path / "out", student, rows)
    report = retokenize(
        replace(config, think_open="<thought>\\n", think_close="\\n</thought>\\n\\n")
    )
    assert (report.num_traces, report.rejects.total) == (12, 0)
    theirs = TeacherTokenizer(ModelFiles(student, None), {})
    assert open_cache(config.out).header.vocab_size == theirs.size + 3
    for row in ROWS:
        trace = traces_of(config.out)[row["id"]]
        turn = row["messages"][1]
        written = theirs.decode(trace.token_ids[trace.cot_start :])
        thought = f"<thought>\n{turn['reasoning_content']}\n</thought>"
        assert written == f"{thought}\n\n{turn['content']}<|eot_id|>"
        assert (trace.token_ids < theirs.size).all()
        assert (trace.top_ids < theirs.size).all()


@pytest.mark.slow
def test_an_unsealed_source_is_refused_unless_asked(source, student, rows, tmp_path):
    whole = open_cache(source)
    writer = CacheWriter(tmp_path / "part", whole.header)
    for trace in list(traces_of(source).values())[:3]:
        writer.append(FinishedTrace(trace, "x"))
    writer.finish()
    part = str(tmp_path / "part")
    with pytest.raises(CacheMismatchError, match="not complete"):
        retokenize(configured(part, tmp_path / "out", student, rows))
    report = retokenize(configured(part, tmp_path / "out", student, rows, allow_unsealed=True))
    assert report.num_traces == 3


def test_traces_that_cannot_be_carried_over_are_counted_with_an_example(source, rows, tmp_path):
    composing = make_model(tmp_path / "nfc", "qwen", 330)
    accent = {**ROWS[0], "id": "accent"}
    accent["messages"] = [ROWS[0]["messages"][0], {"role": "assistant", "content": "e\u0301"}]
    # The text of r1's trace is one with an accent apart: the student writes it as one character.
    traces = traces_of(source)
    theirs = open_cache(source)
    ids = TeacherTokenizer(ModelFiles(theirs.header.teacher, None), {}).encode("e\u0301 = é")
    changed = traces["r1"]
    prompt = changed.cot_start
    tokens = np.concatenate([changed.token_ids[:prompt], ids]).astype(np.int32)
    bare = type(changed)(
        trace_id="r1", token_ids=tokens, n_total=len(tokens), cot_start=prompt,
        answer_start=prompt, k=np.zeros(len(tokens), np.uint8), top_ids=np.zeros(0, np.int32),
        top_logits=np.zeros(0, np.float32), tail_logit=np.zeros(len(tokens), np.float32),
    )  # fmt: skip
    part = tmp_path / "part"
    with CacheWriter(part, theirs.header) as writer:
        for trace in (bare, traces["r2"], type(changed)(**{**vars(traces["r3"]), "trace_id": "?"})):
            writer.append(FinishedTrace(trace, "x"))
        writer.finish()
    seal_cache(part)
    out = tmp_path / "out"
    report = retokenize(configured(str(part), out, composing, rows))
    assert dict(report.rejects.counts) == {"text-changes": 1, "no-row": 1}
    listed = [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]
    assert {line["id"]: line["reason"] for line in listed} == {"r1": "text-changes", "?": "no-row"}
    assert traces_of(str(out)).keys() == {"r2"}
    assert retokenize(configured(str(part), out, composing, rows)).num_present == 1
    assert (out / "rejects.jsonl").exists()


def test_a_job_without_any_usable_trace_says_why(source, student, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({**ROWS[0], "id": "other"}) + "\n")
    with pytest.raises(SourceError, match=r"no trace can be carried over: 12 of 12 .*no-row"):
        retokenize(configured(source, tmp_path / "out", student, tmp_path / "rows.jsonl"))


def test_tokenizers_that_do_not_hold_a_texts_bytes_are_refused(source, student, rows, tmp_path):
    words = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    folder = tmp_path / "bert"
    make_model(folder, "gpt2", 300)
    fast = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|im_end|>")
    fast.chat_template = trl_templates()["qwen3"]
    fast.save_pretrained(folder)
    with pytest.raises(UnsupportedTokenizerError, match="WordPiece tokens do not hold every byte"):
        retokenize(configured(source, tmp_path / "out", str(folder), rows))


def test_marks_that_cannot_be_exchanged_leave_thoughts_out_and_say_why(
    source, rows, student, tmp_path
):
    whole = open_cache(source)
    parts = tmp_path / "parts"
    mark = TeacherTokenizer(ModelFiles(whole.header.teacher, None), {}).encode("<thought>")
    header = replace(whole.header, think_open_ids=tuple(mark))
    with CacheWriter(parts, header) as writer:
        for trace in list(traces_of(source).values())[:2]:
            writer.append(FinishedTrace(trace, "x"))
        writer.finish()
    seal_cache(parts)
    with pytest.raises(SourceError, match=r"marks-unknown.*b'<thought>'.*--think-open"):
        retokenize(configured(str(parts), tmp_path / "out", student, rows))


def test_a_folder_of_another_teacher_is_refused(source, student, rows, tmp_path):
    with pytest.raises(CacheMismatchError, match="its tokenizer is not the one of the capture"):
        retokenize(configured(source, tmp_path / "out", student, rows, teacher=student))
    with pytest.raises(EngineError, match="no such folder"):
        retokenize(configured(source, tmp_path / "out", str(tmp_path / "none"), rows))


def test_a_derived_cache_is_not_derived_again(made, teacher, rows, tmp_path):
    with pytest.raises(CacheMismatchError, match="itself carried over from another tokenizer"):
        retokenize(configured(made[1], tmp_path / "out", teacher, rows))
