"""Rows that vLLM's worker takes from the logits: their arithmetic, their ring, their order."""

import os
import subprocess
import sys
import threading
from inspect import signature
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_cache.engines import EngineError, Sampling
from teacher_cache.engines.vllm import step_rows
from teacher_cache.engines.vllm.pages import RowPages
from teacher_cache.engines.vllm.ring import HEAD_WORDS, ReaderGoneError, RowRing, row_words
from teacher_cache.engines.vllm.step_rows import DeviceStep, RowMaker
from teacher_cache.engines.vllm.worker_rows import (
    NO_SLOT,
    REQUEST_KEY,
    SCORED_KEY,
    require_same_rows,
    require_same_tails,
    worker_rows_of,
)
from teacher_cache.format import KeepPolicy, keep_entries

# Importing vLLM makes torch warn about its own past.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

K, V = 4, 50
NO_HEADS = np.zeros((500, HEAD_WORDS - 1), np.int32)


def made_rows(numbers, num_candidates=K):
    numbers = np.asarray(numbers, np.int32)
    return np.repeat(numbers[:, None], row_words(num_candidates), axis=1)


# --- the ring -----------------------------------------------------------------------------------


def test_a_ring_gives_every_row_once_and_its_writer_waits_for_room():
    reader = RowRing.made(capacity=7, num_candidates=K)
    writer = RowRing.opened(reader.address)
    assert (writer.num_candidates, reader.num_writers) == (K, 1)
    sizes = np.random.default_rng(0).integers(0, 20, 60)
    ends = np.cumsum(sizes)
    rows = made_rows(range(ends[-1]))

    def write():
        for end, size in zip(ends, sizes, strict=True):
            writer.write(rows[end - size : end])

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    found = []
    while sum(map(len, found)) < len(rows):
        found += [part.copy() for part in reader.read()]
        assert not found or max(map(len, found)) <= 7
    thread.join()
    assert np.array_equal(np.concatenate(found), rows)
    assert list(reader.read()) == []
    reader.close()


def test_a_writer_does_not_wait_for_a_reader_that_is_gone():
    reader = RowRing.made(capacity=3, num_candidates=K)
    writer = RowRing.opened(reader.address)
    writer.write(made_rows(range(3)))
    reader.close()
    with pytest.raises(ReaderGoneError, match="is gone"):
        writer.write(made_rows([3]))
    with pytest.raises(OSError, match="No such file"):
        RowRing.opened(reader.address)


# --- putting rows together ----------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.lists(st.integers(1, 150), min_size=1, max_size=7))
def test_rows_in_any_company_come_together_by_request_and_the_last_write_wins(seed, lengths):
    random = Random(seed)
    pages = RowPages(num_slots=4, num_positions=150, num_words=row_words(1))
    waiting = list(enumerate(lengths, start=1))
    free, at_work, number = [0, 1, 2, 3], {}, 0
    while waiting or at_work:
        while free and waiting:
            serial, length = waiting.pop()
            slot = free.pop(random.randrange(len(free)))
            pages.open(slot, serial)
            at_work[slot] = [serial, length, 0, {}]
        rows = []
        for slot, state in at_work.items():
            serial, length, at, sent = state
            if at and random.random() < 0.5 / length:  # preempted, and computed again
                state[2] = at = random.randrange(at)
            number += 1
            rows.append([slot, serial, at, 0, number, 0, 0, 0])
            sent[at] = number
            state[2] = at + 1
        rows.append([random.choice(list(at_work)), 99, 0, 0, -1, 0, 0, 0])  # given up before
        random.shuffle(rows)
        pages.add(np.array(rows, np.int32))
        for slot, (_, length, at, sent) in list(at_work.items()):
            found = pages.rows(slot, length)
            assert (found is None) == (len(sent) < length)
            if at == length:
                assert found[:, 4].tolist() == [sent[position] for position in range(length)]
                pages.close(slot)
                free.append(slot)
                del at_work[slot]
    assert len(pages._free_pages) * 64 == len(pages._rows)


# --- the arithmetic -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def worker_tap():
    from teacher_cache.engines.vllm import worker_tap

    return worker_tap


