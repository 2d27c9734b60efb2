"""The pages of `view`: what they hold is what the cache holds, and strangers' text stays text."""

import base64
import html
import json
import re
import zlib
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from fakes import TOKENS, make_cache, make_header, make_trace, make_traces, write_shards
from students import make_model, make_student

import student_train.cli.group
import teacher_cache.cli.group
from student_train.model.forward import StudentWithLoss
from student_train.model.load import head_of
from student_train.profile.config import ProfileConfig
from student_train.profile.profile import profile
from student_train.view.view import kl_of_entries, student_view
from teacher_cache.cli.report_text import figures_lines, token_line
from teacher_cache.examine.audit import AuditConfig, audit
from teacher_cache.examine.inspection import inspect_cache, show_tokens
from teacher_cache.format import CacheMismatchError, lead_span_length, num_bands_needed, open_cache
from teacher_cache.pages.choice import choose, sample_places
from teacher_cache.pages.packing import pack, texts_index
from teacher_cache.pages.page import json_for_script
from teacher_cache.pages.traces import ShownTrace, bytes_before, trace_page, worst_disagreements
from teacher_cache.transform.retokenize.configs import RetokenizeConfig
from teacher_cache.transform.retokenize.run import retokenize

STRANGER = "</script><img src=x onerror=alert(1)>\u202e&\"'"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    traces = make_traces(9)
    traces[4] = replace(traces[4], trace_id=STRANGER, fields={STRANGER: STRANGER})
    return open_cache(make_cache(tmp_path_factory.mktemp("view") / "cache", traces))


@pytest.fixture(scope="module")
def student():
    model = make_model().eval()
    return StudentWithLoss(model, head_of(model)).eval()


def invoke(group, *args, exit_code=0):
    result = CliRunner().invoke(group, [str(a) for a in args])
    assert result.exit_code == exit_code, (result.output, result.exception)
    return result


def columns(packed, trace, *, with_student):
    """Read a packed trace as the page's script does."""
    data, offset = zlib.decompress(base64.b64decode(packed)), 0
    m, entries = len(trace), trace.num_entries
    found = {}
    layout = [("tail_logit", "<f4", m)]
    layout += [("kl", "<f4", m), ("student_tail", "<f4", m)] if with_student else []
    layout += [("token", "<u2", m), ("entry", "<u2", entries)]
    layout += [("student", "<u2", entries)] if with_student else []
    layout += [("k", "u1", m), ("code", "u1", entries)]
    for name, kind, length in layout:
        found[name] = np.frombuffer(data, kind, length, offset)
        offset += found[name].nbytes
    assert offset == len(data)
    return found


def test_a_packed_trace_is_the_trace_to_the_last_bit():
    trace = make_trace("t", 60, without_entries=[7])
    ids = texts_index([trace])
    found = columns(pack(trace, ids, None), trace, with_student=False)

    np.testing.assert_array_equal(ids[found["token"]], trace.token_ids)
    np.testing.assert_array_equal(ids[found["entry"]], trace.top_ids)
    np.testing.assert_array_equal(np.unique(trace.top_logits)[found["code"]], trace.top_logits)
    np.testing.assert_array_equal(found["tail_logit"], trace.tail_logit)
    np.testing.assert_array_equal(found["k"], trace.k)


def test_logits_that_no_cache_holds_are_refused():
    trace = make_trace("t", 60)
    trace = replace(trace, top_logits=np.linspace(-9, 0, trace.num_entries, dtype=np.float32))
    with pytest.raises(ValueError, match="at most 256 different logits"):
        pack(trace, texts_index([trace]), None)


