"""Rows of the user become exactly the tokens that the teacher would have produced."""

import json
from collections import Counter

import pytest
from small_teachers import CHAT, make_teacher

from teacher_cache.format import open_store
from teacher_cache.sources import (
    BadRow,
    Input,
    InputTraces,
    PromptRenderer,
    Rejects,
    RowColumns,
    SourceError,
    TraceRenderer,
    find_first,
    find_last,
    find_sections,
)
from teacher_cache.sources.marks import ThinkMarks
from teacher_cache.sources.marks_in_tokens import opening_token

VOCAB_SIZE = 60
MARKS = ThinkMarks("<think>", "</think>")
OPENING_CHAT = CHAT.replace(
    "<start> assistant {% endif %}", "<start> assistant <think> {% endif %}"
)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return make_teacher(tmp_path_factory.mktemp("teacher"), CHAT)


@pytest.fixture(scope="module")
def opening_teacher(tmp_path_factory):
    """A teacher whose template writes the opening mark into the prompt."""
    return make_teacher(tmp_path_factory.mktemp("opening"), OPENING_CHAT)


def text(teacher, ids):
    return teacher.decode(ids)


def render(teacher, row, max_tokens=100):
    return TraceRenderer(teacher, max_tokens, VOCAB_SIZE, RowColumns())(row)


def render_prompt(teacher, row, **layout):
    return PromptRenderer(teacher, 100, VOCAB_SIZE, RowColumns(**layout))(row)


def user(content):
    return {"role": "user", "content": content}


def sections(teacher, trace):
    start, end = trace.bounds
    ids = trace.token_ids
    return [text(teacher, ids[:start]), text(teacher, ids[start:end]), text(teacher, ids[end:])]


def test_a_prompt_as_text_is_taken_as_it_is(teacher):
    trace = render_prompt(teacher, {"id": 7, "prompt": "a b c", "answer": "12"})
    assert text(teacher, trace.token_ids) == "a b c"
    assert (trace.trace_id, trace.num_prompt, dict(trace.fields)) == ("7", 3, {"answer": "12"})


def test_messages_go_through_the_chat_template(teacher):
    trace = render_prompt(teacher, {"messages": [user("a b")]})
    assert text(teacher, trace.token_ids) == "<start> user a b <end> <start> assistant"


def test_a_row_without_id_is_named_by_its_tokens(teacher):
    one, same, other = (render_prompt(teacher, {"prompt": p}) for p in ("a", "a", "b"))
    assert one.trace_id == same.trace_id != other.trace_id


def test_thinking_inside_the_assistants_turn_is_kept_although_the_template_strips_it(teacher):
    turn = {"role": "assistant", "content": "<think> c d </think> 5"}
    trace = render(teacher, {"messages": [user("a b"), turn]})
    assert text(teacher, trace.token_ids) == (
        "<start> user a b <end> <start> assistant <think> c d </think> 5 <end>"
    )
    assert sections(teacher, trace) == [
        "<start> user a b <end> <start> assistant",
        "<think> c d </think>",
        "5 <end>",
    ]


def test_reasoning_given_apart_is_put_between_the_marks(teacher):
    turn = {"role": "assistant", "reasoning_content": "c d", "content": "5"}
    trace = render(teacher, {"messages": [user("a b"), turn]})
    assert sections(teacher, trace)[1:] == ["<think> c d </think>", "5 <end>"]


def test_an_opening_mark_that_the_template_wrote_is_not_written_twice(opening_teacher):
    marked = {"role": "assistant", "content": "<think> c </think> 5"}
    apart = {"role": "assistant", "reasoning_content": "c", "content": "5"}
    for turn in (marked, apart):
        trace = render(opening_teacher, {"messages": [user("a"), turn]})
        assert sections(opening_teacher, trace) == [
            "<start> user a <end> <start> assistant",
            "<think> c </think>",
            "5 <end>",
        ]


def test_prompt_and_response_are_joined_as_text(teacher):
    trace = render(teacher, {"prompt": "a b", "response": "<think> c </think> 5", "source": "x"})
    assert sections(teacher, trace) == ["a b", "<think> c </think>", "5 <end>"]
    assert dict(trace.fields) == {"source": "x"}


def test_earlier_turns_belong_to_the_prompt(teacher):
    earlier = {"role": "assistant", "content": "<think> i </think> 1"}
    last = {"role": "assistant", "content": "<think> c </think> 5"}
    trace = render(teacher, {"messages": [user("a"), earlier, user("b"), last]})
    assert sections(teacher, trace)[1:] == ["<think> c </think>", "5 <end>"]


def test_ready_token_ids_are_taken_as_they_are(teacher):
    row = {"id": "x", "token_ids": [8, 9, 2, 3, 10], "cot_start": 2, "answer_start": 4}
    trace = render(teacher, row)
    assert (trace.token_ids, trace.bounds) == ((8, 9, 2, 3, 10), (2, 4))