def parts(rows, num_candidates=K):
    """Heads, tails, ids and logprobs of rows."""
    middle = HEAD_WORDS + 1 + num_candidates
    floats = np.ascontiguousarray(rows).view(np.float32)
    return rows[:, :3], floats[:, 3], rows[:, HEAD_WORDS:middle], floats[:, middle:]


def on_host(logits, tokens):
    step = RowMaker().started(NO_HEADS[: len(logits)], logits, lambda: tokens, K)
    return step.rows().rows.numpy()


def on_device(logits, tokens):
    """As on a GPU, but for its kernel."""
    top, ids = torch.topk(logits, K, dim=1)
    outside = step_rows._outside(logits, top, ids)
    step = DeviceStep(NO_HEADS[: len(logits)], ids, top, *outside, lambda: tokens)
    return step.rows().rows.numpy()


@pytest.mark.parametrize("spread", [0.1, 3.0, 30.0])
@pytest.mark.parametrize(("made", "wide"), [(on_host, V), (on_host, V + 1), (on_device, V)])
def test_rows_are_those_of_float64_and_their_tails_are_exact(monkeypatch, made, wide, spread):
    monkeypatch.setattr(step_rows, "_SORTED_AT_ONCE", 30 * V)
    monkeypatch.setattr(step_rows, "_WIDE", wide)
    rng = np.random.default_rng(0)
    logits = (spread * rng.normal(size=(200, V))).astype(np.float32)
    logits[:20, :10] = -np.inf
    tokens = rng.integers(10, V, 200)
    _, tails, ids, logprobs = parts(made(torch.tensor(logits), torch.tensor(tokens)))
    exact = torch.tensor(logits, dtype=torch.float64).log_softmax(1).numpy()
    order = np.argsort(-exact, axis=1, kind="stable")
    assert np.array_equal(ids, np.column_stack([tokens, order[:, :K]]))
    # Nats; float32 logits of 100 are exact to 4e-6.
    assert np.abs(logprobs - np.take_along_axis(exact, ids.astype(int), 1)).max() < 5e-5
    outside = np.take_along_axis(exact, order[:, K:], 1)
    assert np.abs(tails - np.logaddexp.reduce(outside, axis=1)).max() < 5e-5
    assert (np.exp(tails) < 1e-7).any() == (spread == 30.0)  # where 1 - sum is only noise


def test_the_memory_of_a_step_serves_all_later_ones():
    maker = RowMaker()
    for num_rows in (3, 7, 2, 7):
        logits = torch.randn(num_rows, V)
        logits[0, 1:] = logits[0, 0]  # ties
        logits[1, 2:] = -torch.inf
        tokens = torch.arange(num_rows)
        expected = on_device(logits, tokens)
        step = maker.started(NO_HEADS[:num_rows], logits, lambda tokens=tokens: tokens, K)
        logits.zero_()  # the sampler works in place
        found = step.rows().rows.numpy()
        assert len(found) == num_rows
        for ours, theirs in zip(parts(found), parts(expected), strict=True):
            if ours.dtype == np.int32:
                assert np.array_equal(ours[2:], theirs[2:])
            else:
                assert np.allclose(ours, theirs, atol=1e-6)


def test_a_row_with_a_logit_that_is_no_number_is_none_either():
    for value in (np.nan, -np.nan):
        logits = torch.randn(2, V)
        logits[1, 7] = value
        *_, logprobs = parts(on_host(logits, torch.tensor([1, 2])))
        assert np.isfinite(logprobs[0]).all() and np.isnan(logprobs[1]).any()


