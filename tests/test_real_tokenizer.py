"""A real tokenizer, the first 32,768 tokens of Mistral's Tekken, under real templates.

Tokens of bytes show every difference of texts; only one with merges shows where pieces of text
that are tokenized apart would join. `mistral-common`, which comes with vLLM, brings its file.
"""

import pytest
from families import TAG, trl_templates
from transformers import PreTrainedTokenizerFast

from teacher_cache.sources import RowColumns, TraceRenderer
from teacher_cache.sources.tokenizer import ModelFiles, OwnGenerationConfig, TeacherTokenizer

FAMILIES = {
    "qwen3": "<|im_end|>", "glm4moe": "<|user|>", "gptoss": "<|return|>",
    "nemotron_3_nano": "<|im_end|>",
}  # fmt: skip
OF_TEMPLATE = {"gptoss": {"today": "2026-01-02"}}
REASONING, ANSWER = "  2 plus 3\n\n\nmakes 5: né, 日本 😀.", "It is\n\n**5**."


class Loaded(ModelFiles):
    """A model's files whose tokenizer is there already."""

    def __init__(self, tokenizer):
        super().__init__("tekken", None)
        object.__setattr__(self, "loaded", tokenizer)

    def tokenizer(self):
        return self.loaded

    def generation_config(self):
        return OwnGenerationConfig()


def make_teacher(tekken, family):
    template = trl_templates()[family]
    fast = PreTrainedTokenizerFast(tokenizer_object=tekken, eos_token=FAMILIES[family])
    fast.add_tokens(list(dict.fromkeys(TAG.findall(template))))
    fast.chat_template = template
    return TeacherTokenizer(Loaded(fast), OF_TEMPLATE.get(family, {}))


@pytest.mark.parametrize("family", FAMILIES)
def test_our_tokens_are_those_of_the_templates_own_text(tekken, family):
    teacher = make_teacher(tekken, family)
    asked = {"role": "user", "content": "What is 2+3?\n"}
    turn = {"role": "assistant", "content": ANSWER, "reasoning_content": REASONING}
    renderer = TraceRenderer(teacher, 10**6, 10**6, RowColumns())
    trace = renderer({"messages": [asked, turn]})
    own = renderer.template_rendering({"messages": [asked, turn]})
    text = teacher.decode(trace.token_ids)
    ends_turn = teacher.layout().end
    assert text.removesuffix(ends_turn) == own[: len(text) - len(ends_turn)]
    prompt = teacher.decode(trace.token_ids[: trace.num_prompt])
    if prompt.endswith("<think>\n"):  # the line break is the prompt's, and joins no later text
        whole = teacher.encode(prompt) + teacher.encode(text.removeprefix(prompt))
    else:
        whole = teacher.encode(text)
    assert list(trace.token_ids) == whole
    start, end = trace.bounds
    thought = teacher.decode(trace.token_ids[start:end])
    assert "2 plus 3\n\n\nmakes 5: né, 日本 😀." in thought
    assert "It is" not in thought
    assert len(whole) < len(text.encode()) // 2  # merges, not bytes
