"""Real chat templates: our tokens are those of the template's own rendering, family by family.

The templates come with the package trl and were written by nobody here. The truth is what
transformers makes of the same messages, with the reasoning under the name that the family uses.
"""

import re
from pathlib import Path

import pytest
from families import make_teacher, trl_templates

from teacher_cache.engines import EngineError
from teacher_cache.sources import BadRow, PromptRenderer, RowColumns, TraceRenderer
from teacher_cache.sources.turn_layout import GivenMarks, Prompt

TEMPLATES = trl_templates()
IM_END = "<|im_end|>"
THINKING_ON = {"enable_thinking": True}
# template -> (name of the reasoning, end token, template arguments)
FAMILIES = {
    "diffusion_gemma": ("reasoning_content", "<turn|>", THINKING_ON),
    "gemma4_v5": ("reasoning_content", "<turn|>", THINKING_ON),
    "glm4moe": ("reasoning_content", "<|user|>", {}),
    "gptoss": ("thinking", "<|return|>", {"today": "2026-01-02"}),
    "lfm2_2_5": ("thinking", IM_END, {}),
    "lfm2_2_5_v2": ("reasoning_content", IM_END, {}),
    "lfm2_2_5_vl": ("reasoning_content", IM_END, {}),
    "muse_glimmer": ("reasoning_content", "<|eot|>", {"today": "2026-01-02"}),
    "nemotron_3_5_lightning": ("reasoning_content", IM_END, {}),
    "nemotron_3_nano": ("reasoning_content", IM_END, {}),
    "nemotron_3_super": ("reasoning_content", IM_END, {}),
    "nemotron_3_ultra": ("reasoning_content", IM_END, {}),
    "qwen3": ("reasoning_content", IM_END, {}),
    "qwen3_5_nothink": ("reasoning_content", IM_END, THINKING_ON),
    "qwen3_5_think": ("reasoning_content", IM_END, {}),
    "qwen3_6": ("reasoning_content", IM_END, {}),
    "qwen3_8": ("reasoning_content", IM_END, {}),
}
# Templates that drop the reasoning of an answer: nothing says what stands around it.
STRIPPING = ("deepseek_r1_distill", "deepseekv3")
REASONING, ANSWER = "2 plus 3\n\nmakes 5.", "It is\n5."
SYSTEM = {"role": "system", "content": "Be brief."}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds.",
            "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
        },
    }
]


def user(content):
    return {"role": "user", "content": content}


def answer(name="reasoning_content", reasoning=REASONING, content=ANSWER):
    return {"role": "assistant", "content": content, name: reasoning}


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    made = {}

    def of(family, **more):
        key = (family, *sorted(more.items()))
        if key not in made:
            end, arguments = FAMILIES[family][1:] if family in FAMILIES else (IM_END, {})
            made[key] = make_teacher(
                tmp_path_factory.mktemp(family), TEMPLATES[family], end, **{**arguments, **more}
            )
        return made[key]

    return of


def render(teacher, row, **columns):
    return TraceRenderer(teacher, 10**6, 10**6, RowColumns(**columns))(row)


def parts(teacher, trace):
    """Prompt, chain of thought and answer, as text."""
    start, end = trace.bounds
    ids = trace.token_ids
    return [teacher.decode(ids[:start]), teacher.decode(ids[start:end]), teacher.decode(ids[end:])]


def own_text(teacher, family, messages, **more):
    """The template's own rendering up to the end of the turn, without our code."""
    _, end, arguments = FAMILIES[family]
    arguments = {name: v for name, v in arguments.items() if name != "today"} | more
    text = teacher._tokenizer.apply_chat_template(
        messages, tokenize=False, strftime_now=lambda _: "2026-01-02", **arguments
    )
    return text[: text.rfind(end) + len(end)] if text.rstrip().endswith(end) else text + end


CONVERSATIONS = {
    "one turn": [user("2+3?")],
    "a system prompt": [SYSTEM, user("2+3?")],
    "several turns": [user("1?"), answer(reasoning="Hm.", content="1."), user("2+3?")],
    "several turns without reasoning": [
        SYSTEM,
        user("1?"),
        {"role": "assistant", "content": "1."},
        user("2+3?"),
    ],
    "marks in the question": [user("What do <think>, </think>, [THINK] and <|channel> mean?")],
}