@pytest.mark.parametrize("mass", [0.9, 0.999, 1.0])
def test_a_stored_tail_is_the_mass_of_all_that_is_not_kept(mass):
    rng = np.random.default_rng(1)
    logits = torch.tensor(4 * rng.normal(size=(500, V)), dtype=torch.float32)
    tokens = rng.integers(0, V, 500)
    _, tails, ids, logprobs = parts(on_host(logits, torch.tensor(tokens)))
    kept = keep_entries(ids, logprobs, KeepPolicy(K, mass), tails)
    without = keep_entries(ids, logprobs, KeepPolicy(K, mass))
    exact = logits.double().softmax(1).numpy()
    ends = np.cumsum(kept.k, dtype=int)
    right = np.empty(500)
    for row, (end, k) in enumerate(zip(ends, kept.k.astype(int), strict=True)):
        right[row] = np.delete(exact[row], kept.top_ids[end - k : end]).sum()
    right = np.maximum(right, 1e-7)
    right_logit = np.log(right / (1 - right))
    assert (np.abs(kept.tail_logit - right_logit) <= 0.005 + np.abs(right_logit) / 2**8).all()
    assert kept.num_clamped_tails == (right == 1e-7).sum()
    for name in ("k", "top_ids", "top_logits"):
        assert np.array_equal(getattr(kept, name), getattr(without, name))
    unknown = keep_entries(ids, logprobs, KeepPolicy(K, mass), np.full(500, np.nan, np.float32))
    assert np.array_equal(unknown.tail_logit, without.tail_logit)


INTERPRETED = """
import torch
from teacher_cache.engines.vllm import outside_triton

outside_triton._BLOCK = 64
torch.manual_seed(0)
for num_rows, width, k in ((1, 2, 1), (3, 17, 5), (4, 403, 64), (2, 128, 128)):
    logits = 5 * torch.randn(num_rows, width + 3)[:, :width]
    logits[0] = logits[0].round()  # ties with the last candidate
    logits[-1, k // 2 :] -= 200  # of no mass beside the largest
    logits[-1, 1:2] = -torch.inf
    top, ids = logits.topk(k, dim=1)
    copy, log_sum = outside_triton.outside(logits, top)
    assert torch.equal(copy, logits)
    exact = logits.double().scatter(1, ids, -torch.inf).logsumexp(1)
    assert torch.equal(log_sum.isinf(), exact.isinf())
    finite = exact.isfinite()
    assert (log_sum[finite] - exact[finite]).abs().max() < 1e-5 if finite.any() else True
print("equal")
"""


@pytest.mark.slow
def test_the_kernel_for_gpus_sums_as_float64_does_in_the_interpreter():
    ended = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.stdout == "equal\n", ended.stderr


@pytest.mark.slow
# Triton says so of a default of its own.
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION is unset")
def test_the_kernel_compiles_for_a_gpu_that_is_not_here(monkeypatch, tmp_path):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from teacher_cache.engines.vllm.outside_triton import _outside

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = {"block": 8192, "candidates": 64}
    numbers = dict.fromkeys(("stride", "width", "num_candidates"), "i32")
    signature = dict.fromkeys(_outside.arg_names, "*fp32") | numbers
    signature |= dict.fromkeys(constants, "constexpr")
    compiled = triton.compile(
        ASTSource(_outside, signature, constants),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": 16},
    )
    assert compiled.asm["cubin"] and ".local" not in compiled.asm["ptx"]


# --- the processor, as either model runner calls it ---------------------------------------------


@pytest.fixture
def ring(worker_tap, monkeypatch):
    ring = RowRing.made(capacity=100, num_candidates=K)
    monkeypatch.setattr(worker_tap, "opened_ring", lambda: RowRing.opened(ring.address))
    yield ring
    ring.close()


def params(slot, serial, num_prompt):
    return SimpleNamespace(extra_args={REQUEST_KEY: [slot, serial, num_prompt]})


NOT_OURS = SimpleNamespace(extra_args=None)


def update(removed=(), added=(), moved=()):
    return SimpleNamespace(removed=removed, added=added, moved=moved)


def written(ring):
    """Slot, serial, position and token of the rows written since the last call."""
    rows = [row for part in ring.read() for row in part.copy()]
    return [tuple(int(word) for word in row[[0, 1, 2, HEAD_WORDS]]) for row in rows]


