"""What a student can do: answers generated and checked, and how close it is to the teacher."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from student_train.evaluation.answers import extract_answer, has_math_verify, is_right
from student_train.evaluation.config import EvaluateConfig
from student_train.evaluation.generation import Completion, generate
from student_train.evaluation.intervals import clustered_interval
from student_train.evaluation.prompts import Prompt, prompt_ids, read_prompts
from student_train.model.forward import StudentWithLoss
from student_train.model.heldout import SectionFigures, heldout_figures
from student_train.model.load import check_student, head_of, load_model, load_tokenizer
from student_train.model.save import check_saved
from student_train.model.tokens import add_missing_tokens
from teacher_cache.format import Cache, open_cache
from teacher_cache.format.files import publish_file
from teacher_cache.format.folder_lock import FolderLock


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
    unfinished_share: float  # that did not end within max_new_tokens
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
        ValueError: If the model cannot be loaded, a prompt line is wrong (file and line), or
            completions have no folder to go to.
        CacheError: If the cache cannot be read or does not fit the model.
        DamagedFileError: If the model is a run's student and not as it was written.
        InUseError: If another evaluation writes its completions to the same file.
    """
    if config.completions is not None and not config.completions.parent.is_dir():
        raise ValueError(f"completions: there is no folder {config.completions.parent}")
    check_saved(config.model)
    if config.completions is None:
        return _evaluate(config)
    lock = config.completions.with_name(f".{config.completions.name}.lock")
    with FolderLock(lock, owned=config.completions):
        return _evaluate(config)


def _evaluate(config: EvaluateConfig) -> Evaluation:
    prompts = list(islice(read_prompts(config.prompts, config.group_by), config.limit))
    if not prompts:
        raise ValueError(f"{config.prompts}: expected at least one prompt, found none")
    tokenizer = load_tokenizer(config.model)
    ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    cache = None if config.cache is None else open_cache(config.cache)
    heldout = {} if cache is None else _heldout(config.model, cache)
    end_ids = () if cache is None else cache.header.terminal_token_ids
    samples = _samples(tokenizer, ids, end_ids, config)
    checked = _check(tokenizer, prompts, samples, config)
    if config.completions is not None:
        _write_completions(config.completions, checked)
    groups: dict[str, list[_Checked]] = {}
    for sample in checked:
        if sample.group is not None:
            groups.setdefault(sample.group, []).append(sample)
    return Evaluation(
        model=config.model,
        checker="exact, numeric, boxed" + (", math-verify" if has_math_verify() else ""),
        answers=_answers(checked, config.samples_per_prompt),
        groups={name: _answers(groups[name], config.samples_per_prompt) for name in sorted(groups)},
        heldout=heldout,
    )


def _samples(
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[Sequence[int]],
    end_ids: Sequence[int],
    config: EvaluateConfig,
) -> list[list[Completion]]:
    """By sample, the completions of all prompts."""
    if config.engine == "vllm":
        from student_train.evaluation.generation_vllm import generate_with_vllm

        return generate_with_vllm(tokenizer, ids, config, end_ids)
    model, _ = load_model(config.model)
    model.to(_device()).eval()
    seeds = range(
        config.seed * config.samples_per_prompt, (config.seed + 1) * config.samples_per_prompt
    )
    return [generate(model, tokenizer, ids, replace(config, seed=seed), end_ids) for seed in seeds]


def _check(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    samples: Sequence[Sequence[Completion]],
    config: EvaluateConfig,
) -> list[_Checked]:
    with_math = has_math_verify()
    checked = []
    for completions in samples:
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
    with publish_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for sample in checked:
            file.write(json.dumps(asdict(sample)) + "\n")


def _heldout(name: str, cache: Cache) -> dict[str, SectionFigures]:
    model, tokenizer = load_model(name, dtype=torch.float32)
    add_missing_tokens(name, tokenizer, cache.header)
    check_student(name, model, tokenizer, cache.header)
    student = StudentWithLoss(model, head_of(model)).to(_device()).eval()
    return heldout_figures(student, cache, _device())


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