@pytest.mark.parametrize("case", CONVERSATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_trace_is_the_templates_own_rendering(teachers, family, case):
    teacher, name = teachers(family), FAMILIES[family][0]
    messages = [*CONVERSATIONS[case], answer()]
    trace = render(teacher, {"messages": messages})
    named = [
        {name if key == "reasoning_content" else key: value for key, value in turn.items()}
        for turn in messages
    ]
    assert teacher.decode(trace.token_ids) == own_text(teacher, family, named)
    _, thought, rest = parts(teacher, trace)
    assert thought.strip().removeprefix(teacher.layout().marks.open).strip().startswith("2 plus 3")
    assert "It is" not in thought
    assert "makes 5." not in rest
    assert rest.endswith(FAMILIES[family][1])


@pytest.mark.parametrize("given", ["reasoning", "thinking", "parts", "inline", "OpenThoughts"])
@pytest.mark.parametrize("family", FAMILIES)
def test_however_a_row_holds_the_reasoning_the_tokens_are_the_same(teachers, family, given):
    teacher = teachers(family)
    inline = f"<think>\n{REASONING}\n</think>\n\n{ANSWER}"
    turn = {
        "reasoning": answer("reasoning"),
        "thinking": answer("thinking"),
        "parts": {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": REASONING},
                {"type": "text", "text": ANSWER},
            ],
        },
        "inline": {"role": "assistant", "content": inline},
        "OpenThoughts": {
            "role": "assistant",
            "content": f"<|begin_of_thought|>\n\n{REASONING}\n\n<|end_of_thought|>\n\n"
            f"<|begin_of_solution|>\n\n{ANSWER}\n\n<|end_of_solution|>",
        },
    }[given]
    expected = render(teacher, {"messages": [user("2+3?"), answer()]})
    trace = render(teacher, {"messages": [user("2+3?"), turn]})
    assert teacher.decode(trace.token_ids) == teacher.decode(expected.token_ids)
    assert trace.bounds == expected.bounds


