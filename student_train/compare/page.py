"""`train-student compare`: the page."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from student_train.compare.answers import Flip, Paired, paired_answers
from student_train.compare.config import CompareConfig
from student_train.compare.runs import ComparedRun, EvaluatedAnswers, differing_settings, read_run
from student_train.evaluation.prompts import Prompt, prompts_fingerprint, read_prompts
from teacher_cache.format.files import publish
from teacher_cache.pages.charts import LineChart, Series, line_chart
from teacher_cache.pages.numbers import percent, quantity
from teacher_cache.pages.page import render
from teacher_cache.pages.sections import SECTION_NAMES
from teacher_cache.terminal.early_checks import check_file
from teacher_cache.terminal.escape import printable
from teacher_cache.terminal.progress import duration

_TEMPLATE = Path(__file__).with_name("compare.html")
_UNKNOWN = "-"


def compare(config: CompareConfig) -> int:
    """Read the runs and write the page; returns its size in bytes.

    Raises:
        ValueError: If a folder is no run, or the answers cannot be compared.
        DamagedFileError: If settings or completions are damaged.
        OSError: If a file cannot be read.
    """
    if config.prompts is not None:
        check_file(config.prompts, "--prompts")
    files: Sequence[Path | None] = config.completions or [None] * len(config.run)
    runs = [read_run(folder, file) for folder, file in zip(config.run, files, strict=True)]
    page = comparison_page(runs, prompts_file=config.prompts, num_flips=config.flips)
    publish(config.out, page)
    return len(page)


def comparison_page(
    runs: Sequence[ComparedRun], *, prompts_file: Path | None, num_flips: int
) -> bytes:
    """Make the page of some runs; raises as `compare`."""
    paired = paired_answers(runs)
    answers = [run.answers for run in runs if run.answers is not None]
    evaluated = [one for one in answers if one.is_complete]
    prompts = None
    if prompts_file is not None:
        if not evaluated:
            raise ValueError(
                "--prompts: no run has all the completions whose prompts it could show; evaluate "
                "them with --completions, or leave it out"
            )
        prompts = _prompts_of(prompts_file, evaluated[0])
    return render(
        _TEMPLATE,
        title=f"{len(runs)} runs compared",
        overview=_overview_rows(runs, paired),
        charts=_charts(runs),
        heldout_differs=len({run.settings["heldout_fingerprint"] for run in _measured(runs)}) > 1,
        heldout=_heldout_rows(runs),
        sections=list(SECTION_NAMES.values()),
        paired=[_shown_pair(one, prompts, num_flips) for one in paired if one.difference],
        first=paired[0].name if paired else None,
        differing=differing_settings(runs),
        names=[run.name for run in runs],
    )


def _overview_rows(runs: Sequence[ComparedRun], paired: Sequence[Paired]) -> list[list[str]]:
    """A row for each run; by order, as a run may be named twice with different completions."""
    pairs = iter(paired)
    return [
        _overview_row(run, next(pairs) if run.answers and run.answers.is_complete else None)
        for run in runs
    ]


def _overview_row(run: ComparedRun, pair: Paired | None) -> list[str]:
    accuracy = _UNKNOWN
    if pair is not None:
        figures = pair.accuracy
        low, high = percent(figures.accuracy_low), percent(figures.accuracy_high)
        accuracy = f"{percent(figures.accuracy)} ({low} to {high})"
    elif run.answers is not None:
        done, all_of = len(run.answers.samples), run.answers.num_expected
        accuracy = f"not finished: {done:,} of {all_of:,} answers"
    if not run.settings:
        return [run.name, accuracy, *[_UNKNOWN] * 6, "not trained"]
    steps = run.latest("step")
    count = f"{steps or 0:,.0f}" + ("" if run.is_finished else ", not finished")
    return [
        run.name,
        accuracy,
        _number(run.latest("heldout_kl")),
        _number(run.latest("loss")),
        _quantity(run, "tokens_trained", ""),
        _quantity(run, "flops", "FLOP"),
        _quantity(run, "bytes_read", "B"),
        _UNKNOWN if run.latest("train_s") is None else duration(run.latest("train_s") or 0.0),
        count,
    ]


def _quantity(run: ComparedRun, name: str, unit: str) -> str:
    value = run.latest(name)
    return _UNKNOWN if value is None else quantity(value, unit)


def _number(value: float | None) -> str:
    return _UNKNOWN if value is None else f"{value:.4f}"


def _measured(runs: Sequence[ComparedRun]) -> list[ComparedRun]:
    return [run for run in runs if run.latest("heldout_kl") is not None]


def _charts(runs: Sequence[ComparedRun]) -> list[LineChart]:
    """Charts that have something to show."""
    wanted = [
        ("Loss", "step", "step", "loss", "loss"),
        ("KL on held-out traces", "step", "step", "nats per token", "heldout_kl"),
        ("KL on held-out traces by computation", "flops", "FLOP", "nats per token", "heldout_kl"),
    ]
    charts = []
    for title, x, x_label, y_label, y in wanted:
        series = []
        for run in runs:
            lines = [line for line in run.metrics if x in line and y in line]
            series.append(
                Series(run.name, [line[x] for line in lines], [line[y] for line in lines])
            )
        if any(one.x for one in series):
            charts.append(line_chart(title, x_label, y_label, series))
    return charts


def _heldout_rows(runs: Sequence[ComparedRun]) -> list[list[str]]:
    names = [*(f"heldout_kl_{name}" for name in SECTION_NAMES), "heldout_kl"]
    return [[run.name, *(_number(run.latest(name)) for name in names)] for run in _measured(runs)]


def _shown_pair(pair: Paired, prompts: Sequence[Prompt] | None, num_flips: int) -> dict[str, Any]:
    """One run against the first, in words."""
    assert pair.difference is not None  # noqa: S101  # the caller leaves the first run out
    low, high = pair.difference.interval
    return {
        "name": pair.name,
        "difference": f"{100 * pair.difference.value:+.1f}",
        "interval": f"{100 * low:+.1f} to {100 * high:+.1f}",
        "p_value": f"{pair.difference.p_value:.2g}",
        "num_prompts": pair.difference.num_prompts,
        "kinds": [
            ("Right before, wrong now", len(pair.lost), _shown(pair.lost, prompts, num_flips)),
            ("Wrong before, right now", len(pair.gained), _shown(pair.gained, prompts, num_flips)),
        ],
    }


def _shown(
    flips: Sequence[Flip], prompts: Sequence[Prompt] | None, num_flips: int
) -> list[Mapping[str, Any]]:
    return [
        {
            "prompt": flip.prompt,
            "group": flip.before.group,
            "question": None if prompts is None else _question(prompts[flip.prompt]),
            "gold": None if prompts is None else prompts[flip.prompt].answer,
            "before": flip.before,
            "after": flip.after,
        }
        for flip in flips[:num_flips]
    ]


def _question(prompt: Prompt) -> str:
    if prompt.messages is None:
        return prompt.text or ""
    return "\n".join(
        f"{message.get('role')}: {message.get('content')}" for message in prompt.messages
    )


def _prompts_of(file: Path, answers: EvaluatedAnswers) -> list[Prompt]:
    """The prompts behind some answers.

    Raises:
        ValueError: If the file holds others.
    """
    group_of = {sample.prompt: sample.group for sample in answers.samples}
    num_prompts = answers.settings["num_prompts"]
    rows = zip(range(num_prompts), read_prompts(file), strict=False)
    prompts = [replace(prompt, group=group_of.get(number)) for number, prompt in rows]
    if prompts_fingerprint(prompts) != answers.settings["prompts"]:
        raise ValueError(
            f"--prompts: {printable(file)}: not the prompts that {answers.file} answers; name the "
            "file of that evaluation"
        )
    return prompts
