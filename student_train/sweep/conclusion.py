"""The answer in a few sentences: how much of each trace a student needs. Computed, not canned."""

from collections.abc import Mapping, Sequence

from student_train.evaluation.intervals import LEVEL, Mean
from student_train.sweep.cells import FULL
from student_train.sweep.decisions import ENOUGH, Answer, Decision, candidates, decide, holm
from student_train.sweep.groups import Estimate, Group, Pairing
from student_train.sweep.labels import label, whole_percent, with_interval

COSTS = (
    ("computation", ("run", "flops")),
    ("peak memory", ("run", "peak_memory_bytes")),
    ("time", ("run", "train_s")),
    ("bytes read", ("run", "bytes_read")),
)
_THRIFT = ("half-traces", "half-steps")
_EQUAL_COST = 1.05  # times as many FLOPs count as no more


def share_of_full(group: Group, full: Group, path: tuple[str, ...]) -> float | None:
    """A cost over that of the full-length group; None where either is unknown."""
    own, whole = group.mean(*path), full.mean(*path)
    return own / whole if own is not None and whole else None


def conclusion(groups: Sequence[Group]) -> str:
    """Say whether a part of every trace is enough, which, at what cost, and how sure that is."""
    full = next((group for group in groups if group.name == FULL), None)
    if full is None:
        return "There is no full-length cell, so nothing can be said about what a lead span keeps."
    shorter = [group for group in candidates(groups) if group.kind not in _THRIFT]
    if not shorter:
        return "There is no lead span below 1, so nothing can be said about what one keeps."
    decisions = decide(groups)
    shorter = [group for group in shorter if group.name in decisions]
    if not shorter:
        return (
            "The accuracy of the full-length students cannot be told from zero, so there is "
            "nothing to keep."
        )
    sentences = [_answer(shorter, full, decisions), _at_equal_cost(groups, shorter)]
    return " ".join(sentence for sentence in sentences if sentence)


def kept(group: Group) -> Estimate | None:
    """Share that a group keeps of the gain, or of the accuracy where no gain can be told."""
    return group.gain_retention or group.retention


def _answer(groups: Sequence[Group], full: Group, decisions: Mapping[str, Decision]) -> str:
    enough = [g for g in groups if decisions[g.name].answer is Answer.YES]
    unknown = [g for g in groups if decisions[g.name].answer is Answer.UNKNOWN]
    what = "gain" if groups[0].gain_retention is not None else "accuracy"
    goal = f"at least {whole_percent(ENOUGH)} of what whole traces teach"
    if what == "accuracy":
        goal = (
            f"at least {whole_percent(ENOUGH)} of the full-length accuracy (no gain over the "
            "untrained student can be told)"
        )
    if enough:
        chosen = min(enough, key=lambda g: _computation(g, full))
        sentence = f"Yes, less than whole traces keeps {goal}: {_tells(chosen, full)}."
        cheaper = [g for g in unknown if _computation(g, full) < _computation(chosen, full)]
        if cheaper:
            best = max(cheaper, key=_kept_value)
            sentence += f" Whether less is enough {_not_told(best, decisions[best.name])}"
        return sentence
    nearest = max(groups, key=_kept_value)
    if unknown:
        nearest = max(unknown, key=_kept_value)
        return (
            f"Whether less than whole traces keeps {goal} "
            f"{_not_told(nearest, decisions[nearest.name])} The nearest: {_tells(nearest, full)}."
        )
    return (
        f"No, nothing tried that is less than whole traces keeps {goal}. The nearest: "
        f"{_tells(nearest, full)}."
    )


def _computation(group: Group, full: Group) -> float:
    share = share_of_full(group, full, ("run", "flops"))
    return 1.0 if share is None else share


def _kept_value(group: Group) -> float:
    found = kept(group)
    return found.value if found else 0.0


def _tells(group: Group, full: Group) -> str:
    shares = [(name, share_of_full(group, full, path)) for name, path in COSTS]
    costs = ", ".join(
        f"{whole_percent(share)} of the {name}" for name, share in shares if share is not None
    )
    found = kept(group)
    keeps = f" keeps {with_interval(found)}" if found else ""
    return f"“{label(group)}”{keeps}" + (f" and takes {costs}" if costs else "")


def _not_told(group: Group, decision: Decision) -> str:
    """Say with what data it cannot be told, and what would tell it."""
    seeds = "1 seed" if decision.num_seeds == 1 else f"{decision.num_seeds} seeds"
    prompts = "" if decision.num_prompts is None else f" and {decision.num_prompts:,} prompts"
    return f"cannot be told with {seeds}{prompts}; {needed(decision)}."


def needed(decision: Decision) -> str:
    """What would tell it."""
    ways = []
    if decision.prompts_needed is not None:
        ways.append(f"about {decision.prompts_needed:,} prompts")
    if decision.seeds_needed is not None:
        ways.append(f"about {decision.seeds_needed:,} seeds")
    if not ways:
        return f"it is too close to {whole_percent(ENOUGH)} for any number worth trying"
    return f"{' or '.join(ways)} would"


def _at_equal_cost(groups: Sequence[Group], shorter: Sequence[Group]) -> str:
    """Say whether the same saving without truncation would have kept as much, in pairs."""
    thrift = [g for g in groups if g.kind in _THRIFT and kept(g)]
    if not thrift:
        return ""
    best = max(thrift, key=_kept_value)
    found = kept(best)
    sentence = f"Half the computation on “{label(best)}” keeps "
    sentence += with_interval(found) if found else "an unknown share"
    cost = best.mean("run", "flops")
    means = {
        group.name: mean
        for group in shorter
        if cost and (group.mean("run", "flops") or 2 * cost) <= _EQUAL_COST * cost
        if (mean := difference(groups, group, best)) is not None
    }
    if not means:
        return f"{sentence}."
    adjusted = holm({name: mean.p_value for name, mean in means.items()})
    rival = max((g for g in shorter if g.name in means), key=_kept_value)
    mean = means[rival.name]
    low, high = (100 * bound for bound in mean.interval)
    verdict = "no different as far as can be told"
    if adjusted[rival.name] < 1 - LEVEL:
        verdict = "more accurate" if mean.value > 0 else "less accurate"
    return (
        f"{sentence}; for no more computation, “{label(rival)}” is {verdict}: "
        f"{100 * mean.value:+.1f} points ({low:+.1f} to {high:+.1f})."
    )


def difference(groups: Sequence[Group], one: Group, other: Group) -> Mean | None:
    """Accuracy of one minus that of another, by prompt and seed; None without enough in common."""
    pairing = Pairing.of([cell for group in groups for cell in group.cells])
    seeds = pairing.seeds(one.name, other.name)
    if not seeds:
        return None
    values_SP = pairing.values_SP(one.name, seeds) - pairing.values_SP(other.name, seeds)
    return Mean.of(values_SP) if len(seeds) > 1 else None
