"""`train-student rollout`: a student's own traces, kept as they come."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from student_train.errors import InterruptedRunError
from student_train.evaluation.config import Generation
from student_train.evaluation.sample_log import SampleLog, sample_log
from student_train.rounds.rollout_config import RolloutConfig
from student_train.rounds.rows import LINES, OwnTrace, Question, check_names, read_questions
from teacher_cache.format import tokenizer_fingerprint
from teacher_cache.terminal.progress import Progress
from teacher_cache.terminal.stop_signals import Stopped, stop_signals

# torch and transformers take seconds to load: mistakes in files are found before that.
if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from student_train.evaluation.requests import Request, Tokens


@dataclass(frozen=True)
class RolloutResult:
    """Figures of a finished rollout."""

    num_traces: int
    num_tokens: int  # that the student wrote
    unfinished_share: float  # of the traces: cut by --max-new-tokens
    mean_logprob: float  # of these tokens under the student, nats

    def __str__(self) -> str:
        return (
            f"{self.num_traces:,} traces of {self.num_tokens / self.num_traces:.1f} tokens, "
            f"{self.unfinished_share:.1%} unfinished, mean logprob {self.mean_logprob:.4f} nats"
        )


@dataclass(frozen=True)
class _Task:
    config: RolloutConfig
    questions: Sequence[Question]
    tokenizer: "PreTrainedTokenizerBase"
    requests: "Sequence[Request]"
    facts: Mapping[str, Any]  # of student and round, in every row


def roll_out(config: RolloutConfig) -> RolloutResult:
    """Let a student answer every prompt, and keep its traces with their logprobs.

    The same call resumes a stopped one.

    Raises:
        ValueError: If the student cannot be loaded, a prompt is wrong (with file and row), or the
            file holds another rollout.
        DamagedFileError: If the student or the file is damaged.
        InUseError: If another process writes to the same file.
        InterruptedRunError: After SIGINT or SIGTERM.
    """
    questions = read_questions(config)
    with Progress("loading torch"):
        from student_train.evaluation.requests import generation_settings, make_requests
        from student_train.model.load import load_tokenizer, stored_dtype
        from student_train.model.save import check_saved

    check_saved(config.model)
    # vLLM's own choice for float32 weights is half precision: not the student that is trained.
    if config.dtype is None and (dtype := stored_dtype(config.model)) is not None:
        config = replace(config, dtype=str(dtype).removeprefix("torch."))
    tokenizer = load_tokenizer(config.model)
    prompts = [question.prompt for question in questions]
    generation = Generation.of(config, with_logprobs=True)
    requests = make_requests(tokenizer, prompts, generation)
    check_names(questions, [request.ids for request in requests])
    settings = generation_settings(generation, prompts)
    facts = {
        "student": config.model,
        "student_fingerprint": settings["model"],
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer.get_vocab()),
        "round": config.round,
        "temperature": config.temperature,
        "top_p": config.top_p,
    }
    settings |= {"round": config.round, "skip": config.skip}
    task = _Task(config, questions, tokenizer, requests, facts)
    with sample_log(config.out, settings, LINES, force=config.force) as log:
        _write_all(task, generation, log)
        return _result(log)


def _write_all(task: _Task, generation: Generation, log: SampleLog[OwnTrace]) -> None:
    """Generate the traces that the log lacks."""
    from student_train.evaluation.engines import generated

    num_all = len(task.requests) * task.config.samples_per_prompt
    if len(log.samples) == num_all:
        return
    try:
        progress = Progress("rolled out", num_all, "traces", first=len(log.samples))
        with stop_signals() as switch, progress:
            done = set(log.samples)
            found = generated(generation, task.tokenizer, task.requests, (), done)
            for trace in _traces(task, found):
                with switch.held():
                    log.add(trace)
                progress.add()
    except Stopped as stop:
        raise InterruptedRunError(
            f"stopped after {len(log.samples):,} of {num_all:,} traces; they are in "
            f"{task.config.out}; run the same command again to resume",
            stop.signum,
        ) from stop


def _traces(task: _Task, found: "Iterator[tuple[int, int, Tokens]]") -> Iterator[OwnTrace]:
    config = task.config
    for number, sample, tokens in found:
        question, asked = task.questions[number], task.requests[number].ids
        name = question.trace_id(asked, sample, config.samples_per_prompt)
        row = {
            "id": name,
            **question.fields,
            "token_ids": [*asked, *tokens.ids],
            "num_prompt": len(asked),
            "response": str(task.tokenizer.decode(tokens.ids)),
            "student_logprobs": [round(min(v, 0.0), 6) for v in tokens.logprobs or ()],
            "finish_reason": "stop" if tokens.finished else "length",
            "rollout": task.facts,
            "row": number,
            "sample": sample,
        }
        yield OwnTrace((number, sample), row)


def _result(log: SampleLog[OwnTrace]) -> RolloutResult:
    rows = [trace.row for trace in log.samples.values()]
    num_tokens = sum(trace.num_tokens for trace in log.samples.values())
    return RolloutResult(
        num_traces=len(rows),
        num_tokens=num_tokens,
        unfinished_share=sum(row["finish_reason"] == "length" for row in rows) / len(rows),
        mean_logprob=sum(sum(row["student_logprobs"]) for row in rows) / num_tokens,
    )
