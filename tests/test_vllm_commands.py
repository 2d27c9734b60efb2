"""Commands with vLLM, and what it makes of a finished student.

Each runs in a process forked from one that has imported vLLM, and with its engine inside: starting
another for the engine would import everything again. `test_engines.py` and the README's commands
have the engine in a process of its own.
"""

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from caches import read_all
from commands import arguments, invoke, write_rows
from fakes import END_ID, make_cache, make_traces
from forked import CACHE_TEACHER, TRAIN_STUDENT, WITH_VLLM, Forked, run_forked
from small_teachers import make_small_model
from students import make_student
from transformers import AutoModelForCausalLM

from student_train.run.config import TrainConfig
from student_train.run.loop import train
from teacher_cache.format import open_cache
from teacher_cache.format.folder_lock import FolderLock

pytestmark = [pytest.mark.slow, pytest.mark.vllm]

IN_ONE_PROCESS = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
PROMPT = [5, 9, 20, 31]
NUM_TOKENS = 12


def run(code, *words, env=IN_ONE_PROCESS):
    return run_forked(code, *words, env=env, imported=WITH_VLLM, expect=0)


def test_vllm_and_transformers_make_the_same_cache(tmp_path):
    """Both modes, greedily: the engines must agree on tokens and on entries."""
    (tmp_path / "model").mkdir()
    model = make_small_model(tmp_path / "model")
    rows = [{"id": f"p{n}", "prompt": f"a {n} b", "answer": str(n)} for n in range(8)]
    prompts = write_rows(tmp_path / "prompts.jsonl", rows)
    greedy = ("--temperature", "0", "--capture-prompt", "--mass", "1.0")

    def capture(engine, *words):
        if engine == "vllm":
            run(CACHE_TEACHER, *words)
        else:
            invoke(*words)

    for engine in ("vllm", "transformers"):
        capture(engine, *arguments(model, prompts, tmp_path / engine, *greedy, engine=engine))
        invoke("export", tmp_path / engine, tmp_path / f"{engine}.jsonl")
        capture(
            engine,
            *("score", "--engine", engine, "--model", model, "--top-k", 6, "--mass", "1.0"),
            *("--traces", tmp_path / "vllm.jsonl", "--out", tmp_path / f"{engine}-scored"),
        )
    folders = ("vllm", "transformers", "vllm-scored", "transformers-scored")
    ours, *others = (read_all(open_cache(str(tmp_path / folder))) for folder in folders)
    assert len(ours) == 8
    for other in others:
        for name, trace in ours.items():
            np.testing.assert_array_equal(trace.token_ids, other[name].token_ids)
            np.testing.assert_array_equal(trace.k, other[name].k)
            np.testing.assert_array_equal(trace.top_ids, other[name].top_ids)
            # One step of the grid apart where a logprob lies on the edge between two.
            np.testing.assert_allclose(trace.top_logits, other[name].top_logits, atol=1 / 30)
            np.testing.assert_allclose(trace.tail_logit, other[name].tail_logit, rtol=0.01)
    said = invoke("audit", tmp_path / "vllm", "--model", model, "--max-kl", "1e-4")
    assert "passed: mean KL" in said


def test_vllm_writes_what_transformers_does(tmp_path):
    # vLLM on a CPU has no kernel for smaller heads.
    make_student(tmp_path / "student", initializer_range=0.5, head_dim=32)
    prompts = write_rows(
        tmp_path / "p.jsonl", [{"prompt": f"{n} 4", "answer": n} for n in range(8)]
    )

    def evaluate(engine):
        done = run(
            *(TRAIN_STUDENT, "evaluate", "--model", tmp_path / "student", "--prompts", prompts),
            *("--max-new-tokens", 12, "--engine", engine, "--json"),
            *("--completions", tmp_path / engine),
        )
        return json.loads(done.stdout)

    said = {engine: evaluate(engine) for engine in ("transformers", "vllm")}
    written = []
    for engine, figures in said.items():
        assert figures["answers"]["num_prompts"] == 8
        rows = map(json.loads, (tmp_path / engine).read_text().splitlines())
        written.append([row["completion"] for row in sorted(rows, key=lambda row: row["prompt"])])
    same = [a == b for a, b in zip(*written, strict=True)]
    assert sum(same) >= 7  # greedy, but a tie may be broken the other way

    lines = (tmp_path / "vllm").read_bytes().splitlines(keepends=True)
    (tmp_path / "vllm").write_bytes(b"".join(lines[:3]) + lines[3][:9])
    assert evaluate("vllm") == said["vllm"]
    assert (tmp_path / "vllm").read_bytes().startswith(b"".join(lines[:3]))


