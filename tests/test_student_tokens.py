"""A student's folder says of turns what it was trained on."""

import json
from dataclasses import replace

import pytest
from fakes import make_cache, make_header, make_traces
from families import make_tokenizer, trl_templates
from students import make_student
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from student_train.model.tokens import add_missing_tokens, adopt_turns, differences
from student_train.run.config import TrainConfig
from student_train.run.loop import train
from teacher_cache.format import tokenizer_fingerprint

TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}"


def header_of(tokenizer, **changes):
    """What a capture with this tokenizer's teacher writes into its header."""
    decoder = tokenizer.added_tokens_decoder.items()
    facts = {
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer.get_vocab()),
        "tokenizer_size": len(tokenizer),
        "chat_template": tokenizer.chat_template,
        "special_tokens": {"eos_token": tokenizer.eos_token},
        "added_tokens": {t.content: {"id": i, "special": t.special} for i, t in decoder},
    }
    return replace(make_header(), **facts | changes)


def test_a_student_that_lacks_the_marks_gets_them_under_the_teachers_ids():
    """As Qwen2.5 does beside a Qwen3 teacher."""
    template = trl_templates()["qwen3"]
    marks = ["<tool_response>", "</tool_response>", "<think>", "</think>"]
    plain = template
    for mark in marks:
        plain = plain.replace(mark, mark.strip("<>"))
    teacher = make_tokenizer(plain, "<|im_end|>", marks)
    student = make_tokenizer(plain, "<|im_end|>")
    header = header_of(teacher)
    assert add_missing_tokens("student", student, header) == marks
    assert tokenizer_fingerprint(student.get_vocab()) == header.tokenizer_fingerprint
    assert student.encode("<think>") == teacher.encode("<think>")
    assert add_missing_tokens("student", student, header) == []


def test_tokens_that_would_get_other_ids_are_not_added():
    teacher = make_tokenizer("", "<end>", ["<a>", "<think>"])
    student = make_tokenizer("", "<end>", ["<b>"])
    assert add_missing_tokens("student", student, header_of(teacher)) == []
    assert "<think>" not in student.get_vocab()


def test_a_base_model_gets_the_caches_template_and_what_differs_is_said(caplog):
    teacher = make_tokenizer(trl_templates()["qwen3"], "<|im_end|>")
    student = make_tokenizer(trl_templates()["qwen3"], "<|im_start|>")
    student.chat_template = None
    header = header_of(teacher)
    adopt_turns("base", student, header)
    assert student.chat_template == teacher.chat_template
    assert student.eos_token == "<|im_end|>"
    assert "base: it has no chat template: RUN/model gets the cache's" in caplog.text
    assert "its eos_token is '<|im_start|>', the teacher's '<|im_end|>'" in caplog.text
    assert differences(student, header) == []


@pytest.mark.parametrize("whose", ["cache", "student"])
def test_the_written_student_speaks_as_it_was_trained(tmp_path, whose):
    student = make_student(tmp_path / "student")
    tokenizer = AutoTokenizer.from_pretrained(student)
    tokenizer.chat_template = "the student's own"
    tokenizer.save_pretrained(student)
    own_end = AutoConfig.from_pretrained(student).eos_token_id
    end = tokenizer.convert_ids_to_tokens(7)
    cache = make_cache(
        tmp_path / "cache",
        make_traces(8),
        chat_template=TEMPLATE,
        special_tokens={"eos_token": end},
        terminal_token_ids=(7, 9),
    )
    config = TrainConfig(
        cache=(cache,), student=str(student), out=tmp_path / "run", batch_traces=4, max_steps=1,
        chat_template=whose,
    )  # fmt: skip
    train(config)
    folder = tmp_path / "run" / "model"
    written = AutoTokenizer.from_pretrained(folder)
    assert written.chat_template == (TEMPLATE if whose == "cache" else "the student's own")
    if whose == "cache":
        assert written.eos_token == end
        assert AutoConfig.from_pretrained(folder).eos_token_id == [7, 9]
        assert GenerationConfig.from_pretrained(folder).eos_token_id == [7, 9]
    else:
        assert AutoConfig.from_pretrained(folder).eos_token_id == own_end
    assert json.loads((folder / "config.json").read_text())


def test_caches_of_different_templates_are_refused(tmp_path):
    student = make_student(tmp_path / "student")
    caches = tuple(
        make_cache(tmp_path / name, make_traces(4), chat_template=f"{TEMPLATE}{name}")
        for name in ("one", "two")
    )
    config = TrainConfig(cache=caches, student=str(student), out=tmp_path / "run", batch_traces=2)
    with pytest.raises(ValueError, match="rendered with different chat templates"):
        train(config)
