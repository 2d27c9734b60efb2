import gzip
import json
import os
import signal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import zstandard
from fakes import VOCAB_SIZE, make_cache, make_traces
from students import make_model, make_student, make_tokenizer

from student_train.errors import InterruptedRunError
from student_train.evaluation import evaluate as evaluate_module
from student_train.evaluation import generation, mathematics
from student_train.evaluation.checker import Checker
from student_train.evaluation.completions import Completion
from student_train.evaluation.config import EvaluateConfig, Generation
from student_train.evaluation.evaluate import evaluate
from student_train.evaluation.golds import check_golds
from student_train.evaluation.prompts import read_prompts, seen_in
from student_train.evaluation.requests import Request
from teacher_cache.format import open_cache
from teacher_cache.format.checksums import DamagedFileError
from teacher_cache.terminal.progress import Progress


def config_of(**changes):
    return EvaluateConfig(**({"model": "m", "prompts": Path("p"), "max_new_tokens": 12} | changes))


def generate(model, tokenizer, prompts, config, done=()):
    """The first sample of every prompt that is not done, by prompt."""
    requests = [Request(tuple(ids), config.max_new_tokens) for ids in prompts]
    settings = Generation.of(config)
    found = generation.generate(model, tokenizer, requests, settings, (), done)
    by_prompt = {
        prompt: Completion(tokenizer.decode(tokens.ids), len(tokens.ids), tokens.finished)
        for prompt, sample, tokens in found
        if sample == 0
    }
    return [by_prompt[prompt] for prompt in sorted(by_prompt)]


def test_batches_generate_what_single_prompts_do():
    model, tokenizer = make_model().eval(), make_tokenizer()
    prompts = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [15, 16]]
    together = generate(model, tokenizer, prompts, config_of(batch_size=3))
    alone = [generate(model, tokenizer, [prompt], config_of())[0] for prompt in prompts]

    assert together == alone
    assert len({done.text for done in together}) > 1


def test_generation_ends_at_any_end_token_and_counts_it():
    model, tokenizer = make_model().eval(), make_tokenizer()
    (free,) = generate(model, tokenizer, [[5, 6]], config_of())
    ids = tokenizer(free.text)["input_ids"]
    assert not free.finished
    assert free.num_tokens == len(ids) == 12
    model.generation_config.eos_token_id = [VOCAB_SIZE - 1, ids[4]]
    (ended, longer) = generate(model, tokenizer, [[5, 6], [30, 3]], config_of())

    first = ids.index(ids[4])
    assert ended.finished
    assert ended.num_tokens == first + 1
    assert ended.text == tokenizer.decode(ids[: first + 1])
    assert longer.num_tokens >= 1


def test_sampling_depends_on_the_seed_alone():
    model, tokenizer = make_model().eval(), make_tokenizer()

    def sampled(seed):
        torch.manual_seed(12345 + seed * 7)
        return generate(model, tokenizer, [[5, 6]] * 4, config_of(temperature=2.0, seed=seed))

    assert sampled(0) == sampled(0)
    assert sampled(0) != sampled(1)


