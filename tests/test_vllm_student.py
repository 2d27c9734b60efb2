"""A finished student in the CPU build of vLLM: it loads, says the same, and ends."""

import json
import os
import subprocess
import sys

import pytest
import torch
from fakes import END_ID, make_cache, make_traces
from students import make_student
from transformers import AutoModelForCausalLM

from student_train.run.config import TrainConfig
from student_train.run.loop import train

pytestmark = [pytest.mark.slow, pytest.mark.vllm]

PROMPT = [5, 9, 20, 31]
NUM_TOKENS = 12
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
print(json.dumps(found))
"""


def test_vllm_loads_the_student_and_ends_where_the_traces_end(tmp_path):
    cache = make_cache(tmp_path / "cache", make_traces(40))
    student = make_student(tmp_path / "student", head_dim=32)  # the least that vLLM takes here
    config = TrainConfig(
        cache=(cache,), student=student, out=tmp_path / "run", lr=3e-3, batch_traces=4, epochs=3
    )
    folder = train(config).model
    values = f"END_ID, PROMPT, NUM_TOKENS = {END_ID}, {PROMPT}, {NUM_TOKENS}\n"
    done = subprocess.run(
        [sys.executable, "-c", values + PROGRAM, str(folder)],
        env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.strip().splitlines()[-1])

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokens = model.generate(
        torch.tensor([PROMPT]), max_new_tokens=NUM_TOKENS, min_new_tokens=NUM_TOKENS,
        do_sample=False, eos_token_id=None, pad_token_id=END_ID,
    )  # fmt: skip
    assert found["free"] == [tokens[0, len(PROMPT) :].tolist(), "length"]
    assert found["ending"] == [[END_ID], "stop"]
