"""Tools of tools/truncation: what they cut and deal; a table follows from the data beside it."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from fakes import make_traces

ROOT = Path(__file__).parents[1]
MIXTURES = ROOT / "tools/results/mixtures"


def tool(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"tools/truncation/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_table_of_mixtures_follows_from_the_answers_beside_it(capsys):
    tool("paired").print_paired(str(MIXTURES / "answers.csv"))

    assert capsys.readouterr().out == (MIXTURES / "paired.csv").read_text()


def test_a_trace_with_its_ending_has_the_distributions_of_the_whole_one():
    rewritten = tool("rewritten")
    trace = max(make_traces(9), key=len)
    part = rewritten.with_ending(trace, 0.2, num_closing=2)
    part.validate()

    num_kept = len(trace) // 5
    start = trace.answer_start - 2
    assert part.token_ids.tolist() == [
        *trace.token_ids[:num_kept].tolist(), *trace.token_ids[start:].tolist()
    ]  # fmt: skip
    assert part.answer_start == num_kept + 2
    for token in (num_kept - 1, num_kept, len(part) - 1):
        of_whole = token if token < num_kept else token - num_kept + start
        np.testing.assert_array_equal(part.logprobs(token).ids, trace.logprobs(of_whole).ids)


@pytest.mark.slow
@pytest.mark.parametrize("rises", [True, False])
def test_a_course_gives_each_length_its_share_in_the_order_of_training(tmp_path, rises):
    from fakes import make_cache

    from student_train.data.order import data_order
    from student_train.data.tokens import TokenSelection
    from student_train.data.traces import open_data
    from teacher_cache.format.lead_spans import LeadSpans

    data = open_data([make_cache(tmp_path / "cache", make_traces(60))])
    (source,) = data.sources
    mixture = TokenSelection(LeadSpans.parse("0.375:4,1:1"))
    drawn = tool("course").course_spans(source, mixture, 3, rises=rises)
    order = data_order(data, seed=3, epoch=0)
    places = zip(order.shard.tolist(), order.row.tolist(), strict=True)
    spans = [drawn.of(*place).lead_span for place in places]

    assert spans == sorted(spans, reverse=not rises)
    whole = sum(info.n_total for info in source.train_infos())
    inside = sum(
        info.n_total for place, info in zip(source.train, source.train_infos(), strict=True)
        if drawn.of(*place).lead_span == 1.0
    )  # fmt: skip
    assert inside / whole == pytest.approx(0.2, abs=0.03)
