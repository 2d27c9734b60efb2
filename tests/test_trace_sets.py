"""Rows of public sets of reasoning traces, as they are: one row of each shape, one trace."""

import json
import re
from pathlib import Path

import pytest
from families import make_teacher, trl_templates

from teacher_cache.sources import Input, InputTraces, Rejects, RowColumns, TraceRenderer

Q, R, A, SYSTEM = "What is 2+3?", "2 plus 3 makes 5.", "It is 5.", "Be brief."
INLINE = f"<think>\n{R}\n</think>\n\n{A}"
USER = {"role": "user", "content": Q}
MESSAGE = {"role": "assistant", "content": A, "reasoning_content": R}
GUIDE = Path(__file__).parent.parent / "teacher_cache" / "sources" / "DATA_SETS.md"


def sets_of_the_guide():
    """Name -> (row, how the user lays it out), from the guide's table."""
    found = {}
    for line in GUIDE.read_text().splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)]
        if len(cells) == 5 and cells[3].startswith("`{"):
            row = json.loads(cells[3].strip("`").replace("\\|", "|"))
            options = cells[2].strip("`").split()
            assert set(options) <= {"--apply-chat-template"}
            found[cells[1]] = (row, {"apply_chat_template": True} if options else {})
    return found


SETS = sets_of_the_guide()
WITH_SYSTEM = ("Llama-Nemotron", "SmolTalk2")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return make_teacher(tmp_path_factory.mktemp("qwen3"), trl_templates()["qwen3"], "<|im_end|>")


def render(teacher, row, **columns):
    return TraceRenderer(teacher, 10**6, 10**6, RowColumns(**columns))(row)


def test_the_guide_has_a_row_of_every_set():
    assert len(SETS) == 15
    assert SETS.keys() > set(WITH_SYSTEM)


@pytest.mark.parametrize("name", SETS)
def test_a_row_of_a_public_set_becomes_the_trace_that_it_means(teacher, name):
    row, columns = SETS[name]
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