@pytest.mark.slow
@pytest.mark.vllm
def test_the_first_runners_requests_are_followed_through_its_batch(worker_tap, ring):
    from vllm.v1.sample.logits_processor.interface import MoveDirectionality

    tap = worker_tap.RowTap(None, "cpu", False)
    assert not tap.is_argmax_invariant()
    logits = torch.randn(3, V)
    one, two = [], []
    tap.update_state(update(added=[(0, params(5, 1, 9), None, one), (1, NOT_OURS, None, [])]))
    tap.update_state(update(added=[(2, params(6, 2, 9), None, two)]))
    before = logits.clone()
    assert torch.equal(tap.apply(logits), before)
    logits.fill_(0)  # the sampler works in place
    one.append(7)  # the prompt of the other is not complete: it draws nothing
    tap.update_state(
        update(moved=[(0, 2, MoveDirectionality.SWAP), (0, 1, MoveDirectionality.UNIDIRECTIONAL)])
    )
    tap.apply(logits)
    (row,) = (part.copy() for part in ring.read())
    assert row[0, :3].tolist() == [5, 1, 0]
    expected = before[0].log_softmax(0)
    assert row[0, HEAD_WORDS] == 7
    logprobs = row.view(np.float32)[0, HEAD_WORDS + 1 + K :]
    assert np.allclose(logprobs[0], expected[7], atol=1e-5)
    assert np.allclose(logprobs[1:], expected.topk(K).values, atol=1e-5)
    one.append(8), two.append(9)
    # The first is preempted, and comes back later with its tokens, in chunks.
    tap.update_state(update(removed=[2]))
    tap.apply(logits)
    assert written(ring) == [(6, 2, 0, 9), (5, 1, 1, 8)]
    two.append(3)
    tap.update_state(update(added=[(2, params(5, 1, 9), None, one)]))
    tap.apply(logits)
    assert written(ring) == [(6, 2, 1, 3)]
    tap.update_state(None)
    tap.apply(logits)
    assert written(ring) == []
    one.append(4)
    tap.update_state(update(added=[(0, params(NO_SLOT, 0, 1), None, [])], removed=[2]))
    tap.apply(logits)
    assert written(ring) == [(5, 1, 2, 4)]


@pytest.mark.slow
@pytest.mark.vllm
def test_the_second_runners_rows_are_known_by_its_places_and_lengths(worker_tap, ring):
    tokens = torch.zeros(8, 40, dtype=torch.int32)
    tap = worker_tap.RowTap(None, SimpleNamespace(all_token_ids=SimpleNamespace(gpu=tokens)))
    assert not tap.add_request(1, NOT_OURS)
    assert tap.add_request(3, params(0, 1, 5))
    assert tap.add_request(6, params(1, 2, 10))
    logits = torch.randn(3, V)

    def step(places, lengths, drawn):
        context = SimpleNamespace(
            idx_mapping_np=np.array(places), seq_lens_upper_bound_np=np.array(lengths)
        )
        tap.apply(logits[: len(places)], context)
        for place, length, token in zip(places, lengths, drawn, strict=True):
            tokens[place, length] = token

    step([6, 1, 3], [8, 4, 5], [0, 11, 12])  # 8 of 10 tokens of the prompt: not complete
    step([3, 6, 1], [6, 10, 5], [13, 14, 15])
    assert written(ring) == [(0, 1, 0, 12)]
    tap.add_request(3, params(2, 3, 20))  # the place's last owner ended with token 13
    tokens[3, :7] = 49
    assert written(ring) == [(0, 1, 1, 13), (1, 2, 0, 14)]
    step([6], [11], [16])
    tap.add_request(7, params(NO_SLOT, 0, 1))
    assert written(ring) == [(1, 2, 1, 16)]


# --- scoring ------------------------------------------------------------------------------------


class SecondRunnersWorker:
    """Its methods take what those of vLLM's `PromptLogprobsWorker` take."""

    def add_request(self, req_id, req_idx, sampling_params):
        pass

    def remove_request(self, req_id):
        pass

    def compute_prompt_logprobs(
        self, logits_fn, hidden_states, input_batch, all_token_ids, num_computed_tokens, prompt_lens
    ):
        return "stock"