PROGRAM = """
import json, sys
from vllm import LLM, SamplingParams

llm = LLM(
    sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=64, max_num_seqs=2,
    kv_cache_memory_bytes=1 << 26,
)
found = {}
for name, settings in {
    "free": {"ignore_eos": True},
    "ending": {"logit_bias": {END_ID: 100.0}},
}.items():
    params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, **settings)
    (output,) = llm.generate({"prompt_token_ids": PROMPT}, params, use_tqdm=False)
    found[name] = [list(output.outputs[0].token_ids), output.outputs[0].finish_reason]
print(json.dumps(found), flush=True)
import os
os._exit(0)  # threads that vLLM leaves behind may abort the interpreter's end
"""


def test_vllm_loads_the_student_and_ends_where_the_traces_end(tmp_path):
    cache = make_cache(tmp_path / "cache", make_traces(40))
    student = make_student(tmp_path / "student", head_dim=32)  # the least that vLLM takes here
    config = TrainConfig(
        cache=(cache,), student=student, out=tmp_path / "run", lr=3e-3, batch_traces=4, epochs=3
    )
    folder = train(config).model
    values = f"END_ID, PROMPT, NUM_TOKENS = {END_ID}, {PROMPT}, {NUM_TOKENS}\n"
    found = json.loads(run(values + PROGRAM, folder).stdout.strip().splitlines()[-1])

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokens = model.generate(
        torch.tensor([PROMPT]), max_new_tokens=NUM_TOKENS, min_new_tokens=NUM_TOKENS,
        do_sample=False, eos_token_id=None, pad_token_id=END_ID,
    )  # fmt: skip
    assert found["free"] == [tokens[0, len(PROMPT) :].tolist(), "length"]
    assert found["ending"] == [[END_ID], "stop"]


HOLDS_A_LOCK = """
import multiprocessing, sys, time
from pathlib import Path
from teacher_cache.engines.vllm import VllmTeacher
from teacher_cache.format.folder_lock import FolderLock

lock = FolderLock(Path(sys.argv[1]))
teacher = VllmTeacher(model=sys.argv[2], top_k=6)
Path(sys.argv[3]).write_text(" ".join(str(p.pid) for p in multiprocessing.active_children()))
time.sleep(600)
"""


def test_the_engine_ends_with_who_started_it_and_holds_none_of_its_locks(tmp_path):
    """Left alone it would keep the GPU's memory, and a journal's lock: no next run could start."""
    lock, pids = tmp_path / "lock", tmp_path / "pids"
    (tmp_path / "model").mkdir()
    model = make_small_model(tmp_path / "model")
    environment = {**os.environ, "VLLM_WORKER_MULTIPROC_METHOD": "fork"}  # CUDA's default
    script = Forked(HOLDS_A_LOCK, lock, model, pids, env=environment, imported=WITH_VLLM)
    try:
        deadline_s = time.monotonic() + 200
        while not (pids.exists() and pids.read_text()):
            assert script.poll() is None and time.monotonic() < deadline_s
            time.sleep(0.1)
        started = [int(pid) for pid in pids.read_text().split()]
        children = psutil.Process(script.pid).children(recursive=True)
        assert {process.pid for process in children} > set(started)
        assert str(lock) in files_of(script.pid)
        for process in children:
            assert str(lock) not in files_of(process.pid)
        for pid in started:  # the guard would end them at once
            os.kill(pid, signal.SIGSTOP)
    finally:
        script.kill()
        script.wait()
    FolderLock(lock).close()
    deadline_s = time.monotonic() + 30
    while any(is_running(pid) for pid in started):
        assert time.monotonic() < deadline_s
        time.sleep(0.1)


def files_of(pid):
    links = Path(f"/proc/{pid}/fd").iterdir()
    return {str(each.readlink()) for each in links if each.is_symlink()}


def is_running(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