def test_a_student_is_packed_beside_the_teacher_with_its_own_logprobs(student):
    trace = make_trace("t", 40, without_entries=[3])
    view = student_view(student, trace, torch.device("cpu"))
    ids = torch.from_numpy(trace.token_ids.astype(np.int64))[None]
    with torch.no_grad():
        dense = student.model(ids).logits[0].double().log_softmax(-1).numpy()

    for t in range(1, len(trace)):
        own = slice(*trace.entry_offsets[t : t + 2])
        if not trace.k[t]:
            assert np.isnan(view.kl[t])
            continue
        log_q = dense[t - 1][trace.top_ids[own]]
        np.testing.assert_allclose(view.entry_logprobs[own], log_q, atol=1e-5)
        q_tail = 1 - np.exp(log_q).sum()
        assert np.exp(view.tail_logprob[t]) == pytest.approx(q_tail, abs=1e-5)
        log_p, tail = trace.top_logprobs[own], trace.tail[t]
        kl = (np.exp(log_p) * (log_p - log_q)).sum() + tail * np.log(tail / q_tail)
        assert view.kl[t] == pytest.approx(kl, abs=1e-5)
    found = columns(pack(trace, texts_index([trace]), view), trace, with_student=True)
    np.testing.assert_allclose(found["student"] * -0.001, view.entry_logprobs, atol=6e-4)


def test_ids_that_a_student_lacks_have_no_probability_and_are_not_in_its_tail():
    model = make_model(vocab_size=30).eval()
    trace = make_trace("t", 40)
    inside = trace.token_ids < 30
    trace = replace(trace, token_ids=np.where(inside, trace.token_ids, 0).astype(np.int32))
    view = student_view(StudentWithLoss(model, head_of(model)).eval(), trace, torch.device("cpu"))

    is_absent = trace.top_ids >= 30
    assert is_absent.any()
    assert np.isneginf(view.entry_logprobs[is_absent]).all()
    assert np.isfinite(view.entry_logprobs[~is_absent]).all()
    own = slice(*trace.entry_offsets[5:7])
    total = np.exp(view.entry_logprobs[own]).sum() + np.exp(view.tail_logprob[5])
    assert total == pytest.approx(1, abs=1e-5)


def test_the_worst_disagreements_are_those_of_all_traces_by_falling_kl(student):
    cpu = torch.device("cpu")
    shown = [ShownTrace(trace, student_view(student, trace, cpu)) for trace in make_traces(4)]
    worst = worst_disagreements(shown, TOKENS.__getitem__)
    everything = np.concatenate([one.student.kl[one.trace.k > 0] for one in shown])

    assert [one.kl for one in worst] == sorted(everything, reverse=True)[:50]
    for one in worst:
        assert shown[one.trace].student.kl[one.token] == one.kl
        trace = shown[one.trace].trace
        assert trace.section(one.token) == one.section
        entries = trace.logprobs(one.token)
        own = entries.ids.tolist().index(trace.token_ids[one.token])
        assert one.teacher == pytest.approx(np.exp(entries.logprobs[own]))
        own += trace.entry_offsets[one.token]
        assert one.student == pytest.approx(np.exp(shown[one.trace].student.entry_logprobs[own]))
        assert one.before == "".join(
            TOKENS[i] for i in trace.token_ids[max(0, one.token - 8) : one.token]
        )


@pytest.mark.parametrize("max_lead_span", [1.0, 0.5])
def test_bytes_before_a_lead_span_are_those_that_a_reader_takes(tmp_path, max_lead_span):
    span = {} if max_lead_span == 1.0 else {"max_lead_span": max_lead_span}
    traces = [trace[: lead_span_length(len(trace), max_lead_span)] for trace in make_traces(7)]
    made = open_cache(make_cache(tmp_path / "cache", traces, **span))
    found = bytes_before(made)

    for percent in (1, 29, 50):
        expected = 0
        for shard in made.shards:
            keep = [
                (made.num_held(info), lead_span_length(info.n_total, percent / 100))
                for info in shard.traces
            ]
            expected += shard.prefix_bytes(num_bands_needed(keep, len(shard.blocks)))
        assert found[percent - 1] == expected
    assert (found[99] is None) == (max_lead_span < 1)


