"""A vLLM server's JSON as rows: a map from token id to logprob for every token.

vLLM writes -9999.0 for a logprob that is -inf, NaN, or not there at all. Such entries are left out
here, so that none is ever taken for the teacher's.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

TOKEN_ID = "token_id:"  # how vLLM writes a token with return_tokens_as_token_ids
NO_LOGPROB = -9000.0  # what is below it stands for a logprob that the server does not have


class AnswerError(ValueError):
    """An answer lacks logprobs or ids; the message says which."""


def prompt_rows(prompt_logprobs: object, num_prompt: int) -> list[dict[int, float]]:
    """Rows of the prompt's tokens but the first, which has none.

    Args:
        prompt_logprobs: The answer's value: null, then an object per token, by id.
        num_prompt: Tokens of the prompt.

    Raises:
        AnswerError: If it has another number of rows, or a row is missing.
    """
    if not isinstance(prompt_logprobs, list) or len(prompt_logprobs) != num_prompt:
        found = len(prompt_logprobs) if isinstance(prompt_logprobs, list) else "none"
        raise AnswerError(f"prompt_logprobs: expected {num_prompt} rows, got {found}")
    rows = []
    for position, row in enumerate(prompt_logprobs[1:], start=1):
        if not isinstance(row, dict) or not row:
            raise AnswerError(f"prompt_logprobs: token {position} has no row")
        try:
            entries = {int(token): float(entry["logprob"]) for token, entry in row.items()}
        except (KeyError, TypeError, ValueError) as error:
            raise AnswerError(f"prompt_logprobs: token {position}: {error!r}") from error
        rows.append(_known(entries))
    return rows


def choice_rows(logprobs: object, token_ids: Sequence[int]) -> list[dict[int, float]]:
    """Rows of the generated tokens, from any of the three kinds of `logprobs` that vLLM writes.

    Args:
        logprobs: The choice's value.
        token_ids: The choice's tokens.

    Raises:
        AnswerError: If tokens are given as text, or rows are missing or another token's.
    """
    if not isinstance(logprobs, dict):
        raise AnswerError("logprobs: none; ask the server with logprobs")
    try:
        rows = _of_completion(logprobs) if "tokens" in logprobs else _of_content(logprobs)
    except (KeyError, TypeError, AttributeError) as error:
        raise AnswerError(f"logprobs: not as vLLM writes them: {error!r}") from error
    if len(rows) != len(token_ids):
        raise AnswerError(f"logprobs: expected {len(token_ids)} rows, got {len(rows)}")
    for position, ((own, entries), token) in enumerate(zip(rows, token_ids, strict=True)):
        if own != token:
            raise AnswerError(f"logprobs: row {position} is of token {own}, not of {token}")
        if token not in entries:
            raise AnswerError(f"logprobs: row {position} has no logprob of its own token")
    return [_known(entries) for _, entries in rows]


def _of_content(logprobs: Mapping[str, Any]) -> list[tuple[int, dict[int, float]]]:
    rows = []
    for item in logprobs["content"] or []:
        entries = {_id_of(item): float(item["logprob"])}
        entries |= {_id_of(top): float(top["logprob"]) for top in item["top_logprobs"]}
        rows.append((_id_of(item), entries))
    return rows


def _of_completion(logprobs: Mapping[str, Any]) -> list[tuple[int, dict[int, float]]]:
    rows = []
    for token, own, top in zip(
        logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    ):
        entries = {_id_of_text(token): math.nan if own is None else float(own)}
        entries |= {_id_of_text(other): float(value) for other, value in (top or {}).items()}
        rows.append((_id_of_text(token), entries))
    return rows


def _id_of(item: Mapping[str, Any]) -> int:
    return int(item["token_id"]) if "token_id" in item else _id_of_text(item["token"])


def _id_of_text(token: str) -> int:
    if not token.startswith(TOKEN_ID):
        raise AnswerError(
            f"token {token!r} is text, which does not tell its id: ask the server with "
            "return_tokens_as_token_ids"
        )
    return int(token[len(TOKEN_ID) :])


def _known(entries: dict[int, float]) -> dict[int, float]:
    return {token: value for token, value in entries.items() if value > NO_LOGPROB}
