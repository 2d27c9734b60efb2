"""A trace's response in the student's tokens: the same bytes, split anew."""

import re
from dataclasses import dataclass

import numpy as np

from teacher_cache.format import CacheHeader, Trace
from teacher_cache.sources.rejects import BadRow, Reason
from teacher_cache.sources.trace import SourceTrace
from teacher_cache.transform.retokenize.alignment import Response
from teacher_cache.transform.retokenize.byte_tokenizer import ByteTokenizer, whole_length
from teacher_cache.transform.retokenize.token_bytes import special_of
from teacher_cache.transform.retokenize.vocabularies import Vocabularies

_STAND_IN = re.compile(rb"(\xff.{4})", re.DOTALL)
_SHOWN = 40  # bytes shown of an example


@dataclass(frozen=True)
class ResponseWriter:
    """Writes one teacher's responses in the tokens of one student."""

    header: CacheHeader  # of the teacher's cache
    student: ByteTokenizer
    words: Vocabularies

    def __call__(self, trace: Trace, prompt: SourceTrace) -> Response:
        """Split a response into the student's tokens.

        Args:
            trace: The teacher's trace, or as much of it as its cache holds.
            prompt: The student's prompt.

        Raises:
            BadRow: If that is impossible without changing the text.
        """
        num_held = len(trace.token_ids)
        if trace.cot_start >= num_held:
            raise BadRow(
                Reason.NOTHING_HELD,
                f"the cache holds {num_held} tokens, and the response begins at {trace.cot_start}",
            )
        if self.words.mark_problem and trace.cot_start < trace.answer_start:
            raise BadRow(Reason.MARKS_UNKNOWN, self.words.mark_problem)
        pieces = [self._text_of(int(token)) for token in trace.token_ids[trace.cot_start :]]
        text = b"".join(pieces)
        skipped = self._opened_in_prompt(text, prompt)
        text = text[skipped:]
        is_cut = num_held < trace.n_total
        if is_cut or trace.finish_reason == "length":
            text = text[: whole_length(text)]
        ids = self._encoded(text)
        if is_cut and len(ids) > 1:
            ids.pop()  # the following text may belong to it
        if not ids:
            raise BadRow(Reason.NOTHING_HELD, "no whole character of the response is held")
        lengths = np.array([len(self.words.student[token]) for token in ids], np.int64)
        return Response(
            trace, trace.cot_start, len(pieces), np.array(ids, np.int32), lengths, skipped
        )

    def _text_of(self, token: int) -> bytes:
        text = self.words.texts[token] if token < len(self.words.texts) else None
        if not text:
            raise BadRow(
                Reason.TOKEN_WITHOUT_COUNTERPART,
                f"the student has no equivalent of the teacher's token {token}",
            )
        return text

    def _opened_in_prompt(self, text: bytes, prompt: SourceTrace) -> int:
        """Bytes of the response that the student's prompt already contains."""
        if prompt.opened_at is None:
            return 0
        opener = b"".join(self.words.student[i] for i in prompt.token_ids[prompt.opened_at :])
        for written in (opener, self.words.open_text):
            if written and text.startswith(written):
                return len(written)
        raise BadRow(
            Reason.EMPTY_CHAIN_OF_THOUGHT,
            "the student's template opens a chain of thought, but the response has none",
        )

    def _encoded(self, text: bytes) -> list[int]:
        ids: list[int] = []
        for part in _STAND_IN.split(text):
            special = special_of(part)
            if special is not None:
                ids.append(special)
            elif part:
                ids += self.student.encode(self._decoded(part))
        names = self.words.student
        if any(token >= len(names) for token in ids):
            raise BadRow(Reason.NOT_UTF8, "the teacher's text has bytes that are not UTF-8")
        written = b"".join(names[token] for token in ids)
        if written != text:
            place = next(
                (n for n, (a, b) in enumerate(zip(written, text, strict=False)) if a != b),
                min(len(written), len(text)),
            )
            around = slice(max(0, place - _SHOWN // 2), place + _SHOWN // 2)
            raise BadRow(
                Reason.TEXT_CHANGES,
                f"the student's tokenizer turns {text[around]!r} into {written[around]!r}",
            )
        return ids

    @staticmethod
    def _decoded(part: bytes) -> str:
        try:
            return part.decode()
        except UnicodeDecodeError as error:
            around = part[max(0, error.start - _SHOWN // 2) : error.start + _SHOWN // 2]
            raise BadRow(Reason.NOT_UTF8, f"the teacher's text is not UTF-8: {around!r}") from error
