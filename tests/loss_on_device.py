"""The loss on a GPU against float64 definitions: what a machine without a GPU cannot show.

    python tests/loss_on_device.py --device cuda --json checks.json

Plain functions, for machines without pytest; test_loss_on_device.py runs them where it is. Each
raises where the device is wrong, and returns the number of cases and the worst error it allowed.
"""

import argparse
import json
import time
import traceback
from pathlib import Path

import loss_cases
import reference
import torch

from student_train.losses import Objective, chunks, sparse_kl, sparse_kl_per_token
from student_train.losses.rows import TorchPasses

# Beside every objective: what stands between the head's outputs and the logits.
HEADS = [
    {"ce_weight": 0.0},
    {"softcap": 3.0, "logit_scale": 0.7, "ce_weight": 0.0},
    {"softcap": 3.0, "tail": "renormalise", "temperature": 0.7, "ce_weight": 0.3},
]
KL_ALONE = {"ce_weight": 0.0}
WIDE = 20_011  # ids: more than two blocks of a kernel, and no multiple of anything
# Relative, by norm, between two orders of the same sums on one device.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 4e-6,
    torch.bfloat16: 1e-2,
    torch.float16: 2e-3,
}


def some_on_a_gpu(device):
    """Every objective; on a GPU, where each is a kernel to compile, one in four."""
    return list(loss_cases.allowed_objectives())[:: 1 if device == "cpu" else 4]


def every_objective(device, num_vocab):
    """Values, parts and gradients of every divergence, tail and temperature, in float64."""
    worst, num_cases = 0.0, 0
    # As many entries as caches keep, and more: of a large vocabulary the last are more than the
    # fused kernel takes. Each is another kernel to compile.
    usual, more = [(7, 7), (num_vocab, min(num_vocab, 60))], [300, num_vocab]
    for number, settings in enumerate([*loss_cases.allowed_objectives(), *HEADS]):
        sizes = [
            *usual,
            *((num_vocab, min(num_vocab, k)) for k in more[number % 4 : number % 4 + 1]),
        ]
        for width, most_kept in sizes:
            hidden, weight, targets, token_weight = loss_cases.ragged_case(
                num_vocab=width, most_kept=most_kept
            )
            bias = torch.linspace(-1, 1, width, dtype=torch.float64)
            got = _loss_and_gradients(
                _fused, device, (hidden, weight, bias), targets, token_weight, settings
            )
            truth = _loss_and_gradients(
                _definition, "cpu", (hidden, weight, bias), targets, token_weight, settings
            )
            worst = max(worst, _largest_difference(got, truth, f"{settings}, V = {width}"))
            num_cases += 1
    return num_cases, worst


def per_token(device, _):
    """The variant that forms its logits again, and the parts, in float64."""
    worst = 0.0
    objectives = some_on_a_gpu(device)
    for settings in objectives:
        hidden, weight, targets, upstream = loss_cases.ragged_case()
        results = []
        for where in (device, "cpu"):
            operands = [each.to(where).requires_grad_() for each in (hidden, weight)]
            on_device = loss_cases.on_device(targets, where)
            output = sparse_kl_per_token(*operands, on_device, Objective(**settings), chunk_bytes=1)
            gradients = torch.autograd.grad(output.loss, operands, upstream.to(where))
            parts = (output.kl, output.ce, output.student_mass, output.top1.double())
            results.append([output.loss, *parts, *gradients])
        worst = max(worst, _largest_difference(*results, f"{settings}"))
    return len(objectives), worst


def rounding(device, num_vocab):
    """At most twice the error of the plain formula in the same dtype, near the teacher and far."""
    worst, num_cases = 0.0, 0
    for dtype in (torch.float32, torch.bfloat16):
        for distance in (1, 1e-2, 1e-4):
            for sharpness in (1, 3):
                hidden, weight, targets = loss_cases.distillation_case(
                    dtype, distance, sharpness, num_vocab=num_vocab
                )
                errors, allowed = loss_cases.errors_and_yardstick(
                    hidden.to(device), weight.to(device), loss_cases.on_device(targets, device)
                )
                for error, limit in zip(errors, allowed, strict=True):
                    assert error <= limit, (
                        f"{dtype}, KL {distance}, sharpness {sharpness}: {error} > {limit}"
                    )
                    worst = max(worst, error / limit)
                num_cases += 1
    return num_cases, worst


