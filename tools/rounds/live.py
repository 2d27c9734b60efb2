"""A student that learns from a live teacher: every few steps it writes new traces.

The ceiling of rounds on the tiny task, where both fit into memory at once.
"""

import random
import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from student_train.evaluation.config import Generation
from student_train.evaluation.generation import generate
from student_train.evaluation.prompts import read_prompts
from student_train.evaluation.requests import Request, Tokens, make_requests
from student_train.losses import Objective, TeacherTargets, sparse_kl
from student_train.model.flops import FlopFormula
from student_train.model.load import load_model, output_layer
from student_train.run.optimizers import make_optimizer, make_schedule
from teacher_cache.format.files import publish_folder

CLIP_NORM = 1.0  # of `train-student run`, as the weight decay
WEIGHT_DECAY = 0.05
STEPS_PER_ROLLOUT = 4


def train_live(
    student: str,
    teacher: str,
    prompts: Path,
    out: Path,
    *,
    num_prompts: int,
    num_steps: int,
    batch_traces: int,
    max_new_tokens: int,
    seed: int,
    options: dict[str, Any],
) -> tuple[str, dict[str, Any]]:
    """Train a student on traces that it wrote at most `STEPS_PER_ROLLOUT` steps before.

    Args:
        student: Folder to start from.
        teacher: Folder of the teacher; same tokenizer.
        prompts: Rows to roll out, in an order of the seed's, again and again.
        out: Folder of the student, written at the end.
        num_prompts: Number of prompts to use, the first ones.
        num_steps: Number of steps.
        batch_traces: Traces per step.
        max_new_tokens: Largest length of a trace without its prompt.
        seed: Seed for the order and the samples.
        options: lr, schedule and warmup as of `train-student run`, and the divergence.

    Returns:
        The folder, and figures as of a run, with the tokens that the teacher read.
    """
    model, tokenizer = load_model(student, dtype=torch.float32)
    judge, _ = load_model(teacher, dtype=torch.float32)
    judge.eval()
    sampling = Generation(
        model=student, engine="transformers", dtype=None, samples_per_prompt=1,
        max_new_tokens=max_new_tokens, temperature=1.0, top_p=1.0, seed=seed,
        batch_size=STEPS_PER_ROLLOUT * batch_traces, with_logprobs=False,
    )  # fmt: skip
    requests = make_requests(tokenizer, list(islice(read_prompts(prompts), num_prompts)), sampling)
    optimizer = make_optimizer("adamw", model, lr=options["lr"], weight_decay=WEIGHT_DECAY)
    schedule = make_schedule(
        options["schedule"], optimizer, warmup=options["warmup"], num_steps=num_steps
    )
    objective = Objective(options["divergence"], ce_weight=0.0)
    formula, order = FlopFormula.of(model), random.Random(seed)
    flops, num_tokens, num_scored = 0, 0, 0
    waiting: list[tuple[Request, Tokens]] = []
    unseen: list[Request] = []
    for step in range(num_steps):
        if not waiting:
            model.eval()
            unseen = unseen or order.sample(requests, len(requests))
            asked, unseen = unseen[: sampling.batch_size], unseen[sampling.batch_size :]
            drawn = replace(sampling, seed=1000 * seed + step)
            written = generate(model, tokenizer, asked, drawn)
            waiting = order.sample([(asked[n], row) for n, _, row in written], len(asked))
            model.train()
        batch, waiting = waiting[:batch_traces], waiting[batch_traces:]
        ids_BT, index_N = _rows(batch)
        loss = _loss(model, judge, ids_BT, index_N, objective)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        num_tokens += len(index_N)
        lengths = [len(one.ids) + len(row.ids) for one, row in batch]
        flops += formula.flops([length - 1 for length in lengths], len(index_N))
        num_scored += sum(lengths)
    shutil.rmtree(out, ignore_errors=True)  # of a run that was stopped before its line was written
    with publish_folder(out) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return str(out), {
        "tokens_trained": num_tokens,
        "flops": flops,
        "step": num_steps,
        "teacher_tokens": num_scored,
    }


def _rows(batch: list[tuple[Request, Tokens]]) -> tuple[Tensor, Tensor]:
    """Ids [B, T], padded on the right where no token looks; [N] places before written tokens."""
    whole = [[*one.ids, *row.ids] for one, row in batch]
    width = max(map(len, whole))
    index = [
        number * width + place - 1
        for number, ((one, _), ids) in enumerate(zip(batch, whole, strict=True))
        for place in range(len(one.ids), len(ids))
    ]
    return torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in whole]), torch.tensor(index)


def _loss(
    model: PreTrainedModel,
    judge: PreTrainedModel,
    ids_BT: Tensor,
    index_N: Tensor,
    objective: Objective,
) -> Tensor:
    """The mean divergence of the written tokens from the teacher's whole distributions."""
    with torch.no_grad():
        logits_NV = judge(input_ids=ids_BT, use_cache=False).logits.flatten(0, 1)[index_N]
    top_logits, top_ids = logits_NV.sort(dim=-1, descending=True)
    targets = TeacherTargets(
        top_ids=top_ids,
        top_logits=top_logits - top_logits[:, :1],
        k=torch.full((len(index_N),), top_ids.shape[1]),
        tail_logit=torch.full((len(index_N),), -torch.inf),
        target_ids=ids_BT.flatten()[index_N + 1],
    )
    hidden_BTD = model.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state
    output = output_layer(model)
    weight_N = torch.full((len(index_N),), 1 / len(index_N))
    return sparse_kl(
        hidden_BTD.flatten(0, 1)[index_N], output.weight, targets, weight_N, objective,
        bias=output.bias,
    ).loss  # fmt: skip
