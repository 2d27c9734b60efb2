"""Which tokens of a prompt the assistant wrote is found through any template."""

import pytest
from small_teachers import TEMPLATES, make_byte_teacher, rendered, says

from teacher_cache.sources import BadRow, PromptRenderer, RowColumns

REASONED = "<think>\nhm\n</think>\n\nfive"
CONVERSATION = [
    says("system", "Be brief."),
    says("user", "2+3?"),
    says("assistant", REASONED),
    says("user", "sure?"),
    says("assistant", "add(2, 3)"),
    says("tool", "5"),
    says("assistant", "", reasoning_content="so it is"),
    says("tool", "5"),
]


def own_texts(teacher, messages):
    """What the renderer takes for the assistant's."""
    layout = RowColumns(prompt_turns="assistant")
    trace = PromptRenderer(teacher, 1000, 260, layout)({"messages": messages})
    assert trace.token_ids == tuple(teacher.encode(rendered(teacher, messages)))
    position, texts = 0, []
    for start, end in trace.without_rows:
        texts.append(teacher.decode(trace.token_ids[position:start]))
        position = end
    assert position == len(trace.token_ids)  # the generation prompt is the template's
    return [text for text in texts if text]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("plain", [f"{REASONED}<|end|>", "add(2, 3)<|end|>", "<|end|>"]),
        ("opening", ["five<|end|>", "add(2, 3)<|end|>", "<|end|>"]),
        (
            "stripping",
            ["five<|end|>", "add(2, 3)<|end|>", "<think>\nso it is\n</think>\n\n<|end|>"],
        ),
    ],
)
def test_the_assistants_turns_are_found_with_their_ends(tmp_path, template, expected):
    teacher = make_byte_teacher(tmp_path, TEMPLATES[template])
    assert own_texts(teacher, CONVERSATION) == expected


def test_without_turns_of_the_assistant_nothing_of_the_prompt_is_kept(tmp_path):
    teacher = make_byte_teacher(tmp_path, TEMPLATES["plain"])
    assert own_texts(teacher, CONVERSATION[:2]) == []


def test_a_template_without_end_marks_ends_a_turn_where_the_next_text_begins(tmp_path):
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    teacher = make_byte_teacher(tmp_path, template)
    assert own_texts(teacher, CONVERSATION[1:4]) == [f"{REASONED}\nuser: "]


def test_a_template_that_moves_messages_is_refused_row_by_row(tmp_path):
    template = "{{ messages | map(attribute='content') | map('length') | join(' ') }}"
    teacher = make_byte_teacher(tmp_path, template)
    with pytest.raises(BadRow, match="message 2 is not found in the chat template") as caught:
        own_texts(teacher, CONVERSATION)
    assert caught.value.reason == "turns-not-found"
