"""The text of each of the teacher's tokens in a text that the student writes."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from teacher_cache.format import CacheHeader
from teacher_cache.sources.marks import ThinkMarks
from teacher_cache.sources.tokenizer import TeacherTokenizer
from teacher_cache.transform.retokenize.byte_tokenizer import ByteTokenizer
from teacher_cache.transform.retokenize.token_bytes import stand_in


@dataclass(frozen=True)
class Vocabularies:
    """Both vocabularies in one language: bytes, and stand-ins for the student's special tokens.

    Attributes:
        texts: Text of each of the teacher's ids; None if the student has no equivalent.
        student: Text of each of the student's ids; empty if an id has no meaning.
        marks: Marks around a chain of thought in the student's form; None if neither has any.
        open_text: Opening mark in these bytes.
        end_text: End of the student's turn, likewise.
        mark_problem: Reason why a chain of thought cannot be carried over; None if it can.
    """

    texts: list[bytes | None]
    student: list[bytes]
    marks: ThinkMarks | None
    open_text: bytes
    end_text: bytes
    mark_problem: str | None


def share_vocabularies(
    teacher: ByteTokenizer, header: CacheHeader, student: ByteTokenizer, chat: TeacherTokenizer
) -> Vocabularies:
    """Map the teacher's special tokens to what the student writes in their place.

    Tokens that end the teacher's turn end the student's; thinking marks are the student's own; a
    special token of the same name is the same.

    Args:
        teacher: The tokenizer of the cache's teacher.
        header: Header of the cache.
        student: The student's tokenizer.
        chat: The student's tokenizer with its chat template.
    """
    student_bytes = [text or b"" for text in student.tokens.of_id]
    for token in student.tokens.special_ids.values():
        student_bytes[token] = stand_in(token)
    texts = list(teacher.tokens.of_id)
    texts += [None] * (header.vocab_size - len(texts))  # the teacher's softmax may be wider
    names = {name: number for number, name in enumerate(student.tokens.names) if name}
    for name, token in teacher.tokens.special_ids.items():
        if name in names and student_bytes[names[name]]:
            texts[token] = student_bytes[names[name]]

    layout = chat.layout()
    end_text = _written(student, layout.end)
    for token in header.terminal_token_ids:
        texts[token] = end_text or None
    marks = layout.marks or _own_marks(teacher, header)
    open_text, problem = b"", None
    if marks is not None:
        open_text, close_text = _written(student, marks.open), _written(student, marks.close)
        problem = _translate_mark(texts, header.think_open_ids, open_text)
        problem = _translate_mark(texts, header.think_close_ids, close_text) or problem
    return Vocabularies(texts, student_bytes, marks, open_text, end_text, problem)


def _written(student: ByteTokenizer, text: str) -> bytes:
    """Bytes of a template's text, with stand-ins for the student's special tokens in it.

    Its tokenizer is not asked: many write a space before a text that stands alone.
    """
    names = sorted(student.tokens.special_ids, key=len, reverse=True)
    parts = re.split(f"({'|'.join(map(re.escape, names))})", text) if names else [text]
    ids = student.tokens.special_ids
    return b"".join(stand_in(ids[part]) if part in ids else part.encode() for part in parts)


def _own_marks(teacher: ByteTokenizer, header: CacheHeader) -> ThinkMarks | None:
    """The teacher's marks, for a student without known marks: they are text to it."""
    ids = (header.think_open_ids, header.think_close_ids)
    opened, closed = (b"".join(_name(teacher, i) for i in mark).decode() for mark in ids)
    return ThinkMarks(opened, closed) if closed else None


def _name(teacher: ByteTokenizer, token: int) -> bytes:
    return teacher.tokens.of_id[token] or teacher.tokens.names[token].encode()


def _translate_mark(texts: list[bytes | None], ids: Sequence[int], mark: bytes) -> str | None:
    """Map the teacher's mark to the student's; return the reason if that is impossible."""
    if len(ids) == 1:
        texts[ids[0]] = mark
        return None
    written = b"".join(texts[token] or b"" for token in ids)
    if written == mark:
        return None
    return (
        f"the teacher writes a thinking mark in {len(ids)} tokens, {written!r}, but the student's "
        f"is {mark!r}: only a mark of one token can be exchanged. Give the student the same one "
        "with --think-open and --think-close"
    )
