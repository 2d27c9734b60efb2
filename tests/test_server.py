"""`--engine server`: rows of a server's answers, and every way in which one may lie."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from answer_server import COMPLETIONS, GENERATE, TABLE, table_server, text_of
from fakes import END_ID, VOCAB_SIZE

from teacher_cache.capture.configs import ScoreConfig
from teacher_cache.engines import EngineError, Sampling, TeacherRequest
from teacher_cache.engines.server import teacher as teacher_module
from teacher_cache.engines.server.client import Client, check_server
from teacher_cache.engines.server.settings import ServerSettings
from teacher_cache.engines.server.teacher import ServerTeacher

TOP_K = 6
DRAWING = Sampling(1.0, 1.0, 0, stop_ids=(END_ID,))


def teacher_of(server, *, sampling=DRAWING, top_k=TOP_K, max_model_len=40, **settings):
    found = ServerSettings(
        url=server.url, vocab_size=VOCAB_SIZE, probe_ids=tuple(range(3, 23)),
        **({"in_flight": 8, "model": "models/table", "decode": text_of} | settings),
    )  # fmt: skip
    return ServerTeacher(found, top_k=top_k, max_model_len=max_model_len, sampling=sampling)


def requests(count, *, new=12, capture_prompt=False):
    rng = np.random.default_rng(3)
    for number in range(count):
        ids = tuple(int(i) for i in rng.integers(3, VOCAB_SIZE, 6))
        yield TeacherRequest(f"r{number}", ids, new, number, capture_prompt)


def assert_rows_of_the_table(rows):
    before = rows.token_ids[rows.first_row - 1 : -1]
    expected = TABLE[before]
    best = -np.sort(-expected, axis=1)[:, :TOP_K]
    own = expected[np.arange(len(before)), rows.token_ids[rows.first_row :]]
    np.testing.assert_allclose(rows.row_logprobs[:, 0], own, atol=1e-6)
    is_there = np.isfinite(rows.row_logprobs[:, 1:])
    assert is_there[:, : TOP_K - 1].all()
    np.testing.assert_allclose(rows.row_logprobs[:, 1:][is_there], best[is_there], atol=1e-6)
    own_of = np.take_along_axis(expected, rows.row_ids[:, 1:], axis=1)
    np.testing.assert_allclose(rows.row_logprobs[:, 1:][is_there], own_of[is_there], atol=1e-6)


@pytest.mark.parametrize("has_generate", [True, False])
@pytest.mark.parametrize("max_logprobs", [30, TOP_K])
def test_rows_are_the_servers_whatever_its_endpoint_and_limit(has_generate, max_logprobs):
    with table_server(has_generate=has_generate, max_logprobs=max_logprobs) as server:
        teacher = teacher_of(server)
        assert teacher.facts.settings["api"] == (GENERATE if has_generate else COMPLETIONS)
        found = list(teacher.run(requests(20, capture_prompt=True)))
        found += list(teacher.run(requests(4, new=0)))
        teacher.close()
    assert sorted(rows.request_id for rows in found[:20]) == sorted(f"r{n}" for n in range(20))
    for rows in found:
        assert_rows_of_the_table(rows)
        if max_logprobs > TOP_K:
            assert np.isfinite(rows.row_logprobs).all()
    assert {rows.finish_reason for rows in found[20:]} == {"scored"}


def test_a_window_of_requests_is_in_flight_and_no_more_are_drawn():
    drawn = []

    def source():
        for request in requests(60):
            drawn.append(request.request_id)
            yield request

    with table_server() as server:
        teacher = teacher_of(server, in_flight=5)
        server.most_at_once = 0
        run = teacher.run(source())
        next(run)
        assert len(drawn) <= 5 + 1
        assert len(list(run)) == 59
        teacher.close()
        assert 2 <= server.most_at_once <= 5


@pytest.mark.slow
def test_failed_requests_are_sent_again_and_every_trace_comes_once():
    with table_server() as server:
        teacher = teacher_of(server)
        calm = {r.request_id: r.token_ids.tolist() for r in teacher.run(requests(16))}
        server.fault_share = 0.2
        found = list(teacher.run(requests(16)))
        teacher.close()
        assert server.num_faults > 0
    assert {r.request_id: r.token_ids.tolist() for r in found} == calm
    assert len(found) == 16


LIES = {
    "context": "context holds 20 tokens, the longest trace needs 40",
    "models": "serves table, other; name one with --served-model",
    "loading": "serves no model yet",
    "key": r"answered 401: who are you \(the key is read from VLLM_API_KEY, which is not set\)$",
    "prompt": "answered 400: this prompt is no good$",
    "replica": "replicas disagree",
    "ranks": r"Lower --top-k|logprobs: the server gives no more",
    "processed": "logprobs-mode raw_logprobs",
    "renormalised": "add up to 1 exactly",
    "logits": "these are no logprobs",
    "tokenizer": "it is another model",
    "begin": "adds or changes tokens of the prompt",
}


@pytest.mark.parametrize("lie", LIES)
def test_a_liar_is_named_before_anything_is_asked_of_it(lie):
    with table_server(lie) as server, pytest.raises(EngineError, match=LIES[lie]):
        teacher_of(server)


def test_a_model_of_another_name_is_refused_unless_it_is_named():
    with table_server() as server:
        with pytest.raises(EngineError, match=r"serves table, .*--served-model table"):
            teacher_of(server, model="models/chair")
        teacher_of(server, model="models/chair", served_model="table").close()
    with table_server("root") as server:
        teacher_of(server, model="Models/Chair").close()


def test_a_text_that_says_nothing_does_not_pass():
    with table_server() as server, pytest.raises(EngineError, match="cannot be compared"):
        teacher_of(server, decode=lambda ids: "\ufffd")


def test_an_endpoint_that_is_not_implemented_is_not_waited_for():
    with table_server("501") as server:
        teacher = teacher_of(server)
        assert teacher.facts.settings["api"] == COMPLETIONS
        teacher.close()


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://me:secret@host:8000", "set VLLM_API_KEY"),
        ("me:secret@host:8000", "set VLLM_API_KEY"),
        ("https://host/v1?api_key=secret", "set VLLM_API_KEY"),
        ("http://host:port", "--url: 'http://host:port': Port"),
        ("http://host:99999", "--url: 'http://host:99999': Port"),
        ("host:8000", "expected http://HOST:PORT"),
    ],
)
def test_addresses_that_cannot_be_or_hold_a_key_are_refused(url, said, tmp_path):
    with pytest.raises(ValueError, match=said) as refused:
        ScoreConfig(traces=tmp_path, model="m", out="o", engine="server", url=url)
    assert "secret" not in str(refused.value)
    with pytest.raises(EngineError, match=said):
        Client(url)


def test_the_key_is_sent_without_the_line_break_of_its_file(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "abc\n")
    with table_server("key") as server:
        teacher_of(server).close()
    monkeypatch.setenv("VLLM_API_KEY", "a\nb")
    with pytest.raises(EngineError, match="VLLM_API_KEY: expected printable"):
        Client("http://host")


LATER_LIES = {name: LIES[name] for name in ("replica", "ranks", "logits", "begin")} | {
    "cap": "cut after 3 of 12 tokens"
}


@pytest.mark.parametrize("lie", LATER_LIES)
def test_a_server_that_begins_to_lie_later_is_caught_too(lie, monkeypatch):
    monkeypatch.setattr(teacher_module, "_REPEAT_EVERY", 8)  # half of them see the other replica
    with table_server(lie, honest_first=40) as server:
        teacher = teacher_of(server)
        with pytest.raises(EngineError, match=LATER_LIES[lie]):
            list(teacher.run(requests(300)))
        teacher.close()


@pytest.mark.slow
def test_honest_servers_whose_batches_differ_raise_no_alarm():
    with table_server(jitter=0.01) as server:
        for seed in range(5):
            teacher = teacher_of(server)
            assert len(list(teacher.run(requests(200, new=4)))) == 200
            teacher.close()
            assert seed < 5


def test_what_the_server_lacks_is_said_at_the_start():
    with table_server("no prompt logprobs") as server:
        with pytest.raises(EngineError, match="no prompt_logprobs to score by"):
            teacher_of(server, sampling=None)
        teacher = teacher_of(server)  # it can still generate
        assert len(list(teacher.run(requests(3)))) == 3
        with pytest.raises(EngineError, match="--capture-prompt"):
            list(teacher.run(requests(1, capture_prompt=True)))
        teacher.close()
    with (
        table_server(max_logprobs=5) as server,
        pytest.raises(EngineError, match=r"max-logprobs 7\), or a lower --top-k"),
    ):
        teacher_of(server)


def test_a_server_that_is_not_there_is_said_at_once_and_waited_for_later():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
    began_s = time.monotonic()
    with pytest.raises(EngineError, match="no answer"):
        check_server(url)
    assert time.monotonic() - began_s < 2
    client = Client(url, give_up_s=1)
    with pytest.raises(EngineError, match="tried for 1 s"):
        client.get("/v1/models")
    client.close()
    with pytest.raises(EngineError, match="expected http://HOST:PORT"):
        check_server("localhost:8000")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"engine": "server"}, "give its address"),
        ({"url": "http://x"}, "only --engine server"),
        ({"engine": "server", "url": "http://x", "dtype": "float16"}, "--dtype"),
        ({"engine": "server", "url": "http://x", "num_replicas": 2}, "--num-replicas"),
        ({"engine": "server", "url": "http://x", "engine_arg": {"a": 1}}, "--engine-arg"),
        ({"in_flight": 3}, "--in-flight"),
    ],
)
def test_settings_that_do_not_go_with_a_server_are_refused(settings, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        ScoreConfig(traces=tmp_path, model="m", out="o", **settings)


TINY = Path(__file__).parent.parent / "tools" / "tiny-teacher"
SERVE = Path(__file__).parent / "serve_vllm.py"


@pytest.fixture(scope="module")
def vllm_url(tmp_path_factory):
    """A real vLLM server with the tiny teacher."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    log = tmp_path_factory.mktemp("vllm") / "log"
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "TORCH_COMPILE_DISABLE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    command = [
        *(sys.executable, SERVE, TINY, "--served-model-name", "tiny", "--dtype", "float32"),
        *("--host", "127.0.0.1", "--port", port, "--enforce-eager", "--max-num-seqs", 8),
        *("--max-logprobs", 20, "--enable-scale-out"),
    ]
    with log.open("w") as output:
        server = subprocess.Popen(
            [str(part) for part in command], env=environment, stdout=output, stderr=output,
            start_new_session=True,
        )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert server.poll() is None, log.read_text()[-3000:]
            try:
                check_server(url)
                break
            except EngineError:
                time.sleep(0.5)
        yield url
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


