"""Whatever the shape of a row, the same conversation becomes the same tokens."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_teachers import TEMPLATES, make_byte_teacher, rendered, says

from teacher_cache.engines import EngineError
from teacher_cache.sources import BadRow, PromptRenderer, RowColumns, TraceRenderer, find_sections
from teacher_cache.sources.turn_layout import GivenMarks


@pytest.fixture(scope="module", params=TEMPLATES)
def teacher(request, tmp_path_factory):
    return make_byte_teacher(tmp_path_factory.mktemp("teacher"), TEMPLATES[request.param])


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return make_byte_teacher(tmp_path_factory.mktemp("plain"), TEMPLATES["plain"])


@pytest.fixture(scope="module")
def opening(tmp_path_factory):
    return make_byte_teacher(tmp_path_factory.mktemp("opening"), TEMPLATES["opening"])


@pytest.fixture(scope="module")
def stripping(tmp_path_factory):
    return make_byte_teacher(tmp_path_factory.mktemp("stripping"), TEMPLATES["stripping"])


def render(teacher, row, **layout):
    return TraceRenderer(teacher, 1000, 260, RowColumns(**layout))(row)


def render_prompt(teacher, row, **layout):
    return PromptRenderer(teacher, 1000, 260, RowColumns(**layout))(row)


def sections(teacher, trace):
    start, end = trace.bounds
    ids = trace.token_ids
    return [teacher.decode(part) for part in (ids[:start], ids[start:end], ids[end:])]


SYSTEM, QUESTION, REASONING, ANSWER = "Be brief.", "2 + 3?", "Two and\n\nthree.", "It is\n5."
INLINE = f"<think>\n{REASONING}\n</think>\n\n{ANSWER}"
OPEN_THOUGHTS = (
    f"<|begin_of_thought|>\n\n{REASONING}\n\n<|end_of_thought|>\n\n"
    f"<|begin_of_solution|>\n\n{ANSWER}\n\n<|end_of_solution|>"
)
ASKED = [says("system", SYSTEM), says("user", QUESTION)]
SENT = [{"from": "system", "value": SYSTEM}, {"from": "human", "value": QUESTION}]
PARTS = [{"type": "thinking", "thinking": REASONING}, {"type": "text", "text": ANSWER}]
SHAPES = {
    "marks inside": ({"messages": [*ASKED, says("assistant", INLINE)]}, {}),
    "reasoning_content": (
        {"messages": [*ASKED, says("assistant", ANSWER, reasoning_content=REASONING)]},
        {},
    ),
    "reasoning": ({"messages": [*ASKED, says("assistant", ANSWER, reasoning=REASONING)]}, {}),
    "thinking": (
        {"messages": [*ASKED, says("assistant", f"\n\n{ANSWER}", thinking=f"\n{REASONING}\n")]},
        {},
    ),
    "content in parts": ({"messages": [*ASKED, says("assistant", PARTS)]}, {}),
    "nulls of a table": (
        {
            "messages": [
                {**turn, "reasoning_content": None, "tool_calls": None}
                for turn in [*ASKED, says("assistant", INLINE)]
            ],
            "conversations": None,
        },
        {},
    ),
    "ShareGPT": ({"conversations": [*SENT, {"from": "gpt", "value": INLINE}]}, {}),
    "ShareGPT, system apart": (
        {"system": SYSTEM, "conversations": [SENT[1], {"from": "assistant", "value": INLINE}]},
        {},
    ),
    "OpenThoughts": ({"conversations": [*SENT, {"from": "gpt", "value": OPEN_THOUGHTS}]}, {}),
    "JSON in a string": (
        {"messages": json.dumps([*ASKED, says("assistant", OPEN_THOUGHTS)])},
        {},
    ),
    "prompt of messages, response": ({"prompt": ASKED, "response": INLINE}, {}),
    "TRL": ({"prompt": ASKED, "completion": [says("assistant", INLINE)]}, {}),
    "text, template applied": (
        {"system": SYSTEM, "prompt": QUESTION, "response": INLINE},
        {"apply_chat_template": True},
    ),
    "three columns": (
        {"system": SYSTEM, "prompt": QUESTION, "reasoning": REASONING, "response": ANSWER},
        {"apply_chat_template": True},
    ),
    "named columns": (
        {
            "system": SYSTEM, "messages": [], "question": QUESTION,
            "trajectory": REASONING, "attempt": ANSWER,
        },
        {
            "apply_chat_template": True, "prompt_field": "question",
            "response_field": "attempt", "reasoning_field": "trajectory",
        },
    ),
    "named conversation": (
        {"dialogue": [*SENT, {"from": "model", "value": OPEN_THOUGHTS}]},
        {"prompt_field": "dialogue"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_a_conversation_becomes_the_same_tokens(teacher, shape):
    row, layout = SHAPES[shape]
    trace = render(teacher, row, **layout)
    prompt = rendered(teacher, ASKED)
    text = prompt.removesuffix("<think>\n") + INLINE + "<|end|>"
    assert teacher.decode(trace.token_ids) == text
    assert trace.token_ids == tuple(teacher.encode(text))
    assert teacher.decode(trace.token_ids[: trace.num_prompt]) == prompt
    assert sections(teacher, trace)[1:] == [
        f"<think>\n{REASONING}\n</think>", f"\n\n{ANSWER}<|end|>"
    ]  # fmt: skip
    opened_at = trace.bounds[0] if trace.bounds[0] < trace.num_prompt else None
    assert trace.bounds == find_sections(
        trace.token_ids, trace.num_prompt, opened_at, teacher.layout().marks, teacher
    )
    assert trace.finish_reason is None
    ready = {
        "token_ids": list(trace.token_ids),
        "cot_start": trace.bounds[0],
        "answer_start": trace.bounds[1],
    }
    again = render(teacher, ready)
    assert (again.token_ids, again.bounds) == (trace.token_ids, trace.bounds)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_prompt_of_every_shape_can_be_answered_anew(teacher, shape):
    row, layout = SHAPES[shape]
    prompt_layout = {
        name: layout[name] for name in layout.keys() & {"apply_chat_template", "prompt_field"}
    }
    trace = render_prompt(teacher, row, **prompt_layout)
    assert teacher.decode(trace.token_ids) == rendered(teacher, ASKED)


EARLIER = {
    "marks inside": says("assistant", INLINE),
    "apart": says("assistant", ANSWER, reasoning_content=REASONING),
    "OpenThoughts": says("assistant", OPEN_THOUGHTS),
}


@pytest.mark.parametrize("earlier", EARLIER)
@pytest.mark.parametrize("template", ["opening", "stripping"])
def test_a_template_that_strips_earlier_thinking_does_so_in_every_shape(
    tmp_path, template, earlier
):
    teacher = make_byte_teacher(tmp_path, TEMPLATES[template])
    turns = [says("user", "1?"), EARLIER[earlier], says("user", QUESTION)]
    trace = render(teacher, {"messages": [*turns, says("assistant", INLINE)]})
    turns[1] = says("assistant", ANSWER)
    assert teacher.decode(trace.token_ids[: trace.num_prompt]) == rendered(teacher, turns)
    assert sections(teacher, trace)[1] == f"<think>\n{REASONING}\n</think>"


def test_marks_of_a_data_set_stay_where_the_teacher_writes_them_itself(tmp_path):
    marks = GivenMarks("<|begin_of_thought|>\n\n", "\n\n<|end_of_thought|>\n\n")
    teacher = make_byte_teacher(tmp_path, TEMPLATES["plain"], marks)
    row = {"conversations": [*SENT, {"from": "gpt", "value": OPEN_THOUGHTS}]}
    assert teacher.decode(render(teacher, row).token_ids).endswith(f"{OPEN_THOUGHTS}<|end|>")
    row = {"conversations": [*SENT, {"from": "gpt", "value": INLINE}]}
    assert sections(teacher, render(teacher, row))[1] == (
        f"<|begin_of_thought|>\n\n{REASONING}\n\n<|end_of_thought|>"
    )


def test_system_prompts_can_be_left_out_wherever_they_stand(plain):
    expected = "<|start|>user\n2 + 3?<|end|>\n<|start|>assistant\n"
    for row in (
        {"messages": ASKED},
        {"system": SYSTEM, "conversations": [SENT[1]]},
    ):
        trace = render_prompt(plain, row, drop_system=True)
        assert plain.decode(trace.token_ids) == expected


def test_two_system_prompts_that_differ_are_refused(plain):
    row = {"system": "Be long.", "messages": ASKED}
    with pytest.raises(BadRow, match="`system` column and a system message differ"):
        render_prompt(plain, row)
    assert render_prompt(plain, row | {"system": SYSTEM}).token_ids


CUT = {
    "no closing mark": {"prompt": ASKED, "response": f"<think>\n{REASONING}"},
    "a data set's marks": {"prompt": ASKED, "response": f"<|begin_of_thought|>\n\n{REASONING}"},
    "reasoning without an answer": {"prompt": ASKED, "response": "", "reasoning": REASONING},
}


@pytest.mark.parametrize("case", CUT)
def test_a_cut_chain_of_thought_is_kept_flagged_and_has_no_end(teacher, case):
    trace = render(teacher, CUT[case])
    assert sections(teacher, trace)[1:] == [f"<think>\n{REASONING}", ""]
    assert trace.finish_reason == "length"
    ready = {
        "token_ids": list(trace.token_ids),
        "cot_start": trace.bounds[0],
        "answer_start": len(trace.token_ids),
    }
    assert render(teacher, ready).finish_reason == "length"


def test_a_column_says_that_an_answer_was_cut(plain):
    row = {"prompt": ASKED, "response": INLINE, "finish_reason": "length"}
    trace = render(plain, row)
    assert trace.finish_reason == "length"
    assert plain.decode(trace.token_ids).endswith(ANSWER)
    assert dict(trace.fields) == {"finish_reason": "length"}
    whole = render(plain, row | {"finish_reason": "stop"})
    assert whole.finish_reason is None
    assert plain.decode(whole.token_ids).endswith("<|end|>")


def test_a_solution_without_its_closing_mark_was_cut(plain):
    row = {"prompt": ASKED, "response": OPEN_THOUGHTS.removesuffix("\n\n<|end_of_solution|>")}
    trace = render(plain, row)
    assert trace.finish_reason == "length"
    assert sections(plain, trace)[2] == f"\n\n{ANSWER}"


def test_a_chain_of_thought_that_ends_the_trace_was_not_cut(plain):
    trace = render(plain, {"prompt": ASKED, "response": f"<think>{REASONING}</think>"})
    assert (trace.finish_reason, sections(plain, trace)[2]) == (None, "\n\n<|end|>")
    *ids, _ = trace.token_ids
    ready = {"token_ids": ids, "cot_start": trace.bounds[0], "answer_start": len(ids)}
    assert render(plain, ready).finish_reason is None


def test_an_end_that_the_text_has_already_is_not_written_twice(plain):
    trace = render(plain, {"prompt": ASKED, "response": f"{INLINE}<|end|>"})
    assert sections(plain, trace)[2] == f"\n\n{ANSWER}<|end|>"


def test_raw_output_after_an_opened_chain_of_thought_is_taken_as_it_is(opening):
    trace = render(opening, {"prompt": ASKED, "response": INLINE.removeprefix("<think>\n")})
    assert sections(opening, trace)[1] == f"<think>\n{REASONING}\n</think>"


def test_a_response_without_thinking_has_no_chain_of_thought(plain, opening):
    row = {"messages": [*ASKED, says("assistant", ANSWER, reasoning_content="")]}
    trace = render(plain, row)
    assert sections(plain, trace)[1:] == ["", f"{ANSWER}<|end|>"]
    with pytest.raises(
        BadRow, match="opens a chain of thought with <think>, but the row's is empty"
    ):
        render(opening, row)
    row["messages"][-1]["content"] = INLINE
    assert sections(opening, render(opening, row))[1] == f"<think>\n{REASONING}\n</think>"


def test_a_reasoning_column_that_is_a_switch_is_the_users_own(plain):
    row = {"prompt": ASKED, "response": INLINE, "reasoning": "on"}
    trace = render(plain, row)
    assert dict(trace.fields) == {"reasoning": "on"}
    assert sections(plain, trace)[1] == f"<think>\n{REASONING}\n</think>"


def test_reasoning_given_twice_is_refused(plain):
    with pytest.raises(BadRow, match="given twice"):
        render(plain, {"prompt": ASKED, "response": INLINE, "reasoning": REASONING})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 300) | st.text("a<>/|\n ", max_size=5)
    | st.sampled_from([INLINE, OPEN_THOUGHTS, "<think>", "</think>", "user", "gpt", "assistant"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(
        st.sampled_from(["role", "from", "content", "value", "type", "text", "thinking"]), inner
    ),
    max_leaves=12,
)  # fmt: skip
COLUMNS = [
    "id", "messages", "conversations", "prompt", "response", "reasoning_content", "thinking",
    "system", "tools", "token_ids", "cot_start", "answer_start", "finish_reason", "other",
]  # fmt: skip
TURN = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool"]), "content": JSON},
    optional={"reasoning_content": JSON, "tool_calls": JSON},
)


@pytest.mark.slow
@settings(deadline=None, max_examples=100)
@given(
    row=st.dictionaries(st.sampled_from(COLUMNS), JSON)
    | st.fixed_dictionaries({"messages": st.lists(TURN), "system": JSON, "tools": JSON}),
    apply_chat_template=st.booleans(),
)
def test_a_row_of_any_content_is_rendered_or_refused_with_a_reason(
    stripping, row, apply_chat_template
):
    layout = RowColumns(apply_chat_template=apply_chat_template, prompt_turns="assistant")
    for renderer in (PromptRenderer, TraceRenderer):
        try:
            trace = renderer(stripping, 400, 260, layout)(row)
        except BadRow:
            continue
        assert trace.token_ids
        if trace.bounds is not None:
            assert 0 <= trace.bounds[0] <= trace.bounds[1] <= len(trace.token_ids)
        assert all(0 <= start < end <= trace.num_prompt for start, end in trace.without_rows)


def test_token_ids_that_are_null_or_beside_a_named_prompt_are_not_taken(plain):
    row = {"question": ASKED, "response": INLINE, "token_ids": [1, 2]}
    expected = render(plain, {"prompt": ASKED, "response": INLINE}).token_ids
    assert render(plain, row, prompt_field="question").token_ids == expected
    row = {"prompt": ASKED, "response": INLINE, "token_ids": None}
    assert render(plain, row).token_ids == expected


def test_tools_reach_the_chat_template(tmp_path):
    template = "{% if tools %}tools: {{ tools[0].name }}\n{% endif %}" + TEMPLATES["plain"]
    teacher = make_byte_teacher(tmp_path, template)
    tools = [{"name": "add"}]
    for value in (tools, json.dumps(tools)):
        trace = render_prompt(teacher, {"messages": ASKED, "tools": value})
        assert teacher.decode(trace.token_ids).startswith("tools: add\n<|start|>system")
        assert "tools" not in trace.fields


def test_a_call_without_content_is_null_for_the_template_as_openai_has_it(tmp_path):
    template = (
        "{% for m in messages %}{% if m.content is none %}call {{ m.tool_calls[0].name }};"
        "{% else %}{{ m.role }} {{ m.content }};{% endif %}{% endfor %}"
    )
    teacher = make_byte_teacher(tmp_path, template)
    for call in ({}, {"content": None}):
        turns = [says("user", "a"), {"role": "assistant", "tool_calls": [{"name": "add"}], **call}]
        trace = render_prompt(teacher, {"messages": [*turns, says("tool", "5")]})
        assert teacher.decode(trace.token_ids) == "user a;call add;tool 5;"


def test_a_template_that_asks_for_the_date_gets_a_fixed_one_or_none(tmp_path):
    """Else the prompts of a capture that goes on tomorrow are others."""
    template = "{{ strftime_now('%d %b %Y') }} " + TEMPLATES["plain"]
    teacher = make_byte_teacher(tmp_path, template, today="2026-11-25")
    assert teacher.decode(render_prompt(teacher, {"messages": ASKED}).token_ids).startswith(
        "25 Nov 2026 <|start|>"
    )
    with pytest.raises(BadRow, match=r"--template-arg today=YYYY-MM-DD") as caught:
        render_prompt(make_byte_teacher(tmp_path, template), {"messages": ASKED})
    assert caught.value.reason == "template-refuses"
    with pytest.raises(EngineError, match="expected YYYY-MM-DD, got 'soon'"):
        make_byte_teacher(tmp_path, template, today="soon")


def test_turns_of_tools_are_the_prompts(plain):
    call = {"from": "function_call", "value": "add(2, 3)"}
    result = {"from": "observation", "value": "5"}
    row = {"conversations": [*SENT, call, result, {"from": "gpt", "value": INLINE}]}
    trace = render(plain, row)
    assert plain.decode(trace.token_ids[: trace.num_prompt]).endswith(
        "<|start|>assistant\nadd(2, 3)<|end|>\n<|start|>tool\n5<|end|>\n<|start|>assistant\n"
    )
