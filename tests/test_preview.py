"""preview shows what a capture would make of rows, without the teacher's weights."""

import json

import pytest
from click.testing import CliRunner
from families import make_tokenizer, trl_templates

from teacher_cache.capture.preview import difference
from teacher_cache.cli.group import cli

FAMILIES = {
    "qwen3": "<|im_end|>", "glm4moe": "<|user|>", "gptoss": "<|return|>",
    "nemotron_3_nano": "<|im_end|>", "gemma4_v5": "<turn|>",
}  # fmt: skip
ROW = {
    "messages": [
        {"role": "user", "content": "What is <think> for?"},
        {"role": "assistant", "content": "It is 5.", "reasoning_content": "2 plus 3"},
    ]
}


@pytest.fixture
def rows(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(ROW) + "\n" + json.dumps({"text": "no"}) + "\n")
    return file


def model_of(folder, family):
    make_tokenizer(trl_templates()[family], FAMILIES[family]).save_pretrained(folder)
    config = {"model_type": "qwen3", "vocab_size": 1000, "max_position_embeddings": 64}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def preview(*arguments):
    result = CliRunner().invoke(cli, ["preview", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("family", FAMILIES)
def test_sections_end_tokens_and_the_templates_own_text_are_shown(tmp_path, rows, family):
    model = model_of(tmp_path, family)
    day = ("--template-arg", "today=2026-01-02")
    shown = json.loads(preview("--model", model, "--traces", rows, *day, "--json"))
    first, second = shown["rows"]
    sections = dict(first["sections"])
    assert "2 plus 3" in sections["cot"]
    assert "What is <think> for?" in sections["prompt"]
    assert sections["answer"].endswith(f"It is 5.⟦{FAMILIES[family]}⟧")
    assert first["beside"].startswith("the same")
    assert "expected `messages`" in second["rejected"]
    assert shown["layout"][0].startswith("chain of thought: ")


def test_prompts_are_shown_up_to_where_the_teacher_goes_on(tmp_path, rows):
    model = model_of(tmp_path, "nemotron_3_nano")
    said = preview("--model", model, "--prompts", rows, "--limit", 1)
    assert "  cot    | <think>" in said
    assert "2 plus 3" not in said


def test_without_rows_the_layout_is_shown(tmp_path):
    said = preview("--model", model_of(tmp_path, "qwen3"))
    assert r"'<think>\n' ... '\n</think>\n\n' answer '<|im_end|>'" in said
    assert "--template-arg enable_thinking=false: the generation prompt closes it" in said


def test_a_difference_names_its_place():
    assert difference("abc", "abc") == "the same"
    assert difference("abc", "abc\n") == r"the same, and then '\n'"
    assert difference("abcd", "abc") == "the same up to its end; ours continues with 'd'"
    assert difference("abXd", "abcd").startswith("differs at character 2: ours 'abXd'")
