"""Evaluation prompts: read, turned into token ids, compared with the training traces."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from teacher_cache.format import Cache, rows_by_shard
from teacher_cache.sources.files import Input

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prompt:
    """One row of the prompts."""

    text: str | None
    messages: list[dict[str, Any]] | None
    answer: str
    group: str | None  # value of the field that groups are told by
    where: str  # file:row


def read_prompts(path: Path, group_field: str | None = None) -> Iterator[Prompt]:
    """Prompts of a file, a folder, a saved dataset or a hub id, as `cache-teacher` reads them.

    Args:
        path: JSON Lines or a JSON array, plain or compressed, Parquet or Arrow.
        group_field: Field that every row must have.

    Raises:
        ValueError: If a row is wrong; it names file and row.
    """
    for where, record in read_records(path):
        yield parse_prompt(record, where, group_field)


def read_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of prompts, each with its place as `file:row`.

    Raises:
        ValueError: If a row is no object.
    """
    for row in Input(path):
        where = f"{row.file}:{row.number}"
        yield where, _record(row.content, where)


def prompts_fingerprint(prompts: Sequence[Prompt]) -> str:
    """Hash of questions and golds, wherever the rows come from."""
    digest = hashlib.sha256()
    for prompt in prompts:
        values = {name: value for name, value in asdict(prompt).items() if name != "where"}
        digest.update(json.dumps(values, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


def _record(content: object, where: str) -> dict[str, Any]:
    if isinstance(content, bytes):  # of a text file
        try:
            content = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{where}: expected an object, got {type(content).__name__}")
    return content


def parse_prompt(
    record: dict[str, Any],
    where: str,
    group_field: str | None = None,
    *,
    needs_answer: bool = True,
) -> Prompt:
    """A row as a prompt, with an empty answer where none is needed.

    Raises:
        ValueError: If the row is wrong; it begins with `where`.
    """
    text, messages = record.get("prompt"), record.get("messages")
    has_messages = isinstance(messages, list) and bool(messages)
    if not has_messages and not (isinstance(text, str) and text):
        raise ValueError(
            f"{where}: expected a text `prompt` or a list `messages`, not empty; found "
            f"{', '.join(record) or 'no fields'}"
        )
    group = None
    if group_field is not None:
        if record.get(group_field) is None:
            raise ValueError(
                f"{where}: no field {group_field!r} to group by; found {', '.join(record)}"
            )
        group = str(record[group_field])
    answer = _gold(record.get("answer"), where) if needs_answer else ""
    if has_messages:
        return Prompt(None, messages, answer, group, where)
    return Prompt(text, None, answer, group, where)


def _gold(answer: object, where: str) -> str:
    """A gold as text; numbers in full, true and false as in JSON."""
    if isinstance(answer, bool):
        return str(answer).lower()
    if isinstance(answer, int) or (isinstance(answer, str) and answer.strip()):
        return str(answer)
    if isinstance(answer, float) and Decimal(answer).is_finite():
        return format(Decimal(repr(answer)), "f")
    raise ValueError(
        f"{where}: expected an `answer`, a text, a number, true or false, got {answer!r}"
    )


def prompt_ids(tokenizer: "PreTrainedTokenizerBase", prompt: Prompt) -> list[int]:
    """Token ids of a prompt, with messages rendered by the chat template up to the answer.

    Raises:
        ValueError: If the template refuses the messages; it names file and row.
    """
    if prompt.messages is None:
        ids: list[int] = tokenizer(prompt.text)["input_ids"]
        return ids
    try:
        text = tokenizer.apply_chat_template(
            prompt.messages, tokenize=False, add_generation_prompt=True
        )
    # Templates raise errors of every kind on messages that they do not expect.
    except Exception as error:
        raise ValueError(
            f"{prompt.where}: the model's chat template refuses these messages: {error}"
        ) from error
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def seen_in(cache: Cache, prompts: Sequence[Sequence[int]]) -> list[int]:
    """Find the prompts that a cache holds as the prompt of a trace, token for token.

    Reads the bands that hold the prompts. A prompt that ends in the opening mark of the thinking,
    as some templates write it, is compared without that mark, which the cache counts as thinking.

    Returns:
        Indices into `prompts`.

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
