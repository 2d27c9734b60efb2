"""Rows of public sets of reasoning traces, as they are: one row of each shape, one trace."""

import json

import pytest
from families import make_teacher, trl_templates

from teacher_cache.sources import Input, InputTraces, Rejects, RowColumns, TraceRenderer

Q, R, A, SYSTEM = "What is 2+3?", "2 plus 3 makes 5.", "It is 5.", "Be brief."
INLINE = f"<think>\n{R}\n</think>\n\n{A}"
USER = {"role": "user", "content": Q}
OPEN_THOUGHTS = (
    f"<|begin_of_thought|>\n\n{R}\n\n<|end_of_thought|>\n\n"
    f"<|begin_of_solution|>\n\n{A}\n\n<|end_of_solution|>"
)
ASKED = {"apply_chat_template": True}
MESSAGE = {"role": "assistant", "content": A, "reasoning_content": R}
# name -> (row, how the user lays it out)
SETS = {
    "OpenThoughts-114k": (
        {"system": None, "conversations": [
            {"from": "user", "value": Q}, {"from": "assistant", "value": OPEN_THOUGHTS}]},
        {},
    ),
    "OpenThoughts-114k, metadata": (
        {"problem": Q, "deepseek_reasoning": R, "deepseek_solution": A,
         "ground_truth_solution": None, "domain": "math", "source": "x", "test_cases": None},
        ASKED,
    ),
    "OpenThoughts3": (
        {"difficulty": 8, "source": "x", "domain": "code", "conversations": [
            {"from": "human", "value": Q}, {"from": "gpt", "value": INLINE}]},
        {},
    ),
    "OpenR1-Math-220k": (
        {"problem": Q, "solution": "5", "answer": "5", "uuid": "u", "generations": [INLINE, "x"],
         "messages": [USER, {"role": "assistant", "content": INLINE}]},
        {},
    ),
    "Mixture-of-Thoughts": (
        {"messages": [USER, {"role": "assistant", "content": INLINE}], "num_tokens": 9,
         "source": "x"},
        {},
    ),
    "s1K": (
        {"question": Q, "solution": "5", "attempt": A, "cot_type": "math",
         "thinking_trajectories": [R], "source_type": "x", "metadata": "{}"},
        ASKED,
    ),
    "s1K-1.1": (
        {"question": Q, "solution": "5", "deepseek_thinking_trajectory": R, "deepseek_attempt": A,
         "gemini_thinking_trajectory": "other", "gemini_attempt": "other"},
        ASKED,
    ),
    "AM-DeepSeek-R1-Distilled": (
        {"messages": [
            {**USER, "info": {"source": "x", "reference_answer": "5", "think_content": None}},
            {"role": "assistant", "content": f"<think>{R}</think>\n<answer>{A}</answer>",
             "info": {"think_content": R, "answer_content": A, "source": None}}]},
        {},
    ),
    "dolphin-r1": (
        {"messages": [USER], "reasoning": R, "answer": A, "model": "R1"},
        {},
    ),
    "Dolci, OLMo": (
        {"id": "d1", "dataset_source": "x", "messages": [
            {**USER, "function_calls": None, "functions": None},
            {"role": "assistant", "content": INLINE, "function_calls": None, "functions": None}]},
        {},
    ),
    "OpenRouter": (
        {"messages": [USER, {"role": "assistant", "content": A, "reasoning_details": [
            {"type": "reasoning.text", "text": R, "format": "unknown", "index": 0}]}]},
        {},
    ),
    "a vLLM server's response beside its messages": (
        {"messages": [USER], "response": {"id": "chatcmpl-1", "object": "chat.completion",
         "choices": [{"index": 0, "message": MESSAGE, "finish_reason": "stop"}]}},
        {},
    ),
    "a vLLM server's response": (
        {"messages": [USER], "id": "chatcmpl-1", "object": "chat.completion",
         "choices": [{"index": 0, "message": MESSAGE, "finish_reason": "stop"}]},
        {},
    ),
}  # fmt: skip
WITH_SYSTEM = {
    "Llama-Nemotron": (
        {"input": [USER], "output": INLINE, "system_prompt": SYSTEM, "reasoning": "on",
         "category": "math", "license": "x"},
        {},
    ),
    "SmolTalk2": (
        {"messages": [{"role": "system", "content": SYSTEM}, USER,
                      {"role": "assistant", "content": INLINE}],
         "chat_template_kwargs": {"custom_instructions": "", "enable_thinking": True,
                                  "python_tools": None, "xml_tools": None}},
        {},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return make_teacher(tmp_path_factory.mktemp("qwen3"), trl_templates()["qwen3"], "<|im_end|>")


def render(teacher, row, **columns):
    return TraceRenderer(teacher, 10**6, 10**6, RowColumns(**columns))(row)


@pytest.mark.parametrize("name", [*SETS, *WITH_SYSTEM])
def test_a_row_of_a_public_set_becomes_the_trace_that_it_means(teacher, name):
    row, columns = (SETS | WITH_SYSTEM)[name]
    trace = render(teacher, row, **columns)
    system = [{"role": "system", "content": SYSTEM}] if name in WITH_SYSTEM else []
    expected = render(teacher, {"messages": [*system, USER, MESSAGE]})
    assert teacher.decode(trace.token_ids) == teacher.decode(expected.token_ids)
    assert trace.bounds == expected.bounds
    assert trace.bounds[0] < trace.bounds[1] < len(trace.token_ids)


def read(path, teacher, rows, columns):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    renderer = TraceRenderer(teacher, 10**6, 10**6, columns)
    return list(InputTraces(Input(path), renderer, columns=columns).read(Rejects()))


def test_every_generation_of_a_row_is_a_trace_with_its_own_verdict(tmp_path, teacher):
    row = {
        "id": "r", "problem": Q, "generations": [INLINE, INLINE.replace("5.", "six.")],
        "correctness_math_verify": [True, False], "finish_reasons": ["stop", "length"],
    }  # fmt: skip
    columns = RowColumns(response_field="generations", apply_chat_template=True)
    first, second = read(tmp_path / "rows.jsonl", teacher, [row], columns)
    assert (first.trace_id, second.trace_id) == ("r#0", "r#1")
    assert first.fields["correctness_math_verify"] is True
    assert (first.finish_reason, second.finish_reason) == (None, "length")
    assert "six." in teacher.decode(second.token_ids)


def test_a_response_column_that_the_user_names_wins_over_the_messages(teacher):
    row = {"messages": [USER, {"role": "assistant", "content": "x"}], "mine": INLINE}
    trace = render(teacher, row, response_field="mine")
    assert A in teacher.decode(trace.token_ids)


def test_reasoning_that_is_encrypted_is_no_trace(teacher):
    details = [{"type": "reasoning.encrypted", "data": "abc"}]
    turn = {"role": "assistant", "content": A, "reasoning_details": details}
    with pytest.raises(ValueError, match="encrypted"):
        render(teacher, {"messages": [USER, turn]})


def test_a_question_without_the_template_is_named(teacher):
    with pytest.raises(ValueError, match="`question` is used with --apply-chat-template"):
        render(teacher, {"question": Q, "attempt": A})


def test_every_turn_of_the_assistant_is_a_trace_with_its_own_sections(tmp_path, teacher):
    call = {"type": "function", "function": {"name": "add", "arguments": "{}"}}
    messages = [
        USER,
        {"role": "assistant", "content": "", "reasoning_content": "Add.", "tool_calls": [call]},
        {"role": "tool", "content": "5"},
        MESSAGE,
    ]
    rows, columns = [{"id": "r", "messages": messages}], RowColumns(assistant_turns="all")
    first, second = read(tmp_path / "rows.jsonl", teacher, rows, columns)
    assert (first.trace_id, second.trace_id) == ("r#0", "r#1")
    thoughts = [t.token_ids[t.bounds[0] : t.bounds[1]] for t in (first, second)]
    assert [teacher.decode(ids) for ids in thoughts] == [
        "<think>\nAdd.\n</think>",
        f"<think>\n{R}\n</think>",
    ]
    assert "<tool_call>" in teacher.decode(first.token_ids[first.bounds[1] :])
    assert second.token_ids == render(teacher, {"messages": messages}).token_ids