# After a tool's result its generation prompt opens no turn, its finished turns begin with one:
# what the teacher sees is the generation prompt.
@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"diffusion_gemma"}))
def test_tools_and_their_calls_are_rendered_as_the_template_does(teachers, family):
    teacher, name = teachers(family), FAMILIES[family][0]
    call = {"type": "function", "id": "c1", "function": {"name": "add", "arguments": '{"a": 2}'}}
    called = {"role": "assistant", "content": "", "tool_calls": [call]}
    result = {"role": "tool", "content": "5", "name": "add", "tool_call_id": "c1"}
    messages = [user("2+3?"), called, result, answer()]
    trace = render(teacher, {"messages": messages, "tools": TOOLS})
    parsed = {**call, "function": {"name": "add", "arguments": {"a": 2}}}
    named = [messages[0], {**called, "tool_calls": [parsed]}, result, answer(name)]
    text = teacher.decode(trace.token_ids)
    assert text == own_text(teacher, family, named, tools=TOOLS)
    assert "add" in text.partition("2+3?")[2]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_last_turn_that_calls_a_tool_is_a_trace(teachers, family):
    teacher, name = teachers(family), FAMILIES[family][0]
    call = {"type": "function", "id": "c1", "function": {"name": "add", "arguments": {"a": 2}}}
    turn = {**answer(content=""), "tool_calls": [call]}
    trace = render(teacher, {"messages": [user("2+3?"), turn], "tools": TOOLS})
    named = {**answer(name, content=""), "tool_calls": [call]}
    text = teacher.decode(trace.token_ids)
    own = own_text(teacher, family, [user("2+3?"), named], tools=TOOLS)
    assert own.startswith(text.removesuffix(FAMILIES[family][1]))
    assert "add" in parts(teacher, trace)[2]
    assert "makes 5." in parts(teacher, trace)[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_turn_without_reasoning_is_the_templates_own_or_refused(teachers, family):
    teacher = teachers(family)
    messages = [user("2+3?"), {"role": "assistant", "content": ANSWER}]
    try:
        trace = render(teacher, {"messages": messages})
    except BadRow as error:
        assert error.reason == "empty-chain-of-thought"
        assert teacher.layout().prompt is Prompt.OPENS
        return
    assert teacher.decode(trace.token_ids) == own_text(teacher, family, messages)
    assert parts(teacher, trace)[2].strip().endswith(f"{ANSWER}{FAMILIES[family][1]}")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cut_chain_of_thought_ends_where_it_was_cut(teachers, family):
    teacher = teachers(family)
    whole = render(teacher, {"messages": [user("2+3?"), answer()]})
    for turn in (answer(content=""), {"role": "assistant", "content": f"<think>\n{REASONING}"}):
        trace = render(teacher, {"messages": [user("2+3?"), turn]})
        text = teacher.decode(trace.token_ids)
        assert text.endswith(REASONING)
        assert teacher.decode(whole.token_ids).startswith(text)
        assert (trace.finish_reason, trace.bounds[1]) == ("length", len(trace.token_ids))
    cut = {"messages": [user("2+3?"), answer()], "finish_reason": "length"}
    assert teacher.decode(render(teacher, cut).token_ids).endswith(ANSWER)


@pytest.mark.parametrize("family", [f for f in FAMILIES if "enable_thinking" in TEMPLATES[f]])
def test_where_thinking_is_off_a_chain_of_thought_is_refused(teachers, family):
    teacher = teachers(family, enable_thinking=False)
    rows = [[user("2+3?"), answer()], [user("2+3?"), {"role": "assistant", "content": ANSWER}]]
    if teacher.layout().prompt is Prompt.CLOSES:
        with pytest.raises(BadRow, match=r"the row has one \(--template-arg enable_thinking=true"):
            render(teacher, {"messages": rows[0]})
    trace = render(teacher, {"messages": rows[1]})
    assert trace.bounds == (trace.num_prompt, trace.num_prompt)
    assert teacher.decode(trace.token_ids).endswith(f"{ANSWER}{FAMILIES[family][1]}")


@pytest.mark.parametrize("family", ["qwen3", "glm4moe", "qwen3_5_think", "nemotron_3_nano"])
def test_a_rows_own_template_arguments_are_honoured(teachers, family):
    teacher = teachers(family)
    row = {"messages": [user("2+3?"), {"role": "assistant", "content": ANSWER}]}
    off = teachers(family, enable_thinking=False)
    for value in ({"enable_thinking": False}, '{"enable_thinking": false}'):
        trace = render(teacher, row | {"chat_template_kwargs": value})
        assert trace.token_ids == render(off, row).token_ids
        assert "chat_template_kwargs" not in trace.fields
    with pytest.raises(BadRow, match=r"does not read it.*did you mean 'enable_thinking'"):
        render(teacher, row | {"chat_template_kwargs": {"enable_thinkng": False}})


@pytest.mark.parametrize("family", STRIPPING)
def test_where_nothing_says_the_joint_the_user_is_asked(tmp_path, family):
    end = "<｜end▁of▁sentence｜>"
    teacher = make_teacher(tmp_path, TEMPLATES[family], end)
    row = {"messages": [user("2+3?"), answer()]}
    with pytest.raises(BadRow, match="--think-open and --think-close") as caught:
        render(teacher, row)
    assert caught.value.reason == "marks-unknown"
    inline = {"role": "assistant", "content": f"<think>\n{REASONING}\n</think>\n\n{ANSWER}"}
    trace = render(teacher, {"messages": [user("2+3?"), inline]})  # says so itself
    text = f"<｜User｜>2+3?<｜Assistant｜><think>\n{REASONING}\n</think>\n\n{ANSWER}{end}"
    assert teacher.decode(trace.token_ids).endswith(text)
    assert parts(teacher, trace)[1] == f"<think>\n{REASONING}\n</think>"
    told = make_teacher(
        tmp_path, TEMPLATES[family], end, marks=GivenMarks("<think>\n", "\n</think>\n\n")
    )
    assert render(told, row).token_ids == trace.token_ids


def test_a_mark_that_the_teacher_does_not_know_is_never_written(teachers):
    teacher = teachers("llama3")
    with pytest.raises(BadRow, match="nothing shows how the teacher marks one"):
        render(teacher, {"messages": [user("2+3?"), answer()]})
    plain = render(teacher, {"messages": [user("2+3?"), {"role": "assistant", "content": ANSWER}]})
    assert plain.bounds == (plain.num_prompt, plain.num_prompt)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_5_think", "gptoss", "gemma4_v5"])
def test_marks_of_other_turns_open_nothing(teachers, family):
    """A question about a mark, or a mark in an earlier answer, must not move a section."""
    teacher = teachers(family)
    marks = teacher.layout().marks
    asked = user(f"What is {marks.open} for?")
    for messages in ([asked], [{"role": "system", "content": f"Write {marks.open}."}, user("a")]):
        plain = [user("x") if turn["role"] == "user" else SYSTEM for turn in messages]
        prompt = PromptRenderer(teacher, 10**6, 10**6, RowColumns())({"messages": messages})
        without = PromptRenderer(teacher, 10**6, 10**6, RowColumns())({"messages": plain})
        assert (prompt.opened_at is None) == (without.opened_at is None)
        if prompt.opened_at is not None:
            num_behind = len(without.token_ids) - without.opened_at
            assert len(prompt.token_ids) - prompt.opened_at == num_behind
        trace = render(teacher, {"messages": [*messages, answer()]})
        assert parts(teacher, trace)[1].count(marks.open) == 1


def test_channels_in_messages_of_their_own_are_one_turn(teachers):
    teacher = teachers("gptoss")
    expected = render(teacher, {"messages": [user("2+3?"), answer()]})
    channels = [
        {"role": "assistant", "channel": "analysis", "content": REASONING},
        {"role": "assistant", "channel": "final", "content": ANSWER},
    ]
    assert render(teacher, {"messages": [user("2+3?"), *channels]}).token_ids == expected.token_ids
    two = [{"role": "assistant", "content": "5"}, {"role": "assistant", "content": "6"}]
    for later in ([], [user("why?"), answer()]):
        with pytest.raises(BadRow, match="more than one answers"):
            render(teacher, {"messages": [user("2+3?"), *two, *later]})
    later = [user("why?"), answer()]
    earlier = render(teacher, {"messages": [user("2+3?"), *channels, *later]})
    whole = [user("2+3?"), answer(), *later]
    assert earlier.token_ids == render(teacher, {"messages": whole}).token_ids


@pytest.mark.parametrize("family", ["qwen3", "glm4moe", "qwen3_5_think"])
def test_an_empty_thought_is_accepted_and_one_after_it_is_not(teachers, family):
    teacher = teachers(family)
    expected = render(teacher, {"messages": [user("a"), {"role": "assistant", "content": ANSWER}]})
    empty = {"role": "assistant", "content": f"<think>\n\n</think>\n\n{ANSWER}"}
    assert render(teacher, {"messages": [user("a"), empty]}).token_ids == expected.token_ids
    second = {"role": "assistant", "content": "<think>\n\n</think>\n\n<think>\nb\n</think>\n\nc"}
    with pytest.raises(BadRow, match="follows an empty one"):
        render(teacher, {"messages": [user("a"), second]})


def test_an_argument_that_the_template_does_not_read_is_refused(tmp_path):
    with pytest.raises(EngineError, match="did you mean 'enable_thinking'"):
        make_teacher(tmp_path, TEMPLATES["qwen3"], IM_END, enable_thnking=True)


EXPECTED_LAYOUTS = {
    "gemma4": ("<|channel>thought\n", "\n<channel|>", "<turn|>"),  # shown where a tool is called
    "glm4moe": ("\n<think>", "</think>\n", "<|user|>"),
    "gptoss": (
        "<|channel|>analysis<|message|>",
        "<|end|><|start|>assistant<|channel|>final<|message|>",
        "<|return|>",
    ),
    "lfm2_2_5": ("<think>", "</think>", IM_END),
    "muse_glimmer": (
        " to=self<|message|>",
        "<|eom|><|start|>assistant to=user<|message|>",
        "<|eot|>",
    ),
    "nemotron_3_nano": ("<think>\n", "\n</think>\n", IM_END),
    "nemotron_3_ultra": ("<think>\n", "</think>", IM_END),
    "qwen3": ("<think>\n", "\n</think>\n\n", IM_END),
    "qwen3_5_nothink": ("<think>\n", "\n</think>\n\n", IM_END),
    "deepseek_r1_distill": ("<think>\n", None, "<｜end▁of▁sentence｜>"),
    "qwen2_5": (None, None, IM_END),
}


@pytest.mark.parametrize("family", EXPECTED_LAYOUTS)
def test_layouts_are_read_off_the_template(tmp_path, family):
    opener, joint, end = EXPECTED_LAYOUTS[family]
    arguments = FAMILIES[family][2] if family in FAMILIES else {}
    layout = make_teacher(tmp_path, TEMPLATES[family], end, **arguments).layout()
    assert (layout.opener, layout.joint, layout.end) == (opener, joint, end)


def guide_rows():
    """Template -> cells of the guide's table of families, as Python writes the texts."""
    guide = Path(__file__).parent.parent / "teacher_cache" / "sources" / "FAMILIES.md"
    rows = {}
    for line in guide.read_text().splitlines():
        if line.startswith("| ") and " (trl) |" in line:
            name, *cells = re.split(r"(?<!\\) ?\| ", line[2:])
            rows[name.removesuffix(" (trl)")] = [cell.replace("\\|", "|") for cell in cells]
    return rows


def test_the_guide_says_what_is_read_off_the_templates(teachers):
    rows = guide_rows()
    assert rows.keys() >= FAMILIES.keys() | set(STRIPPING)
    for family in FAMILIES:
        layout = teachers(family).layout()
        shown = [f"`{text!r}`".replace("'", "") for text in (layout.opener, layout.joint)]
        assert rows[family][:2] == shown
        num_same, num_cases = map(int, rows[family][5].split(" of "))
        assert num_cases - num_same <= 1  # a prompt that opens a thought, and a row without one


# Kinds of templates beyond those of trl, in the fewest words.
TAGS_FROM_PARTS = (
    "{% set k = ':x' %}{% if again %}{% set add_generation_prompt = false %}{% endif %}"
    "{% if not effort is defined %}{% set effort = 'none' %}{% endif %}"
    "{% for m in messages %}{{ '<|' ~ m.role ~ '|>' }}"
    "{% if m.role == 'assistant' %}{{ '<think{}>'.format(k) ~ (m.reasoning_content or '') }}"
    "{{ '</think{}>'.format(k) }}{% endif %}{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' ~ '<think{}>'.format(k) }}"
    "{% if effort not in ['low', 'high'] %}{{ '</think{}>'.format(k) }}{% endif %}{% endif %}"
)
MARKED_ANSWER = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}<|answer|>{% endif %}"
    "{{ m.content }}<|end|>{% endfor %}<|assistant|>"
    "{% if not enable_thinking %}<|START_THINKING|><|END_THINKING|>{% endif %}"
)
COMPLETION = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
SHORT_PROMPT = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}<think>\n"
    "{{ m.reasoning_content }}\n</think>\n{% endif %}{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>{% endif %}"
)