def test_a_sample_is_the_same_every_time_and_comes_from_all_shards(cache):
    places = sample_places(cache, 6)

    assert places == sample_places(cache, 6)
    assert len(set(places)) == 6
    assert len({shard for shard, _ in places}) > 1
    assert len(choose(cache, (), 100).traces) == 9
    assert choose(cache, (), 100).words == "All traces"
    assert [t.trace_id for t in choose(cache, ("t7", "t0", "t7"), 1).traces] == ["t7", "t0"]


def test_nothing_of_strangers_is_markup(cache):
    shown = [ShownTrace(cache[STRANGER])]
    page = trace_page(cache, shown, lambda _: STRANGER, chosen="One", student=STRANGER).decode()

    assert "<img" not in page
    assert page.count("</script>") == page.count("<script")
    data = re.search(r'id="page-data">(.*?)</script>', page)[1]
    assert json.loads(data)["traces"][0]["fields"] == {STRANGER: STRANGER}
    assert "\u202e" not in page
    assert not re.search(r"""(?:src|href)=["'](?!data:,)""", page)
    assert "default-src 'none'" in html.unescape(page)


def test_json_in_a_script_cannot_end_it():
    assert json.loads(json_for_script(STRANGER)) == STRANGER
    assert not set("<>&") & set(json_for_script(STRANGER))


def test_the_command_writes_a_page_and_keeps_an_existing_one(cache, tmp_path):
    group, page = teacher_cache.cli.group.cli, tmp_path / "page.html"
    model = make_student(tmp_path / "model")
    done = invoke(group, "view", cache.path, "--trace", "t1", "--model", model, "-o", page)

    assert "opens in any browser" in done.stdout
    data = re.search(r'id="page-data">(.*?)</script>', page.read_text())[1]
    ids = json.loads(data)["ids"]
    assert json.loads(data)["texts"] == json.loads(json_for_script([TOKENS[i] for i in ids]))
    again = invoke(group, "view", cache.path, "-o", page, exit_code=1)
    assert "already exists" in str(again.exception)
    args = ["--trace", "t99", "--model", "no such model", "-o", tmp_path / "x"]  # looked for last
    unknown = invoke(group, "view", cache.path, *args, exit_code=1)
    assert "no trace 't99'" in str(unknown.exception)
    both = ["--trace", "t1", "--sample", "2", "-o", tmp_path / "x"]
    assert "leave one of them out" in invoke(group, "view", cache.path, *both, exit_code=2).stderr
    assert not (tmp_path / "x").exists()


def test_an_unfinished_capture_is_shown_and_said_to_be_one(tmp_path, monkeypatch):
    path = write_shards(tmp_path / "cache", make_traces(3))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "table").mkdir()  # where the teacher was is nothing that has a tokenizer now
    done = invoke(teacher_cache.cli.group.cli, "view", path, "-o", tmp_path / "page.html")

    assert "token ids instead of text" in done.stdout

    assert "the capture is not complete" in (tmp_path / "page.html").read_text()


def test_an_empty_cache_has_nothing_to_show(tmp_path):
    path = make_cache(tmp_path / "cache", [])
    with pytest.raises(ValueError, match="nothing to show"):
        choose(open_cache(path), (), 1)


def test_a_student_is_shown_with_its_worst_tokens_by_section(cache, tmp_path):
    model = make_student(tmp_path / "student", initializer_range=0.2)
    page = tmp_path / "page.html"
    group = student_train.cli.group.cli
    invoke(group, "view", cache.path, "--student", model, "--sample", 3, "-o", page)
    text = page.read_text()

    counts = [int(n) for n in re.findall(r"<summary>[a-z ]+: (\d+) of the fifty", text)]
    assert len(counts) == 3
    assert sum(counts) == 50 == text.count('<button type="button" data-trace=')
    wrong = make_student(tmp_path / "wrong", tokens=[*TOKENS[:-1], "other"])
    done = invoke(group, "view", cache.path, "--student", wrong, "-o", tmp_path / "x", exit_code=1)
    assert "tokenizer" in str(done.exception)


