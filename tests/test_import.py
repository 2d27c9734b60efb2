"""`cache-teacher import`: files that the other programs' own writers made, and rows that lie.

data/others/ holds rows of tools/tiny-teacher (two of DistillKit's are of a random table); its
README.md has the versions and commands that made them.
"""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from commands import write_rows

from teacher_cache.cli.group import cli
from teacher_cache.examine.audit import AuditConfig, audit
from teacher_cache.format import open_cache
from teacher_cache.format.checking.verify import verify_cache
from teacher_cache.sources import BadRow, SourceError
from teacher_cache.transform.export import ExportConfig, export
from teacher_cache.transform.importing.configs import ImportConfig
from teacher_cache.transform.importing.distillkit import CONFIG_NAME, DistillKit
from teacher_cache.transform.importing.responses import server_traces, trl_traces
from teacher_cache.transform.importing.run import import_cache

ROOT = Path(__file__).parent.parent
OTHERS = ROOT / "tests" / "data" / "others"
TEACHER = ROOT / "tools" / "tiny-teacher"
# Format of each file, and the largest mean KL to the teacher: grid and (DistillKit) fit.
FILES = {
    "vllm-completions.jsonl": ("server", 1e-4),
    "vllm-chat.jsonl": ("server", 1e-4),
    "vllm-generate.jsonl": ("server", 1e-4),
    "trl-generate.json": ("trl", 1e-4),
    "trl-sequences.json": ("trl", 1e-4),
    "axolotl-raw.jsonl": ("axolotl", 1e-4),
    "distillkit": ("distillkit", 5e-3),
}


def imported(rows, out, format_, **settings):
    config = ImportConfig(rows=Path(rows), out=out, format=format_, model=str(TEACHER), **settings)
    report = import_cache(config)
    return report, open_cache(str(out))


def columns_of(cache, folder, **changes):
    """A cache's traces as rows of plain columns, and their file."""
    rows = []
    for trace in cache:
        entries = [trace.logprobs(t) for t in range(len(trace))]
        rows.append(
            {
                "id": trace.trace_id,
                "token_ids": trace.token_ids.tolist(),
                "top_ids": [e.ids.tolist() for e in entries],
                "top_logprobs": [e.logprobs.tolist() for e in entries],
            }
            | {name: change(trace, entries) for name, change in changes.items()}
        )
    return write_rows(folder / "columns.jsonl", rows), rows


@pytest.fixture(scope="module")
def completions(tmp_path_factory):
    out = tmp_path_factory.mktemp("completions") / "cache"
    return imported(OTHERS / "vllm-completions.jsonl", out, "server")[1]


@pytest.fixture(scope="module")
def live():
    from teacher_cache.engines.transformers import TransformersTeacher

    teacher = TransformersTeacher(
        model=str(TEACHER), revision=None, dtype="float32", top_k=64, max_model_len=512,
        sampling=None,
    )  # fmt: skip
    yield teacher
    teacher.close()


def mean_kl(cache, teacher):
    """Mean KL of a cache's rows to the teacher's, over kept entries and one bucket."""
    from teacher_cache.engines import TeacherRequest

    total, count = 0.0, 0
    for trace in cache:
        ids = tuple(trace.token_ids.tolist())
        (rows,) = teacher.run([TeacherRequest(trace.trace_id, ids, 0, 0, capture_prompt=True)])
        for t in np.flatnonzero(trace.k):
            row = dict(zip(rows.row_ids[t - 1], rows.row_logprobs[t - 1], strict=True))
            entries = trace.logprobs(int(t))
            pairs = [
                (p, row[i]) for i, p in zip(entries.ids, entries.logprobs, strict=True) if i in row
            ]
            p, q = np.array(pairs, np.float64).T
            p_rest, q_rest = max(1 - np.exp(p).sum(), 1e-7), max(1 - np.exp(q).sum(), 1e-7)
            total += float((np.exp(p) * (p - q)).sum() + p_rest * np.log(p_rest / q_rest))
            count += 1
    return total / count