def test_tags_made_from_parts_and_a_default_of_the_templates_own(tmp_path):
    """As Hunyuan 3 does, which thinks only if asked to."""
    teacher = make_teacher(tmp_path, TAGS_FROM_PARTS, "<|end|>")
    layout = teacher.layout()
    assert (layout.opener, layout.joint) == ("<think:x>", "</think:x>")
    assert layout.prompt is Prompt.CLOSES
    row = {"messages": [user("2+3?"), answer()]}
    with pytest.raises(BadRow, match=r"closes the chain of thought.*--template-arg effort=low"):
        render(teacher, row)
    high = make_teacher(tmp_path, TAGS_FROM_PARTS, "<|end|>", effort="high")
    text = high.decode(render(high, row).token_ids)
    assert text == f"<|user|>2+3?<|end|><|assistant|><think:x>{REASONING}</think:x>{ANSWER}<|end|>"


def test_a_mark_before_every_answer_is_written_after_a_closed_thought(tmp_path):
    """As Command R7B does, whose template always opens the assistant's turn."""
    teacher = make_teacher(tmp_path, MARKED_ANSWER, "<|end|>")
    assert teacher.layout().prompt is Prompt.CLOSES
    trace = render(teacher, {"messages": [user("a"), {"role": "assistant", "content": ANSWER}]})
    end = "<|assistant|><|START_THINKING|><|END_THINKING|><|answer|>" + ANSWER + "<|end|>"
    assert teacher.decode(trace.token_ids).endswith(end)


def test_a_cut_thought_has_the_line_break_that_the_prompt_left_out(tmp_path):
    """As Laguna XS does."""
    teacher = make_teacher(tmp_path, SHORT_PROMPT, "<|end|>")
    trace = render(teacher, {"messages": [user("a"), answer(content="")]})
    assert teacher.decode(trace.token_ids).endswith(f"<|assistant|><think>\n{REASONING}")


def test_a_second_begin_token_is_refused_wherever_it_came_from(tmp_path):
    teacher = make_teacher(tmp_path, COMPLETION, IM_END)
    renderer = PromptRenderer(teacher, 100, 10**6, RowColumns())
    begin = teacher.begin_id
    assert renderer({"messages": [user("a")]}).token_ids == (begin, *teacher.encode("a"))
    assert renderer({"prompt": "<bos>a"}).token_ids[0] == begin
    for row in ({"messages": [user("<bos>a")]}, {"prompt": "<bos><bos>a"}):
        with pytest.raises(BadRow, match="begins with <bos> twice"):
            renderer(row)


def test_what_switches_thinking_is_found(teachers):
    off = "enable_thinking=false: the generation prompt closes it: thinking is off"
    assert off in teachers("qwen3").layout().switches
    assert teachers("gptoss").layout().switches == ()
