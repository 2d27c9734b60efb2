"""One cache, one teacher: whatever changes its numbers changes the fingerprint."""

import dataclasses
import importlib.util
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fakes import make_header

from teacher_cache.capture import run
from teacher_cache.engines import EngineError, EngineStartError
from teacher_cache.engines.checks import looks_rounded
from teacher_cache.engines.start import check_engine_args_early, is_of_quantised_head
from teacher_cache.engines.vllm.start import (
    IN_ONE_PROCESS,
    args_with_defaults,
    rows_args,
    start_engine,
)
from teacher_cache.format import CacheMismatchError, CacheWriter

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
TINY = "tools/tiny-teacher"
# Arguments of vLLM that change a teacher's numbers, and what the header says of them.
NUMERIC = {
    "quantization": {"quantization": "fp8"},
    "KV cache": {"kv_cache_dtype": "fp8"},
    "rope scaling": {
        "hf_overrides": {
            "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
        }
    },
    "a value of the model's config": {"hf_overrides": {"rms_norm_eps": 1e-3}},
    "window": {"disable_sliding_window": True},
    "random weights": {"load_format": "dummy"},
    "another implementation": {"model_impl": "transformers"},
}
NEUTRAL = {
    "batch": {"max_num_seqs": 3, "max_num_batched_tokens": 512},
    "prefix cache": {"enable_prefix_caching": False},
    "loading": {"load_format": "safetensors"},
}


@pytest.fixture(scope="module")
def header_with():
    vllm = pytest.importorskip("vllm")
    from teacher_cache.engines.vllm.settings import reported_settings

    def of(**arguments):
        args = vllm.EngineArgs(model=TINY, enforce_eager=True, **arguments)
        settings = reported_settings(args.create_engine_config())
        return dataclasses.replace(make_header(), teacher_settings=settings)

    return of


@pytest.mark.slow
def test_every_numeric_engine_argument_changes_the_fingerprint(header_with, tmp_path):
    plain = header_with()
    found = {name: header_with(**arguments) for name, arguments in NUMERIC.items()}
    fingerprints = [plain.fingerprint, *(header.fingerprint for header in found.values())]
    assert len(set(fingerprints)) == len(fingerprints)
    for arguments in NEUTRAL.values():
        assert header_with(**arguments).fingerprint == plain.fingerprint
    CacheWriter(tmp_path, plain).close()
    with pytest.raises(CacheMismatchError, match=r"kv_cache_dtype: 'auto' there, 'fp8' now"):
        CacheWriter(tmp_path, found["KV cache"])


def test_adapters_are_refused_by_name():
    with pytest.raises(EngineError, match="'enable_lora' cannot be set: the base model would be"):
        check_engine_args_early("vllm", {"enable_lora": True})


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("data_parallel_size", "`vllm serve --data-parallel-size N` and capture with --engine se"),
        ("data_parallel_external_lb", "use --num-replicas or --worker"),
        ("nnodes", "use distributed_executor_backend=ray, or start `vllm serve`"),
        ("node_rank", "this process starts no other machine's"),
    ],
)
def test_engines_that_others_drive_are_refused_with_what_to_do(name, remedy):
    with pytest.raises(EngineError, match=f"'{name}' cannot be set: .*{remedy}"):
        check_engine_args_early("vllm", {name: 2})


@pytest.mark.parametrize(
    ("args", "why"),
    [
        ({"enable_expert_parallel": True, "tensor_parallel_size": 2}, "CPU kernel for mixtures"),
        ({"pipeline_parallel_size": 2, "kv_cache_memory_bytes": 1}, "leaves out the warm-up"),
    ],
)
def test_what_ends_vllms_processes_on_a_cpu_is_refused_there_alone(args, why, monkeypatch):
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")  # or it is set for the tests after this
    args = {"enforce_eager": True} | args
    with pytest.raises(EngineError, match=why):
        rows_args(args, 4, on_cpu=True)
    assert args.items() <= rows_args(args, 4, on_cpu=False).items()
    single = dict.fromkeys(("tensor_parallel_size", "pipeline_parallel_size"), 1)
    assert rows_args(args | single, 4, on_cpu=True)["max_logprobs"] == 4