@pytest.mark.parametrize("name", FILES)
def test_files_of_other_writers_hold_the_teachers_distributions(name, live, tmp_path):
    format_, largest_kl = FILES[name]
    report, cache = imported(OTHERS / name, tmp_path / "cache", format_)
    assert report.rejects.total == 0
    assert report.counts.num_without_own == 0 or format_ == "distillkit"
    assert len(cache) == report.num_traces >= 1
    assert verify_cache(str(tmp_path / "cache")).errors == []
    assert cache.header.has_tails
    assert 0 <= mean_kl(cache, live) < largest_kl
    # <think> is among the tokens that the teacher drew: the chain of thought begins there.
    assert all(trace.token_ids[trace.cot_start] == 3 for trace in cache)


def test_an_imported_cache_can_be_audited(completions):
    assert audit(AuditConfig(cache=completions.path, model=str(TEACHER))).passed


@pytest.mark.parametrize("name", ["distillkit", "distillkit-delta", "distillkit-legacy"])
def test_distillkits_codec_is_read_as_its_own_reader_does(name):
    read = DistillKit.read(OTHERS / name / CONFIG_NAME)
    expected = json.loads((OTHERS / f"{name}.decompressed.json").read_text())
    expected = expected if isinstance(expected, list) else [expected]
    rows = pq.read_table(OTHERS / name / "data_0.parquet").to_pylist()
    assert len(rows) == len(expected)
    for row, values in zip(rows, expected, strict=True):
        (trace,) = read(row)
        assert trace.top_ids.tolist() == values["ids"]
        # Sums in another order, in float32; the deltas' first values are bfloat16.
        np.testing.assert_allclose(trace.values, values["values"], rtol=0.01, atol=2e-3)


def test_what_axolotl_prepared_is_its_raw_rows_without_their_tails(tmp_path):
    with pytest.raises(SourceError, match=r"divides every row by its sum.*--tail unknown"):
        imported(OTHERS / "axolotl-prepared", tmp_path / "refused", "axolotl")
    assert not (tmp_path / "refused").exists()
    raw = imported(OTHERS / "axolotl-raw.jsonl", tmp_path / "raw", "axolotl")[1]
    report, prepared = imported(
        OTHERS / "axolotl-prepared", tmp_path / "prepared", "axolotl", tail="unknown"
    )
    # Its chat template writes a line break after the turn, which the rows are counted past.
    assert report.meaning.shift < 0
    assert not prepared.header.has_tails
    for one, other in zip(raw, prepared, strict=True):
        at = np.flatnonzero(one.k)[:20]
        assert np.flatnonzero(other.k)[:20].tolist() == at.tolist()
        for t in at.tolist():
            a, b = one.logprobs(t), other.logprobs(t)
            shared = dict(zip(b.ids.tolist(), b.logprobs, strict=True))
            kept = [i for i, token in enumerate(a.ids.tolist()) if token in shared]
            p = a.logprobs[kept] - np.logaddexp.reduce(a.logprobs[kept])
            q = np.array([shared[token] for token in a.ids[kept].tolist()])
            np.testing.assert_allclose(np.exp(p), np.exp(q), atol=0.02)


def test_rows_exported_for_axolotl_are_those_that_its_own_writer_makes(tmp_path):
    raw = imported(OTHERS / "axolotl-raw.jsonl", tmp_path / "raw", "axolotl")[1]
    export(ExportConfig(cache=raw.path, out=tmp_path / "rows.parquet", axolotl=True))
    rows = pq.read_table(tmp_path / "rows.parquet").to_pylist()
    theirs = pa.ipc.open_stream(OTHERS / "axolotl-prepared" / "data-00000-of-00001.arrow")
    for trace, ours, other in zip(raw, rows, theirs.read_all().to_pylist(), strict=True):
        n = len(trace)
        # Counted from the end, where its template writes more than the 48 tokens of the response.
        num_late = len(other["input_ids"]) - (trace.cot_start + 48)
        assert ours["input_ids"] == other["input_ids"][:n]
        assert ours["labels"][: trace.cot_start] == [-100] * trace.cot_start
        assert ours["labels"][trace.cot_start :] == ours["input_ids"][trace.cot_start :]
        assert {len(ours[name]) for name in ours if name != "id"} == {n}
        assert not any(sum(mask) for mask in ours["target_mask"][: trace.cot_start - 1])
        for t in range(trace.cot_start, trace.cot_start + 40):
            before = t - 1  # where the loss looks for it
            assert ours["target_mask"][before] == [1] * trace.k[t]
            p = dict(
                zip(ours["target_token_ids"][before], ours["target_logprobs"][before], strict=True)
            )
            t_late = t + num_late
            q = dict(
                zip(
                    other["target_token_ids"][t_late], other["target_logprobs"][t_late], strict=True
                )
            )
            for token in p.keys() & q.keys():
                assert np.exp(p[token]) == pytest.approx(np.exp(q[token]), abs=0.02)
    # Read back, they are the same rows again.
    back = imported(tmp_path / "rows.parquet", tmp_path / "back", "axolotl", tail="unknown")[1]
    for one, other in zip(raw, back, strict=True):
        np.testing.assert_array_equal(one.k[one.cot_start :], other.k[one.cot_start :])
        np.testing.assert_array_equal(one.top_ids, other.top_ids)


