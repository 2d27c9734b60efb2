"""One sentence with the answer: how much of each trace a student needs. Computed, not canned."""

from collections.abc import Sequence

from student_train.sweep.cells import FULL
from student_train.sweep.results import Estimate, Group

ENOUGH = 0.9  # of the gain
COSTS = (
    ("FLOPs", ("run", "flops")),
    ("peak memory", ("run", "peak_memory_bytes")),
    ("time", ("run", "train_s")),
    ("bytes read", ("run", "bytes_read")),
)


def share_of_full(group: Group, full: Group, path: tuple[str, ...]) -> float | None:
    """A cost over that of the full-length group; None where either is not known."""
    own, whole = group.mean(*path), full.mean(*path)
    return own / whole if own is not None and whole else None


def conclusion(groups: Sequence[Group]) -> str:
    """The smallest lead span that keeps ENOUGH, or the best there is, and what it costs."""
    full = next((group for group in groups if group.name == FULL), None)
    if full is None:
        return "There is no full-length cell, so nothing can be said of what a lead span keeps."
    spans = [g for g in groups if g.is_plain_span and g.options["lead_span"] < 1]
    if not spans:
        return "There is no lead span below 1, so nothing can be said of what one keeps."
    what, kept = _kept(spans)
    if not kept:
        return "The full-length students got nothing right, so there is nothing to keep."
    enough = [group for group in spans if kept[group.name].value >= ENOUGH]
    if enough:
        chosen = min(enough, key=lambda group: group.options["lead_span"])
        begin = f"The shortest lead span that keeps {ENOUGH:.0%} of {what} is"
    else:
        chosen = max(spans, key=lambda group: kept[group.name].value)
        begin = f"No lead span below 1 keeps {ENOUGH:.0%} of {what}; the nearest is"
    sentence = f"{begin} {_tells(chosen, full, kept[chosen.name])}"
    half = next((group for group in spans if group.options["lead_span"] == 0.5), None)
    if half is not None and half is not chosen:
        sentence += f"; lead span {_tells(half, full, kept[half.name])}"
    return sentence + _at_equal_cost(groups, half, kept) + "."


def _kept(spans: Sequence[Group]) -> tuple[str, dict[str, Estimate]]:
    gains = {g.name: g.gain_retention for g in spans if g.gain_retention is not None}
    if len(gains) == len(spans):
        return "the accuracy gain over the untrained student", gains
    return (
        "the full-length accuracy (there is no gain over the untrained student to tell of)",
        {g.name: g.retention for g in spans if g.retention is not None},
    )


def percent(estimate: Estimate) -> str:
    """`93 % (90 % to 96 %)`."""
    return f"{estimate.value:.0%} ({estimate.low:.0%} to {estimate.high:.0%})"


def _tells(group: Group, full: Group, kept: Estimate) -> str:
    shares = [(name, share_of_full(group, full, path)) for name, path in COSTS]
    costs = ", ".join(f"{share:.0%} of the {name}" for name, share in shares if share is not None)
    return f"{group.options['lead_span']:g}, which keeps {percent(kept)} for {costs}"


def _at_equal_cost(groups: Sequence[Group], half: Group | None, kept: dict[str, Estimate]) -> str:
    """Whether the same saving without truncation would have kept as much."""
    if half is None:
        return ""
    is_gain = half.gain_retention is not None
    others = [g for g in groups if g.kind in ("half-traces", "half-steps")]
    told = []
    for group in others:
        found = group.gain_retention if is_gain else group.retention
        if found is not None:
            told.append(f"{group.kind.replace('-', ' the ')} {percent(found)}")
    if not told:
        return ""
    return f". Half the computation on whole traces keeps, with {' and with '.join(told)}"
