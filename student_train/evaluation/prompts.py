"""Evaluation prompts: read, turned into token ids, compared with what was trained on."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from teacher_cache.format import Cache, rows_by_shard

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prompt:
    """One line of the prompts file."""

    text: str | None
    messages: list[dict[str, Any]] | None
    answer: str
    group: str | None = None  # value of the field that groups are told by


def read_prompts(path: Path, group_field: str | None = None) -> Iterator[Prompt]:
    """Prompts of a JSONL file, blank lines left out.

    Args:
        path: Of the file.
        group_field: Every line must have it.

    Raises:
        ValueError: Naming file and line.
    """
    if not path.is_file():
        raise ValueError(f"{path}: expected a JSONL file of prompts, found none")
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _parse_prompt(line, f"{path}:{number}", group_field)


def _parse_prompt(line: str, where: str, group_field: str | None) -> Prompt:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected an object, got {type(record).__name__}")
    text, messages = record.get("prompt"), record.get("messages")
    if not (isinstance(text, str) and text) and not (isinstance(messages, list) and messages):
        raise ValueError(f"{where}: expected a text `prompt` or a list `messages`, not empty")
    answer = record.get("answer")
    if not isinstance(answer, str | int | float) or isinstance(answer, bool):
        raise ValueError(f"{where}: expected an `answer`, a text or a number, got {answer!r}")
    group = None
    if group_field is not None:
        if record.get(group_field) is None:
            raise ValueError(
                f"{where}: no field {group_field!r} to group by; there are {', '.join(record)}"
            )
        group = str(record[group_field])
    if isinstance(messages, list) and messages:
        return Prompt(None, messages, str(answer), group)
    return Prompt(text, None, str(answer), group)


def prompt_ids(tokenizer: "PreTrainedTokenizerBase", prompt: Prompt) -> list[int]:
    """Token ids of a prompt, messages by the chat template up to where the answer begins."""
    if prompt.messages is None:
        ids: list[int] = tokenizer(prompt.text)["input_ids"]
        return ids
    text = tokenizer.apply_chat_template(
        prompt.messages, tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def seen_in(cache: Cache, prompts: Sequence[Sequence[int]]) -> list[int]:
    """Which of these prompts stand in a cache as the prompt of a trace, token for token.

    Reads the bands that hold the prompts. A prompt that ends in the opening mark of the thinking,
    as some templates write it, is compared without that mark, which the cache counts as thinking.

    Returns:
        Indexes into `prompts`.

    Raises:
        CacheError: If the cache cannot be read.
    """
    mark = list(cache.header.think_open_ids)
    wanted: dict[tuple[int, ...], list[int]] = {}
    for index, ids in enumerate(prompts):
        wanted.setdefault(_without_opening(list(ids), mark), []).append(index)
    found: set[int] = set()
    for shard, rows in rows_by_shard(cache.traces).items():
        infos = cache.shards[shard].traces
        lengths = {row: min(infos[row].cot_start, cache.num_held(infos[row])) for row in rows}
        keep = {row: length for row, length in lengths.items() if length}
        for trace in cache.read(shard, keep).values():
            found.update(wanted.get(tuple(trace.token_ids.tolist()), ()))
    return sorted(found)


def _without_opening(ids: list[int], mark: list[int]) -> tuple[int, ...]:
    for place in range(max(0, len(ids) - len(mark) - 2), len(ids)):  # a newline may follow it
        if mark and ids[place : place + len(mark)] == mark:
            return tuple(ids[:place])
    return tuple(ids)