def test_logits_without_a_normaliser_are_refused_or_marked(tmp_path):
    folder = OTHERS / "distillkit-legacy"
    with pytest.raises(SourceError, match=r"older kind are logits.*--tail unknown"):
        imported(folder, tmp_path / "refused", "distillkit")
    report, cache = imported(folder, tmp_path / "cache", "distillkit", tail="unknown")
    assert report.meaning.shift == 1  # as a model puts its logits out
    assert cache.manifest.header.imported["tail"] == "unknown"
    assert verify_cache(str(tmp_path / "cache")).errors == []


def test_columns_are_read_back_wherever_the_rows_stand(completions, tmp_path):
    file, rows = columns_of(completions, tmp_path)
    _, beside = imported(file, tmp_path / "beside", "columns")
    for row in rows:  # as a model puts them out: one token earlier, the last row of no token
        row["top_ids"] = [*row["top_ids"][1:], [5]]
        row["top_logprobs"] = [*row["top_logprobs"][1:], [0.0]]
    report, early = imported(write_rows(file, rows), tmp_path / "early", "columns")
    assert report.meaning.shift == 1
    for a, b, c in zip(completions, beside, early, strict=True):
        np.testing.assert_array_equal(a.top_ids, b.top_ids)
        np.testing.assert_allclose(a.tail, b.tail, rtol=0.02, atol=2e-7)
        for name in ("k", "top_ids", "top_logits", "tail_logit"):
            np.testing.assert_array_equal(getattr(b, name), getattr(c, name))


def test_logits_with_their_normaliser_are_logprobs(completions, tmp_path):
    file, rows = columns_of(completions, tmp_path)
    for row in rows:
        row["norm"] = [3.0 + t for t in range(len(row["token_ids"]))]
        row["top_logprobs"] = [
            [value + norm for value in values]
            for values, norm in zip(row["top_logprobs"], row["norm"], strict=True)
        ]
    with pytest.raises(SourceError, match=r"these are no logprobs\. If they are logits"):
        imported(write_rows(file, rows), tmp_path / "refused", "columns")
    _, cache = imported(
        file, tmp_path / "cache", "columns", values="logits", log_normaliser_column="norm"
    )
    for a, b in zip(completions, cache, strict=True):
        np.testing.assert_allclose(a.tail, b.tail, rtol=0.05, atol=2e-6)


def test_rows_that_were_divided_by_their_sums_are_found_out(completions, tmp_path):
    file, rows = columns_of(completions, tmp_path)
    for row in rows:
        row["top_logprobs"] = [
            (np.array(v[:2]) - np.logaddexp.reduce(v[:2])).tolist() if v else []
            for v in row["top_logprobs"]
        ]
        row["top_ids"] = [ids[:2] for ids in row["top_ids"]]
    with pytest.raises(SourceError, match="divided by their sums"):
        imported(write_rows(file, rows), tmp_path / "cache", "columns")


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_rows_divided_by_their_sums_are_found_out_in_half_precision(
    precision, completions, tmp_path
):
    torch = pytest.importorskip("torch")

    def stored(logprobs):
        return torch.tensor(logprobs).to(getattr(torch, precision)).tolist()

    file, rows = columns_of(completions, tmp_path)
    for row in rows:
        row["top_ids"] = [ids[:2] for ids in row["top_ids"]]
        row["top_logprobs"] = [values[:2] for values in row["top_logprobs"]]
    honest = [row | {"top_logprobs": [stored(v) for v in row["top_logprobs"]]} for row in rows]
    imported(write_rows(file, honest), tmp_path / "honest", "columns")
    divided = [
        row
        | {
            "top_logprobs": [
                stored(np.array(v) - np.logaddexp.reduce(v)) if v else []
                for v in row["top_logprobs"]
            ]
        }
        for row in rows
    ]
    with pytest.raises(SourceError, match="divided by their sums"):
        imported(write_rows(file, divided), tmp_path / "divided", "columns")