def half_precision_equals_pytorch(device, num_vocab):
    """The device's own kernels against PyTorch's passes there, in every dtype, packed rows too."""
    worst, num_cases = 0.0, 0
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for settings in HEADS:
            hidden, weight, targets = loss_cases.distillation_case(dtype, 1, 1, num_vocab=num_vocab)
            results = []
            for passes in (chunks.passes_type(torch.device(device).type), TorchPasses):
                chosen, chunks.passes_type = chunks.passes_type, lambda _, passes=passes: passes
                try:
                    results.append(
                        _loss_and_gradients(
                            _fused, device, (hidden, weight, None), targets,
                            torch.full((len(hidden),), 1 / len(hidden)), settings,
                        )
                    )  # fmt: skip
                finally:
                    chunks.passes_type = chosen
            tolerance = TOLERANCE[dtype]
            for one, other in zip(*results, strict=True):
                error = float((one - other).norm() / other.norm())
                assert error <= tolerance, f"{dtype}, {settings}: {error} > {tolerance}"
                worst = max(worst, error / tolerance)
            num_cases += 1
    return num_cases, worst


def extremes(device, _):
    """Logits of 1e4 give numbers."""
    objectives = some_on_a_gpu(device)
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (12, 9), generator=generator) * 2.0 - 1
    targets = loss_cases.targets_of(20 * torch.randn(12, 9, generator=generator), [1, 2, 3, 8] * 3)
    for settings in objectives:
        for dtype in (torch.float32, torch.bfloat16):
            student = (1e4 * signs).to(device, dtype).requires_grad_()
            weight = torch.eye(9, device=device, dtype=dtype).requires_grad_()
            moved = loss_cases.on_device(targets, device)
            output = sparse_kl(
                student, weight, moved, torch.ones(12, device=device), Objective(**settings)
            )
            output.loss.backward()
            for tensor in (output.kl, output.ce, student.grad, weight.grad):
                assert tensor.isfinite().all(), f"{settings}, {dtype}: not finite"
    return 2 * len(objectives), 0.0


