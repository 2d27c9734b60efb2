import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fakes import VOCAB_SIZE, make_cache, make_traces
from students import make_model, make_student, make_tokenizer

from student_train.evaluation.config import EvaluateConfig
from student_train.evaluation.evaluate import evaluate
from student_train.evaluation.generation import generate
from student_train.evaluation.prompts import read_prompts, seen_in
from teacher_cache.format import open_cache


def config_of(**changes):
    return EvaluateConfig(**({"model": "m", "prompts": Path("p"), "max_new_tokens": 12} | changes))


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
        ('{"prompt": "a"}', r"p\.jsonl:2: expected an `answer`, a text or a number, got None"),
        ('{"prompt": "a", "answer": true}', r"p\.jsonl:2: expected an `answer`"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, message):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a", "answer": "1"}\n' + line + "\n")

    with pytest.raises(ValueError, match=message):
        list(read_prompts(path))


def test_missing_and_empty_prompt_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.jsonl: expected a JSONL file"):
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
    with pytest.raises(ValueError, match=r"p\.jsonl:1: no field 'size' to group by; there are"):
        list(read_prompts(prompts, "size"))


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


@pytest.mark.slow
@pytest.mark.vllm
def test_vllm_writes_what_transformers_does(tmp_path):
    # vLLM on a CPU has no kernel for smaller heads.
    make_student(tmp_path / "student", initializer_range=0.5, head_dim=32)
    records = [{"prompt": f"{n} 4", "answer": "x"} for n in range(8)]
    prompts = write_prompts(tmp_path / "p.jsonl", *records)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    written = {}
    for engine in ("transformers", "vllm"):
        options = ["--model", tmp_path / "student", "--prompts", prompts, "--max-new-tokens", "12"]
        options += ["--engine", engine, "--json", "--completions", tmp_path / engine]
        done = subprocess.run(
            [sys.executable, "-m", "student_train.cli", "evaluate", *map(str, options)],
            env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["answers"]["num_prompts"] == 8
        rows = [json.loads(line) for line in (tmp_path / engine).read_text().splitlines()]
        written[engine] = [row["completion"] for row in rows]

    same = [a == b for a, b in zip(written["transformers"], written["vllm"], strict=True)]
    assert sum(same) >= 7  # greedy, but a tie may be broken the other way