def test_a_trace_that_stands_elsewhere_than_the_others_is_left_out(completions, tmp_path):
    file, rows = columns_of(completions, tmp_path)
    moved = dict(rows[0], id="moved", top_ids=[], top_logprobs=[])
    # Rows so wide that they hold nearly any token.
    for ids, logprobs in zip(rows[0]["top_ids"], rows[0]["top_logprobs"], strict=True):
        further = sorted(set(rows[0]["token_ids"]) - set(ids))
        moved["top_ids"].append(ids + further)
        moved["top_logprobs"].append(logprobs + [-14.0] * len(further))
    moved["top_ids"] = [*moved["top_ids"][1:], [5]]
    moved["top_logprobs"] = [*moved["top_logprobs"][1:], [0.0]]
    report, cache = imported(
        write_rows(file, [*rows, moved]), tmp_path / "cache", "columns", row_shift=0
    )
    assert len(cache) == len(rows)
    assert report.rejects.counts == {"rows-of-other-tokens": 1}
    with pytest.raises(SourceError, match=r"clearly better \+1 tokens from where"):
        imported(file, tmp_path / "strict", "columns", row_shift=0, strict=True)


@pytest.mark.slow
@pytest.mark.parametrize("format_", ["columns", "axolotl", "server", "trl"])
def test_a_malformed_row_is_listed_and_not_the_end(format_, completions, tmp_path):
    name = {
        "axolotl": "axolotl-raw.jsonl", "server": "vllm-generate.jsonl", "trl": "trl-generate.json"
    }  # fmt: skip
    if format_ == "columns":
        good = columns_of(completions, tmp_path)[1][0]
    else:
        text = (OTHERS / name[format_]).read_text()
        good = json.loads(text.splitlines()[0] if format_ != "trl" else text)
        good = good[0] if isinstance(good, list) else good
    wrong = (7, "x", None, [7], [[7]], [["x"]], [{"a": 1}], [None], {"a": 1}, [[{}]], [10**30])
    columns = [key for key in good if key not in ("id", "request_id", "model", "object")]
    bad = [good | {"id": f"{key}-{n}", key: w} for key in columns for n, w in enumerate(wrong)]
    if format_ == "server":
        choice = good["choices"][0]
        bad += [
            good | {"id": f"choice-{key}-{n}", "choices": [choice | {key: w}]}
            for key in choice
            for n, w in enumerate(wrong)
        ]
    file = write_rows(tmp_path / "rows.jsonl", [good | {"id": "good"}, *bad])
    report, cache = imported(file, tmp_path / "cache", format_)
    names = {trace.trace_id for trace in cache}
    if format_ == "trl":  # two traces of a row
        names = {name.rpartition("-")[0] for name in names}
    assert "good" in names
    text = (tmp_path / "cache" / "rejects.jsonl").read_text()
    listed = [json.loads(line) for line in text.splitlines()]
    ids = {row["id"] for row in bad if isinstance(row["id"], str)}
    assert ids <= names | {str(each["id"]) for each in listed}
    assert len(listed) == report.rejects.total >= len(bad) / 4
    with pytest.raises(SourceError, match=r"rows\.jsonl:\d+: "):
        imported(file, tmp_path / "strict", format_, strict=True)


def test_bad_rows_are_listed_and_the_others_kept(completions, tmp_path):
    file, rows = columns_of(completions, tmp_path)
    good = dict(rows[0], id="good", note=7)
    again = dict(rows[0], id="good")
    twice = dict(rows[0], id="twice", top_ids=[[9] * len(ids) for ids in rows[0]["top_ids"]])
    outside = dict(rows[0], id="outside", token_ids=[*rows[0]["token_ids"][:-1], 448])
    other = dict(rows[0], id="other", token_ids=[5] * len(rows[0]["token_ids"]))
    lacking = {"id": "lacking", "token_ids": [1, 2]}
    tall = dict(
        rows[0], id="tall", top_logprobs=[[v + 1 for v in vs] for vs in rows[0]["top_logprobs"]]
    )
    write_rows(file, [good, good | {"id": "two"}, again, twice, outside, other, lacking, tall])
    report, cache = imported(file, tmp_path / "cache", "columns")
    assert {trace.trace_id: trace.fields for trace in cache} == {
        "good": {"note": 7}, "two": {"note": 7}
    }  # fmt: skip
    assert report.rejects.counts == {
        "duplicate-id": 1, "bad-distributions": 1, "token-outside-vocabulary": 1,
        "rows-of-other-tokens": 1, "unknown-columns": 1, "not-normalised": 1,
    }  # fmt: skip
    with pytest.raises(SourceError, match=r"columns.jsonl:3: .*\[duplicate-id\]"):
        imported(file, tmp_path / "strict", "columns", strict=True)


