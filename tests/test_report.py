import csv
import re
from html.parser import HTMLParser

import pytest
from sweeps import costs, curve, make_sweep

from student_train.sweep.charts import pareto_front, steps
from student_train.sweep.report import write_report
from teacher_cache.format.checksums import publish_record, read_record

HEADER = {"teacher": "Teacher <32B>", "engine": "vllm"}
STRANGERS = '<img src=x onerror="alert(1)">&amp;$\\frac$'


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A folder with a report, and the answer."""
    out = tmp_path_factory.mktemp("sweep")
    cells = curve({0.25: 0.3, 0.5: 0.7, 1.0: 0.8})
    cells += [("sft", "sft", 0, {"ce_weight": 1.0}, 0.7)]
    cells += [("span-1_cot", "span", 0, {"lead_span": 1.0, "sections": ["cot"]}, 0.6)]
    cells += [("mix-0.375x4+1x1", "mixture", n, {"lead_span": "0.375:4,1:1"}, 0.79) for n in (0, 1)]
    make_sweep(out, cells)
    (out / "cells" / "span-0.5_seed-9").mkdir()
    (out / "cells" / "span-0.5_seed-9" / "failed.txt").write_text("exit code 1: <oops>\n")
    rows = [{"lead_span": 1.0, "num_positions": 9, "by_formula": 100, "counted": 103}]
    publish_record(out / "flops.json", {"rows": rows})
    return out, write_report(out, HEADER, costs)


class Page(HTMLParser):
    """What a page would fetch, its text, and its unclosed elements."""

    def __init__(self, source):
        super().__init__()
        self.fetched, self.text, self.open = [], "", []
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        fetching = ("src", "href", "srcset", "action")
        if tag != "a":
            self.fetched += [v for k, v in attributes if k in fetching]
        assert tag not in ("script", "iframe", "object")
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.mark.slow
def test_the_page_is_whole_and_fetches_nothing(report):
    out, sentence = report
    source = (out / "report.html").read_text()
    page = Page(source)

    assert page.open == []
    assert page.fetched == ["data:,"]  # the icon
    assert "url(" not in source
    assert "@import" not in source
    assert sentence in page.text


def test_the_page_tells_what_a_reader_needs(report):
    out, _ = report
    text = Page((out / "report.html").read_text()).text

    for words in (
        "How much of each trace does <tiny> & co need?", '"teacher": "Teacher <32B>"',
        "train-student sweep --cache cache", "train-student run --out span-0.5_seed-0",
        "Cell span-0.5_seed-9 failed: exit code 1: <oops>", '"lr": 0.001', "1.030",
        "whole traces, hard labels only", "whole traces, reasoning only",
        "mixture: 80 % of the traces cut at 37.5 %, 20 % whole", "What the words mean",
        "1.00 GFLOP (100 %)", "250 MFLOP (25 %)", "1.20 MB (100 %)", "4.00 kB",
    ):  # fmt: skip
        assert words in text
    assert "e+0" not in text
    assert "still to come" not in text


@pytest.mark.slow
def test_the_page_says_when_intervals_rest_on_the_seeds_alone(report, tmp_path):
    words = "rest on the seeds alone"
    assert words not in (report[0] / "report.html").read_text()
    out = make_sweep(tmp_path / "sweep", curve({0.5: 0.7, 1.0: 0.8}))
    (out / "cells" / "span-1_seed-2" / "completions.jsonl").unlink()

    write_report(out, HEADER, costs)

    text = Page((out / "report.html").read_text()).text
    assert words in text
    assert "missing in 1 of 7 cells (the first is span-1_seed-2)" in text


def test_the_overview_is_sorted_by_accuracy_and_says_what_is_enough(report):
    out, _ = report
    page = (out / "report.html").read_text()
    overview = page[: page.index('class="panels ')]
    rows = re.findall(r"<tr>(.*?)</tr>", overview)[1:]
    cells = [re.findall(r"<td>(.*?)</td>", row) for row in rows]
    accuracies = [int(re.match(r"\d+", row[1])[0]) for row in cells]
    enough = {row[0]: row[3] for row in cells}

    assert accuracies == sorted(accuracies, reverse=True)
    assert enough["first 25 % of each trace"] == "no"
    assert enough["whole traces"] == enough["untrained student"] == ""


def test_a_page_for_a_phone_scrolls_only_its_tables(report):
    out, _ = report
    page = (out / "report.html").read_text()

    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page
    assert page.count("<table>") == page.count('<div class="table" tabindex="0"><table>')
    assert page.count('<svg class="chart"') == 4  # one below the other where it is narrow


@pytest.mark.slow
def test_while_a_sweep_runs_the_page_says_so_and_loads_itself_again(tmp_path):
    make_sweep(tmp_path, curve({0.5: 0.7, 1.0: 0.8}))
    write_report(tmp_path, HEADER, costs, num_unfinished=5)
    page = (tmp_path / "report.html").read_text()

    assert "7 cells are finished, 5 are still to come" in page
    assert 'http-equiv="refresh"' in page
    write_report(tmp_path, HEADER, costs)
    assert "refresh" not in (tmp_path / "report.html").read_text()


def test_strangers_text_is_text_wherever_it_stands(tmp_path):
    cells = curve({0.5: 0.7, 1.0: 0.8}, seeds=1)
    cells += [
        (STRANGERS.replace("/", ""), "span", 0, {"lead_span": 1.0, "sections": [STRANGERS]}, 0.5)
    ]
    make_sweep(tmp_path, cells)
    for file in tmp_path.glob("cells/*/result.json"):
        result = read_record(file, "")
        result["evaluation"]["groups"] = {STRANGERS: result["evaluation"]["answers"]}
        result["commands"] = [STRANGERS]
        publish_record(file, result)
    facts = read_record(tmp_path / "sweep.json", "")
    facts |= {"student": STRANGERS, "eval_prompts": STRANGERS, "calls": [[STRANGERS]]}
    publish_record(tmp_path / "sweep.json", facts)
    (tmp_path / "cells" / "x").mkdir()
    (tmp_path / "cells" / "x" / "failed.txt").write_text(STRANGERS)
    write_report(tmp_path, {STRANGERS: STRANGERS}, costs)
    page = (tmp_path / "report.html").read_text()

    assert "<img src=x" not in page
    assert Page(page).text.count("onerror=") > 6
    assert Page(page).fetched == ["data:,"]


@pytest.mark.slow
def test_reports_without_completions_can_be_written(tmp_path):
    make_sweep(tmp_path, curve({0.5: 0.7, 1.0: 0.8}))
    for file in tmp_path.glob("cells/*/completions.jsonl"):
        file.unlink()

    assert "cannot be told" not in write_report(tmp_path, HEADER, costs)
    assert "untrained student" in Page((tmp_path / "report.html").read_text()).text


def test_the_front_holds_what_nothing_beats_at_no_more_cost():
    points = [(0.5, 0.7), (0.5, 0.9), (1.0, 0.9), (0.25, 0.75), (0.0, 0.3), (1.0, 0.95)]

    front = [(0.0, 0.3), (0.25, 0.75), (0.5, 0.9), (1.0, 0.95)]
    assert pareto_front(points) == front
    assert steps(front[:2], 1.0) == [(0.0, 0.3), (0.25, 0.3), (0.25, 0.75), (1.0, 0.75)]


def charts_of(page):
    """What each chart tells a screen reader, by title."""
    found = re.findall(r'aria-label="(.*?)\. (.*?)"', page)
    return {title: words.split(". ")[:-1] for title, words in found}


def test_charts_hold_every_group_with_its_interval(report):
    charts = charts_of((report[0] / "report.html").read_text())
    by_span, by_computation, kept, right = charts.values()

    assert [line.split(":")[0] for line in by_span] == ["first 25 %", "first 50 %", "whole traces"]
    assert re.fullmatch(
        r"first 50 %: 70 % \(\d+ % to \d+ %\), computation 50 %", by_computation[2]
    ), by_computation
    shares = [int(re.search(r": (-?\d+) %", line)[1]) for line in right]
    assert len(right) == 7
    assert shares == sorted(shares, reverse=True)
    assert {line.split(":")[0] for line in kept}.isdisjoint({"whole traces", "untrained student"})
    assert len(kept) == 5


def test_names_beside_points_do_not_lie_on_each_other_or_on_the_line(report):
    page = (report[0] / "report.html").read_text()
    chart = page[page.index("Right answers by computation") :]
    chart = chart[: chart.index("</svg>")]
    pattern = r'<text class="name" x="([\d.]+)" y="([\d.]+)" text-anchor="(\w+)">(.*?)</text>'
    places = []
    for x, y, anchor, name in re.findall(pattern, chart):
        width = 6.5 * len(name)
        left = float(x) - (width if anchor == "end" else 0)
        places.append((left, left + width, float(y)))

    assert len(places) == 5
    for number, (left, right, y) in enumerate(places):
        assert left >= 50 and right <= 400
        for other_left, other_right, other_y in places[:number]:
            assert left > other_right or other_left > right or abs(y - other_y) >= 13


def test_runs_are_compared_on_a_page_of_their_own(report):
    out, _ = report
    page = (out / "compare.html").read_text()

    linked = (out / "report.html").read_text()
    assert '<a href="compare.html">' in linked
    number = re.search(r'href="compare.html#against-(\d)">first 50 % of each trace<', linked)[1]
    assert f'<h3 id="against-{number}">first 50 % of each trace against whole traces</h3>' in page
    assert "span-0.5_seed-0: " in page  # a completion that flipped
    assert "span-0.5_seed-1: " not in page  # one run of each group


def test_a_table_lies_beside_the_page(report):
    out, _ = report
    with (out / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))

    assert len(rows) == 14
    assert {
        "cell", "lead_span", "sections", "seed", "accuracy", "heldout_kl", "tokens", "bytes_read",
        "flops", "peak_memory_bytes", "wall_s",
    } <= set(rows[0])  # fmt: skip
    assert not list(out.glob("*.tmp*"))


def test_a_sweep_without_any_finished_cell_has_a_report_too(tmp_path):
    make_sweep(tmp_path, [])

    assert "no full-length cell" in write_report(tmp_path, HEADER, costs)
    assert (tmp_path / "report.html").exists()
