"""Every page in a real browser: clicked, scrolled, searched and read; one browser for all."""

import importlib.util
import logging
from dataclasses import replace
from pathlib import Path
from time import monotonic

import numpy as np
import pytest
from browsers import chromium, complaints, open_page, requested, resize, text_of, width_of
from fakes import make_cache, make_trace, make_traces
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select
from sweeps import costs, curve, make_sweep

from student_train.sweep.report import write_report
from teacher_cache.format import Trace, open_cache
from teacher_cache.pages.packing import StudentView
from teacher_cache.pages.traces import ShownTrace, trace_page

logger = logging.getLogger(__name__)

WIDTHS = [(1280, False), (390, True)]
STRANGER = "</script><img src=x onerror=alert(1)>\u202e&\"'\n\t"
NUM_LONG = 32_768


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("browser")) as started:
        yield started


def words(token_id):
    """Texts of every kind: words, line breaks, wide and joined characters, and a stranger's."""
    special = {
        0: "\n",
        1: STRANGER,
        2: "",
        3: "漢字",
        4: "👩‍👩‍👧",
        5: "x" * 5000,
        6: "\u200b\u202e",
    }
    return special.get(token_id, f" word{token_id}")


def with_student(trace):
    rng = np.random.default_rng(0)
    return ShownTrace(
        trace,
        StudentView(
            kl=np.where(trace.k > 0, rng.exponential(0.2, len(trace)), np.nan),
            tail_logprob=np.full(len(trace), -4.0),
            entry_logprobs=np.maximum(trace.top_logprobs - 0.1, -60),
        ),
    )


