"""ByteTokenizer: tokenizes bytes, even those that end inside a character."""

import json
import re
from collections.abc import Sequence
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from teacher_cache.transform.retokenize.token_bytes import (
    TokenBytes,
    character_of_byte,
    for_continuation,
    token_bytes,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_CONTINUATION = range(0x80, 0xC0)  # bytes of UTF-8 that begin no character
_STRAY_BYTE = re.compile("[\udc80-\udcff]")  # a decoded byte that belongs to no character
_RUNS = re.compile("[\udc80-\udcff]+|[^\udc80-\udcff]+")
# Between a letter or digit and a space every splitter of words has a border, and neither side's
# words depend on the other. A vocabulary may still have tokens that reach across.
_WORD_ENDS = re.compile("(?<=[A-Za-z0-9])(?= )")
_REACHES_ACROSS = re.compile(b"[A-Za-z0-9] ")
_MAX_WORDS = 1 << 18  # kept with their ids: some 60 MB
_FILLERS = (0xA0, 0x80, 0x90)  # one of these continues any started character


class ByteTokenizer:
    """A tokenizer for text that continues a prompt, with bytes as input.

    Special tokens in a text are plain text here, as an assistant may write about them.
    """

    def __init__(self, definition: str, where: str) -> None:
        """Read a `tokenizer.json`.

        Raises:
            UnsupportedTokenizerError: If its tokens are not bytes of the text.
        """
        self._definition = definition
        self._ids_of_word: dict[str, list[int]] = {}
        self.tokens: TokenBytes = token_bytes(definition, where)

    @cached_property
    def _backend(self) -> "Tokenizer":
        from tokenizers import Tokenizer  # comes with transformers, which reading does not need

        backend = Tokenizer.from_str(for_continuation(self._definition))
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = True
        return backend

    @cached_property
    def _byte_ids(self) -> list[int]:
        """SentencePiece's ids of single bytes; all of them exist, which was checked."""
        ids = {name: number for number, name in enumerate(self.tokens.names)}
        return [ids[f"<0x{byte:02X}>"] for byte in range(256)]

    @property
    def vocab_size(self) -> int:
        """Number of ids, including those that are not text."""
        return len(self.tokens.of_id)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; most of its words have been seen before."""
        words = _WORD_ENDS.split(text) if self._has_separate_words else [text]
        known = self._ids_of_word
        if not all(map(known.__contains__, words)):
            new = [word for word in dict.fromkeys(words) if word not in known]
            if len(known) + len(new) > _MAX_WORDS:
                known.clear()
                new = list(dict.fromkeys(words))
            found = self._backend.encode_batch_fast(new, add_special_tokens=False)  # no offsets
            known.update((word, one.ids) for word, one in zip(new, found, strict=True))
        return list(chain.from_iterable(map(known.__getitem__, words)))

    @cached_property
    def _has_separate_words(self) -> bool:
        return not any(token and _REACHES_ACROSS.search(token) for token in self.tokens.of_id)

    def encode_all(self, pieces: Sequence[bytes]) -> list[list[int]]:
        """Token ids of each of many short pieces, which need not be whole characters."""
        texts: list[str] = []
        partial: list[int] = []
        for number, piece in enumerate(pieces):
            try:
                texts.append(piece.decode())
            except UnicodeDecodeError:
                texts.append("")
                partial.append(number)
        found = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        ids: list[list[int]] = [encoded.ids for encoded in found]
        for number in partial:
            ids[number] = self._encode_partial(pieces[number])
        return ids

    @cached_property
    def is_only_word(self) -> NDArray[np.bool_]:
        """[V] tokens that are written only where they are whole words.

        Llama 3's tokenizer and others look words up before they merge: a token to which no merges
        lead is not written within a longer word.
        """
        from tokenizers import Tokenizer

        found = np.zeros(self.vocab_size, np.bool_)
        definition = json.loads(for_continuation(self._definition))
        if not definition["model"].get("ignore_merges"):
            return found
        definition["model"]["ignore_merges"] = False
        model = Tokenizer.from_str(json.dumps(definition)).model
        for token, text in enumerate(self.tokens.of_id):
            if text:
                merged = model.tokenize(self.tokens.names[token])
                found[token] = [part.id for part in merged] != [token]
        return found

    def _encode_partial(self, piece: bytes) -> list[int]:
        """Token ids of bytes that begin or end inside a character.

        Byte-level: the text is completed so that it can be split into words, and the addition
        is removed again. SentencePiece: an incomplete character is written in bytes.
        """
        if not self.tokens.is_byte_level:
            return self._encode_runs(piece)
        begin, end = _whole_characters(piece)
        before, after = _completing(piece[:begin], piece[end:])
        try:
            text = (before + piece + after).decode()
        except UnicodeDecodeError:  # invalid in the middle, unlike any text
            return self._encode_runs(piece)
        words = [word for word, _ in self._backend.pre_tokenizer.pre_tokenize_str(text)]
        words[0] = words[0][len(before) :]
        words[-1] = words[-1][: len(words[-1]) - len(after)]
        return self._word_ids(words)

    def _word_ids(self, words: Sequence[str]) -> list[int]:
        return [token.id for word in words if word for token in self._backend.model.tokenize(word)]

    def _encode_runs(self, piece: bytes) -> list[int]:
        ids: list[int] = []
        for run in _RUNS.findall(piece.decode(errors="surrogateescape")):
            if not _STRAY_BYTE.match(run):
                ids += self.encode(run)
                continue
            data = run.encode(errors="surrogateescape")
            if self.tokens.is_byte_level:
                ids += self._word_ids(["".join(character_of_byte()[byte] for byte in data)])
            else:
                ids += (self._byte_ids[byte] for byte in data)
        return ids


def _whole_characters(piece: bytes) -> tuple[int, int]:
    """Start of the first character in some bytes, and end of the last whole one."""
    begin = 0
    while begin < min(3, len(piece)) and piece[begin] in _CONTINUATION:
        begin += 1
    for back in range(1, min(4, len(piece) - begin) + 1):
        byte = piece[-back]
        if byte not in _CONTINUATION:
            length = 1 if byte < 0x80 else 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return begin, len(piece) - back if length > back else len(piece)
    return begin, len(piece)


def whole_length(text: bytes) -> int:
    """Number of bytes up to the end of a text's last whole character."""
    return _whole_characters(text)[1]


def _completing(head: bytes, rest: bytes) -> tuple[bytes, bytes]:
    """Bytes that complete partial characters at the ends of others."""
    before = b""
    if head:
        three = b"\xf0" if head[0] >= 0x90 else b"\xf1"
        before = {1: b"\xc3", 2: b"\xe3", 3: three}[len(head)]
    if not rest:
        return before, b""
    missing = (2 if rest[0] < 0xE0 else 3 if rest[0] < 0xF0 else 4) - len(rest)
    for filler in _FILLERS:
        after = bytes([filler]) * missing
        try:
            (rest + after).decode()
        except UnicodeDecodeError:
            continue
        return before, after
    return before, b""