def test_tokens_that_their_own_row_lacks_get_no_distribution_and_are_counted(completions, tmp_path):
    file, rows = columns_of(completions, tmp_path)
    for row in rows:
        at = row["top_ids"][5].index(row["token_ids"][5])
        del row["top_ids"][5][at], row["top_logprobs"][5][at]
    report, cache = imported(write_rows(file, rows), tmp_path / "cache", "columns")
    assert report.counts.num_without_own == len(rows)
    assert all(trace.k[5] == 0 and trace.k[6] > 0 for trace in cache)


def test_rows_of_other_traces_fit_nowhere(completions, tmp_path):
    file, rows = columns_of(completions, tmp_path)
    for row in rows:
        row["token_ids"] = [(7 * token + 11) % 448 for token in row["token_ids"]]
    with pytest.raises(SourceError, match="fit their tokens nowhere"):
        imported(write_rows(file, rows), tmp_path / "cache", "columns")


def test_an_import_goes_on_and_notices_changed_rows(completions, tmp_path):
    file, rows = columns_of(completions, tmp_path)
    assert imported(file, tmp_path / "cache", "columns")[0].num_traces == len(rows)
    again = imported(file, tmp_path / "cache", "columns")[0]
    assert (again.num_traces, again.num_present) == (0, len(rows))
    rows[1]["top_logprobs"][9][0] -= 0.5
    with pytest.raises(SourceError, match="made from other content"):
        imported(write_rows(file, rows), tmp_path / "cache", "columns")


def test_servers_text_for_tokens_is_refused_with_what_to_ask_for(tmp_path):
    answer = json.loads((OTHERS / "vllm-chat.jsonl").read_text().splitlines()[0])
    answer["choices"][0]["logprobs"]["content"][0]["token"] = "<think>"
    with pytest.raises(SourceError, match="return_tokens_as_token_ids"):
        imported(write_rows(tmp_path / "a.jsonl", [answer]), tmp_path / "cache", "server")
    del answer["prompt_token_ids"]
    with pytest.raises(SourceError, match="return_token_ids"):
        imported(write_rows(tmp_path / "b.jsonl", [answer]), tmp_path / "cache", "server")


@pytest.mark.parametrize(
    ("said", "kept"), [("length", "length"), ("tool_calls", "stop"), (None, None), ("abort", 0)]
)
def test_an_answer_that_a_server_broke_off_is_no_trace(said, kept):
    answer = json.loads((OTHERS / "vllm-completions.jsonl").read_text().splitlines()[0])
    answer["choices"][0]["finish_reason"] = said
    if kept == 0:
        with pytest.raises(BadRow, match="the server ended it as 'abort'"):
            server_traces(answer)
    else:
        assert server_traces(answer)[0].finish_reason == kept


def test_trls_columns_must_be_of_the_same_tokens():
    row = json.loads((OTHERS / "trl-sequences.json").read_text())
    row = row[0] if isinstance(row, list) else row
    assert len(trl_traces(row)) == 2
    short = row | {name: [v[:-1] for v in row[name]] for name in ("logprobs", "logprob_token_ids")}
    with pytest.raises(BadRow, match="47 rows for 48 completion_ids"):
        trl_traces(short)
    moved = [[*ids[1:], ids[0]] for ids in row["actual_token_ids"]]
    with pytest.raises(BadRow, match="`actual_token_ids` must be those of"):
        trl_traces(row | {"actual_token_ids": moved})
    del row["actual_token_ids"]
    with pytest.raises(BadRow, match="actual_logprobs without actual_token_ids"):
        trl_traces(row)


