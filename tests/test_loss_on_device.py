"""The checks that a GPU must pass, on the CPU and, where there is one, on the GPU."""

import loss_on_device
import pytest
import torch

from student_train.losses import chunks

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.slow
@pytest.mark.parametrize("check", loss_on_device.CHECKS, ids=lambda check: check.__name__)
def test_the_loss_on_the_cpu(check):
    num_cases, _ = check("cpu", 211)
    assert num_cases > 0


@GPU
@pytest.mark.parametrize(
    "check", loss_on_device.checks_for("cuda"), ids=lambda check: check.__name__
)
def test_the_loss_on_a_gpu(check):
    check("cuda", loss_on_device.WIDE)


@GPU
def test_a_gpu_runs_the_triton_kernels():
    assert chunks.passes_type("cuda").__name__ == "TritonPasses"


def test_a_wrong_kernel_is_noticed(monkeypatch):
    right = chunks.TorchPasses.reduce_

    def wrong(passes, logits):
        sums = right(passes, logits)
        sums.rest.add_(1e-9)
        return sums

    monkeypatch.setattr(chunks.TorchPasses, "reduce_", wrong)
    with pytest.raises(AssertionError, match="differs by"):
        loss_on_device.every_objective("cpu", 17)
