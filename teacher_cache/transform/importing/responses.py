"""JSON of servers: vLLM's completions, chat and token-in-token-out answers, and TRL's client.

Every one of them may hold several traces. Tokens must be ids: `"token_id:17"`, integers, or keys of
`prompt_logprobs`; text of a token does not tell its id.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from teacher_cache.engines.server.answers import (
    AnswerError,
    choice_rows,
    prompt_rows,
)
from teacher_cache.sources import BadRow, Reason
from teacher_cache.transform.importing.foreign import (
    ForeignTrace,
    rows_from_lists,
    rows_from_maps,
    token_array,
)


def server_traces(row: Mapping[str, Any]) -> list[ForeignTrace]:
    """The traces of one answer of a vLLM server: one for each choice.

    `prompt_token_ids` and `token_ids` must be in it (`return_token_ids` of the request).

    Raises:
        BadRow: If it is no such answer, or lacks ids or logprobs.
    """
    choices = row.get("choices")
    if not isinstance(choices, list) or not choices:
        raise BadRow(Reason.UNKNOWN_COLUMNS, "expected a server's answer with `choices`")
    traces = []
    for number, choice in enumerate(choices):
        if not isinstance(choice, dict):
            raise BadRow(Reason.UNKNOWN_COLUMNS, f"choice {number} is not an object")
        suffix = f"-{choice.get('index', number)}" if len(choices) > 1 else ""
        traces.append(_of_choice(row, choice, suffix))
    return traces


# What a server says of an answer's end, and what a cache does.
_FINISHED = {"stop": "stop", "tool_calls": "stop", "length": "length", None: None}


def _of_choice(answer: Mapping[str, Any], choice: Mapping[str, Any], suffix: str) -> ForeignTrace:
    prompt = choice.get("prompt_token_ids") or answer.get("prompt_token_ids")
    if prompt is None or choice.get("token_ids") is None:
        raise BadRow(
            Reason.BAD_TOKEN_IDS,
            "no `prompt_token_ids` and `token_ids`: ask the server with return_token_ids",
        )
    finish = choice.get("finish_reason")
    if finish not in _FINISHED:
        raise BadRow(
            Reason.BAD_RESPONSE,
            f"the server ended it as {finish!r:.80}; expected stop, length, tool_calls, or nothing",
        )
    new = choice["token_ids"]
    tokens = token_array([*prompt, *new], "prompt_token_ids and token_ids")
    given = choice.get("prompt_logprobs") or answer.get("prompt_logprobs")
    try:
        rows = [] if given is None else prompt_rows(given, len(prompt))
        rows += choice_rows(choice.get("logprobs"), new)
    except AnswerError as error:
        raise BadRow(Reason.BAD_DISTRIBUTIONS, str(error)) from error
    top_ids, values = rows_from_maps(rows)
    return ForeignTrace(
        tokens,
        top_ids,
        values,
        first_token=len(prompt) if given is None else 1,
        num_prompt=len(prompt),
        suffix=suffix,
        finish_reason=_FINISHED[finish],
        used=tuple(name for name in answer if name not in ("id", "request_id")),
    )


_TRL = ("prompt_ids", "completion_ids", "logprob_token_ids", "logprobs")
_TRL_SCORED = ("actual_logprobs", "actual_token_ids")  # of `get_sequence_logprobs`


def trl_traces(row: Mapping[str, Any]) -> list[ForeignTrace]:
    """The traces of what TRL's `VLLMClient` returned: a batch, or one sequence of it.

    Raises:
        BadRow: If columns are missing or do not fit each other.
    """
    missing = [name for name in _TRL if row.get(name) is None]
    if missing:
        raise BadRow(
            Reason.UNKNOWN_COLUMNS,
            f"expected columns {', '.join(_TRL)}, not found: {', '.join(missing)}",
        )
    used = tuple(name for name in (*_TRL, *_TRL_SCORED) if name in row)
    scored = [name for name in _TRL_SCORED if row.get(name) is not None]
    if len(scored) == 1:
        raise BadRow(Reason.UNKNOWN_COLUMNS, f"{scored[0]} without {_other(scored[0])}")
    columns = [row[name] for name in (*_TRL, *scored)]
    is_batch = bool(row["completion_ids"]) and isinstance(row["completion_ids"][0], list)
    if not is_batch:
        return [_of_trl(*columns, used=used)]
    prompts, completions = columns[:2]
    if not prompts or len(completions) % len(prompts):
        raise BadRow(
            Reason.UNKNOWN_COLUMNS,
            f"{len(completions)} completions of {len(prompts)} prompts do not go together",
        )
    per_prompt = len(completions) // len(prompts)  # those of a prompt follow each other
    columns[0] = [prompt for prompt in prompts for _ in range(per_prompt)]
    if any(len(column) != len(completions) for column in columns):
        raise BadRow(Reason.UNKNOWN_COLUMNS, "the columns have different numbers of sequences")
    return [
        _of_trl(*parts, used=used, suffix=f"-{number}")
        for number, parts in enumerate(zip(*columns, strict=True))
    ]


def _other(name: str) -> str:
    return next(other for other in _TRL_SCORED if other != name)


def _of_trl(
    prompt: Sequence[int],
    completion: Sequence[int],
    ids: object,
    values: object,
    actual: Sequence[Sequence[float]] | None = None,
    actual_ids: Sequence[Sequence[int]] | None = None,
    *,
    used: tuple[str, ...],
    suffix: str = "",
) -> ForeignTrace:
    tokens = token_array([*prompt, *completion], "prompt_ids and completion_ids")
    top_ids, logprobs = rows_from_lists(ids, values, ("logprob_token_ids", "logprobs"))
    if len(top_ids) != len(completion):
        raise BadRow(
            Reason.BAD_DISTRIBUTIONS, f"{len(top_ids)} rows for {len(completion)} completion_ids"
        )
    if actual_ids is not None and np.array(actual_ids).reshape(-1).tolist() != list(completion):
        raise BadRow(
            Reason.ROWS_OF_OTHER_TOKENS, "`actual_token_ids` must be those of `completion_ids`"
        )
    if actual is not None:  # of a token outside the top k it is -inf there too
        own = np.array(actual, np.float32).reshape(-1, 1)
        own_ids = np.array(completion, np.int32).reshape(-1, 1)
        if len(own) != len(top_ids):
            raise BadRow(Reason.BAD_DISTRIBUTIONS, "`actual_logprobs` must have a row per token")
        is_inside = (top_ids == own_ids).any(axis=1, keepdims=True)
        top_ids = np.concatenate([top_ids, own_ids], axis=1)
        logprobs = np.concatenate([logprobs, np.where(is_inside, -np.inf, own)], axis=1)
    return ForeignTrace(
        tokens, top_ids, logprobs, first_token=len(prompt), num_prompt=len(prompt), used=used,
        suffix=suffix,
    )  # fmt: skip
