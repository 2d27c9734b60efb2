"""Distance of a student from the teacher on traces that it was not trained on, by section."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from student_train.batch.micro_batch import empty_micro_batch, micro_batches
from student_train.batch.sequence_parts import WHOLE_SEQUENCE, SequencePart
from student_train.data.tokens import TokenSelection
from student_train.model.forward import StudentWithLoss
from student_train.model.load import output_layer
from teacher_cache.format import SECTIONS, Trace


@dataclass(frozen=True)
class SectionFigures:
    """Means over the tokens of one section, or of all."""

    num_tokens: int
    kl: float  # nats, the cache's tail included
    nll: float  # nats, of the tokens that the traces hold
    top1_agreement: float  # share of tokens whose likeliest id is the teacher's


def heldout_figures(
    student: StudentWithLoss, traces: Iterable[Trace], device: torch.device
) -> dict[str, SectionFigures]:
    """Measure a student on whole traces, whatever it was trained on.

    Args:
        student: Student in evaluation mode, on the device.
        traces: Traces of a cache; tokens without a distribution do not count.
        device: Device to compute on.

    Returns:
        Figures by section, those without a token left out, and under "all".
    """
    return section_figures(heldout_sums(student, traces, device))


def heldout_sums(
    student: StudentWithLoss,
    traces: Iterable[Trace | None],
    device: torch.device,
    part: SequencePart = WHOLE_SEQUENCE,
) -> NDArray[np.float64]:
    """[3, 4] sums over the tokens of each section: count, KL, NLL, agreement.

    Args:
        student: Student, as in `heldout_figures`.
        traces: Traces, as many in every process of a sharded student, padded with None.
        device: Device to compute on.
        part: Part of every trace that this process has, and sums over.
    """
    num_ids = output_layer(student.model).weight.shape[0]
    sums = np.zeros((len(SECTIONS), 4))
    for trace in traces:
        # One by one: a micro-batch does not say which trace and section a token is of.
        batches = micro_batches(
            TokenSelection().selected([] if trace is None else [trace]),
            batch_tokens=1, loss_reduction="token", num_ids=num_ids,
        )  # fmt: skip
        batch = part.of(batches[0] if batches else empty_micro_batch())
        result = student.per_token(batch.to(device))
        if trace is None:
            continue
        parts = torch.stack([result.kl.double(), result.ce.double(), result.top1.double()])
        section = trace.section_of_token[(batch.predicting_positions() + 1).numpy()]
        counted = np.concatenate([np.ones((1, len(section))), parts.cpu().numpy()])
        for index in range(len(SECTIONS)):
            sums[index] += counted[:, section == index].sum(axis=1)
    return sums


def section_figures(sums: NDArray[np.float64]) -> dict[str, SectionFigures]:
    """The means of `heldout_sums`, by section and for "all"."""
    figures = {name: _figures(row) for name, row in zip(SECTIONS, sums, strict=True) if row[0]}
    return {**figures, "all": _figures(sums.sum(axis=0))} if figures else {}


def _figures(sums: NDArray[np.float64]) -> SectionFigures:
    num_tokens = int(sums[0])
    kl, nll, top1 = (float(value) / num_tokens for value in sums[1:])
    return SectionFigures(num_tokens, kl, nll, top1)