def repeats(device, num_vocab):
    """Two runs give the same bits; chunks of another size the same numbers."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        hidden, weight, targets = loss_cases.distillation_case(dtype, 1, 1, num_vocab=num_vocab)
        runs = [
            _loss_and_gradients(
                _fused, device, (hidden, weight, None), targets,
                torch.full((len(hidden),), 1 / len(hidden)),
                {**KL_ALONE, "chunk_bytes": chunk_bytes},
            )
            for chunk_bytes in (None, None, 7 * 8 * num_vocab)
        ]  # fmt: skip
        for one, same, cut in zip(*runs, strict=True):
            assert torch.equal(one, same), f"{dtype}: two runs differ"
            error = float((one - cut).norm() / one.norm())
            assert error <= TOLERANCE[dtype], f"{dtype}: other chunks give {error}"
    return 4, 0.0


def autocast(device, num_vocab):
    """float32 weights under bf16 autocast: operands rounded, gradients float32."""
    hidden, weight, targets = loss_cases.distillation_case(torch.float32, 1, 1, num_vocab=num_vocab)
    hidden = hidden.bfloat16().float()  # or rounding it would be the error
    weight = weight.bfloat16().float()
    token_weight = torch.full((len(hidden),), 1 / len(hidden))
    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
        got = _loss_and_gradients(
            _fused, device, (hidden, weight, None), targets, token_weight, KL_ALONE
        )
    truth = _loss_and_gradients(
        _fused, "cpu", (hidden.double(), weight.double(), None), targets, token_weight, KL_ALONE
    )
    worst = 0.0
    for one, other in zip(got, truth, strict=True):
        error = float((one - other).norm() / other.norm())
        assert error <= 4e-3, f"error {error}"
        worst = max(worst, error)
    return 1, worst


def offsets_beyond_32_bits(device, _):
    """A chunk of more than 2^31 logits: its last rows are those of a small chunk."""
    num_vocab, num_rows = 151_936, 2**31 // 151_936 + 64
    hidden, weight, targets = _big_case(device, num_rows, num_vocab, hidden_size=16)
    last = slice(num_rows - 32, None)
    kl_alone = Objective(**KL_ALONE)
    whole = sparse_kl_per_token(hidden, weight, targets, kl_alone, chunk_bytes=2**36)
    part = sparse_kl_per_token(hidden[last], weight, targets.select(last), kl_alone)
    torch.testing.assert_close(whole.loss[last], part.loss, rtol=1e-5, atol=1e-5)
    token_weight = torch.zeros(num_rows, device=device)
    token_weight[last] = 1.0
    token_weight[: num_rows - 32] = 1e-30  # rows of weight 0 would be left out
    hidden.requires_grad_()
    loss = sparse_kl(hidden, weight, targets, token_weight, kl_alone, chunk_bytes=2**36).loss
    (whole,) = torch.autograd.grad(loss, hidden)
    hidden_part = hidden.detach()[last].requires_grad_()
    loss = sparse_kl(hidden_part, weight, targets.select(last), token_weight[last], kl_alone).loss
    (part,) = torch.autograd.grad(loss, hidden_part)
    torch.testing.assert_close(whole[last], part, rtol=2e-2, atol=1e-4)
    return 2, 0.0


def memory(device, _):
    """The logits of all tokens never exist: one chunk of them, and the gradients."""
    num_rows, num_vocab, hidden_size = 8192, 151_936, 256
    hidden, weight, targets = _big_case(device, num_rows, num_vocab, hidden_size)
    operands = [each.requires_grad_() for each in (hidden, weight)]
    token_weight = torch.full((num_rows,), 1 / num_rows, device=device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    sparse_kl(*operands, targets, token_weight, Objective(**KL_ALONE)).loss.backward()
    extra = torch.cuda.max_memory_allocated(device) - before
    gradients = num_vocab * hidden_size * (4 + 2) + num_rows * hidden_size * 2
    limit = gradients + chunks.CUDA_CHUNK_BYTES + 128 * 2**20
    assert extra <= limit, f"{extra / 2**20:.0f} MiB above the inputs, at most {limit / 2**20:.0f}"
    return 1, extra / limit


def another_gpu_than_the_current_one(_, num_vocab):
    """Tensors on the second GPU while the first is the current one."""
    return per_token("cuda:1", num_vocab)


CHECKS = (
    every_objective,
    per_token,
    rounding,
    half_precision_equals_pytorch,
    extremes,
    repeats,
    autocast,
)
CUDA_CHECKS = (offsets_beyond_32_bits, memory)


def checks_for(device):
    """The checks that this device can run; a second GPU is one more."""
    if device == "cpu":
        return CHECKS
    others = (another_gpu_than_the_current_one,) if torch.cuda.device_count() > 1 else ()
    return (*CHECKS, *CUDA_CHECKS, *others)


def _fused(hidden, weight, targets, token_weight, *, bias, chunk_bytes=None, **settings):
    return sparse_kl(
        hidden, weight, targets, token_weight, Objective(**settings), bias=bias,
        chunk_bytes=chunk_bytes,
    ).loss  # fmt: skip


def _definition(hidden, weight, targets, token_weight, *, bias, **settings):
    losses = reference.sparse_kl(hidden, weight, targets, bias=bias, **settings)
    return (losses * token_weight).sum()


def _loss_and_gradients(function, device, operands, targets, token_weight, settings):
    """Loss and gradients of hidden, weight and bias, on the CPU in float64."""
    moved = [None if each is None else each.to(device).requires_grad_() for each in operands]
    hidden, weight, bias = moved
    loss = function(
        hidden, weight, loss_cases.on_device(targets, device), token_weight.to(device),
        bias=bias, **settings,
    )  # fmt: skip
    given = [each for each in moved if each is not None]
    return [each.detach().cpu().double() for each in (loss, *torch.autograd.grad(loss, given))]


def _largest_difference(got, truth, where):
    worst = 0.0
    for one, other in zip(got, truth, strict=True):
        one, other = one.detach().cpu(), other.detach().cpu()
        error = float(((one - other).abs() / (1 + other.abs())).max())
        assert error <= 1e-11, f"{where}: differs by {error}"
        worst = max(worst, error)
    return worst


def _big_case(device, num_rows, num_vocab, hidden_size):
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape):
        values = torch.randn(*shape, generator=generator, device=device)
        return (values * hidden_size**-0.25).bfloat16()

    first = torch.randint(num_vocab, (num_rows, 1), generator=generator, device=device)
    top_ids = (first + torch.arange(8, device=device) * (num_vocab // 8)) % num_vocab
    targets = loss_cases.TeacherTargets(
        top_ids=top_ids,
        top_logits=-0.5 * torch.arange(8.0, device=device).expand(num_rows, 8),
        k=torch.full((num_rows,), 8, device=device),
        tail_logit=torch.full((num_rows,), -4.0, device=device),
        target_ids=top_ids[:, 0].contiguous(),
    )
    return normal(num_rows, hidden_size), normal(num_vocab, hidden_size), targets


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], required=True)
    parser.add_argument("--wide", type=int, default=WIDE, help="vocabulary of the wide cases")
    parser.add_argument("--json", type=Path, help="written anew after each check")
    arguments = parser.parse_args()
    results = {}
    for check in checks_for(arguments.device):
        began_s, found = time.perf_counter(), {}
        try:
            num_cases, worst = check(arguments.device, arguments.wide)
            found = {"num_cases": num_cases, "worst": worst, "error": None}
        except Exception as error:  # the others say more about what is wrong
            traceback.print_exc()
            lines = str(error).strip().splitlines() or [""]
            found = {"error": f"{type(error).__name__}: {lines[0]}"}
        found = {**found, "seconds": time.perf_counter() - began_s}
        print(check.__name__, found)  # noqa: T201 (a script, when it runs alone)
        results[check.__name__] = found
        if arguments.json is not None:
            about = {
                "device": arguments.device,
                "kernels": chunks.passes_type(arguments.device).__name__,
            }
            arguments.json.write_text(json.dumps({**about, "checks": results}, indent=2))
    raise SystemExit(any(result["error"] for result in results.values()))


if __name__ == "__main__":
    main()
