import csv
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from sweeps import costs, curve, make_sweep

from student_train.sweep.report import write_report
from teacher_cache.format.checksums import publish_record

BROWSER = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium"))), None)
HEADER = {"teacher": "Teacher <32B>", "engine": "vllm"}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A folder with a report, and the answer."""
    out = tmp_path_factory.mktemp("sweep")
    cells = curve({0.25: 0.3, 0.5: 0.7, 1.0: 0.8})
    cells += [("sft", "sft", 0, {"ce_weight": 1.0}, 0.7)]
    cells += [("span-1_cot", "span", 0, {"lead_span": 1.0, "sections": ["cot"]}, 0.6)]
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
        self.fetched += [v for k, v in attributes if k in ("src", "href", "srcset", "action")]
        assert tag not in ("script", "iframe", "object")
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_is_whole_and_fetches_nothing(report):
    out, sentence = report
    source = (out / "report.html").read_text()
    page = Page(source)

    assert page.open == []
    assert len(page.fetched) == 2
    assert all(value.startswith("data:") for value in page.fetched)
    assert "url(" not in source
    assert "@import" not in source
    assert sentence in page.text


def test_the_page_tells_what_a_reader_needs(report):
    out, _ = report
    text = Page((out / "report.html").read_text()).text

    for words in (
        "How much of each trace does <tiny> & co need?", '"teacher": "Teacher <32B>"',
        "train-student sweep --cache cache", "train-student run --out span-0.5_seed-0",
        "Cell span-0.5_seed-9 failed: exit code 1: <oops>", '"lr": 0.001', "1.030", "sft",
        "span-1 cot",
    ):  # fmt: skip
        assert words in text


def test_table_and_picture_lie_beside_the_page(report):
    out, _ = report
    with (out / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))

    assert len(rows) == 12
    assert {
        "cell", "lead_span", "sections", "seed", "accuracy", "heldout_kl", "tokens", "bytes_read",
        "flops", "peak_memory_bytes", "wall_s",
    } <= set(rows[0])  # fmt: skip
    picture = (out / "report.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert int.from_bytes(picture[16:20], "big") > 1500  # three panels wide
    assert not list(out.glob("*.tmp*"))


def test_a_sweep_without_any_finished_cell_has_a_report_too(tmp_path):
    make_sweep(tmp_path, [])

    assert "no full-length cell" in write_report(tmp_path, HEADER, costs)
    assert (tmp_path / "report.html").exists()


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no headless Chromium here")
def test_a_browser_shows_the_page_without_requests_or_complaints(report, tmp_path):
    out, sentence = report
    netlog, picture = tmp_path / "net.json", tmp_path / "page.png"
    options = [
        "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
        "--enable-logging=stderr", "--v=0", "--window-size=1300,2400",
    ]  # fmt: skip
    url = (out / "report.html").as_uri()
    shot = subprocess.run(
        [BROWSER, *options, f"--log-net-log={netlog}", f"--screenshot={picture}", url],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    dom = subprocess.run(
        [BROWSER, *options, "--dump-dom", url], capture_output=True, text=True, timeout=120,
        check=True,
    )  # fmt: skip

    assert "CONSOLE" not in shot.stderr
    requested = set(re.findall(r'"url":"([^"]+)"', netlog.read_text()))
    assert {u for u in requested if not u.startswith(("file:", "data:", "chrome"))} == set()
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 50_000  # the picture is in it, not an empty page
    assert sentence.split("%")[0] in dom.stdout