def test_raw_rows_of_axolotl_have_their_place_and_stay_apart_from_prepared_ones(tmp_path):
    raw = [json.loads(line) for line in (OTHERS / "axolotl-raw.jsonl").read_text().splitlines()]
    with pytest.raises(SourceError, match="--row-shift: raw rows of Axolotl"):
        imported(OTHERS / "axolotl-raw.jsonl", tmp_path / "refused", "axolotl", row_shift=1)
    file = OTHERS / "axolotl-prepared" / "data-00000-of-00001.arrow"
    prepared = pa.ipc.open_stream(file).read_all().to_pylist()[0]
    late = dict(raw[0], id="late", logprobs=[raw[0]["logprobs"][-1], *raw[0]["logprobs"][:-1]])
    filler = [{"id": f"empty-{number}"} for number in range(64)]  # looked at first
    file = write_rows(tmp_path / "rows.jsonl", [raw[0], late, *filler, prepared])
    report, cache = imported(file, tmp_path / "cache", "axolotl")
    assert [trace.trace_id for trace in cache] == [raw[0]["id"]]
    assert report.rejects.counts == {"rows-of-other-tokens": 1, "unknown-columns": 65}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"format": "columns", "values": "logits"}, "--log-normaliser-column"),
        ({"format": "server", "values": "logits"}, "--values logits"),
        ({"format": "columns", "log_normaliser_column": "x"}, "give --values logits"),
        ({"format": "trl", "top_ids_column": "x"}, "--top-ids-column"),
        ({"format": "server", "row_shift": 1}, "--row-shift"),
        ({"format": "columns", "compression_config": Path("x")}, "--compression-config"),
    ],
)
def test_options_that_would_change_nothing_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        ImportConfig(rows=Path("r"), out="o", model="m", **settings)


def test_damaged_bytes_of_distillkit_are_a_bad_row(tmp_path):
    read = DistillKit.read(OTHERS / "distillkit" / CONFIG_NAME)
    row = pq.read_table(OTHERS / "distillkit" / "data_0.parquet").to_pylist()[0]
    row["compressed_logprobs"] = [values[:-3] for values in row["compressed_logprobs"]]
    with pytest.raises(BadRow, match=CONFIG_NAME):
        read(row)
    (tmp_path / CONFIG_NAME).write_text("k: [")
    with pytest.raises(SourceError, match="not a compression config"):
        DistillKit.read(tmp_path / CONFIG_NAME)


@pytest.mark.slow
def test_a_student_trains_on_imported_caches_and_not_on_tails_that_nobody_knows(tmp_path):
    from student_train.cli.group import cli as train

    imported(OTHERS / "vllm-completions.jsonl", tmp_path / "known", "server")
    imported(OTHERS / "axolotl-prepared", tmp_path / "unknown", "axolotl", tail="unknown")

    def run(cache, *more):
        command = [
            *("run", "--cache", tmp_path / cache, "--student", TEACHER, "--max-steps", 2),
            *("--batch-traces", 2, "--out", tmp_path / f"run-{cache}{len(more)}", *more),
        ]
        return CliRunner().invoke(train, [str(part) for part in command])

    done = run("known")
    assert done.exit_code == 0, done.output
    refused = run("unknown")
    assert refused.exit_code != 0
    assert "--tail renormalise" in str(refused.exception) + refused.output
    done = run("unknown", "--tail", "renormalise")
    assert done.exit_code == 0, done.output
    refused = run("known", "--heldout-cache", tmp_path / "unknown")
    assert "nothing can be measured on it" in str(refused.exception) + refused.output
    refused = run("unknown", "--tail", "renormalise", "--heldout-share", "0.7")
    assert "nothing can be measured on it" in str(refused.exception) + refused.output
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "1 + 1", "answer": "2"}])
    command = [
        "evaluate",
        "--model",
        TEACHER,
        "--prompts",
        prompts,
        "--cache",
        tmp_path / "unknown",
    ]
    refused = CliRunner().invoke(train, [str(part) for part in command])
    assert "nothing can be measured on it" in str(refused.exception) + refused.output


def test_the_command_says_what_it_did(tmp_path):
    arguments = ["import", OTHERS / "trl-generate.json", tmp_path / "cache", "--format", "trl"]
    done = CliRunner().invoke(cli, [str(a) for a in [*arguments, "--model", TEACHER]])
    assert done.exit_code == 0, done.output
    assert "imported now" in done.output
    assert "0 rows left out; tails as the rows tell them; sealed" in done.output