def long_trace():
    """A reasoning trace of 32,768 tokens with 1 to 30 kept entries of a large vocabulary."""
    rng = np.random.default_rng(1)
    k = np.where(rng.random(NUM_LONG) < 0.7, 2, rng.integers(3, 30, NUM_LONG))
    k[0] = 0
    first = np.concatenate([[0], np.cumsum(k)])[:-1]
    place = np.arange(k.sum()) - np.repeat(first, k)
    common = rng.zipf(1.3, NUM_LONG) % 5000
    top_ids = ((np.repeat(common, k) + 733 * place) % 20_011 + 100).astype(np.int32)
    token_ids = np.zeros(NUM_LONG, np.int32)  # a line break where nothing follows
    token_ids[1:] = top_ids[first[1:]]
    top_ids[first[1::25]] = token_ids[1::25] = 0
    logits = -np.minimum(rng.integers(0, 200, k.sum()), 199).astype(np.float32) / 8
    logits[first[1:]] = 0
    return Trace(
        trace_id="long", token_ids=token_ids, n_total=NUM_LONG, cot_start=200,
        answer_start=NUM_LONG - 500, k=k.astype(np.uint8), top_ids=top_ids, top_logits=logits,
        tail_logit=np.where(k > 0, rng.normal(-6, 2, NUM_LONG), 0).astype(np.float16).astype("f4"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def viewed(tmp_path_factory):
    """A page of strange traces with a student, and the traces."""
    folder = tmp_path_factory.mktemp("view")
    trace = replace(make_trace("t", 300), fields={STRANGER: [STRANGER]})
    traces = [trace, replace(make_trace("u", 40, seed=1), trace_id=STRANGER), *make_traces(2)]
    cache = open_cache(make_cache(folder / "cache", traces))
    shown = [with_student(one) for one in traces]
    page = folder / "page.html"
    page.write_bytes(trace_page(cache, shown, words, chosen="All", student="run"))
    return page, traces


@pytest.fixture(scope="module")
def without_tails(tmp_path_factory):
    """A page of a trace whose tails nobody knows, with a student, and the trace."""
    folder = tmp_path_factory.mktemp("without")
    trace = make_trace("t", 60)
    cache = make_cache(folder / "cache", [trace], imported={"tail": "unknown"})
    shown = [with_student(trace)]
    page = folder / "page.html"
    page.write_bytes(trace_page(open_cache(cache), shown, words, chosen="All", student="run"))
    return page, trace


def set_value(browser, selector, value):
    browser.execute_script(
        "const e = document.querySelector(arguments[0]); e.value = arguments[1];"
        "e.dispatchEvent(new Event('input'))",
        selector, value,
    )  # fmt: skip


@pytest.mark.parametrize(("width", "dark"), WIDTHS)
def test_a_view_fits_its_screen_and_neither_asks_nor_complains(browser, viewed, width, dark):
    complaints(browser), requested(browser)
    resize(browser, width, dark=dark)
    open_page(browser, viewed[0], "body[data-shown]")

    assert complaints(browser) == []
    assert requested(browser) == []
    assert width_of(browser) == width
    background = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") != dark


IS_SEEN = """
const box = document.getElementById("token-0").getBoundingClientRect();
return document.elementFromPoint(box.left + 2, box.top + box.height / 2)?.id === "token-0";
"""


@pytest.mark.parametrize("page", ["viewed", "without_tails"])
def test_a_phone_shows_the_text_first_and_unfolds_what_is_set(browser, page, request):
    resize(browser, 390, 844)
    open_page(browser, request.getfixturevalue(page)[0], "body[data-shown]")
    assert browser.execute_script(IS_SEEN)
    slider = browser.find_element(By.ID, "span")
    assert not slider.is_displayed()
    browser.find_element(By.CSS_SELECTOR, "#settings > summary").click()
    assert slider.is_displayed()
    browser.find_element(By.XPATH, "//*[@id='sections']/button[2]").click()
    assert "chain of thought" in text_of(browser, "#detail")

    resize(browser, 1280)
    assert slider.is_displayed()
    assert not browser.find_element(By.CSS_SELECTOR, "#settings > summary").is_displayed()


def test_unknown_tails_are_said_and_shown_nowhere(browser, without_tails):
    page, trace = without_tails
    complaints(browser)
    resize(browser, 1280)
    open_page(browser, page, "body[data-shown]")
    said = text_of(browser, ".warning[open]")
    assert "outside the kept entries is not known" in said
    assert "as the student's are here" in said
    colours = [one.text for one in Select(browser.find_element(By.ID, "quantity")).options]
    alone = ", kept entries alone"
    assert colours == [f"entropy{alone}", f"surprise{alone}", "kept entries",
                       f"KL to the student{alone}"]  # fmt: skip

    browser.find_element(By.ID, "token-12").click()
    rows = browser.find_elements(By.CSS_SELECTOR, "#detail tbody tr")
    own = trace.logprobs(12).ids.tolist().index(trace.token_ids[12])
    p = np.exp(trace.logprobs(12).logprobs)
    p /= p.sum()
    shares = [float(row.text.split("%")[0].split()[-1]) for row in rows[: trace.k[12]]]
    assert shares == pytest.approx(sorted(100 * p, reverse=True), abs=0.051)
    facts = dict(zip(*[iter(text_of(browser, "#detail dl").splitlines())] * 2, strict=True))
    assert float(facts[f"entropy{alone}"].split()[0]) == pytest.approx(-(p * np.log(p)).sum(), 2e-3)
    assert float(facts[f"surprise{alone}"].split()[0]) == pytest.approx(-np.log(p[own]), 2e-3)
    others = text_of(browser, "#detail tr.tail")
    assert others.startswith("all others not known ")
    assert others.endswith(" %")  # the student's
    assert complaints(browser) == []


def test_tokens_are_pointed_at_and_walked_through_by_keys(browser, viewed):
    page, (trace, *_) = viewed
    resize(browser, 1280)
    open_page(browser, page, "body[data-shown]")
    browser.find_element(By.ID, "token-12").click()

    assert text_of(browser, "#detail h2").strip() == words(int(trace.token_ids[12])).strip()
    assert "12 of 300 (after 4.0 %)" in text_of(browser, "#detail")
    rows = browser.find_elements(By.CSS_SELECTOR, "#detail tbody tr")
    assert len(rows) == trace.k[12] + 1  # and the tail
    p = np.exp(trace.logprobs(12).logprobs)
    teacher, student = rows[0].text.split()[-4], rows[0].text.split()[-2]
    assert float(teacher) == pytest.approx(100 * p[0], rel=0.02)
    assert float(student) == pytest.approx(100 * p[0] * np.exp(-0.1), rel=0.02)
    box = browser.find_element(By.ID, "tokens")
    box.send_keys(Keys.ARROW_RIGHT)
    assert box.get_attribute("aria-activedescendant") == "token-13"
    box.send_keys(Keys.END)
    assert box.get_attribute("aria-activedescendant") == "token-299"
    assert "299 of 300" in text_of(browser, "#detail")
    box.send_keys(Keys.HOME)
    assert "There is no distribution" in text_of(browser, "#detail")
    box.send_keys("n")
    assert int(box.get_attribute("aria-activedescendant").split("-")[1]) > 0


@pytest.mark.slow
def test_strangers_text_is_shown_as_text(browser, viewed):
    page, traces = viewed
    open_page(browser, page, "body[data-shown]")
    Select(browser.find_element(By.ID, "trace")).select_by_value("1")

    assert browser.find_elements(By.TAG_NAME, "img") == []
    assert "<img src=x onerror=alert(1)>⟨202E⟩" in text_of(browser, "#trace option:nth-child(2)")
    Select(browser.find_element(By.ID, "trace")).select_by_value("0")
    assert "</script><img" in text_of(browser, "#fields")
    place = int(np.flatnonzero(traces[0].token_ids == 1)[0])
    browser.execute_script(f"text.select({place})")
    assert text_of(browser, "#detail h2").startswith("</script><img")
    assert complaints(browser) == []


def test_the_slider_says_what_lies_before_a_lead_span(browser, viewed):
    page, (trace, *_) = viewed
    open_page(browser, page, "body[data-shown]")
    set_value(browser, "#span", 29)
    said = text_of(browser, "#span-holds")
    terms = -np.exp(trace.top_logprobs) * trace.top_logprobs
    entropy = np.bincount(trace.token_of_entry, terms, len(trace))
    entropy[1:] -= trace.tail[1:] * np.log(trace.tail[1:])

    assert said.startswith("0.29: 87 of 300 tokens, ")
    assert f"{100 * entropy[:87].sum() / entropy.sum():.1f} % of this trace's entropy" in said
    classes = [browser.find_element(By.ID, f"token-{t}").get_attribute("class") for t in (86, 87)]
    assert ["beyond" in names for names in classes] == [False, True]


def test_a_search_finds_text_across_tokens(browser, viewed):
    page, (trace, *_) = viewed
    open_page(browser, page, "body[data-shown]")
    texts = [words(token) for token in trace.token_ids.tolist()]
    wanted = (texts[20] + texts[21])[1:].strip().upper()
    count = "".join(texts).upper().count(wanted)
    box = browser.find_element(By.ID, "search")
    box.send_keys(wanted, Keys.ENTER)

    assert text_of(browser, "#hits") == f"{count} found"
    assert len(browser.find_elements(By.CSS_SELECTOR, ".token.hit")) >= 2
    assert "hit" in browser.find_element(By.CSS_SELECTOR, ".current").get_attribute("class")


@pytest.mark.slow
def test_a_colour_is_chosen_and_the_worst_tokens_are_jumped_to(browser, viewed):
    page, _ = viewed
    open_page(browser, page, "body[data-shown]")
    assert browser.find_element(By.ID, "quantity").get_attribute("value") == "kl"
    before = browser.find_element(By.ID, "token-1").get_attribute("class")
    for quantity in ("entropy", "tail", "surprise", "k"):
        Select(browser.find_element(By.ID, "quantity")).select_by_value(quantity)
    assert browser.find_element(By.ID, "token-1").get_attribute("class") != before
    button = browser.find_element(By.CSS_SELECTOR, ".worst button")
    trace, token = button.get_attribute("data-trace"), button.get_attribute("data-token")
    browser.execute_script("arguments[0].click()", button)

    assert browser.find_element(By.ID, "trace").get_attribute("value") == trace
    assert "KL to the student" in text_of(browser, "#detail")
    active = browser.find_element(By.ID, "tokens").get_attribute("aria-activedescendant")
    assert active == f"token-{token}"


def test_a_damaged_page_says_so(browser, viewed, tmp_path):
    page = tmp_path / "page.html"
    text = viewed[0].read_text()
    begin = text.index('id="trace-0">') + 200
    page.write_text(text[:begin] + "AAAAAAAA" + text[begin + 8 :])
    open_page(browser, page, "#failure:not([hidden])")

    assert "the page is damaged" in text_of(browser, "#failure")
    assert complaints(browser) != []


@pytest.mark.slow
def test_a_long_trace_shows_quickly_and_scrolls_with_few_rows(browser, tmp_path):
    trace = long_trace()
    cache = open_cache(make_cache(tmp_path / "cache", make_traces(1)))
    page = tmp_path / "long.html"
    page.write_bytes(trace_page(cache, [ShownTrace(trace)], words, chosen="One trace"))
    began_s = monotonic()
    open_page(browser, page, "body[data-shown]")
    opened_s = monotonic() - began_s
    paint = browser.execute_script(
        "return performance.getEntriesByName('first-contentful-paint')[0].startTime"
    )
    box = browser.find_element(By.ID, "tokens")
    drawing_ms = browser.execute_script(
        """
        const [box, times] = [document.getElementById("tokens"), []];
        for (let i = 1; i <= 60; i++) {
          box.scrollTop += i < 40 ? 120 : box.scrollHeight / 25;  // a wheel's turn, or a leap
          const began = performance.now();
          text.draw();
          box.offsetHeight;
          times.push(performance.now() - began);
        }
        return times;
        """
    )
    browser.find_element(By.ID, "strip").click()  # its middle
    middle = int(box.get_attribute("aria-activedescendant").split("-")[1])
    box.send_keys(Keys.END)
    figures = {
        "page_bytes": page.stat().st_size, "first_paint_ms": paint, "opened_s": opened_s,
        "wheel_ms": float(np.median(drawing_ms[:39])), "leap_ms": float(np.median(drawing_ms[39:])),
    }  # fmt: skip
    logger.info("%s", figures)  # shown with --log-cli-level=INFO

    assert "32,767 of 32,768" in text_of(browser, "#detail")
    assert abs(middle - NUM_LONG / 2) < NUM_LONG / 50
    assert len(browser.find_elements(By.CSS_SELECTOR, ".row")) < 120  # of thousands
    assert figures["page_bytes"] < 2e6
    assert figures["wheel_ms"] < 50  # far above what it takes where nothing else runs
    assert complaints(browser) == []


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    cells = curve({0.5: 0.7, 1.0: 0.8})
    cells += [("mix-0.375x4+1x1", "mixture", 0, {"lead_span": "0.375:4,1:1"}, 0.79)]
    cells += [("half-steps", "half-steps", 0, {"max_steps": 5}, 0.65)]
    out = make_sweep(tmp_path_factory.mktemp("sweep"), cells)
    write_report(out, {"teacher": STRANGER}, costs)
    return out


CLIPPED_OR_SMALL = """
const found = [];
for (const text of document.querySelectorAll(".chart text")) {
  const [box, chart] = [text, text.closest("svg")].map((one) => one.getBoundingClientRect());
  const pixels = (parseFloat(getComputedStyle(text).fontSize) * chart.width) / 400;
  if (box.left < chart.left - 1 || box.right > chart.right + 1 || pixels < 10)
    found.push(text.textContent);
}
return found;
"""


@pytest.mark.parametrize(("width", "dark"), WIDTHS)
def test_a_sweep_and_its_comparison_fit_every_screen(browser, sweep, width, dark):
    resize(browser, width, dark=dark)
    for page in ("report.html", "compare.html"):
        complaints(browser), requested(browser)
        open_page(browser, sweep / page)
        browser.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")

        assert complaints(browser) == []
        assert requested(browser) == []
        assert width_of(browser) == width
        assert browser.execute_script(CLIPPED_OR_SMALL) == []


# What axe, a checker of accessibility, finds wrong with the page.
VIOLATIONS = """
const done = arguments[0];
axe.run(document, { resultTypes: ["violations"] }).then((found) =>
  done(found.violations.map((one) => `${one.id}: ${one.nodes.map((node) => node.html)}`)));
"""


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True])
def test_pages_are_for_keyboards_and_screen_readers_too(browser, viewed, sweep, dark):
    axe = Path(importlib.util.find_spec("axe_core_python").origin).with_name("axe.min.js")
    resize(browser, 390, dark=dark)
    for page in (viewed[0], sweep / "report.html", sweep / "compare.html"):
        open_page(browser, page, "body[data-shown]" if page == viewed[0] else "body")
        browser.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
        if page == viewed[0]:
            set_value(browser, "#span", 50)  # so that half of the tokens are pale
            browser.execute_script("text.select(12)")
        browser.execute_script(axe.read_text())
        assert browser.execute_async_script(VIOLATIONS) == [], page.name


def test_a_flipped_answer_is_opened_and_read(browser, sweep):
    resize(browser, 1280)
    open_page(browser, sweep / "report.html")
    browser.find_element(By.LINK_TEXT, "Runs beside each other").click()
    for selector in ("details.flips > summary", "details.flip > summary"):
        browser.find_element(By.CSS_SELECTOR, selector).click()
    before, after = browser.find_elements(By.CSS_SELECTOR, "details.flip[open] .completion")

    assert before.text.startswith("span-1_seed-0: ")
    assert after.text.split(": ")[1] == before.text.split(": ")[1]
    assert "whole traces: right" in text_of(browser, "details.flip[open]")
