import json

import pytest
import torch
from fakes import VOCAB_SIZE
from students import make_model, make_student, make_tokenizer

from student_train.config import EvaluateConfig
from student_train.evaluate import (
    evaluate,
    extract_answer,
    generate,
    is_right,
    read_prompts,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>3+4=7</think>7<end>", "7"),
        ("<think>a</think>b</think> 42 \n<end>", "42"),
        ("no marks at all<end>", "no marks at all"),
        ("<think>never closed", "<think>never closed"),
        ("", ""),
    ],
)
def test_the_answer_is_what_follows_the_last_closing_mark(text, answer):
    assert extract_answer(text, "</think>", ["<end>"]) == answer


def test_another_closing_mark_or_none_can_be_named():
    assert extract_answer("x|SOLUTION|y", "|SOLUTION|", []) == "y"
    assert extract_answer("x</think>y", "", []) == "x</think>y"


@pytest.mark.parametrize(
    ("found", "wanted", "right"),
    [
        ("190", "190", True),
        (" 190\n", "190", True),
        ("190.0", "190", True),
        ("1,234", "1234", True),
        ("-5", "- 5", False),
        ("+7", "7", True),
        ("191", "190", False),
        ("", "0", False),
        ("yes", "yes", True),
        ("Yes", "yes", False),
        ("nan", "inf", False),
        ("1e3", "1000", False),  # not how answers are written
    ],
)
def test_answers_compare_as_text_or_as_numbers(found, wanted, right):
    assert is_right(found, wanted) is right


@pytest.mark.parametrize(
    ("num_right", "num_all", "low", "high"),
    [
        # Newcombe 1998, Statistics in Medicine 17, table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_agrees_with_published_values(num_right, num_all, low, high):
    found = wilson_interval(num_right, num_all)

    assert found == pytest.approx((low, high), abs=5e-5)


def test_all_right_reaches_one():
    assert wilson_interval(20, 20) == pytest.approx((1 - 0.1611, 1.0), abs=5e-5)


def config_of(**changes):
    return EvaluateConfig(**({"model": "", "prompts": "", "max_tokens": 12} | changes))


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

    assert (result.num_prompts, result.num_right, result.accuracy) == (2, 1, 0.5)
    assert result.accuracy_low < 0.5 < result.accuracy_high
    assert result.mean_tokens == 12
    assert result.unfinished_share == 1.0
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

    assert evaluate(config_of(model=student, prompts=prompts, think_close="")).num_right == 1


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


def test_a_model_that_does_not_exist_is_refused_in_one_line(tmp_path):
    prompts = write_prompts(tmp_path / "p.jsonl", {"prompt": "3", "answer": "4"})
    with pytest.raises(ValueError, match="cannot be loaded") as error:
        evaluate(config_of(model=str(tmp_path / "nowhere"), prompts=prompts))
    assert "\n" not in str(error.value)
