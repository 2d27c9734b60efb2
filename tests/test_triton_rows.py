"""Triton's part of the loss: its kernels in Triton's interpreter, and the choice of them."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from student_train.losses import chunks, triton_rows
from student_train.losses.rows import TorchPasses


@pytest.mark.slow
def test_the_kernels_equal_float64_and_pytorch_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, str(Path(__file__).with_name("triton_interpreted.py"))],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


# Triton says so of a default of its own.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION is unset")
@pytest.mark.parametrize(
    ("logits", "out"), [("fp32", "bf16"), ("fp32", "fp16"), ("fp32", "fp32"), ("fp64", "fp64")]
)
def test_the_kernels_compile_for_a_gpu_that_is_not_here(monkeypatch, tmp_path, logits, out):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    hopper = GPUTarget("cuda", 90, 32)
    constants = {"temperature": 2.0, "softcap": 30.0, "block": 8192}
    types = {"out": f"*{out}", "stride": "i32", "out_stride": "i32", "width": "i32"}
    for kernel in (triton_rows._sum_tails, triton_rows._weight_softmax):
        used = {name: value for name, value in constants.items() if name in kernel.arg_names}
        signature = {name: types.get(name, f"*{logits}") for name in kernel.arg_names}
        signature.update(dict.fromkeys(used, "constexpr"))
        source = ASTSource(kernel, signature, used)
        compiled = triton.compile(source, target=hopper, options={"num_warps": 16})
        assert compiled.asm["cubin"]


def test_without_triton_the_loss_says_so_once_and_runs_on_pytorch(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "student_train.losses.triton_rows", None)
    chunks.passes_type.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert chunks.passes_type("cuda") is TorchPasses
        assert chunks.passes_type("cuda") is TorchPasses
    chunks.passes_type.cache_clear()
    assert [record.name for record in caplog.records] == ["student_train.losses.chunks"]
    assert "without its Triton kernels" in caplog.text


def test_only_cuda_asks_for_triton():
    assert chunks.passes_type("cpu") is chunks.passes_type("mps") is TorchPasses
