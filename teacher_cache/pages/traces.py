"""The page that shows traces token by token: what teacher, and maybe student, say of each."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from teacher_cache.format import SECTIONS, Cache, Trace, bands_of_tokens, lead_span_lengths
from teacher_cache.pages.packing import StudentView, facts, pack, texts_index
from teacher_cache.pages.page import json_for_script, render
from teacher_cache.pages.sections import SECTION_NAMES
from teacher_cache.terminal.escape import printable

_TEMPLATE = Path(__file__).with_name("traces.html")
_SCRIPTS = ("trace_data.js", "trace_text.js", "trace_detail.js", "trace_page.js")
_NUM_WORST = 50
_NUM_BEFORE = 8  # tokens of context


@dataclass(frozen=True, eq=False)
class ShownTrace:
    """A trace of a page."""

    trace: Trace
    student: StudentView | None = None


@dataclass(frozen=True)
class Disagreement:
    """A token on which teacher and student differ."""

    trace: int  # number on the page
    trace_id: str
    token: int
    section: str
    kl: float  # nats
    before: str  # text of the tokens before, printable
    text: str  # printable
    teacher: float  # probability of the token
    student: float


def trace_page(
    cache: Cache,
    shown: Sequence[ShownTrace],
    text_of: Callable[[int], str],
    *,
    chosen: str,
    student: str | None = None,
) -> bytes:
    """Make the page.

    Args:
        cache: The cache that the traces are of.
        shown: The traces.
        text_of: Gives the text of a token id.
        chosen: Says in words which traces of the cache these are.
        student: Name of the student, if the traces have its view.
    """
    known_ids = texts_index(one.trace for one in shown)
    data = {
        "texts": [text_of(token_id) for token_id in known_ids.tolist()],
        "ids": known_ids.tolist(),
        "traces": [facts(one.trace, one.student) for one in shown],
        "bytes_before": bytes_before(cache),
        "has_tails": cache.header.has_tails,
    }
    worst = worst_disagreements(shown, text_of)
    return render(
        _TEMPLATE,
        title=f"Traces of {cache.header.teacher}",
        scripts=_SCRIPTS,
        cache=printable(cache.path),
        num_traces=len(cache),
        sealed=cache.sealed,
        chosen=chosen,
        has_tails=cache.header.has_tails,
        student=None if student is None else printable(student),
        header=header_rows(cache),
        data=json_for_script(data),
        packed=[pack(one.trace, known_ids, one.student) for one in shown],
        section_names=SECTION_NAMES,
        worst={name: [one for one in worst if one.section == name] for name in SECTIONS},
        mean_kl=_mean_kl(shown),
    )


def worst_disagreements(
    shown: Sequence[ShownTrace], text_of: Callable[[int], str]
) -> list[Disagreement]:
    """The tokens with the largest KL of all traces, the worst first; none without a student."""
    found = []
    for number, one in enumerate(shown):
        if one.student is None:
            continue
        kl = np.nan_to_num(one.student.kl, nan=-1.0)
        worst = np.argsort(-kl, kind="stable")[:_NUM_WORST]
        found += [(float(kl[token]), number, token) for token in worst.tolist() if kl[token] > 0]
    found.sort(key=lambda place: -place[0])
    return [
        _disagreement(shown[number], number, token, text_of)
        for _, number, token in found[:_NUM_WORST]
    ]


def _disagreement(
    one: ShownTrace, number: int, token: int, text_of: Callable[[int], str]
) -> Disagreement:
    trace, student = one.trace, one.student
    assert student is not None  # noqa: S101  # the caller has looked
    ids = trace.token_ids.tolist()
    entries = trace.logprobs(token)
    own = entries.ids.tolist().index(ids[token])
    before = "".join(text_of(token_id) for token_id in ids[max(0, token - _NUM_BEFORE) : token])
    return Disagreement(
        trace=number,
        trace_id=printable(trace.trace_id, 60),
        token=token,
        section=trace.section(token),
        kl=float(student.kl[token]),
        before=printable(before, 60),
        text=printable(repr(text_of(ids[token])), 60),
        teacher=float(np.exp(entries.logprobs[own])),
        student=float(np.exp(student.entry_logprobs[trace.entry_offsets[token] + own])),
    )


def _mean_kl(shown: Sequence[ShownTrace]) -> Mapping[str, tuple[int, float]]:
    """Tokens with a distribution, and their mean KL, by section."""
    found = {}
    for number, name in enumerate(SECTIONS):
        parts = [
            one.student.kl[(one.trace.section_of_token == number) & (one.trace.k > 0)]
            for one in shown
            if one.student is not None
        ]
        kl = np.concatenate(parts) if parts else np.zeros(0)
        found[name] = (len(kl), float(kl.mean()) if len(kl) else 0.0)
    return found


def bytes_before(cache: Cache) -> list[int | None]:
    """Bytes that a run on the whole cache reads at lead spans of 1 to 100 %; None if not held."""
    catalog, num_bands = cache.catalog, cache.header.num_bands
    n_total = catalog.numbers("n_total")
    sizes: list[int | None] = []
    for percent in range(1, 101):
        if percent / 100 > cache.header.max_lead_span:
            sizes.append(None)
            continue
        keep = lead_span_lengths(n_total, percent / 100)
        if (keep > catalog.num_held).any():
            return [*sizes, *[None] * (101 - percent)]  # nor at any longer span
        bands = bands_of_tokens(catalog.num_held, keep, num_bands)
        of_shard = np.maximum.reduceat(bands, catalog.first_row[:-1]).tolist()
        sizes.append(
            sum(
                shard.prefix_bytes(most) for shard, most in zip(cache.shards, of_shard, strict=True)
            )
        )
    return sizes


def header_rows(cache: Cache) -> dict[str, str]:
    """A cache's provenance in words, printable."""
    return {name: _readable(value) for name, value in cache.header.to_json().items()}


def _readable(value: Any) -> str:  # noqa: ANN401  # a value of a header
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return printable(text, 4000)