@pytest.mark.slow
@pytest.mark.vllm
def test_the_second_runner_scores_the_wanted_rows_of_every_piece(worker_tap, ring, monkeypatch):
    from vllm.v1.worker.gpu.sample.prompt_logprob import PromptLogprobsWorker

    from teacher_cache.engines.vllm import worker_scoring

    for name in ("add_request", "remove_request", "compute_prompt_logprobs"):
        one, other = (getattr(each, name) for each in (SecondRunnersWorker, PromptLogprobsWorker))
        assert list(signature(one).parameters) == list(signature(other).parameters)
    monkeypatch.setattr(worker_scoring, "opened_ring", lambda: RowRing.opened(ring.address))
    monkeypatch.setattr(worker_scoring, "_CHUNK_ON_HOST", 3)
    worker = SecondRunnersWorker()
    extension = worker_scoring.ScoringExtension()
    extension.model_runner = SimpleNamespace(prompt_logprobs_worker=worker)
    assert extension.take_scored_rows() is None
    tokens = torch.randint(0, V, (4, 20), dtype=torch.int32)
    hidden, head = torch.randn(4, 20, 8), torch.randn(8, V)
    worker.add_request("ours", 2, SimpleNamespace(extra_args={SCORED_KEY: [5, 1, 4]}))
    worker.add_request("other", 3, NOT_OURS)
    num_seen = []

    def logits_fn(states):
        num_seen.append(len(states))
        return states @ head

    found = []
    for start, end in ((0, 2), (2, 9), (9, 12)):
        batch = SimpleNamespace(
            req_ids=["other", "ours"],
            idx_mapping_np=np.array([3, 2]),
            num_computed_prefill_tokens_np=np.array([0, start]),
            num_scheduled_tokens=np.array([4, end - start]),
            query_start_loc_np=np.array([0, 4, 4 + end - start]),
        )
        states = torch.cat([hidden[3, :4], hidden[2, start:end]])
        lengths = np.full(4, 12)
        assert worker.compute_prompt_logprobs(
            logits_fn, states, batch, tokens, None, lengths
        ) == "stock"  # fmt: skip
        found += [row for part in ring.read() for row in part.copy()]
    # Of 12 tokens those from the 4th on; the rows before and after them were not computed.
    assert num_seen == [3, 3, 2]
    heads, _, ids, logprobs = parts(np.array(found))
    assert heads.tolist() == [[5, 1, position] for position in range(8)]
    assert ids[:, 0].tolist() == tokens[2, 4:12].tolist()
    exact = (hidden[2, 3:11] @ head).log_softmax(1).numpy()
    assert np.abs(logprobs - np.take_along_axis(exact, ids.astype(int), 1)).max() < 1e-5
    worker.remove_request("ours")
    worker.compute_prompt_logprobs(logits_fn, states, batch, tokens, None, lengths)
    assert len(num_seen) == 3 and written(ring) == []


@pytest.mark.slow
@pytest.mark.vllm
def test_a_worker_of_another_form_keeps_its_prompt_logprobs(worker_tap, ring, caplog):
    from teacher_cache.engines.vllm.worker_scoring import ScoringExtension

    def other(hidden_states):
        return "stock"

    extension = ScoringExtension()
    extension.model_runner = SimpleNamespace(_get_prompt_logprobs_dict=other)
    reason = extension.take_scored_rows()
    assert "takes hidden_states" in reason
    assert extension.model_runner._get_prompt_logprobs_dict is other
    rows = worker_rows_of({"max_num_seqs": 4}, None, K)
    engine = SimpleNamespace(
        collective_rpc=lambda method: [None, reason],
        vllm_config=SimpleNamespace(
            scheduler_config=SimpleNamespace(max_num_batched_tokens=64),
            model_config=SimpleNamespace(max_model_len=512),
        ),
    )
    rows.score_in(engine)
    assert not rows.are_scored and not rows.are_sent(engine.vllm_config)
    assert caplog.messages == [
        f"scoring from vLLM's prompt logprobs, which is slower: {reason}"
    ]  # fmt: skip
    engine.collective_rpc = lambda method: [None, None]
    rows.score_in(engine)
    assert rows.are_scored
    engine.vllm_config.scheduler_config.max_num_batched_tokens = 1 << 24
    rows.score_in(engine)
    assert not rows.are_scored and "has no room" in caplog.messages[-1]
    rows.close()