@pytest.mark.parametrize(
    ("ids", "opened_at", "expected"),
    [
        ([5, 5, 2, 7, 7, 3, 9], None, (2, 6)),  # opened and closed in the response
        ([5, 2, 7, 7, 3, 9], 1, (1, 5)),  # opened by the generation prompt
        ([5, 2, 2, 7, 3, 9], None, (2, 5)),  # a mark of the user's own text means nothing
        ([5, 5, 2, 7, 7], None, (2, 5)),  # cut before the closing mark
        ([5, 5, 7, 3, 9], None, (2, 4)),  # closed, never opened
        ([5, 5, 9, 9], None, (2, 2)),  # no thinking at all
        ([5, 5, 9, 2, 9, 3, 9], None, (2, 2)),  # an answer that mentions the marks
        ([5, 5, 9, 2, 9], None, (2, 2)),
        ([2, 3, 9, 9], None, (2, 2)),  # the prompt holds an empty thinking part
        ([2, 3, 2, 7, 3, 9, 3, 9], None, (2, 5)),  # the first closing mark ends it
    ],
)
def test_sections_are_found(teacher, ids, opened_at, expected):
    assert find_sections(ids, 2, opened_at, MARKS, teacher) == expected


def test_a_teacher_without_marks_has_no_chain_of_thought(teacher):
    assert find_sections([5, 5, 2, 7, 3, 9], 2, None, None, teacher) == (2, 2)


def test_marks_of_several_tokens_are_found():
    ids = [1, 2, 3, 1, 2, 4, 1, 2]
    assert (find_first(ids, (1, 2)), find_last(ids, (1, 2)), find_first(ids, (2, 4))) == (0, 6, 4)
    assert (find_first(ids, (1, 2), 1), find_last(ids, (9,)), find_first([], (1,))) == (3, -1, -1)


class MergingTokenizer:
    """Marks of several tokens, the last of which takes in what follows, as `>\\n\\n` does."""

    pieces = ("<|", "open", "shut", "|>", "|>\n", "a", "b")

    def decode(self, ids):
        return "".join(self.pieces[i] for i in ids)

    def encode(self, text):
        return {"<|open|>": [0, 1, 3], "<|shut|>": [0, 2, 3]}[text]


@pytest.mark.parametrize(
    ("ids", "num_prompt", "expected"),
    [
        ([5, 0, 1, 4, 5, 5, 0, 2, 4, 6], 1, (1, 9)),  # both marks merged with a line break
        ([0, 1, 4, 5, 5, 0, 2, 3, 6], 3, (0, 8)),  # the prompt of 3 tokens opens
        ([5, 0, 1, 3, 5, 5], 1, (1, 6)),  # cut
        ([5, 5, 6, 6], 1, (1, 1)),  # no marks
    ],
)
def test_marks_that_are_plain_text_are_found_in_the_text(ids, num_prompt, expected):
    tokenizer, marks = MergingTokenizer(), ThinkMarks("<|open|>", "<|shut|>")
    opened_at = opening_token(ids[:3], marks.open, tokenizer) if num_prompt == 3 else None
    assert find_sections(ids, num_prompt, opened_at, marks, tokenizer) == expected


def source(path, teacher, lines, max_tokens=10, **options):
    path.write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    )
    return InputTraces(
        Input(path), PromptRenderer(teacher, max_tokens, VOCAB_SIZE, RowColumns()), **options
    )


BAD = {
    "not-json": ("{'prompt'", "not JSON"),
    "not-an-object": ("5", "expected a JSON object, got int"),
    "unknown-columns": ({"text": "a"}, "expected `messages` or `conversations` or `prompt`, found"),
    "empty-prompt": ({"prompt": "  "}, "the prompt is empty"),
    "bad-prompt": ({"prompt": 5}, "`prompt` must be text or a list of messages, got int"),
    "bad-messages": ({"messages": []}, "at least one message"),
    "bad-messages ": ({"messages": [{"content": "a"}]}, "a `role` or a `from`"),
    "unknown-role": ({"messages": [{"from": "cat", "value": "a"}]}, "no role for `from` 'cat'"),
    "prompt-too-long": (
        {"prompt": "a " * 10},
        "prompt of 10 tokens; 10 fit together with the answer",
    ),
    "duplicate-id": ({"id": "1", "prompt": "b"}, "id '1' already occurs in "),
    "not-utf-8": ('{"prompt": "a \\ud83d"}', "not a character"),
    "bad-id": ({"id": [], "prompt": "b"}, "`id` must be text or an integer"),
}