@pytest.mark.parametrize(
    ("given", "threads", "executor"),
    [
        ({}, "nobind", IN_ONE_PROCESS),
        ({"tensor_parallel_size": "1"}, "nobind", IN_ONE_PROCESS),
        ({"tensor_parallel_size": 2}, "nobind", None),  # vLLM's own choice
        ({}, "auto", None),  # only a process of its own has its threads bound
        ({"distributed_executor_backend": "mp"}, "nobind", "mp"),
    ],
)
def test_an_engine_on_a_cpu_works_in_one_process_unless_it_needs_more(
    given, threads, executor, monkeypatch
):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", threads)
    name = "distributed_executor_backend"
    assert args_with_defaults(given, on_cpu=True).get(name) == executor
    assert args_with_defaults(given, on_cpu=False).get(name) == given.get(name)


@pytest.mark.slow
def test_a_misspelt_engine_argument_is_found_without_importing_vllm():
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    code = (
        "import sys\n"
        "from teacher_cache.engines.start import check_engine_args_early as check\n"
        "check('vllm', {'max_num_seqs': 4, 'hf_overrides': {}})\n"
        "try:\n    check('vllm', {'max_num_seq': 4})\n"
        "except Exception as error:\n    print(error)\n"
        "assert not {'vllm', 'torch'} & sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "knows no engine argument 'max_num_seq'; close to it: max_num_seqs" in done.stdout


def test_an_engine_whose_process_ends_as_it_starts_is_told_without_its_own_words():
    def fail(args):
        raise RuntimeError("Engine core initialization failed. Failed core proc(s): {}")

    model = SimpleNamespace(get_vocab_size=lambda: 9, max_model_len=8)
    vllm = SimpleNamespace(
        EngineArgs=lambda **args: SimpleNamespace(create_model_config=lambda: model),
        LLMEngine=SimpleNamespace(from_engine_args=fail),
    )
    with pytest.raises(EngineStartError, match="'m': vLLM's process ended before the engine"):
        start_engine(vllm, {"model": "m", "max_logprobs": 4}, 8, on_cpu=True, seeded=False)


def rounded_to_bfloat16(values):
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x8000) & np.uint32(0xFFFF0000)).view(np.float32)


def logprobs_of(logits):
    logits = -np.sort(-logits, axis=1)
    return (logits - np.log(np.exp(logits.astype("f8")).sum(1, keepdims=True))).astype("f4")


@pytest.mark.parametrize("scale", [3.0, 8.0])
def test_a_head_that_is_rounded_is_seen_in_its_logprobs(scale):
    logits = np.random.default_rng(0).normal(0, scale, (20, 64)).astype(np.float32)
    assert not looks_rounded(logprobs_of(logits)[:, :12])
    assert looks_rounded(logprobs_of(rounded_to_bfloat16(logits))[:, :12])


def test_a_few_entries_are_no_evidence():
    assert not looks_rounded(np.array([[-0.1, -2.1]], np.float32))


UNQUANTISED_ONLY = (
    "ValueError: A head_dtype different from the model dtype is only supported for an "
    "unquantized lm_head."
)


def test_a_quantised_head_is_started_again_with_the_models_own_dtype(monkeypatch, caplog):
    monkeypatch.setattr(run, "last_error_said", lambda: UNQUANTISED_ONLY)
    tried = []

    def start(head_dtype):
        tried.append(head_dtype)
        if head_dtype == "float32":
            raise EngineStartError("model 'm': vLLM's process ended before the engine was ready")
        return "teacher"

    assert run.started("starting", start) == "teacher"
    assert tried == ["float32", "model"]
    assert "starting the engine again" in caplog.text and "`head_dtype` in the cache" in caplog.text


@pytest.mark.parametrize(("cause", "num_tries"), [("CUDA out of memory", 1), (UNQUANTISED_ONLY, 2)])
def test_an_engine_that_does_not_start_says_its_own_error(cause, num_tries, monkeypatch):
    """A user's own `head_dtype` takes precedence the second time too."""
    monkeypatch.setattr(run, "last_error_said", lambda: cause)
    tried = []

    def start(head_dtype):
        tried.append(head_dtype)
        raise EngineStartError("model 'm': vLLM's process ended before the engine was ready")

    with pytest.raises(EngineError, match=f"^model 'm': .* was ready: {re.escape(cause)}"):
        run.started("starting", start)
    assert len(tried) == num_tries


@pytest.mark.vllm
@pytest.mark.slow
def test_the_words_by_which_a_quantised_head_is_known_are_vllms():
    from vllm.model_executor.layers.logits_processor import LogitsProcessor

    processor = SimpleNamespace(head_dtype=torch.float32)
    quantised = SimpleNamespace(quant_method=object())
    with pytest.raises(ValueError) as found:
        LogitsProcessor._apply_head(processor, quantised, torch.zeros(1, 4).bfloat16(), None)
    assert is_of_quantised_head(str(found.value))
