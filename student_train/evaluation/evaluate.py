"""Evaluation of a student: answers generated and checked, and its distance from the teacher."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING

from student_train.data.tails import require_tails_to_measure
from student_train.errors import InterruptedRunError
from student_train.evaluation.answers import ThinkingMarks, extract_answer
from student_train.evaluation.checker import Checker
from student_train.evaluation.completions import Completion, Sample, completion_log
from student_train.evaluation.config import EvaluateConfig, Generation
from student_train.evaluation.figures import Answers, Evaluation
from student_train.evaluation.golds import check_golds
from student_train.evaluation.prompts import Prompt, read_prompts
from student_train.evaluation.sample_log import SampleLog
from teacher_cache.format import open_cache
from teacher_cache.terminal.progress import Progress
from teacher_cache.terminal.stop_signals import Stopped, stop_signals

# torch and transformers take seconds to load: mistakes in files are found before that.
if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from student_train.evaluation.requests import Request


@dataclass(frozen=True)
class _Task:
    """Prompts to answer, and the model that answers them."""

    config: EvaluateConfig
    prompts: Sequence[Prompt]
    tokenizer: "PreTrainedTokenizerBase"
    requests: "Sequence[Request]"
    end_ids: Sequence[int]


def evaluate(config: EvaluateConfig) -> Evaluation:
    """Generate answers to every prompt and count the right ones; measure on held-out traces.

    With `completions`, every answer is kept as it comes, and the same call resumes a stopped one.

    Raises:
        ValueError: If the model cannot be loaded, a prompt is wrong (with file and row), the
            golds cannot tell right from wrong, or the file of completions has no folder or
            belongs to another evaluation.
        CacheError: If the cache cannot be read or does not fit the model.
        DamagedFileError: If the model or the completions are damaged.
        InUseError: If another evaluation writes its completions to the same file.
        InterruptedRunError: After SIGINT or SIGTERM.
    """
    if config.completions is not None and not config.completions.parent.is_dir():
        raise ValueError(f"completions: there is no folder {config.completions.parent}")
    prompts = list(islice(read_prompts(config.prompts, config.group_by), config.limit))
    if not prompts:
        raise ValueError(f"{config.prompts}: expected at least one prompt, found none")
    cache = None if config.cache is None else open_cache(config.cache)
    if cache is not None:
        require_tails_to_measure(cache)
    with Checker() as checker:
        check_golds(prompts, checker)
        with Progress("loading torch"):
            from student_train.evaluation.engines import device, usual_dtype
            from student_train.evaluation.requests import make_requests, settings_of
            from student_train.model.load import load_tokenizer
            from student_train.model.save import check_saved

        with Progress("loading the tokenizer"):
            check_saved(config.model)
            config = replace(config, dtype=config.dtype or usual_dtype(config.model))
            end_ids = () if cache is None else tuple(cache.header.terminal_token_ids)
            tokenizer = load_tokenizer(config.model)
            requests = make_requests(tokenizer, prompts, Generation.of(config))
        task = _Task(config, prompts, tokenizer, requests, end_ids)
        settings = {}
        if config.completions is not None:
            settings = settings_of(config, prompts, end_ids, checker.name)
        with completion_log(config.completions, settings, force=config.force) as log:
            heldout = {}
            if cache is not None:
                from student_train.evaluation.heldout_cache import measure_on_cache

                with Progress("measuring on the cache"):
                    heldout = measure_on_cache(config.model, cache, device())
            _answer_all(task, checker, log)
    samples = [log.samples[key] for key in sorted(log.samples)]
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        if sample.group is not None:
            groups.setdefault(sample.group, []).append(sample)
    return Evaluation(
        model=config.model,
        checker=checker.name,
        answers=Answers.of(samples, config.samples_per_prompt),
        groups={
            name: Answers.of(groups[name], config.samples_per_prompt) for name in sorted(groups)
        },
        heldout=heldout,
    )


def _answer_all(task: _Task, checker: Checker, log: SampleLog[Sample]) -> None:
    """Generate and check the samples that the log lacks."""
    config = task.config
    num_all = len(task.requests) * config.samples_per_prompt
    if len(log.samples) == num_all:
        return
    try:
        progress = Progress("generated", num_all, "answers", first=len(log.samples))
        num_right = sum(one.right for one in log.samples.values())
        with stop_signals() as switch, progress:
            for prompt, sample, completion in _completions(task, set(log.samples)):
                with switch.held():
                    checked = _checked(task, prompt, sample, completion, checker)
                    log.add(checked)
                num_right += checked.right
                share = num_right / len(log.samples)
                progress.add(figures=f"{num_right:,} right so far, {share:.1%}")
    except Stopped as stop:
        kept = "none are kept without --completions FILE"
        if config.completions is not None:
            kept = f"they are in {config.completions}; run the same command again to resume"
        raise InterruptedRunError(
            f"stopped after {len(log.samples):,} of {num_all:,} answers; {kept}", stop.signum
        ) from stop


def _completions(task: _Task, done: set[tuple[int, int]]) -> Iterator[tuple[int, int, Completion]]:
    from student_train.evaluation.engines import generated

    generation = Generation.of(task.config)
    for prompt, sample, tokens in generated(
        generation, task.tokenizer, task.requests, task.end_ids, done
    ):
        text = str(task.tokenizer.decode(tokens.ids, clean_up_tokenization_spaces=False))
        yield prompt, sample, Completion(text, len(tokens.ids), tokens.finished)


def _checked(
    task: _Task, number: int, sample: int, completion: Completion, checker: Checker
) -> Sample:
    prompt = task.prompts[number]
    marks = ThinkingMarks(task.config.think_open, task.config.think_close)
    asked = str(task.tokenizer.decode(task.requests[number].ids))
    found = extract_answer(asked, completion.text, marks, task.tokenizer.all_special_tokens)
    verdict = checker.check(found, prompt.answer)
    return Sample(
        prompt=number,
        sample=sample,
        group=prompt.group,
        found=found,
        right=verdict.is_right,
        compared_as=verdict.compared_as,
        closed=not marks.is_open(asked + completion.text),
        completion=completion,
    )