@pytest.mark.parametrize("reason", BAD)
def test_the_first_bad_row_stops_a_strict_reading_and_is_named(tmp_path, teacher, reason):
    line, message = BAD[reason]
    rows = source(
        tmp_path / "p.jsonl", teacher, [{"id": "1", "prompt": "a"}, "", line], strict=True
    )
    with pytest.raises(SourceError, match=r"p\.jsonl:3: .*--strict") as caught:
        list(rows.read(Rejects()))
    assert message in str(caught.value)
    assert f"[{reason.strip()}]" in str(caught.value)


def test_bad_rows_are_left_out_counted_by_reason_and_listed(tmp_path, teacher):
    lines = [{"id": "1", "prompt": "a"}, *(line for line, _ in BAD.values()), {"prompt": "c"}]
    rows = source(tmp_path / "p.jsonl", teacher, lines)
    for _ in range(2):  # a second reading counts anew
        rejects = Rejects()
        assert [text(teacher, row.token_ids) for row in rows.read(rejects)] == ["a", "c"]
        assert rejects.counts == Counter(reason.strip() for reason in BAD)
    rejects.publish(open_store(tmp_path / "cache"), "rejects.jsonl")
    listed = [
        json.loads(line) for line in (tmp_path / "cache" / "rejects.jsonl").read_text().splitlines()
    ]
    assert [(item["row"], item["reason"]) for item in listed] == [
        (number, reason.strip()) for number, reason in enumerate(BAD, start=2)
    ]
    assert all(item["file"].endswith("p.jsonl") for item in listed)
    assert [item["id"] for item in listed if item["reason"] == "duplicate-id"] == ["1"]
    for item, (_, message) in zip(listed, BAD.values(), strict=True):
        assert message in item["message"]


def test_a_reading_without_bad_rows_removes_the_list_of_an_earlier_one(tmp_path):
    path = tmp_path / "rejects.jsonl"
    path.write_text("{}")
    Rejects().publish(open_store(tmp_path), "rejects.jsonl")
    assert not path.exists()


def response(text):
    return {"prompt": "a", "response": text}


BAD_TRACES = {
    "unknown-columns": ({"prompt": "a", "thoughts": "b"}, "found prompt, thoughts"),
    "no-assistant-turn": ({"messages": [user("a")]}, "must be the assistant's, got role 'user'"),
    "empty-prompt": ({"messages": [{"role": "assistant", "content": "a"}]}, "no message comes"),
    "empty-response": (response(""), "the response is empty"),
    "bad-response": (response(5), "must be text"),
    "empty-chain-of-thought": (
        response("<think> </think> 5"),
        "nothing is between the thinking marks",
    ),
    "unclosed-chain-of-thought": (
        {**response("<think> b c"), "finish_reason": "stop"},
        "says that the response is complete, but it lacks </think>",
    ),
    "marks-out-of-order": (response("a </think> b <think> c"), "</think> comes before <think>"),
    "marks-out-of-order ": (
        response("a <|begin_of_thought|> b <|end_of_thought|> c"),
        "text comes before the opening mark",
    ),
    "marks-out-of-order  ": (
        {**response("5"), "reasoning_content": "a </think> b"},
        "itself has thinking marks",
    ),
    "bad-bounds": ({"token_ids": [1]}, "needs `cot_start` and `answer_start`"),
    "bad-bounds ": (
        {"token_ids": [8, 9], "cot_start": 2, "answer_start": 1},
        "got cot_start=2, answer_start=1",
    ),
    "bad-token-ids": ({"token_ids": []}, "at least one integer"),
    "token-outside-vocabulary": (
        {"token_ids": [8, 999], "cot_start": 1, "answer_start": 2},
        "id 999 is outside",
    ),
    "trace-too-long": (response("b " * 10), "trace of 12 tokens"),
    "field-not-json": ({**response("b"), "picture": b"x"}, "bytes is not JSON serializable"),
}


@pytest.mark.parametrize("reason", BAD_TRACES)
def test_a_bad_trace_is_refused_with_the_reason(teacher, reason):
    row, message = BAD_TRACES[reason]
    with pytest.raises(BadRow) as caught:
        render(teacher, row, max_tokens=10)
    assert message in str(caught.value)
    assert caught.value.reason == reason.strip()


def test_a_file_that_is_not_there_is_named(tmp_path, teacher):
    rows = InputTraces(Input(tmp_path / "nowhere.jsonl"), None)
    with pytest.raises(SourceError, match=r"nowhere\.jsonl: cannot be read: No such file"):
        list(rows.read(Rejects()))


def test_a_teacher_without_chat_template_refuses_messages(tmp_path):
    plain = make_teacher(tmp_path, None)
    with pytest.raises(BadRow, match="no chat template"):
        render_prompt(plain, {"messages": [user("a")]})
