"""What a student can do: answers generated and checked, and how close it is to the teacher."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from student_train.answers import extract_answer, has_math_verify, is_right
from student_train.config import EvaluateConfig
from student_train.data import open_data
from student_train.forward import StudentWithLoss
from student_train.generation import Completion, generate
from student_train.heldout import SectionFigures, heldout_figures
from student_train.intervals import clustered_interval
from student_train.prompts import Prompt, prompt_ids, read_prompts
from student_train.student import check_student, head_of, load_model
from teacher_cache.format import Cache


@dataclass(frozen=True)
class Answers:
    """Figures of generated answers, of all prompts or of one group."""

    num_prompts: int
    num_samples: int  # per prompt
    num_right: int
    accuracy: float  # avg@n: mean over prompts of the share of right samples
    accuracy_low: float  # 95 %: Wilson's, or clustered by prompt where there are several samples
    accuracy_high: float
    mean_tokens: float  # generated, per sample
    unfinished_share: float  # that did not end within max_tokens
    unclosed_share: float  # whose thinking was never closed


@dataclass(frozen=True)
class Evaluation:
    """Figures of one evaluation."""

    model: str
    checker: str  # how answers were compared
    answers: Answers
    groups: dict[str, Answers]
    heldout: dict[str, SectionFigures]  # by section; empty without a cache

    def __str__(self) -> str:
        a = self.answers
        name = "accuracy" if a.num_samples == 1 else f"avg@{a.num_samples}"
        lines = [
            f"{name} {a.accuracy:.1%} (95 %: {a.accuracy_low:.1%} to {a.accuracy_high:.1%}), "
            f"{a.num_right:,} of {a.num_prompts * a.num_samples:,} right | mean length "
            f"{a.mean_tokens:.1f} tokens | {a.unfinished_share:.1%} unfinished, "
            f"{a.unclosed_share:.1%} with unclosed thinking"
        ]
        lines += [
            f"  {group}: {g.accuracy:.1%} ({g.accuracy_low:.1%} to {g.accuracy_high:.1%}) of "
            f"{g.num_prompts:,}"
            for group, g in self.groups.items()
        ]
        lines += [
            f"  held-out {section}: KL {f.kl:.4f}, NLL {f.nll:.4f} nats, top-1 "
            f"{f.top1_agreement:.1%}, {f.num_tokens:,} tokens"
            for section, f in self.heldout.items()
        ]
        return "\n".join(lines)


@dataclass(frozen=True)
class _Checked:
    """One sample."""

    prompt: int
    group: str | None
    found: str
    right: bool
    closed: bool
    completion: Completion


def evaluate(config: EvaluateConfig) -> Evaluation:
    """Generate answers to every prompt and count the right ones; measure on held-out traces.

    Raises:
        ValueError: If the model cannot be loaded, or a prompt line is wrong (file and line).
        CacheError: If the cache cannot be read or does not fit the model.
    """
    prompts = list(islice(read_prompts(config.prompts, config.group_by), config.limit))
    if not prompts:
        raise ValueError(f"{config.prompts}: expected at least one prompt, found none")
    model, tokenizer = load_model(config.model)
    cache = None
    if config.cache is not None:
        cache = open_data([config.cache]).sources[0].cache
        check_student(config.model, model, tokenizer, cache.header)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).eval()
    end_ids = cache.header.terminal_token_ids if cache else ()
    checked = _checked_samples(model, tokenizer, prompts, end_ids, config)
    if config.completions is not None:
        _write_completions(config.completions, checked)
    groups: dict[str, list[_Checked]] = {}
    for sample in checked:
        if sample.group is not None:
            groups.setdefault(sample.group, []).append(sample)
    return Evaluation(
        model=config.model,
        checker="exact, numeric, boxed" + (", math-verify" if has_math_verify() else ""),
        answers=_answers(checked, config.samples),
        groups={name: _answers(groups[name], config.samples) for name in sorted(groups)},
        heldout={} if cache is None else _heldout(model, cache, device),
    )


def _checked_samples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    end_ids: Sequence[int],
    config: EvaluateConfig,
) -> list[_Checked]:
    ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    with_math = has_math_verify()
    checked = []
    for sample in range(config.samples):
        seeded = replace(config, seed=config.seed * config.samples + sample)
        completions = generate(model, tokenizer, ids, seeded, end_ids)
        for index, (prompt, done) in enumerate(zip(prompts, completions, strict=True)):
            found = extract_answer(done.text, config.think_close, tokenizer.all_special_tokens)
            right = is_right(found, prompt.answer, with_math=with_math)
            closed = config.think_close in done.text
            checked.append(_Checked(index, prompt.group, found, right, closed, done))
    return checked


def _answers(samples: Sequence[_Checked], num_samples: int) -> Answers:
    num_right: dict[int, int] = {}
    for sample in samples:
        num_right[sample.prompt] = num_right.get(sample.prompt, 0) + sample.right
    low, high = clustered_interval(list(num_right.values()), num_samples)
    count = len(samples)
    return Answers(
        num_prompts=len(num_right),
        num_samples=num_samples,
        num_right=sum(num_right.values()),
        accuracy=sum(num_right.values()) / count,
        accuracy_low=low,
        accuracy_high=high,
        mean_tokens=sum(sample.completion.num_tokens for sample in samples) / count,
        unfinished_share=sum(not sample.completion.finished for sample in samples) / count,
        unclosed_share=sum(not sample.closed for sample in samples) / count,
    )


def _write_completions(path: Path, checked: Sequence[_Checked]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for sample in checked:
            file.write(json.dumps(asdict(sample)) + "\n")


def _heldout(
    model: PreTrainedModel, cache: Cache, device: torch.device
) -> dict[str, SectionFigures]:
    rows_of_shard: dict[int, list[int]] = {}
    for shard, row in cache.traces:
        rows_of_shard.setdefault(shard, []).append(row)
    traces = (
        trace
        for shard, rows in rows_of_shard.items()
        for trace in cache.read(
            shard, {row: cache.num_held(cache.shards[shard].traces[row]) for row in rows}
        ).values()
    )
    student = StudentWithLoss(model.float(), head_of(model), ce_weight=0.5)
    return heldout_figures(student, traces, device)