def test_a_trace_longer_than_the_ring_is_not_scored_through_it(caplog):
    """The engine says nothing before a prompt is whole: nobody would read, and the worker wait."""
    num_rows, config = 400_000, SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_batched_tokens=8192),
        model_config=SimpleNamespace(max_model_len=400_000),
    )  # fmt: skip
    engine = SimpleNamespace(collective_rpc=lambda method: [None], vllm_config=config)
    known, unknown = (
        worker_rows_of({"max_num_seqs": 4}, None, 64, longest=each) for each in (num_rows, None)
    )
    for rows in (known, unknown):
        rows.score_in(engine)
        rows.close()
    assert (known.are_scored, unknown.are_scored) == (True, False)
    assert "no room for a trace of 400000" in caplog.messages[-1]


@pytest.mark.parametrize("width", [448, 49_152, 151_936])  # the last two of SmolLM2 and Qwen3
def test_the_check_of_tails_knows_the_rounding_of_vllms_own_sum(width):
    """`log_softmax` in float32, which vLLM uses: its error grows with the vocabulary."""
    logits = torch.randn(32, width, generator=torch.Generator().manual_seed(0)) * 2.5
    logits[:, :20] += torch.linspace(20, 8, 20)
    stock, ids = logits.log_softmax(1).topk(K, dim=1)
    stock = torch.cat([stock[:, :1], stock], dim=1).numpy()
    tails = -torch.expm1(logits.double().log_softmax(1).gather(1, ids).logsumexp(1))
    require_same_tails("request 'a'", tails.log().float().numpy(), stock, width)
    with pytest.raises(EngineError, match=r"row 3, summed in vLLM's worker, differs by 0.0005"):
        wrong = tails + 5e-4 * (torch.arange(32) == 3)
        require_same_tails("request 'a'", wrong.log().float().numpy(), stock, width)


# --- when not to, and when to stop --------------------------------------------------------------


def test_engines_whose_worker_cannot_give_rows_are_known(caplog):
    caplog.set_level("INFO")
    sampling = Sampling(temperature=0.6, top_p=0.95, top_k=0)
    args = {"max_num_seqs": 4, "distributed_executor_backend": "mp", "tensor_parallel_size": 2}
    for one, loading in ((sampling, {"logits_processors", "worker_extension_cls"}),
                         (None, {"worker_extension_cls"})):  # fmt: skip
        rows = worker_rows_of(args, one, K)
        assert rows.engine_args.keys() == loading
        rows.close()
    assert worker_rows_of(args | {"worker_extension_cls": "my.Own"}, None, K) is None
    assert caplog.messages[-1].endswith("worker_extension_cls is set already")
    for reason, more in {
        "speculative decoding": {"speculative_config": {"method": "ngram"}},
        "pipeline_parallel_size": {"pipeline_parallel_size": 2},
        "data_parallel_size": {"data_parallel_size": 2},
        "enable_batch_sharded_sampling": {"enable_batch_sharded_sampling": True},
        "distributed_executor_backend ray": {"distributed_executor_backend": "ray"},
    }.items():
        assert worker_rows_of(args | more, sampling, K) is None
        assert caplog.messages[-1].endswith(f"which is slower: {reason}")
    penalty = Sampling(temperature=0.6, top_p=0.95, top_k=0, repetition_penalty=1.1)
    assert worker_rows_of(args, penalty, K) is None


def test_rows_that_differ_from_vllms_own_end_the_capture():
    logprobs = np.log(np.array([[0.1, 0.5, 0.2, 0.1], [0.3, 0.3, 0.30001, 0.2]], np.float32))
    ids = np.array([[3, 1, 2, 3], [5, 5, 6, 7]], np.int32)
    swapped = ids.copy()
    swapped[1, 1:3] = 6, 5  # a tie
    require_same_rows("request 'a'", (swapped, logprobs + 1e-5), (ids, logprobs), 1e-3)
    wrong = {"id": (ids + np.eye(2, 4, 1, int), logprobs), "nats": (ids, logprobs + 0.01)}
    for ours in wrong.values():
        with pytest.raises(EngineError, match=r"request 'a': row 0 .*--rows-from logprobs"):
            require_same_rows("request 'a'", ours, (ids, logprobs), 1e-3)
    nothing = np.where(logprobs < -2, -np.inf, logprobs)
    require_same_rows("request 'a'", (ids, nothing), (ids, nothing), 1e-3)
    with pytest.raises(EngineError, match="differs"):
        require_same_rows("request 'a'", (ids, logprobs), (ids, nothing), 1e-3)
