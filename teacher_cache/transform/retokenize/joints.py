"""Tokenization by the student at the joint of a text and the teacher's possible next tokens.

Left strings are ids: the student's tokens, then NOTHING (a joint where nothing can reach across:
the start of the response, a special token), then beginnings of tokens, added on demand.
Right strings are ids too: the teacher's tokens, then their ends, added on demand.

Letters: N queries in one call.
"""

import itertools
import unicodedata
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from teacher_cache.transform.retokenize.byte_tokenizer import ByteTokenizer
from teacher_cache.transform.retokenize.crossings import Crossings
from teacher_cache.transform.retokenize.memo import Memo
from teacher_cache.transform.retokenize.token_bytes import NOT_TEXT, special_of

NONE = -1  # no token


class Joints:
    """Cached answers about pairs of strings; most need no tokenizer at all."""

    def __init__(
        self, student: ByteTokenizer, teacher: ByteTokenizer, texts: Sequence[bytes | None]
    ) -> None:
        """Read both vocabularies; takes a second or two for 150,000 ids.

        Args:
            student: The student's tokenizer.
            teacher: The teacher's tokenizer.
            texts: Text of each of the teacher's tokens in the shared text; None for those
                that the student cannot write.
        """
        self._student, self._teacher = student, teacher
        self._crossings = Crossings(student.tokens.of_id)
        self._memo = Memo(num_values=2)
        self._teacher_memo = Memo(num_values=1)
        self.nothing = student.vocab_size
        self._left = _Left(student, self._crossings)
        self._right = _Right(student, teacher, texts)

    def left_of(self, beginnings: Sequence[bytes]) -> NDArray[np.int64]:
        """[N] left-string ids of beginnings of the student's tokens."""
        return self._left.ids_of(beginnings)

    def right_of(self, ends: Sequence[bytes]) -> NDArray[np.int64]:
        """[N] right-string ids of ends of the teacher's tokens."""
        return self._right.ids_of(ends)

    def after(
        self,
        left: NDArray[np.int64],
        right: NDArray[np.int64],
        teacher_left: NDArray[np.int64],
        teacher_right: NDArray[np.int64],
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Find what follows a student's token if the text continues in this way.

        A pair that the teacher's own tokenizer would have written differently is left as the
        teacher wrote it: the teacher chose a boundary here.

        Args:
            left: [N] the student's token before the joint, or `nothing`.
            right: [N] the teacher's possible continuation.
            teacher_left: [N] the teacher's token before the joint; NONE if there is none, or
                the joint is inside one of its tokens.
            teacher_right: [N] the teacher's token on the right; used where teacher_left is.

        Returns:
            [N] the token that would replace `left` if the joint were not one
            (NONE if it is), and [N] the first token on the right (NONE: unknown).
        """
        merged = np.full(len(left), NONE, np.int32)
        following = self._right.first[right]
        rows = np.flatnonzero(self._may_cross(left, right))
        rows = rows[self._left.stands[left[rows]]]
        if not len(rows):
            return merged, following
        tokens = self._tokens(left[rows], right[rows])
        is_other = (tokens[:, 0] != left[rows]) | (tokens[:, 1] != following[rows])
        rows, tokens = rows[is_other], tokens[is_other]
        is_own = self._is_canonical(teacher_left[rows], teacher_right[rows])
        rows, tokens = rows[is_own], tokens[is_own]
        is_merged = tokens[:, 0] != left[rows]
        merged[rows[is_merged]] = tokens[is_merged, 0]
        following[rows[~is_merged]] = tokens[~is_merged, 1]
        return merged, following

    def first(self, left: NDArray[np.int64], right: NDArray[np.int64]) -> NDArray[np.int32]:
        """[N] the first token of a beginning (never `nothing`) and what follows it."""
        found = self._left.head[left]
        rows = np.flatnonzero(self._may_cross(left, right))
        if len(rows):
            found[rows] = self._tokens(left[rows], right[rows])[:, 0]
        return found

    def _may_cross(self, left: NDArray[np.int64], right: NDArray[np.int64]) -> NDArray[np.bool_]:
        byte = self._right.first_byte[right]
        word = self._left.masks.reshape(-1)[left * 4 + (byte >> 6)]
        may: NDArray[np.bool_] = (word >> (byte & 63).astype(np.uint64)) & np.uint64(1) != 0
        may |= self._right.is_asked[right] & self._left.has_text[left]
        return may

    def _tokens(self, left: NDArray[np.int64], right: NDArray[np.int64]) -> NDArray[np.int32]:
        """[N, 2] the first two tokens of the joined strings; NONE if missing."""
        keys = (left << 32) | right
        tokens, known = self._memo.find(keys)
        if known.all():
            return tokens
        missing, place = np.unique(keys[~known], return_inverse=True)
        pairs = zip((missing >> 32).tolist(), (missing & 0xFFFFFFFF).tolist(), strict=True)
        texts = [self._left.strings[x] + self._right.strings[y] for x, y in pairs]
        written = self._student.encode_all(texts)
        found = np.array([(*ids[:2], NONE, NONE)[:2] for ids in written], np.int32)
        tokens[~known] = found[place]
        self._memo.insert(missing, found)
        return tokens

    def _is_canonical(self, left: NDArray[np.int64], right: NDArray[np.int64]) -> NDArray[np.bool_]:
        """[N] whether the teacher's own tokenizer writes two of its tokens as these two."""
        canonical = np.ones(len(left), bool)
        asked = np.flatnonzero(left != NONE)
        keys = (left[asked] << 32) | right[asked]
        values, known = self._teacher_memo.find(keys)
        if not known.all():
            missing, place = np.unique(keys[~known], return_inverse=True)
            pairs = list(
                zip((missing >> 32).tolist(), (missing & 0xFFFFFFFF).tolist(), strict=True)
            )
            of_id = self._teacher.tokens.of_id
            texts = [(of_id[x] or b"") + (of_id[y] or b"") for x, y in pairs]
            written = self._teacher.encode_all(texts)
            same = [ids == [*pair] for ids, pair in zip(written, pairs, strict=True)]
            found = np.array(same, np.int32)[:, None]
            values[~known] = found[place]
            self._teacher_memo.insert(missing, found)
        canonical[asked] = values[:, 0] == 1
        return canonical


class _Left:
    """Left strings: [X, 4] masks, [X] whether each is text, is a single token; its first token."""

    def __init__(self, student: ByteTokenizer, crossings: Crossings) -> None:
        self._student, self._crossings = student, crossings
        self.strings: list[bytes] = [token or b"" for token in student.tokens.of_id]
        self.strings.append(b"")  # nothing
        self._ids: dict[bytes, int] = {}
        self.has_text = np.array([string != b"" for string in self.strings])
        written = student.encode_all(self.strings)
        self.masks = self._masks(self.strings, written)
        self.head = np.array([ids[0] if ids else NONE for ids in written], np.int32)
        self.stands = np.array([ids == [n] for n, ids in enumerate(written)])

    def ids_of(self, beginnings: Sequence[bytes]) -> NDArray[np.int64]:
        new = [text for text in dict.fromkeys(beginnings) if text not in self._ids]
        if new:
            for text in new:
                self._ids[text] = len(self.strings)
                self.strings.append(text)
            self.has_text = np.concatenate([self.has_text, [text != b"" for text in new]])
            written = self._student.encode_all(new)
            self.masks = np.concatenate([self.masks, self._masks(new, written)])
            heads = [ids[0] if ids else NONE for ids in written]
            self.head = np.concatenate([self.head, np.array(heads, np.int32)])
            self.stands = np.concatenate([self.stands, np.zeros(len(new), bool)])
        return np.array([self._ids[text] for text in beginnings], np.int64)

    def _masks(
        self, strings: Sequence[bytes], written: Sequence[Sequence[int]]
    ) -> NDArray[np.uint64]:
        masks = self._crossings.masks(strings)
        last = np.frombuffer(b"".join(string[-1:] or b"\xff" for string in strings), np.uint8)
        if self._student.tokens.is_byte_level:
            masks |= _WORDS_DEPEND[last]
            masks[[not _is_whole(string) or _ends_in_sign(string) for string in strings]] = _ALL
            masks[_have_only_words(self._student, written)] = _ALL
        if self._student.tokens.is_composing:
            masks |= _BEYOND_ASCII
        masks[[not string for string in strings]] = 0
        return masks


def _words_depend() -> NDArray[np.uint64]:
    """[256, 4] for each last byte, the first bytes of a text whose word splits may depend on it.

    Word splitting looks across a joint: a space before a letter leaves its run, a symbol joins
    the symbols after it, an apostrophe the text before it. After a letter or digit of ASCII
    only apostrophes and line breaks matter (in the expressions of GPT-2 and all that
    derive from them), and after a digit digits, which GPT-4 and others group by three; after a
    letter beyond ASCII, symbols do too.
    """
    signs = [byte for byte in range(128) if not chr(byte).isalnum() and byte != 0x20]
    depend = np.zeros((256, 256), bool)
    depend[:, list(b"\r\n'")] = True
    depend[0x30:0x3A, 0x30:0x3A] = True
    depend[0x30:0x3A, 0xC0:NOT_TEXT] = True  # digits beyond ASCII
    depend[:, 0x80:0xC0] = True  # continues inside a character
    depend[128:, signs] = True
    depend[[*signs, 0x20], :NOT_TEXT] = True
    return _as_bits(depend)


def _as_bits(sets: NDArray[np.bool_]) -> NDArray[np.uint64]:
    """[.., 4] sets of bytes as bits, of [.., 256] sets as booleans."""
    return np.packbits(sets, axis=-1, bitorder="little").view("<u8").astype(np.uint64)


_WORDS_DEPEND = _words_depend()
_ALL = _as_bits(np.arange(256) < NOT_TEXT)
_BEYOND_ASCII = _as_bits((np.arange(256) >= 128) & (np.arange(256) < NOT_TEXT))


def _is_whole(text: bytes) -> bool:
    """Whether some bytes are whole characters."""
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def _ends_in_sign(text: bytes) -> bool:
    """Whether whole characters end in one beyond ASCII that is no letter.

    Signs, spaces, accents and digits beyond ASCII join what follows in the same ways as those of
    ASCII do, but no byte tells them from letters.
    """
    return text[-1:] >= b"\x80" and not unicodedata.category(text.decode()[-1]).startswith("L")


class _Right:
    """Right strings: [Y] first byte, whether every joint is asked about, first token of each."""

    def __init__(
        self, student: ByteTokenizer, teacher: ByteTokenizer, texts: Sequence[bytes | None]
    ) -> None:
        self._student = student
        self.strings: list[bytes] = [text or b"" for text in texts]
        self._ids: dict[bytes, int] = {}
        self.first_byte = _first_bytes(self.strings)
        self.first, self.is_asked = self._read(self.strings)
        self._keep_own(student, teacher)

    def _keep_own(self, student: ByteTokenizer, teacher: ByteTokenizer) -> None:
        """Map a token that the teacher's tokenizer never writes to the student's of that name."""
        id_of = {name: number for number, name in enumerate(student.tokens.names) if name}
        same = {}  # the teacher's id -> the student's, where their names and bytes agree
        for number, name in enumerate(teacher.tokens.names):
            token, text = id_of.get(name, NONE), self.strings[number]
            is_namesake = token != NONE and text and student.tokens.of_id[token] == text
            if is_namesake and self.first[number] != token:
                same[number] = token
        written = teacher.encode_all([self.strings[number] for number in same])
        for (number, token), ids in zip(same.items(), written, strict=True):
            if ids != [number]:
                self.first[number] = token

    def ids_of(self, ends: Sequence[bytes]) -> NDArray[np.int64]:
        new = [text for text in dict.fromkeys(ends) if text not in self._ids]
        if new:
            for text in new:
                self._ids[text] = len(self.strings)
                self.strings.append(text)
            self.first_byte = np.concatenate([self.first_byte, _first_bytes(new)])
            first, is_asked = self._read(new)
            self.first = np.concatenate([self.first, first])
            self.is_asked = np.concatenate([self.is_asked, is_asked])
        return np.array([self._ids[text] for text in ends], np.int64)

    def _read(self, strings: Sequence[bytes]) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """[Y] first token of each, and whether bytes do not tell across which joints it reaches.

        Special tokens are told by their stand-ins. A string may have a word that is written
        otherwise within a longer one, or letters that the student composes.
        """
        special = [special_of(string) for string in strings]
        texts = [
            b"" if token is not None else string
            for token, string in zip(special, strings, strict=True)
        ]
        written = self._student.encode_all(texts)
        first = [
            token if token is not None else ids[0] if ids else NONE
            for token, ids in zip(special, written, strict=True)
        ]
        is_asked = _have_only_words(self._student, written)
        if self._student.tokens.is_composing:
            whole = (string.decode(errors="ignore") for string in strings)
            is_asked |= [not unicodedata.is_normalized("NFC", text) for text in whole]
        return np.array(first, np.int32), is_asked


def _have_only_words(student: ByteTokenizer, written: Sequence[Sequence[int]]) -> NDArray[np.bool_]:
    """[X] whether the student wrote a text with a token that is no part of a longer word."""
    lengths = np.array([len(ids) for ids in written], np.intp)
    flat = np.fromiter(itertools.chain.from_iterable(written), np.intp, lengths.sum())
    owner = np.repeat(np.arange(len(written)), lengths)
    found = np.zeros(len(written), np.bool_)
    found[owner[student.is_only_word[flat]]] = True
    return found


def _first_bytes(strings: Sequence[bytes]) -> NDArray[np.uint8]:
    """[Y] first byte; NOT_TEXT, across which nothing reaches, for specials and no text.

    The token of the byte NOT_TEXT itself counts as the byte before, which no text has either.
    """
    first = np.frombuffer(b"".join(string[:1] or b"\xff" for string in strings), np.uint8).copy()
    for number in np.flatnonzero(first == NOT_TEXT).tolist():
        if strings[number] and special_of(strings[number]) is None:
            first[number] = NOT_TEXT - 1
    return first
