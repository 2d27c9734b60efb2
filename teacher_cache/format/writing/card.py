"""The dataset card of a sealed cache, by which `datasets` and the Hub know its files."""

import json
from pathlib import PurePosixPath, PureWindowsPath

from teacher_cache.format.catalog import CATALOG_FILE
from teacher_cache.format.header import CacheHeader
from teacher_cache.format.manifest import MANIFEST_NAME, SHARD_FOLDER, Seal
from teacher_cache.format.store import Store

CARD_NAME = "README.md"
_FINGERPRINT = "| fingerprint | "

# Without `configs` a loader takes every file of the folder for rows, commit records too. It reads
# all configs of a folder as one format, so that the catalogue cannot be one of them.
_CARD = """\
---
pretty_name: {pretty_name}
tags:
- knowledge-distillation
- logits
- leadspan
configs:
- config_name: default
  data_files: {shards}/*.arrow
---

# Logits of {teacher}

A leadspan cache: what the teacher says of {num_tokens:,} tokens of {num_traces:,} traces.
For each token: up to {top_k} of the most probable ids with their logits, {tail}, and the token
itself.{notes}

| | |
| --- | --- |
| teacher | `{teacher}`{revision} |
| made by | {engine} {engine_version}, {mode}, dtype {dtype} |
{fingerprint_cell}`{fingerprint}` |

`{manifest}` has the rest; `{catalog}` is a table of all traces, for DuckDB or polars. With
`datasets`, one row is a slice of a trace (`band`): `token_ids`, and flat lists `top_ids` and
`top_logits` with `k` entries per token.

```
train-student run --cache PATH_OR_URI_OF_THIS_FOLDER --student STUDENT --out run{options}
```
"""


def publish_card(store: Store, header: CacheHeader, seal: Seal) -> None:
    """Write the card of a complete cache.

    A card that is there stays as it is, unless it is one of ours that describes another cache: this
    one, before it was repaired.

    Raises:
        OSError: If it cannot be written.
    """
    if store.size(CARD_NAME) is not None:
        there = store.read(CARD_NAME).decode(errors="replace")
        if _FINGERPRINT not in there or f"{_FINGERPRINT}`{seal.fingerprint}`" in there:
            return
    store.publish(CARD_NAME, card_text(header, seal).encode())


def card_text(header: CacheHeader, seal: Seal) -> str:
    """The card of a complete cache."""
    teacher = _public_name(" ".join(header.teacher.split()))
    return _CARD.format(
        pretty_name=json.dumps(f"Logits of {teacher}"),
        shards=SHARD_FOLDER,
        catalog=CATALOG_FILE,
        manifest=MANIFEST_NAME,
        teacher=teacher,
        revision=f", revision `{header.teacher_revision}`" if header.teacher_revision else "",
        engine=header.engine,
        engine_version=header.engine_version,
        mode=header.mode,
        dtype=header.dtype,
        top_k=header.top_k,
        tail="the mass outside them" if header.has_tails else "without the mass outside them",
        notes="".join(f" {note}" for note in _notes(header)),
        options=_options(header),
        fingerprint_cell=_FINGERPRINT,
        fingerprint=seal.fingerprint,
        num_tokens=seal.num_tokens,
        num_traces=seal.num_traces,
    )


def _public_name(teacher: str) -> str:
    """A hub id as it is; of a path on somebody's machine the last part alone."""
    for kind in (PurePosixPath, PureWindowsPath):
        if kind(teacher).is_absolute():
            return kind(teacher).name or teacher
    return teacher


def _notes(header: CacheHeader) -> list[str]:
    notes = []
    if not header.has_tails:
        notes.append(
            "The rows that it was imported from do not tell that mass: the stored `tail_logit` is "
            "a placeholder."
        )
    if header.is_truncated:
        notes.append(f"It is truncated: of its traces it holds {header.held_part}.")
    return notes


def _options(header: CacheHeader) -> str:
    """Options with which a run accepts the cache."""
    span = "0.5"
    if header.lead_spans is not None:
        span = f"{header.lead_spans['spans']} --seed {header.lead_spans['seed']}"
    elif header.is_truncated:
        span = repr(min(0.5, header.max_lead_span))
    return f" --lead-span {span}" + ("" if header.has_tails else " --tail renormalise")
