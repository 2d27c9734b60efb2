"""The committed pages of the demo: written by today's code, with the figures of the guide."""

import re
from html import unescape
from pathlib import Path

import pytest

from teacher_cache.pages import page

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "tools/results/demo"
ADVICE = "run tools/demo_pages, or tools/demo_pictures.py on an earlier demo-out/"


def parts_of(name, tag):
    return re.findall(rf"<{tag}>(.*?)</{tag}>", (DEMO / name).read_text(), re.DOTALL)


@pytest.mark.parametrize("name", ["view.html", "compare.html"])
def test_style_and_scripts_are_todays(name):
    made = page.render(
        Path(page.__file__).with_name("base.html"),
        title="t",
        scripts=("trace_data.js", "trace_text.js", "trace_detail.js", "trace_page.js"),
    ).decode()
    for tag in ("style", "script"):
        todays = re.findall(rf"<{tag}>(.*?)</{tag}>", made, re.DOTALL)
        assert parts_of(name, tag) in (todays, []), f"{name}: {tag}: {ADVICE}"
    assert parts_of(name, "style")
    assert bool(parts_of(name, "script")) == (name == "view.html")
    assert "<main>" in (DEMO / name).read_text()


def test_the_guides_figures_are_the_pages():
    guide = (ROOT / "tools/README.md").read_text()
    text = unescape(re.sub("<[^>]+>", " ", (DEMO / "compare.html").read_text()))
    for line in (DEMO / "report.txt").read_text().splitlines():
        for share in re.findall(r"\d+\.\d(?=%)", line.partition("  0.0%")[0]):
            if "read" not in line:
                assert f"{float(share):g} %" in text, line  # 88.0 is shown as 88
                assert share in guide, line
        for number in re.findall(r"\d+,\d{3},?\d*", line):
            assert number in guide, line
    for name in ("view", "compare"):
        for width in (1280, 390):
            assert (DEMO / f"{name}-{width}.png").stat().st_size < 200_000