def write_prompts(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.slow
def test_an_evaluation_counts_right_answers(tmp_path):
    student = make_student(tmp_path / "student")
    tokenizer = make_tokenizer()
    model = make_model().eval()
    (done,) = generate(model, tokenizer, [tokenizer("3 4")["input_ids"]], config_of())
    prompts = write_prompts(
        tmp_path / "p.jsonl",
        {"prompt": "3 4", "answer": done.text},
        {"prompt": "3 4", "answer": "something else"},
        {"prompt": "5 6 7", "answer": -1},
    )
    result = evaluate(config_of(model=student, prompts=prompts, limit=2, think_close=""))

    answers = result.answers
    assert (answers.num_prompts, answers.num_right, answers.accuracy) == (2, 1, 0.5)
    assert answers.accuracy_low < 0.5 < answers.accuracy_high
    assert answers.mean_tokens == 12
    assert answers.unfinished_share == 1.0
    assert str(result).startswith("accuracy 50.0% (95 %: 9.5% to 90.5%), 1 of 2 right")


@pytest.mark.slow
def test_messages_go_through_the_chat_template(tmp_path):
    student = make_student(tmp_path / "student")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "3 {{ messages[0]['content'] }}{% if add_generation_prompt %} 4{% endif %}"
    )
    tokenizer.save_pretrained(student)
    (done,) = generate(
        make_model().eval(), tokenizer, [tokenizer("3 9 4")["input_ids"]], config_of()
    )
    message = {"role": "user", "content": "9"}
    prompts = write_prompts(tmp_path / "p.jsonl", {"messages": [message], "answer": done.text})

    assert (
        evaluate(config_of(model=student, prompts=prompts, think_close="")).answers.num_right == 1
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"p\.jsonl:2: not JSON"),
        ("[1]", r"p\.jsonl:2: expected an object, got list"),
        ('{"answer": "1"}', r"p\.jsonl:2: expected a text `prompt` or a list `messages`"),
        ('{"prompt": "", "answer": "1"}', r"p\.jsonl:2: expected a text `prompt`"),
        (
            '{"prompt": "a"}',
            r"p\.jsonl:2: expected an `answer`, a text, a number, true or false, got None",
        ),
        ('{"prompt": "a", "answer": " "}', r"p\.jsonl:2: expected an `answer`"),
        ('{"prompt": "a", "answer": NaN}', r"p\.jsonl:2: expected an `answer`"),
        ('{"prompt": "a", "answer": [1]}', r"p\.jsonl:2: expected an `answer`"),
        ('{"question": "a", "answer": 1}', r"found question, answer"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, message):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a", "answer": "1"}\n' + line + "\n")

    with pytest.raises(ValueError, match=message):
        list(read_prompts(path))


def test_missing_and_empty_prompt_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.jsonl: cannot be read: No such file"):
        evaluate(config_of(prompts=tmp_path / "nowhere.jsonl"))
    with pytest.raises(ValueError, match="expected at least one prompt"):
        evaluate(config_of(prompts=write_prompts(tmp_path / "empty.jsonl")))


def test_completions_without_a_folder_are_refused_before_anything_is_generated(tmp_path):
    with pytest.raises(ValueError, match=r"completions: there is no folder .*nowhere"):
        evaluate(config_of(completions=tmp_path / "nowhere" / "c.jsonl"))


def test_a_model_that_does_not_exist_is_refused_in_one_line(tmp_path):
    prompts = write_prompts(tmp_path / "p.jsonl", {"prompt": "3", "answer": "4"})
    with pytest.raises(ValueError, match="cannot be loaded") as error:
        evaluate(config_of(model=str(tmp_path / "nowhere"), prompts=prompts))
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_several_samples_give_avg_at_n_clustered_by_prompt(tmp_path):
    student = make_student(tmp_path / "student")
    prompts = write_prompts(
        tmp_path / "p.jsonl",
        *({"prompt": f"{n} 4", "answer": "x", "size": n % 2} for n in range(6)),
    )
    file = tmp_path / "completions.jsonl"
    result = evaluate(
        config_of(
            model=student, prompts=prompts, samples_per_prompt=3, temperature=1.0, group_by="size",
            completions=file,
        )
    )  # fmt: skip
    rows = [json.loads(line) for line in file.read_text().splitlines()]

    assert (result.answers.num_prompts, result.answers.num_samples) == (6, 3)
    assert "avg@3" in str(result)
    assert list(result.groups) == ["0", "1"]
    assert result.groups["0"].num_prompts == 3
    assert sorted(row["prompt"] for row in rows) == sorted([*range(6)] * 3)
    texts = {row["prompt"]: set() for row in rows}
    for row in rows:
        texts[row["prompt"]].add(row["completion"]["text"])
    assert any(len(different) > 1 for different in texts.values())


