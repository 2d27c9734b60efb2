"""Triton's part of the loss: its kernels in Triton's interpreter, and the choice of them."""

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from student_train.losses import chunks, triton_fused, triton_rows
from student_train.losses.rows import TorchPasses
from student_train.objective import Objective

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import loss_kernels  # noqa: E402 (it lies beside the scripts that it serves)

WITH_A_HEAD = {"tail": "renormalise", "temperature": 2.0, "softcap": 30.0, "logit_scale": 0.5}


@pytest.mark.slow
def test_the_kernels_equal_float64_and_pytorch_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, str(Path(__file__).with_name("triton_interpreted.py"))],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("logits", "out", "settings"),
    [
        ("fp32", "bf16", {}),
        ("fp32", "fp16", {"divergence": "jsd", "mix": 0.5, "lanes": 256, **WITH_A_HEAD}),
        ("fp64", "fp64", {"divergence": "tvd"}),
    ],
    ids=str,
)
def test_the_kernels_compile_for_a_gpu_that_is_not_here(
    monkeypatch, tmp_path, logits, out, settings
):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for kernel in (triton_fused._evaluate_row, triton_rows._sum_tails, triton_rows._weight_softmax):
        binary = loss_kernels.compiled(kernel, logits, out, **settings)
        assert loss_kernels.resources(binary)["spill_bytes"] == 0
        text = binary.asm["ptx"]
        assert "ld.global.nc" not in text  # it may miss what the program itself has written
        if logits == "fp32":
            assert "lg2.approx" not in text  # too coarse near 1, where small divergences are
            assert re.search(r"ld\.global\S*\.v4", text)


def test_a_chunk_launches_three_products_and_one_kernel():
    passes = triton_rows.TritonPasses
    for settings in ({}, {"divergence": "jsd", "softcap": 3.0, "logit_scale": 0.5}):
        found = loss_kernels.launches_per_chunk(passes, Objective(**settings))
        assert found == {"mm": 2, "addmm_": 1, "kernel _evaluate_row": 1}
    assert loss_kernels.launches_per_chunk(loss_kernels.PassesAlone, Objective()).total() > 100


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
