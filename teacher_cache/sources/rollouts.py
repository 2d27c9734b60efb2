"""Rows of rollouts: traces that a student wrote itself, as ids, with its logprob of each token.

`train-student rollout` writes them. They are never tokenized again: what the student saw and said
must be what the teacher is asked about, token for token.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from teacher_cache.sources.files import Input
from teacher_cache.sources.json_files import parse_line
from teacher_cache.sources.rejects import BadRow, Reason

# Columns that a rollout is read from, beside those of its prompt.
COLUMNS = (
    *("token_ids", "num_prompt", "response", "student_logprobs", "finish_reason", "rollout"),
    *("row", "sample", "checksum"),  # of the file that it was written to
)
_FACTS = ("student_fingerprint", "tokenizer_fingerprint", "round")


@dataclass(frozen=True)
class Rollout:
    """A row, checked by itself."""

    token_ids: tuple[int, ...]
    num_prompt: int
    response: str  # text of the tokens after the prompt, as the student's tokenizer decodes them
    student_logprobs: tuple[float, ...]  # of the tokens after the prompt, nats, temperature 1
    is_cut: bool  # whether it ended for want of tokens


def rollout_facts(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a row says of its student and round; None for a row that is no rollout."""
    facts = row.get("rollout")
    if not isinstance(facts, dict) or "student_logprobs" not in row:
        return None
    return facts if all(name in facts for name in _FACTS) else None


def facts_of_input(rows: Input) -> dict[str, Any] | None:
    """What the first usable row of an input says of its student and round; None for other rows."""
    for row in rows:
        try:
            content = parse_line(row.content) if isinstance(row.content, bytes) else row.content
        except BadRow:
            continue  # the survey counts it
        if isinstance(content, dict):
            return rollout_facts(content)
    return None


def check_facts(found: Mapping[str, Any] | None, expected: Mapping[str, Any] | None) -> None:
    """Refuse a row of another student or round than the first: a cache holds those of one.

    Raises:
        BadRow: If it is one.
    """
    if found == expected:
        return
    if found is None or expected is None:
        kinds = ("no rollout", "one") if found is None else ("a rollout", "none")
        raise BadRow(
            Reason.OTHER_ROLLOUT,
            f"the row is {kinds[0]}, the first row is {kinds[1]}; score them apart",
        )
    name = next(n for n in sorted({*found, *expected}) if found.get(n) != expected.get(n))
    raise BadRow(
        Reason.OTHER_ROLLOUT,
        f"the row is of another rollout than the first ({name}: {found.get(name)!r} here, "
        f"{expected.get(name)!r} there); score each rollout into a cache of its own",
    )


def read_rollout(row: Mapping[str, Any]) -> Rollout:
    """A row's tokens, text and logprobs.

    Raises:
        BadRow: If they do not fit together.
    """
    ids, num_prompt, logprobs = (
        row.get(n) for n in ("token_ids", "num_prompt", "student_logprobs")
    )
    if not isinstance(ids, list) or not all(type(token) is int for token in ids):
        raise BadRow(Reason.BAD_TOKEN_IDS, "`token_ids` must be a list of integers")
    if type(num_prompt) is not int or not 0 < num_prompt < len(ids):
        raise BadRow(
            Reason.BAD_BOUNDS,
            f"`num_prompt`: expected 1 to {len(ids) - 1}, so that {len(ids)} `token_ids` hold a "
            f"prompt and a response, got {json.dumps(num_prompt)}",
        )
    if not isinstance(logprobs, list) or len(logprobs) != len(ids) - num_prompt:
        found = f"{len(logprobs)}" if isinstance(logprobs, list) else json.dumps(logprobs)
        raise BadRow(
            Reason.BAD_LOGPROBS,
            f"`student_logprobs`: expected one for each of the {len(ids) - num_prompt} tokens "
            f"after the prompt, got {found}",
        )
    if not all(_is_logprob(value) for value in logprobs):
        raise BadRow(Reason.BAD_LOGPROBS, "`student_logprobs` must be finite numbers, at most 0")
    response, reason = row.get("response"), row.get("finish_reason")
    if not isinstance(response, str) or reason not in ("stop", "length"):
        raise BadRow(
            Reason.BAD_RESPONSE, "a rollout needs its text in `response`, and `finish_reason`"
        )
    return Rollout(
        tuple(ids), num_prompt, response, tuple(map(float, logprobs)), is_cut=reason == "length"
    )


def _is_logprob(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) and value <= 0


def check_same_text(
    rollout: Rollout, prompt_ids: Sequence[int], prompt: str, asked: str, said: str
) -> None:
    """Refuse a rollout that the teacher would see as another text.

    Args:
        rollout: The row.
        prompt_ids: The same prompt, as the teacher's template and tokenizer make it.
        prompt: Text of these.
        asked: Text of the row's own prompt tokens, by the teacher's tokenizer.
        said: Text of its response's tokens, by the teacher's tokenizer.

    Raises:
        BadRow: If prompt or response differ.
    """
    if tuple(prompt_ids) != rollout.token_ids[: rollout.num_prompt]:
        where = next(
            (i for i, (a, b) in enumerate(zip(asked, prompt, strict=False)) if a != b),
            min(len(asked), len(prompt)),
        )
        begin = max(0, where - 20)
        raise BadRow(
            Reason.PROMPT_DIFFERS,
            f"the student was asked with ...{asked[begin : where + 20]!r}, the teacher's chat "
            f"template makes ...{prompt[begin : where + 20]!r} of the same prompt; give the "
            "student the teacher's template (train-student run does), or the teacher the "
            "arguments that the student had (--template-arg)",
        )
    if said != rollout.response:
        raise BadRow(
            Reason.TEXT_CHANGES,
            f"the response's tokens read {said[:60]!r} to the teacher, and "
            f"{rollout.response[:60]!r} to the student",
        )