def test_header_facts_of_any_length_fit(tmp_path):
    header = make_header(chat_template_hash="x" * 10_000)
    path = make_cache(tmp_path / "cache", make_traces(1), chat_template_hash="x" * 10_000)
    page = trace_page(
        open_cache(path), [ShownTrace(make_traces(1)[0])], str, chosen="All traces"
    ).decode()

    assert header.teacher in page
    assert "(10,000 characters)" in page


@pytest.fixture(scope="module")
def without_tails(tmp_path_factory):
    path = tmp_path_factory.mktemp("imported") / "cache"
    return open_cache(make_cache(path, make_traces(3), imported={"tail": "unknown"}))


def test_a_page_without_tails_says_so_and_what_else_it_cannot_know(cache, without_tails, student):
    shown = [ShownTrace(trace) for trace in without_tails]
    page = trace_page(without_tails, shown, str, chosen="all").decode()
    data = json.loads(re.search(r'id="page-data">(.*?)</script>', page, re.DOTALL)[1])
    assert data["has_tails"] is False
    assert "outside the kept entries is not known" in page
    whole = trace_page(cache, [ShownTrace(cache["t0"])], str, chosen="one").decode()
    assert "is not known: this cache" not in whole


def test_the_students_kl_of_such_a_trace_is_over_its_entries(without_tails, student):
    trace = without_tails["t1"]
    view = student_view(student, trace, torch.device("cpu"))
    kl = kl_of_entries(trace, view.entry_logprobs)
    for t in range(len(trace)):
        entries = slice(trace.entry_offsets[t], trace.entry_offsets[t + 1])
        q, p = view.entry_logprobs[entries], trace.top_logprobs[entries]
        if not len(q):
            assert np.isnan(kl[t])
            continue
        p, q = np.exp(p) / np.exp(p).sum(), np.exp(q) / np.exp(q).sum()
        assert kl[t] == pytest.approx(np.sum(p * np.log(p / q)), abs=1e-9)


def test_other_readers_say_that_tails_are_not_known(without_tails, tmp_path):
    group = teacher_cache.cli.group.cli
    found = inspect_cache(without_tails, 0)
    header = without_tails.header.to_json()
    shown = "\n".join(figures_lines(found, header, without_tails.path, can_draw=False))
    assert "tail mass: not known" in shown
    assert "entropy of the kept entries alone" in shown
    figures = json.loads(invoke(group, "inspect", without_tails.path, "--json").output)
    assert figures["measured"]["tail_mass_mean"] is None
    tokens = show_tokens(without_tails["t0"], None, (1, 9), has_tails=False)
    assert all("tail not known" in token_line(token) for token in tokens)
    page = tmp_path / "figures.html"
    invoke(group, "inspect", without_tails.path, "--json", "--html", page)
    assert "tail mass" not in page.read_text()
    for name in ("rows.parquet", "rows.jsonl"):
        options = ["--logprobs"] if name.endswith("jsonl") else []
        invoke(group, "export", without_tails.path, tmp_path / name, *options)
    assert pq.read_table(tmp_path / "rows.parquet")["tail_mass"].null_count == len(
        pq.read_table(tmp_path / "rows.parquet")
    )
    row = json.loads((tmp_path / "rows.jsonl").read_text().splitlines()[0])
    assert set(row["tail_mass"]) == {None}
    assert any(logprobs for logprobs in row["top_logprobs"])


def test_what_needs_tails_refuses_a_cache_without_them(without_tails, tmp_path):
    path, out = without_tails.path, tmp_path / "out"
    student = make_student(tmp_path)
    for work in (
        lambda: retokenize(RetokenizeConfig(cache=path, student=str(student), out=str(out))),
        lambda: audit(AuditConfig(cache=path, model=str(student))),
        lambda: profile(ProfileConfig(cache=(path,), student=str(student), out=out)),
    ):
        with pytest.raises(CacheMismatchError, match="do not tell the probability outside"):
            work()
    config = ProfileConfig(cache=(path,), student=str(student), out=out, tail="renormalise")
    profile(config)
    sections = json.loads((out / "profile.json").read_text())["sections"]
    assert all(row["tail"] is None and row["divergence"] > 0 for row in sections)
