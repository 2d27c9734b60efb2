"""Measurements of the student on held-out traces during training."""

import math
from dataclasses import replace

import torch
from accelerate import Accelerator
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from student_train.data.heldout import heldout_part
from student_train.data.tails import require_tails_to_measure
from student_train.data.traces import TrainingData, open_data
from student_train.errors import NonFiniteLossError
from student_train.model.forward import StudentWithLoss
from student_train.model.heldout import heldout_sums, section_figures
from student_train.run.config import TrainConfig
from student_train.run.teams import Teams


def heldout_data(config: TrainConfig, data: TrainingData) -> TrainingData | None:
    """The source of a run's held-out traces: its own caches, another one, or None.

    Raises:
        CacheError: If the other cache cannot be read, or one does not tell its tails.
        ValueError: If the run trains on that cache.
    """
    if config.heldout_cache is None:
        for source in data.sources:
            if len(source.heldout):
                require_tails_to_measure(source.cache)
        return data if data.num_heldout else None
    other = open_data([config.heldout_cache], prefix_cache=config.kept_prefixes)
    if other.fingerprint in {source.cache.fingerprint for source in data.sources}:
        raise ValueError(
            f"--heldout-cache {config.heldout_cache}: it is trained on; name another, or hold "
            "some of its traces out with --heldout-share"
        )
    (source,) = other.sources
    require_tails_to_measure(source.cache)
    return TrainingData((replace(source, train=source.train[:0], heldout=source.train),))


def num_trained_too(heldout: TrainingData, data: TrainingData) -> int:
    """Number of held-out traces whose id is also trained on."""
    own = (s.cache.catalog.trace_ids(s.train.catalog_rows) for s in data.sources)
    trained = {trace_id for ids in own for trace_id in ids}
    return sum(info.trace_id in trained for info in heldout.heldout_infos())


def check_positions(heldout: TrainingData, model: PreTrainedModel) -> None:
    """Refuse held-out traces that the student cannot hold.

    Raises:
        ValueError: If there is one; it names the longest.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(heldout.heldout_infos(), key=lambda info: info.n_total)
    if limit is not None and longest.n_total - 1 > limit:
        raise ValueError(
            f"held-out trace {longest.trace_id!r} has {longest.n_total:,} tokens and is measured "
            f"whole, the student has {limit:,} positions; leave such traces out, with "
            f"--where 'n_total <= {limit + 1}' or from --heldout-cache"
        )


class Validation:
    """The held-out traces of a run, in memory, shared by its processes; all call it together."""

    def __init__(
        self,
        student: StudentWithLoss,
        heldout: TrainingData,
        accelerator: Accelerator,
        teams: Teams,
        *,
        limit: int,
    ) -> None:
        """Read the traces.

        Args:
            student: Student on its devices, see `place`.
            heldout: Data whose held-out traces are read.
            accelerator: Accelerator of the run.
            teams: Its processes, in teams that share every trace.
            limit: Largest number of traces to measure on.

        Raises:
            ValueError: If none of their tokens has a distribution.
        """
        self._student = student
        self._accelerator = accelerator
        self._part = teams.part
        mine = heldout_part(
            heldout, rank=teams.team, num_ranks=teams.num_teams, exchange=teams.exchange,
            limit=limit,
        )  # fmt: skip
        num_tokens = sum(int((trace.k > 0).sum()) for trace in mine)
        local = torch.tensor([[len(mine), num_tokens]], device=accelerator.device)
        counts_R2 = accelerator.gather(local)
        if not counts_R2[:, 1].any():
            raise ValueError(
                f"none of {int(counts_R2[:, 0].sum()):,} held-out traces has a token with a "
                "distribution, so they measure nothing; hold more out or name another "
                "--heldout-cache"
            )
        # A sharded student's forward needs every process.
        self._traces = [*mine, *[None] * (int(counts_R2[:, 0].max()) - len(mine))]

    def measure(self) -> dict[str, float]:
        """Means over whole traces: `heldout_kl` and so on, also by section: `heldout_kl_cot`.

        Raises:
            NonFiniteLossError: If the KL is not finite, so that no other could be compared to it.
        """
        device = self._accelerator.device
        self._student.eval()
        with self._accelerator.autocast():
            sums = heldout_sums(self._student, self._traces, device, self._part)
        self._student.train()
        if isinstance(self._student, FSDPModule):
            self._student.reshard()  # what a backward would have done
        total = self._accelerator.reduce(torch.from_numpy(sums).to(device), "sum")
        figures = {}
        for section, means in section_figures(total.cpu().numpy()).items():
            suffix = "" if section == "all" else f"_{section}"
            figures[f"heldout_kl{suffix}"] = means.kl
            figures[f"heldout_nll{suffix}"] = means.nll
            figures[f"heldout_top1_agreement{suffix}"] = means.top1_agreement
        if not math.isfinite(figures["heldout_kl"]):
            raise NonFiniteLossError(
                f"the held-out KL is {figures['heldout_kl']}; expected a number. The student gives "
                "no finite logits on held-out traces that it is not trained on: lower --lr, or, "
                "with --dtype bfloat16, measure with float32. The last checkpoint stays."
            )
        return figures
