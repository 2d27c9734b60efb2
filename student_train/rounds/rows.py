"""Rows of a rollout: what `cache-teacher score` reads, one per trace. No torch here."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from student_train.evaluation.prompts import Prompt, parse_prompt, read_records
from student_train.evaluation.sample_log import Lines
from student_train.rounds.rollout_config import RolloutConfig
from teacher_cache.format import content_hash

logger = logging.getLogger(__name__)

# Columns that a row has besides those of its prompt.
_OURS = (
    *("token_ids", "num_prompt", "response", "student_logprobs", "finish_reason", "rollout"),
    *("row", "sample", "checksum", "id", "completion", "reasoning_content", "reasoning"),
)


@dataclass(frozen=True)
class Question:
    """A prompt, and what its row holds besides."""

    prompt: Prompt
    given_id: str | None
    fields: Mapping[str, Any]  # the prompt itself among them

    def trace_id(self, prompt_ids: Sequence[int], sample: int, num_samples: int) -> str:
        """Name of a trace: as `cache-teacher generate` would name the teacher's."""
        name = self.given_id or content_hash(list(prompt_ids))[:16]
        return name if num_samples == 1 else f"{name}#{sample}"


@dataclass(frozen=True)
class OwnTrace:
    """One trace of a student: a line of the file."""

    place: tuple[int, int]  # number of the prompt and of its sample, from 0
    row: Mapping[str, Any]  # as `cache-teacher score` reads it

    @property
    def num_tokens(self) -> int:
        """Number of tokens that the student wrote."""
        return len(self.row["student_logprobs"])


LINES = Lines[OwnTrace](
    of_others="the traces of another rollout",
    place=lambda trace: trace.place,
    to_json=lambda trace: dict(trace.row),
    from_json=lambda record: OwnTrace((record["row"], record["sample"]), record),
)


def read_questions(config: RolloutConfig) -> list[Question]:
    """The prompts of a rollout, in order.

    Raises:
        ValueError: If a row is wrong, two have one id, or there is none; it names file and row.
    """
    found: list[Question] = []
    rows_of: dict[str, str] = {}
    left_out: set[str] = set()
    end = None if config.limit is None else config.skip + config.limit
    for number, (where, record) in enumerate(read_records(config.prompts)):
        if end is not None and number >= end:
            break
        if number < config.skip:
            continue
        prompt = parse_prompt(record, where, needs_answer=False)
        given = record.get("id")
        name = None if given is None else str(given)
        if name is not None and rows_of.setdefault(name, where) != where:
            raise ValueError(
                f"{where}: its id {name!r} is that of {rows_of[name]} too; traces need ids of "
                "their own"
            )
        left_out |= {column for column in _OURS if column != "id" and column in record}
        fields = {column: value for column, value in record.items() if column not in _OURS}
        found.append(Question(prompt, name, fields))
    if not found:
        after = f" after the first {config.skip:,}" if config.skip else ""
        raise ValueError(f"{config.prompts}: expected at least one prompt{after}, found none")
    if left_out:
        logger.warning(
            "%s: left out of the rollout, whose own columns have these names: %s",
            config.prompts, ", ".join(sorted(left_out)),
        )  # fmt: skip
    return found


def check_names(questions: Sequence[Question], prompt_ids: Sequence[Sequence[int]]) -> None:
    """Refuse two rows whose traces would have one name.

    Raises:
        ValueError: If there are two; it names both.
    """
    rows_of: dict[str, str] = {}
    for question, ids in zip(questions, prompt_ids, strict=True):
        name, where = question.trace_id(ids, 0, 1), question.prompt.where
        if name in rows_of:
            raise ValueError(
                f"{where}: it has the prompt of {rows_of[name]}; give every row an `id`, or leave "
                "one out and raise --samples-per-prompt"
            )
        rows_of[name] = where