@pytest.mark.vllm
@pytest.mark.slow
def test_rows_of_a_real_vllm_server_are_those_of_the_model(vllm_url, tmp_path, monkeypatch):
    # One test, because the server's start is what takes the time.
    from commands import write_rows

    from student_train.rounds.rollout import roll_out
    from student_train.rounds.rollout_config import RolloutConfig
    from teacher_cache import open_cache
    from teacher_cache.capture.configs import GenerateConfig
    from teacher_cache.capture.generate import generate
    from teacher_cache.capture.score import score
    from teacher_cache.engines.server import probe
    from teacher_cache.engines.transformers import TransformersTeacher
    from teacher_cache.format.checking.verify import verify_cache
    from teacher_cache.transform.export import ExportConfig, export

    prompts = write_rows(
        tmp_path / "prompts.jsonl",
        [
            {"id": f"p{n}", "messages": [{"role": "user", "content": f"Sum of $4{n} $24 $52?"}]}
            for n in range(6)
        ],
    )
    settings = {"model": str(TINY), "engine": "server", "url": vllm_url, "top_k": 12, "mass": 1.0}
    report = generate(
        GenerateConfig(
            prompts=prompts, out=str(tmp_path / "made"), max_new_tokens=60, capture_prompt=True,
            temperature=1.0, **settings,
        )
    )  # fmt: skip
    assert (report.num_traces, report.sealed) == (6, True)
    made = open_cache(str(tmp_path / "made"))
    assert made.header.teacher_settings == {"served_model": "tiny", "api": GENERATE}
    export(ExportConfig(cache=made.path, out=tmp_path / "traces.jsonl"))
    monkeypatch.setattr(probe, "GENERATE", COMPLETIONS)
    score(ScoreConfig(traces=tmp_path / "traces.jsonl", out=str(tmp_path / "scored"), **settings))
    scored = open_cache(str(tmp_path / "scored"))
    assert scored.header.teacher_settings["api"] == COMPLETIONS
    rollouts = tmp_path / "rollouts.jsonl"
    student = str(TINY.parent / "base-student")
    roll_out(RolloutConfig(model=student, prompts=prompts, out=rollouts, max_new_tokens=24))
    score(ScoreConfig(traces=rollouts, out=str(tmp_path / "own"), **settings))
    own = open_cache(str(tmp_path / "own"))
    assert (len(list(own)), own.header.rollout["student"]) == (6, student)
    assert all(np.isfinite(trace.student_logprob[trace.cot_start :]).all() for trace in own)
    reference = TransformersTeacher(
        model=str(TINY), revision=None, dtype="float32", top_k=12, max_model_len=512, sampling=None
    )
    for cache in (made, scored, own):
        assert verify_cache(cache.path).errors == []
        for trace in cache:
            ids = tuple(trace.token_ids.tolist())
            (rows,) = reference.run([TeacherRequest("x", ids, 0, 0, capture_prompt=True)])
            assert (trace.k[1:] >= 1).all()
            for t in range(1, len(trace)):
                entries = trace.logprobs(t)
                known = dict(
                    zip(rows.row_ids[t - 1].tolist(), rows.row_logprobs[t - 1], strict=True)
                )
                # The last ids may tie; the grid of a cache is as coarse as rtol far out.
                pairs = [
                    (p, known[i])
                    for i, p in zip(entries.ids.tolist(), entries.logprobs, strict=True)
                    if i in known
                ]
                assert len(pairs) >= len(entries.ids) - 1
                p, q = np.exp(np.array(pairs)).T
                np.testing.assert_allclose(p, q, rtol=0.1, atol=1e-5)
    reference.close()
    with pytest.raises(EngineError, match=r"max-logprobs 31\), or a lower --top-k"):
        score(
            ScoreConfig(
                traces=tmp_path / "traces.jsonl", out=str(tmp_path / "wide"),
                **settings | {"top_k": 30},
            )
        )  # fmt: skip