def test_a_small_top_p_is_greedy():
    model, tokenizer = make_model().eval(), make_tokenizer()
    greedy = generate(model, tokenizer, [[5, 6]], config_of())
    narrow = generate(model, tokenizer, [[5, 6]], config_of(temperature=1.0, top_p=1e-6))

    assert narrow == greedy


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples_per_prompt": 4}, "4 answers at temperature 0 would be the same"),
        ({"samples_per_prompt": 0}, "--samples-per-prompt: expected a number at least 1"),
        ({"top_p": 0.0}, "--top-p: expected a number above 0 and at most 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        config_of(**settings)


def test_a_prompt_without_the_field_to_group_by_is_named(tmp_path):
    prompts = write_prompts(tmp_path / "p.jsonl", {"prompt": "3", "answer": "4"})
    with pytest.raises(ValueError, match=r"p\.jsonl:1: no field 'size' to group by; found"):
        list(read_prompts(prompts, "size"))


@pytest.mark.slow
def test_held_out_figures_stand_beside_the_answers(tmp_path):
    student = make_student(tmp_path / "student")
    prompts = write_prompts(tmp_path / "p.jsonl", {"prompt": "3", "answer": "4"})
    cache = make_cache(tmp_path / "cache", make_traces(5))
    result = evaluate(config_of(model=student, prompts=prompts, cache=cache))

    assert list(result.heldout) == ["prompt", "cot", "answer", "all"]
    assert "held-out cot: KL " in str(result)


def test_prompts_that_were_trained_on_are_found(tmp_path):
    traces = make_traces(9)
    cache = open_cache(make_cache(tmp_path / "cache", traces))
    prompts = [traces[n].token_ids[: traces[n].cot_start].tolist() for n in (4, 7)]
    opened = [*prompts[0], *cache.header.think_open_ids]

    assert seen_in(cache, [[5, 6], prompts[0], prompts[0][:-1], prompts[1], opened]) == [1, 3, 4]
    assert seen_in(cache, []) == []


def test_golds_may_be_numbers_and_truth_values_and_stay_exact(tmp_path):
    golds = [10**30, 0.5, 1e22, True, "(B)"]
    prompts = write_prompts(tmp_path / "p.jsonl", *({"prompt": "3", "answer": g} for g in golds))

    answers = [prompt.answer for prompt in read_prompts(prompts)]
    assert answers == [f"1{'0' * 30}", "0.5", f"1{'0' * 22}", "true", "(B)"]


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst", "json", "parquet", "arrow", "folder"])
def test_prompts_come_in_every_format(tmp_path, kind):
    rows = [{"prompt": "3 4", "answer": "7"}, {"prompt": "5 6", "answer": "11"}]
    path = tmp_path / f"p.{kind}"
    table = pa.Table.from_pylist(rows)
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if kind == "jsonl.gz":
        path.write_bytes(gzip.compress(lines))
    elif kind == "jsonl.zst":
        path.write_bytes(zstandard.compress(lines))
    elif kind == "json":
        path.write_text(json.dumps(rows))
    elif kind == "parquet":
        pq.write_table(table, path)
    elif kind == "arrow":
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    else:
        path.mkdir()
        (path / "a.jsonl").write_bytes(lines.splitlines()[0])
        (path / "b.jsonl").write_bytes(lines.splitlines()[1])

    found = [(prompt.text, prompt.answer) for prompt in read_prompts(path)]
    assert found == [("3 4", "7"), ("5 6", "11")]


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_a_prompt_beyond_the_models_positions_is_refused_by_both_engines(tmp_path, engine):
    student = make_student(tmp_path / "student", max_position_embeddings=16)
    long = " ".join(["3"] * 16)
    prompts = write_prompts(
        tmp_path / "p.jsonl", {"prompt": "3", "answer": "1"}, {"prompt": long, "answer": "2"}
    )
    with pytest.raises(
        ValueError, match=r"p\.jsonl:2: the prompt's 16 tokens leave no room .* 16 p"
    ):
        evaluate(config_of(model=student, prompts=prompts, engine=engine))


@pytest.mark.slow
def test_an_answer_ends_where_the_models_positions_do(tmp_path, caplog):
    caplog.set_level("INFO")
    student = make_student(tmp_path / "student", max_position_embeddings=16)
    records = [{"prompt": " ".join(["3"] * n), "answer": "x"} for n in (2, 9, 12)]
    prompts = write_prompts(tmp_path / "p.jsonl", *records)
    file = tmp_path / "c.jsonl"
    evaluate(config_of(model=student, prompts=prompts, completions=file))
    by_prompt = {row["prompt"]: row["completion"] for row in read_lines(file)}

    assert [by_prompt[n]["num_tokens"] for n in range(3)] == [12, 7, 4]
    assert not any(completion["finished"] for completion in by_prompt.values())
    assert "2 of 3 prompts leave less than 12 tokens" in caplog.text


def read_lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def eight_prompts(path):
    return write_prompts(path, *({"prompt": f"{n} 4", "answer": n} for n in range(8)))


@pytest.mark.slow
@pytest.mark.parametrize(("temperature", "kept"), [(0.0, 3), (1.5, 1), (1.5, 6)])
def test_a_stopped_evaluation_keeps_what_was_answered_and_continues_to_the_same_end(
    tmp_path, monkeypatch, temperature, kept
):
    settings = {
        "model": make_student(tmp_path / "student"), "temperature": temperature, "batch_size": 2,
        "prompts": eight_prompts(tmp_path / "p.jsonl"),
    }  # fmt: skip
    whole = evaluate(config_of(**settings, completions=tmp_path / "whole.jsonl"))
    file = tmp_path / "c.jsonl"
    checked = evaluate_module._checked

    def stopped(*arguments):
        if len(read_lines(file)) == kept:
            os.kill(os.getpid(), signal.SIGINT)
        return checked(*arguments)

    monkeypatch.setattr(evaluate_module, "_checked", stopped)
    with pytest.raises(InterruptedRunError, match=f"{kept + 1} of 8 answers.*same command again"):
        evaluate(config_of(**settings, completions=file))
    assert len(read_lines(file)) == kept + 1  # the signal waits for the line in hand
    with file.open("ab") as torn:
        torn.write(b'{"prompt": 7, "sam')
    monkeypatch.setattr(evaluate_module, "_checked", checked)
    again = evaluate(config_of(**settings, completions=file))

    def by_key(path):
        return sorted(read_lines(path), key=lambda row: row["prompt"])

    assert by_key(file) == by_key(tmp_path / "whole.jsonl")
    assert again == whole


@pytest.mark.slow
def test_a_finished_evaluation_is_not_generated_again(tmp_path, monkeypatch):
    settings = {
        "model": make_student(tmp_path / "student"),
        "prompts": eight_prompts(tmp_path / "p.jsonl"),
        "completions": tmp_path / "c.jsonl",
    }
    first = evaluate(config_of(**settings))
    monkeypatch.setattr(evaluate_module, "_completions", None)

    assert evaluate(config_of(**settings)) == first


@pytest.mark.slow
def test_completions_of_another_evaluation_are_not_overwritten_unless_forced(tmp_path):
    student = make_student(tmp_path / "student")
    prompts = eight_prompts(tmp_path / "p.jsonl")
    file = tmp_path / "c.jsonl"
    settings = {"model": student, "prompts": prompts, "completions": file}
    evaluate(config_of(**settings))
    before = file.read_bytes()
    other = make_student(tmp_path / "other", seed=1)
    for changes, named in [
        ({"max_new_tokens": 13}, "max_new_tokens: 12 before, 13 now"),
        ({"model": other}, "model: "),
        ({"limit": 7}, "prompts: "),
        ({"think_close": "x"}, "think_close: "),
    ]:
        with pytest.raises(ValueError, match=rf"completions of another evaluation \({named}"):
            evaluate(config_of(**settings | changes))
    assert file.read_bytes() == before
    (tmp_path / "c.jsonl.settings.json").unlink()
    with pytest.raises(ValueError, match="which records its settings, is missing beside it"):
        evaluate(config_of(**settings))
    evaluate(config_of(**settings | {"limit": 2, "force": True}))
    assert len(read_lines(file)) == 2


@pytest.mark.slow
def test_the_same_prompts_in_another_place_continue(tmp_path):
    student = make_student(tmp_path / "student")
    file = tmp_path / "c.jsonl"
    prompts = eight_prompts(tmp_path / "p.jsonl")
    first = evaluate(config_of(model=student, prompts=prompts, completions=file))
    moved = tmp_path / "moved.jsonl.gz"
    moved.write_bytes(gzip.compress(prompts.read_bytes()))

    assert evaluate(config_of(model=student, prompts=moved, completions=file)) == first


@pytest.mark.slow
def test_a_damaged_line_is_named(tmp_path):
    settings = {
        "model": make_student(tmp_path / "student"),
        "prompts": eight_prompts(tmp_path / "p.jsonl"),
        "completions": tmp_path / "c.jsonl",
    }
    evaluate(config_of(**settings))
    whole = settings["completions"].read_bytes()
    lines = whole.splitlines(keepends=True)
    for damaged in (b"{}\n", b"{\n", lines[1].replace(b'"right": false', b'"right": true ')):
        settings["completions"].write_bytes(b"".join([lines[0], damaged, *lines[2:]]))
        with pytest.raises(DamagedFileError, match=r"c\.jsonl:2: damaged.*--force"):
            evaluate(config_of(**settings))
    settings["completions"].write_bytes(whole)
    evaluate(config_of(**settings))


@pytest.mark.slow
def test_answers_inside_unclosed_thinking_and_beyond_limits_are_counted(tmp_path, monkeypatch):
    texts = ["<think> 7", "<think> a </think> 7", "10^{10^{10}}", "7"]

    def told(task, done):
        for prompt, text in enumerate(texts):
            yield prompt, 0, Completion(text, 3, finished=True)

    monkeypatch.setattr(evaluate_module, "_completions", told)
    monkeypatch.setattr(mathematics, "CPU_LIMIT_S", 0.3)
    records = [{"prompt": "3 4", "answer": "7", "kind": n} for n in range(4)]
    prompts = write_prompts(tmp_path / "p.jsonl", *records)
    file = tmp_path / "c.jsonl"
    result = evaluate(
        config_of(model=make_student(tmp_path / "s"), prompts=prompts, completions=file)
    )

    assert (result.answers.num_right, result.answers.num_beyond_limits) == (2, 1)
    assert result.answers.unclosed_share == 0.25
    assert "1 answers were too long or too costly" in str(result)
    assert "compared by text, numbers, math-verify" in str(result)
    assert [row["compared_as"] for row in read_lines(file)] == [
        "no answer", "text", "beyond limits", "text",
    ]  # fmt: skip
    assert read_lines(file)[0]["found"] is None


@pytest.mark.slow
def test_progress_is_told_and_counts_what_was_there_before(tmp_path, monkeypatch):
    lines = []

    class Recorded(Progress):
        def add(self, num_units=1, figures=""):
            super().add(num_units, figures)
            lines.append(self.line)

    monkeypatch.setattr(evaluate_module, "Progress", Recorded)
    settings = {
        "model": make_student(tmp_path / "student"),
        "prompts": eight_prompts(tmp_path / "p.jsonl"),
        "completions": tmp_path / "c.jsonl",
    }
    evaluate(config_of(**settings))
    assert [line.partition(" |")[0] for line in lines] == [
        f"generated {n}/8 answers" for n in range(1, 9)
    ]
    kept = settings["completions"].read_bytes().splitlines(keepends=True)[:6]
    settings["completions"].write_bytes(b"".join(kept))
    lines.clear()
    evaluate(config_of(**settings))
    assert lines[0].startswith("generated 7/8 answers")


@pytest.mark.parametrize(
    ("golds", "message"),
    [
        (["It is the sum of all the parts", "No one can say what it was then"],
         r"p\.jsonl:1: no `answer` here is a number.*e\.g\. 'It is the sum"),
        (["0.5", "1/2", r"\frac12", "0.50", "50%"],
         r"p\.jsonl:1: 10 of 10 pairs of different `answer`s count as equal.*p\.jsonl:2"),
        (["7", r"\boxed{}"], r"p\.jsonl:2: the part of its `answer` .* is empty"),
    ],
)  # fmt: skip
def test_golds_that_cannot_tell_right_from_wrong_are_refused(tmp_path, golds, message):
    records = [{"prompt": "3", "answer": gold} for gold in golds]
    prompts = write_prompts(tmp_path / "p.jsonl", *records)
    with pytest.raises(ValueError, match=message):
        evaluate(config_of(model=str(tmp_path / "no model is needed"), prompts=prompts))


@pytest.mark.slow
def test_golds_of_every_kind_pass_and_odd_ones_are_named(tmp_path, caplog):
    caplog.set_level("INFO")
    golds = ["7", "(B)", "true", r"\frac{x}{2}", "She has 3 more.\n#### 1,000", "$5", "1,2"]
    golds += ["It is what it is and nothing more"]
    records = [{"prompt": "3", "answer": gold} for gold in golds]
    prompts = list(read_prompts(write_prompts(tmp_path / "p.jsonl", *records)))
    with Checker() as checker:
        check_golds(prompts, checker)
        kinds = [checker.kind(gold) for gold in golds]

    assert kinds == [
        "number",
        "choice",
        "words",
        "mathematics",
        "number",
        "number",
        "number",
        "text",
    ]
    assert "1 of 8 examined golds match only as the same text" in caplog.text
    assert "p.jsonl:8: 'It is what" in caplog.text
