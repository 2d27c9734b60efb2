"""The dataset card of a sealed cache, by which `datasets` and the Hub know its files."""

import json

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
Of each token the {top_k} most probable ids at most, their logits, the mass outside them, and
the token itself.

| | |
| --- | --- |
| teacher | `{teacher}`{revision} |
| made by | {engine} {engine_version}, {mode}, dtype {dtype} |
{fingerprint_cell}`{fingerprint}` |

`{manifest}` has the rest; `{catalog}` is a table of all traces, for DuckDB or polars. With
`datasets`, one row is a slice of a trace (`band`): `token_ids`, and flat lists `top_ids` and
`top_logits` with `k` entries per token.

```
train-student run --cache PATH_OR_URI_OF_THIS_FOLDER --student STUDENT --out run --lead-span 0.5
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
    teacher = " ".join(header.teacher.split())
    text = _CARD.format(
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
        fingerprint_cell=_FINGERPRINT,
        fingerprint=seal.fingerprint,
        num_tokens=seal.num_tokens,
        num_traces=seal.num_traces,
    )
    store.publish(CARD_NAME, text.encode())
